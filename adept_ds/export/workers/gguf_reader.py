"""llama.cpp, by the Python package xllamacpp, which holds its server. See this folder's `__init__.py`."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

ROOM = 64
"""Places of the cache beyond the longest prompt and what was generated."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main(request_path: str, answer_path: str) -> None:
    """Read the request, ask llama.cpp, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    longest = max(len(row) + len(written) for row, written in zip(request["rows"], request["written"], strict=True))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = longest + ROOM
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.warmup = False
    parameters.verbosity = -1
    # llama.cpp's defaults round keys and values to 16 bits, which would be a difference of its own.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)

    def ask(path: str, **body: Any) -> Any:
        query = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _DIRECT.open(query) as reply:
            return json.load(reply)

    def read(text: str) -> list[int]:
        ids: list[int] = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return ids

    # What is chosen does not matter to the logits that are told. But of a token that is a part of a character none are,
    # so a whole one is chosen.
    whole = ask("/tokenize", content="a")["tokens"][-1]
    options = {"n_predict": 1, "temperature": 0, "n_probs": request["count"], "logit_bias": [[whole, 1e6]]}

    def best_after(ids: list[int]) -> list[list[float]]:
        (token,) = ask("/completion", prompt=ids, cache_prompt=request["reuses"], **options)["completion_probabilities"]
        return [[entry["id"], entry["logprob"]] for entry in token["top_logprobs"]]

    def prompt_of(chat: str) -> str:
        text: str = ask("/apply-template", messages=[{"role": "user", "content": chat}])["prompt"]
        return text

    answer = {
        "best": [
            [best_after(row + written[:place]) for place in range(len(written))]
            for row, written in zip(request["rows"], request["written"], strict=True)
        ],
        "text_ids": [read(text) for text in request["texts"]],
        "chat_ids": [read(prompt_of(chat)) for chat in request["chats"]],
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
