"""Decodes token ids with vLLM: the half of `adept_ds.serving.vllm_decode` that runs in vLLM's environment.

    python decode_worker.py REQUEST ANSWERS

REQUEST is JSON: `engine`, the arguments of `vllm.LLM`; `sampling`, those of `vllm.SamplingParams` for all; `adapters`,
names and folders of LoRAs; `batches`, each with `prompts` (lists of token ids), `seeds` and `adapters` (one or null for
each prompt). ANSWERS gets a JSON line for each batch: its `seconds`, and for each prompt the generated `ids` and the
string that ended them, if one did (`ended_by`). It is written whole or not at all. Standard library and vLLM alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import vllm  # type: ignore[import-not-found]
from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]


def main(request_path: Path, answers_path: Path) -> None:
    """Load, decode, write."""
    request = json.loads(request_path.read_text(encoding="utf-8"))
    engine = request["engine"]
    if engine.get("tensor_parallel_size") is None:
        import torch

        engine["tensor_parallel_size"] = max(1, torch.cuda.device_count())
    model = vllm.LLM(**engine)
    adapters: dict[str | None, Any] = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(request["adapters"].items(), 1)
    }
    temporary = answers_path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for batch in request["batches"]:
            started = time.perf_counter()
            outputs = model.generate(
                [{"prompt_token_ids": ids} for ids in batch["prompts"]],
                [vllm.SamplingParams(**request["sampling"], seed=seed) for seed in batch["seeds"]],
                lora_request=[adapters.get(name) for name in batch["adapters"]] if adapters else None,
            )
            seconds = time.perf_counter() - started
            written = [_written(output.outputs[0]) for output in outputs]
            file.write(json.dumps({"seconds": seconds, "written": written}) + "\n")
    os.replace(temporary, answers_path)


def _written(output: Any) -> dict[str, Any]:
    reason = output.stop_reason
    return {"ids": list(output.token_ids), "ended_by": reason if isinstance(reason, str) else None}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
