"""Decodes token ids with vLLM: the half of `adept_ds.serving.vllm_decode` that runs in vLLM's environment.

    python decode_worker.py REQUEST ANSWERS

REQUEST is JSON: `engine`, the arguments of `vllm.LLM`; `sampling`, those of `vllm.SamplingParams` for all; `prompts`,
lists of token ids; `seeds`, one for each or null. ANSWERS gets a JSON line for each prompt: its generated ids, and the
string that ended them, if one did. It is written whole or not at all. Standard library and vLLM alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import vllm  # type: ignore[import-not-found]


def main(request_path: Path, answers_path: Path) -> None:
    """Load, decode, write."""
    request = json.loads(request_path.read_text(encoding="utf-8"))
    engine = request["engine"]
    if engine.get("tensor_parallel_size") is None:
        import torch

        engine["tensor_parallel_size"] = max(1, torch.cuda.device_count())
    model = vllm.LLM(**engine)
    parameters = [vllm.SamplingParams(**request["sampling"], seed=seed) for seed in request["seeds"]]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = model.generate(prompts, parameters)
    temporary = answers_path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for output in outputs:
            written = output.outputs[0]
            ended_by = written.stop_reason if isinstance(written.stop_reason, str) else None
            file.write(json.dumps({"ids": list(written.token_ids), "ended_by": ended_by}) + "\n")
    os.replace(temporary, answers_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
