"""vLLM's command line and environment for a serving base with adapters."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.serving.adapters import RANKS, ServedAdapter, ServingBase
from adept_ds.serving.vllm_environment import VllmEnvironment
from adept_ds.serving.vllm_plugin.adept_prompt import VARIABLE, AdeptPrompt

PLUGIN = Path(__file__).resolve().parent / "vllm_plugin"
MOST_SLOTS = 64
"""Of adapters on a GPU at once, by default; further ones wait in the machine's memory."""
OURS = (
    *("--model", "--served-model-name", "--host", "--port", "--enable-lora", "--enable-scale-out", "--max-loras"),
    *("--max-cpu-loras", "--max-lora-rank", "--lora-target-modules", "--lora-modules"),
)
"""Flags that follow from the adapters, or are flags of `adept-ds serve`."""


@dataclass(frozen=True)
class Options:
    """How it is served."""

    name: str = "base"
    """The serving base as a model."""
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    """Adapters that vLLM computes with at once; None: what fits the device."""
    max_rank: int | None = None
    """Highest rank of an adapter; None: that of those that are served from the start."""
    allow_runtime_updates: bool = False
    spare: int = 0
    """Adapters that may be added while the server runs."""
    further: Sequence[str] = ()
    """Flags that vLLM gets as they are."""


def check_further(flags: Sequence[str]) -> list[str]:
    """What is wrong with flags that are meant for vLLM."""
    names = [flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")]
    return [
        f"{name} behind `--`: it is set from the adapters, or a flag of `adept-ds serve`"
        for name in names
        if name in OURS
    ]


def slots(environment: VllmEnvironment, adapters: Sequence[ServedAdapter], options: Options) -> int:
    """Return LoRA slots of vLLM's batches.

    Raises:
        UserError: Too few, on a CPU.
    """
    wanted = len(adapters) + options.spare
    if not environment.is_cpu:
        return options.slots or min(wanted, MOST_SLOTS)
    # Requests to the base read the last slot there, which must stay empty (vllm#48421).
    chosen = options.slots or wanted + 1
    if chosen <= wanted:
        raise UserError(
            f"--max-loras {chosen}: on a CPU vLLM needs a slot that stays empty (vllm#48421); expected {wanted + 1} or "
            f"more for {wanted} adapters"
        )
    return chosen


def max_rank(adapters: Sequence[ServedAdapter], options: Options) -> int:
    """Return the highest rank that vLLM is to make room for.

    Raises:
        UserError: An adapter's is higher than the one that was chosen, or it is more than vLLM takes.
    """
    needed = max(adapter.rank for adapter in adapters)
    wanted = options.max_rank or needed
    if not needed <= wanted <= RANKS[-1]:
        raise UserError(f"--max-lora-rank {wanted}: expected one from {needed}, which an adapter has, to {RANKS[-1]}")
    return next(allowed for allowed in RANKS if allowed >= wanted)


def server_command(
    environment: VllmEnvironment, base: ServingBase, adapters: Sequence[ServedAdapter], options: Options
) -> list[str]:
    """Return the command that starts vLLM's OpenAI server."""
    count = slots(environment, adapters, options)
    modules = [{"name": one.name, "path": str(one.folder), "base_model_name": options.name} for one in adapters]
    return [
        *(str(environment.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(base.folder), "--served-model-name", options.name),
        *("--host", options.host, "--port", str(options.port)),
        *("--enable-lora", "--max-loras", str(count)),
        *("--max-cpu-loras", str(max(count, len(adapters) + options.spare))),
        *("--max-lora-rank", str(max_rank(adapters, options))),
        *("--lora-target-modules", *sorted({name for adapter in adapters for name in adapter.target_modules})),
        *("--lora-modules", *map(json.dumps, modules)),
        # Without it vLLM's render endpoints, which the middleware asks, are off.
        *("--enable-scale-out", "--middleware", f"{AdeptPrompt.__module__.rpartition('.')[2]}.{AdeptPrompt.__name__}"),
        *options.further,
    ]


def server_environment(
    environment: VllmEnvironment,
    base: ServingBase,
    adapters: Sequence[ServedAdapter],
    options: Options,
    variables: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the variables that the server runs with: ours, and of Python's none that lead to other packages."""
    settings = {
        "bases": [options.name],
        "prompt_token_ids": list(base.manifest.prompt_token_ids),
        "embedding_fingerprint": base.manifest.base["embedding_fingerprint"],
        "adapters": {one.name: {"length": one.length, "digest": one.digest} for one in adapters},
        "max_rank": max_rank(adapters, options),
        "runtime_updates": options.allow_runtime_updates,
        # vLLM gives no slot back when an adapter is unloaded.
        "loads_left": slots(environment, adapters, options) - 1 - len(adapters) if environment.is_cpu else None,
    }
    ours = ("PYTHONPATH", "PYTHONHOME", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    return {
        **{name: value for name, value in variables.items() if name not in ours},
        "PYTHONPATH": str(PLUGIN),
        "PYTHONSAFEPATH": "1",  # not the folder that it is started in either
        VARIABLE: json.dumps(settings),
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if options.allow_runtime_updates else {}),
    }


def announcement(adapters: Sequence[ServedAdapter], options: Options) -> str:
    """Which models there will be, where, and how they are called."""
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{options.port}/v1"
    names = ", ".join(adapter.name for adapter in adapters)
    body = json.dumps({"model": adapters[0].name, "messages": [{"role": "user", "content": "Hello"}]})
    call = shlex.join(["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body])
    return f"serving {options.name} (no adapter), {names} at {url}, once vLLM has loaded them; for example:\n  {call}"
