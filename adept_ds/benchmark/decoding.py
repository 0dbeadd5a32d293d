"""Tokens per second of greedy decoding with an adapter, beside what it could cost and what others cost.

All contenders decode the same number of tokens behind prompts of the same length, in turns, in one process:

    live        the adapter in the backbone
    mixed       the same, each row with another copy of it (`AdaptedModel.load_adapters`)
    folded      the model that `adept-ds export --to folded` writes
    floor       the bare backbone with as many more tokens as the soft prompt has
    PEFT n      PEFT's prompt tuning with n tokens

With vLLM, in its own environment: the adapter as one LoRA for all rows, and as many LoRAs as there are rows, mixed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from adept_ds.backbone.load import DTYPES, load_backbone
from adept_ds.benchmark.machine import machine_facts
from adept_ds.config.run import ModelConfig
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.export.export import NONE, Request, export_folded, export_lora, export_serving_base
from adept_ds.export.manifest import read_manifest
from adept_ds.files import read_json
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.serving.command import RANKS
from adept_ds.serving.vllm_decode import Prompts, decode, engine_arguments
from adept_ds.serving.vllm_environment import VllmEnvironment
from adept_ds.storage.adapter_folder import CONFIG_NAME, Adapter

FLOOR, FOLDED = "floor: backbone with l more tokens", "folded"
GOAL = 0.98
"""Least tokens per second of the folded model, as a part of the floor's."""
MIXED_GOAL = 0.9
"""The same of mixed adapters in vLLM, as a part of one adapter's."""
PEFT_LENGTHS = (10, 100)


@dataclass(frozen=True)
class Options:
    """What is decoded."""

    batch: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5


def benchmark(model: ModelConfig, adapter: Adapter, options: Options, device: torch.device) -> dict[str, Any]:
    """Measure all contenders and return what `text_report` prints, ready for JSON.

    Raises:
        UserError: The backbone is an encoder-decoder, or the adapter cannot be folded.
    """
    length = adapter.method.num_virtual_tokens
    # Untyped, as transformers leaves its models' calls.
    plain: Any = load_backbone(model, device)
    if plain.config.is_encoder_decoder:
        raise UserError(f"{model.name_or_path!r} is an encoder-decoder model; expected a causal one")
    vocabulary: int = plain.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (options.batch, options.prompt_tokens), generator=generator).to(device)
    extra = torch.randint(vocabulary, (options.batch, length), generator=generator).to(device)
    with tempfile.TemporaryDirectory(prefix="adept-folded-") as scratch:
        folder = Path(scratch) / "folded"
        export_folded(Request(adapter, model, folder, prompt_in=NONE, verify=False))
        folded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[model.dtype])
        folded.to(device).eval()
        prompt = torch.tensor(read_manifest(folder).prompt_token_ids, dtype=torch.long, device=device)
    live = AdaptedModel.from_pretrained(load_backbone(model, device), adapter.folder)
    mixed = AdaptedModel(load_backbone(model, device), Untuned()).eval()
    names = [f"row {number}" for number in range(options.batch)]
    mixed.load_adapters(dict.fromkeys(names, adapter.folder))
    behind_prompt = torch.cat([prompt.expand(options.batch, -1), ids], 1)
    runs = {
        "live": partial(_generate, live.backbone, live.generate, ids, options),
        f"mixed: {options.batch} adapters": partial(
            _generate, mixed.backbone, mixed.generate, ids, options, adapter_names=names
        ),
        FOLDED: partial(_generate, folded, folded.generate, behind_prompt, options),
        FLOOR: partial(_generate, plain, plain.generate, torch.cat([extra, ids], 1), options),
    }
    for tokens in PEFT_LENGTHS:
        settings = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
        prompted: Any = peft.get_peft_model(load_backbone(model, device), settings).eval()
        base = prompted.get_base_model()
        runs[f"PEFT prompt tuning, {tokens} tokens"] = partial(_generate, base, prompted.generate, ids, options)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(options.rounds + 1), desc="decode", unit="round"):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    tokens = options.batch * options.new_tokens
    return {
        "model": model.name_or_path,
        "dtype": model.dtype,
        "method": adapter.method.name,
        "num_virtual_tokens": length,
        "machine": machine_facts(device),
        **vars(options),
        "tokens_per_second": {name: tokens / median(own) for name, own in seconds.items()},
        "ratios": {name: _ratio(seconds[FLOOR], own) for name, own in seconds.items() if name != FLOOR},
    }


def _generate(backbone: Any, generate: Callable[..., Any], ids: Tensor, options: Options, **more: Any) -> Any:
    count = options.new_tokens
    plain = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    with attribute_set(backbone, "generation_config", plain):
        return generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain, **more)


