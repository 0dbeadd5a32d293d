"""OpenVINO, with the tokenizer and the chat template of OpenVINO GenAI. See this folder's `__init__.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai


def main(request_path: str, answer_path: str) -> None:
    """Read the request, ask OpenVINO, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    folder = Path(request["model"])
    # Its defaults round to 16 bits where the machine is faster so, and the cache to 8.
    options = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": request["threads"]}
    model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
    inputs = {name for port in model.inputs for name in port.get_names()}
    tokenizer = openvino_genai.Tokenizer(folder)

    def best_of_each(row: list[int], written: list[int]) -> list[list[list[float]]]:
        reader = model.create_infer_request()
        found = []
        for place in range(len(written)):
            ids = row if place == 0 else written[place - 1 : place]
            end = len(row) + place
            values = {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(end - len(ids), end)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            reader.infer({name: value for name, value in values.items() if name in inputs})
            logits = reader.get_tensor("logits").data[0, -1].astype(np.float64)
            best = np.argsort(-logits)[: request["count"]]
            found.append([[int(number), float(logits[number])] for number in best])
        return found

    def read(text: str, add_special_tokens: bool = True) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids
        return [int(number) for number in ids.data[0]]

    def prompt_of(chat: str) -> str:
        text: str = tokenizer.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True)
        return text

    pairs = zip(request["rows"], request["written"], strict=True)
    answer = {
        "best": [best_of_each(row, written) for row, written in pairs],
        "text_ids": [read(text) for text in request["texts"]],
        # As its pipelines read a chat.
        "chat_ids": [read(prompt_of(chat), add_special_tokens=False) for chat in request["chats"]],
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
