"""Decoding many prompts with vLLM, in a process of its own, which ends with them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError
from adept_ds.serving.vllm_environment import VllmEnvironment

WORKER = Path(__file__).resolve().parent / "vllm_plugin" / "decode_worker.py"
_THEIRS = ("PYTHONPATH", "PYTHONHOME")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launcher, which vLLM would take for its own."""


@dataclass(frozen=True)
class Written:
    """What was generated from one prompt."""

    ids: list[int]
    """With the token that ended it, if one did."""
    ended_by: str | None
    """The stop string that ended it, if one did."""


def decode(
    environment: VllmEnvironment,
    engine: Mapping[str, Any],
    sampling: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int | None],
) -> list[Written]:
    """Return what vLLM generates from each prompt, in their order.

    Args:
        environment: Where vLLM is.
        engine: Arguments of `vllm.LLM`; all GPUs of this machine together, if `tensor_parallel_size` is None.
        sampling: Arguments of `vllm.SamplingParams`.
        prompts: Token ids.
        seeds: Of each prompt's random stream; None for greedy decoding.

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
            "prompts": [list(ids) for ids in prompts],
            "seeds": list(seeds),
        }
        request.write_text(json.dumps(whole), encoding="utf-8")
        command = [str(environment.python), str(WORKER), str(request), str(answers)]
        status = subprocess.run(command, env=variables, check=False).returncode
        if status or not answers.is_file():
            raise UserError(
                f"vLLM ended with status {status}, what it says stands above; it was asked for {engine['model']!r} "
                "(eval.engine_options are handed to it; eval.engine transformers decodes without it)"
            )
        found = [Written(**json.loads(line)) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(prompts)
    return found