def _ratio(floor: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Speed as a part of the floor's, round by round."""
    parts = sorted(before / after for before, after in zip(floor, own, strict=True))
    return {"median": median(parts), "least": parts[0], "most": parts[-1]}


def benchmark_vllm(
    model: ModelConfig, adapter: Adapter, options: Options, environment: VllmEnvironment
) -> dict[str, Any]:
    """Measure vLLM with one adapter and with as many as there are rows, in turns; return what `vllm_report` prints.

    Raises:
        UserError: The adapter has no such form, or vLLM did not come to its end.
    """
    length = adapter.method.num_virtual_tokens
    names = [f"adapter{number}" for number in range(options.batch)]
    with tempfile.TemporaryDirectory(prefix="adept-vllm-") as scratch:
        serving, lora = Path(scratch) / "serving", Path(scratch) / "lora"
        export_serving_base(model, max(1, length), serving)
        export_lora(Request(adapter, model, lora, verify=False), serving)
        manifest = read_manifest(lora)
        # Each a folder of its own: by one folder vLLM would know that they are the same.
        folders = {name: Path(shutil.copytree(lora, Path(scratch) / name)) for name in names}
        generator = torch.Generator().manual_seed(0)
        sizes = (options.batch, options.prompt_tokens)
        batches = []
        for _ in range(options.rounds + 1):
            for chosen in (names[:1] * options.batch, names):
                # Other prompts each time: vLLM keeps the keys and values of those that it has read.
                ids = torch.randint(manifest.base["vocab_size"], sizes, generator=generator).tolist()
                prompts = [[*manifest.prompt_token_ids, *row] for row in ids]
                batches.append(Prompts(prompts, [None] * options.batch, chosen))
        config = read_json(lora / CONFIG_NAME)
        longest = length + options.prompt_tokens + options.new_tokens
        engine = {
            **engine_arguments(environment, serving, model.dtype, longest),
            "enable_lora": True,
            "max_loras": options.batch + 1,
            "max_cpu_loras": options.batch + 1,
            "max_lora_rank": next(rank for rank in RANKS if rank >= config["r"]),
            "lora_target_modules": config["target_modules"],
        }
        sampling = {"temperature": 0.0, "max_tokens": options.new_tokens, "ignore_eos": True}
        decoded = decode(environment, engine, sampling, batches, folders)
    seconds = [one.seconds for one in decoded[2:]]  # the first round warms up
    one, mixed = seconds[::2], seconds[1::2]
    tokens = options.batch * options.new_tokens
    return {
        "engine": environment.version,
        "tokens_per_second": {"one adapter": tokens / median(one), "mixed": tokens / median(mixed)},
        "ratio": _ratio(one, mixed),
        **vars(options),
    }


def vllm_report(result: dict[str, Any]) -> str:
    """Return the figures of `benchmark_vllm` in words."""
    rates, ratio = result["tokens_per_second"], result["ratio"]
    met = "met" if ratio["median"] >= MIXED_GOAL else "missed"
    return (
        f"vLLM {result['engine']}: {rates['one adapter']:.1f} tokens/s with one adapter for {result['batch']} rows, "
        f"{rates['mixed']:.1f} with {result['batch']} adapters mixed: {ratio['median']:.3f} ({ratio['least']:.3f} to "
        f"{ratio['most']:.3f}); goal: at least {MIXED_GOAL}, {met}"
    )


def text_report(result: dict[str, Any]) -> str:
    """Return the figures of `benchmark` as a table."""
    machine = ", ".join(
        f"{value}" if name == "device" else f"{name} {value}" for name, value in result["machine"].items()
    )
    lines = [
        f"greedy decoding of {result['model']} in {result['dtype']}, {result['method']} with "
        f"{result['num_virtual_tokens']} prompt tokens: {result['new_tokens']} tokens behind "
        f"{result['prompt_tokens']}, {result['batch']} rows at once",
        f"machine: {machine}",
        "",
        f"{'':40}{'tokens/s':>10}   part of the floor's speed",
    ]
    for name, rate in result["tokens_per_second"].items():
        ratio = result["ratios"].get(name)
        part = "" if ratio is None else f"   {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
        goal = ""
        if name == FOLDED and ratio is not None:
            goal = f"   goal: at least {GOAL}, {'met' if ratio['median'] >= GOAL else 'missed'}"
        lines.append(f"{name:40}{rate:10.1f}{part}{goal}")
    lines.append(f"median of {result['rounds']} rounds; in brackets the least and the most")
    return "\n".join(lines)
