"""ONNX Runtime GenAI. See this folder's `__init__.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai


def main(request_path: str, answer_path: str) -> None:
    """Read the request, ask ONNX Runtime, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    model = onnxruntime_genai.Model(request["model"])
    tokenizer = onnxruntime_genai.Tokenizer(model)

    def best_of_each(row: list[int], written: list[int]) -> list[list[list[float]]]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(row) + len(written) + 1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        found = []
        for place in range(len(written)):
            generator.append_tokens(row if place == 0 else written[place - 1 : place])
            logits = np.asarray(generator.get_logits(), dtype=np.float64).reshape(-1)
            best = np.argsort(-logits)[: request["count"]]
            found.append([[int(number), float(logits[number])] for number in best])
        return found

    def read(text: str) -> list[int]:
        return [int(number) for number in tokenizer.encode(text)]

    def prompt_of(chat: str) -> str:
        messages = json.dumps([{"role": "user", "content": chat}])
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return text

    pairs = zip(request["rows"], request["written"], strict=True)
    answer = {
        "best": [best_of_each(row, written) for row, written in pairs],
        "text_ids": [read(text) for text in request["texts"]],
        "chat_ids": [read(prompt_of(chat)) for chat in request["chats"]],
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
