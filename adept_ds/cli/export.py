"""Write an adapter as a folder that other programs load, with no code of this project.

    adept-ds export --adapter runs/my/best --to folded --out exports/my
    adept-ds export --serving-base --rows 100 --base meta-llama/Meta-Llama-3-8B --out exports/llama3-base
    adept-ds export --adapter runs/my/best --to lora --serving-base exports/llama3-base --out exports/my-lora
    adept-ds export --adapter runs/my/best --to gguf --out exports/my-gguf

`folded` is a whole model in the hub's format. `lora` is a small PEFT folder beside a serving base, which is made once
and shared by any number of adapters. `peft` is PEFT's own format of the methods that are PEFT's. `gguf`, `onnx`
and `openvino` are the folded model for llama.cpp, ONNX Runtime GenAI and OpenVINO GenAI. What was written is loaded
again, by the engine that it is for, and compared with the live model; if it computes something else, nothing stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.backbone.hub import hub_adapter
from adept_ds.config.command_line import parse_count, parse_flags
from adept_ds.errors import UserError, did_you_mean_path

PROGRAM = "adept-ds export"
ENGINE_FORMS = ("gguf", "onnx", "openvino")
FORMS = ("folded", "lora", "peft", *ENGINE_FORMS)
MAKE = ""
"""Value of --serving-base without a folder: one is to be made."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter to export (hub id too)")
    parser.add_argument("--to", choices=FORMS, help="form of what is written")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder to write")
    parser.add_argument(
        "--serving_base",
        nargs="?",
        const=MAKE,
        metavar="FOLDER",
        help="the base that a lora goes onto; without FOLDER: make one, of --base, with --rows tokens for prompts",
    )
    parser.add_argument("--rows", type=parse_count, metavar="L", help="tokens of a serving base for the longest prompt")
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of the backbone (default: the one on record)")
    parser.add_argument("--revision", metavar="NAME", help="commit, tag or branch of --base")
    parser.add_argument("--tokenizer", metavar="MODEL", help="where its tokenizer is (default: the one on record)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="precision (default: the checkpoint's)")
    parser.add_argument("--task", metavar="NAME", help="whose prompt, where an adapter has one for each task")
    parser.add_argument(
        "--prompt_in",
        choices=("both", "text", "chat", "none"),
        default="both",
        help="where the prompt's tokens come from in a folded model: the tokenizer, for plain text, the chat template, "
        "both, or neither (default: both)",
    )
    parser.add_argument("--no_verify", action="store_true", help="do not load and compare what was written")
    parser.add_argument("--python", metavar="PATH", help="interpreter that has an engine (default: this one)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where models are compared (default: cpu)")


def main(arguments: Sequence[str]) -> None:
    """Parse, write, compare, tell."""
    flags = parse_flags(arguments, PROGRAM, __doc__ or "", add_flags)
    if flags.out is None:
        raise UserError("--out FOLDER is needed, a new folder for what is written")
    if flags.serving_base == MAKE:
        _make_serving_base(flags)
        return
    if flags.adapter is None:
        raise UserError("--adapter FOLDER is needed, for example runs/my/best")
    if hub_adapter(flags.adapter) is None and not flags.adapter.is_dir():
        raise UserError(f"--adapter {flags.adapter}: no such folder{did_you_mean_path(str(flags.adapter))}")
    if flags.to is None:
        raise UserError(f"--to is needed: {', '.join(FORMS)}")
    if flags.to == "lora" and flags.serving_base is None:
        raise UserError(
            "--to lora needs --serving-base FOLDER, which is made once by "
            "`adept-ds export --serving-base --rows L --base MODEL --out FOLDER`"
        )
    if flags.to != "lora" and flags.serving_base is not None:
        raise UserError(f"--serving-base is for --to lora, and not for --to {flags.to}")
    if flags.python is not None and flags.to not in ENGINE_FORMS:
        raise UserError(f"--python is for --to {' or '.join(ENGINE_FORMS)}, and not for --to {flags.to}")
    # The libraries behind these take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation.side_by_side import origin_of
    from adept_ds.export.engine_forms import ENGINES, export_engine
    from adept_ds.export.export import Request, backbone_of, export_folded, export_lora, export_peft
    from adept_ds.export.manifest import read_manifest
    from adept_ds.reports.model_card import describe
    from adept_ds.storage.adapter_folder import load_adapter

    adapter = load_adapter(flags.adapter)
    tokenizer = flags.tokenizer or origin_of(flags.adapter, flags.base).model.tokenizer
    engine = ENGINES.get(flags.to)
    dtype = flags.dtype or (engine.only_dtype if engine else None)
    request = Request(
        adapter=adapter,
        model=backbone_of(adapter, flags.base, flags.revision, dtype, tokenizer),
        out=flags.out,
        task=flags.task,
        prompt_in=flags.prompt_in,
        verify=not flags.no_verify,
        device=flags.device,
    )
    if engine is not None:
        agreement = export_engine(request, flags.to, flags.python)
    elif flags.to == "lora":
        agreement = export_lora(request, Path(flags.serving_base))
    else:
        agreement = export_folded(request) if flags.to == "folded" else export_peft(request)
    describe(flags.out)
    reader = f"{engine.name}: " if engine and agreement else ""
    print(f"{flags.out}: {reader}{agreement or 'not compared with the live model'}")
    prefix = read_manifest(flags.out).text_prefix
    if prefix:
        print(f"Chats get the soft prompt from the chat template; put this in front of plain text yourself: {prefix}")


def _make_serving_base(flags: argparse.Namespace) -> None:
    if flags.base is None or flags.rows is None:
        raise UserError("--serving-base without a folder makes one: --base MODEL and --rows L are needed")
    if flags.adapter is not None or flags.to is not None:
        raise UserError("--serving-base without a folder makes one, of no adapter; expected --serving-base FOLDER")
    from adept_ds.backbone.table import stored_dtype
    from adept_ds.config.run import ModelConfig
    from adept_ds.export.export import export_serving_base
    from adept_ds.reports.model_card import describe

    model = ModelConfig(name_or_path=flags.base, revision=flags.revision, tokenizer=flags.tokenizer)
    model = model.model_copy(update={"dtype": flags.dtype or stored_dtype(model)})
    export_serving_base(model, flags.rows, flags.out)
    describe(flags.out)
    print(f"{flags.out}: a serving base for prompts of up to {flags.rows} tokens")
