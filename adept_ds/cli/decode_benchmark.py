"""Tokens per second of greedy decoding with an adapter: live, folded, beside the bare backbone and PEFT's prompts.

    adept-ds decode-benchmark --adapter runs/my/best
    adept-ds decode-benchmark --adapter runs/my/best --vllm
    adept-ds decode-benchmark --adapter runs/my/best --batch 16 --new-tokens 128 --rounds 7 --json decoding.json

All decode as many tokens behind random prompts, in turns, in one process; --vllm measures one adapter for all rows
beside another one for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_count, parse_flags
from adept_ds.errors import UserError
from adept_ds.files import write_json

PROGRAM = "adept-ds decode-benchmark"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter that can be folded")
    parser.add_argument("--base", metavar="MODEL", help="its backbone (default: the one on record)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="precision (default: the checkpoint's)")
    parser.add_argument("--batch", type=parse_count, default=16, metavar="N", help="rows at once (default: 16)")
    parser.add_argument("--prompt_tokens", type=parse_count, default=64, metavar="N", help="default: 64")
    parser.add_argument("--new_tokens", type=parse_count, default=64, metavar="N", help="default: 64")
    parser.add_argument("--rounds", type=parse_count, default=5, metavar="N", help="after a warm-up (default: 5)")
    parser.add_argument("--vllm", action="store_true", help="vLLM with one adapter and with one for each row, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    flags = parse_flags(arguments, PROGRAM, __doc__ or "", add_flags)
    if flags.adapter is None:
        raise UserError("--adapter FOLDER is needed, for example runs/my/best")
    import torch

    from adept_ds.benchmark.decoding import Options, benchmark, benchmark_vllm, text_report, vllm_report
    from adept_ds.distributed import on_gpu
    from adept_ds.export.export import backbone_of
    from adept_ds.serving.vllm_environment import find_vllm
    from adept_ds.storage.adapter_folder import load_adapter

    adapter = load_adapter(flags.adapter)
    model = backbone_of(adapter, flags.base, dtype=flags.dtype)
    options = Options(flags.batch, flags.prompt_tokens, flags.new_tokens, flags.rounds)
    if flags.vllm:
        result = benchmark_vllm(model, adapter, options, find_vllm())
        print(vllm_report(result))
    else:
        result = benchmark(model, adapter, options, torch.device("cuda" if on_gpu() else "cpu"))
        print(text_report(result))
    if flags.json:
        write_json(flags.json, result)
