"""Decoding many prompts with vLLM, in a process of its own, which ends with them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adept_ds.errors import UserError
from adept_ds.serving.vllm_environment import VllmEnvironment

WORKER = Path(__file__).resolve().parent / "vllm_plugin" / "decode_worker.py"
_THEIRS = ("PYTHONPATH", "PYTHONHOME")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launcher, which vLLM would take for its own."""


@dataclass(frozen=True)
class Prompts:
    """What is decoded together."""

    ids: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    seeds: Sequence[int | None]
    """Of each prompt's random stream; None for greedy decoding."""
    adapters: Sequence[str | None] = ()
    """Name of the LoRA that reads each prompt; none for any if it is empty."""


@dataclass(frozen=True)
class Written:
    """What was generated from one prompt."""

    ids: list[int]
    """With the token that ended it, if one did."""
    ended_by: str | None
    """The stop string that ended it, if one did."""


@dataclass(frozen=True)
class Decoded:
    """What was generated from prompts that were decoded together."""

    written: list[Written]
    """In the order of the prompts."""
    seconds: float


def engine_arguments(environment: VllmEnvironment, folder: Path, dtype: str, max_tokens: int) -> dict[str, Any]:
    """Return arguments of `vllm.LLM` for a model whose texts follow from the request alone.

    Args:
        environment: Where vLLM is.
        folder: The model.
        dtype: In the words of `model.dtype`.
        max_tokens: The longest prompt with what is generated behind it.
    """
    return {
        "model": str(folder),
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
        "max_model_len": max_tokens,
        "generation_config": "vllm",  # and nothing of the checkpoint's own
        # Compiling takes longer on a CPU than it saves.
        "enforce_eager": environment.is_cpu,
    }


def decode(
    environment: VllmEnvironment,
    engine: Mapping[str, Any],
    sampling: Mapping[str, Any],
    batches: Sequence[Prompts],
    adapters: Mapping[str, Path] = MappingProxyType({}),
) -> list[Decoded]:
    """Return what vLLM generates from the prompts of each batch, one batch after the other.

    Args:
        environment: Where vLLM is.
        engine: Arguments of `vllm.LLM`; all GPUs of this machine together, if `tensor_parallel_size` is None.
        sampling: Arguments of `vllm.SamplingParams`.
        batches: The prompts.
        adapters: Folders of LoRAs by name.

    Raises:
        UserError: vLLM did not come to its end; what it says stands above.
    """
    variables = {name: value for name, value in os.environ.items() if name not in (*_THEIRS, *_RANK)}
    variables |= {"PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="adept-vllm-") as folder:
        request, answers = Path(folder) / "request.json", Path(folder) / "answers.jsonl"
        whole = {
            "engine": dict(engine),
            "sampling": dict(sampling),
            "adapters": {name: str(path) for name, path in adapters.items()},
            "batches": [
                {
                    "prompts": [list(ids) for ids in batch.ids],
                    "seeds": list(batch.seeds),
                    "adapters": list(batch.adapters),
                }
                for batch in batches
            ],
        }
        request.write_text(json.dumps(whole), encoding="utf-8")
        command = [str(environment.python), str(WORKER), str(request), str(answers)]
        status = subprocess.run(command, env=variables, check=False).returncode
        if status or not answers.is_file():
            raise UserError(
                f"vLLM ended with status {status}, what it says stands above; it was asked for {engine['model']!r} "
                "(eval.engine_options are handed to it; eval.engine transformers decodes without it)"
            )
        lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return [Decoded([Written(**one) for one in line["written"]], line["seconds"]) for line in lines]
