"""lm-evaluation-harness on a folded model, by the recipe of docs/exporting.md: the live model's likelihoods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from adept_ds.export.export import export_folded
from adept_ds.export.manifest import read_manifest
from adept_ds.model.adapted_model import AdaptedModel
from tests.test_export import adapter, backbone_in, request
from tests.test_export import base as base
from tests.test_export import tokenizer as tokenizer_of

QUESTIONS = [("The capital of France is", " a village", 0), ("Once upon a", " time", 1), ("1, 2,", " 3", 1)]


@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
def test_the_recipe_scores_as_the_live_model(base: Callable[[str], Path], tmp_path: Path, is_chat: bool) -> None:
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    export_folded(request(folder, made, tmp_path / "folded", verify=False))
    rows = [{"question": question, "answer": answer} for question, answer, _ in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(task))
    options = {"add_bos_token": False} if is_chat else {}
    model = HFLM(pretrained=str(tmp_path / "folded"), device="cpu", batch_size=2, **options)
    done = simple_evaluate(
        model,
        tasks=["small"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=is_chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    live = AdaptedModel.from_pretrained(backbone_in(folder), made)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample in done["samples"]["small"]:
        question, answer = sample["doc"]["question"], sample["doc"]["answer"]
        if is_chat:
            asked = [{"role": "user", "content": question}]
            context = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        else:
            context = tokenizer(question)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = live(torch.tensor([[*context, *target]])).logits[0, -len(target) - 1 : -1]
        # The harness gives the prompt's tokens their share, which is small in a vocabulary that is not as small.
        logits = torch.cat([logits, logits.mean(1, keepdim=True).expand(-1, 8)], 1)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
        assert sample["filtered_resps"][0][0] == pytest.approx(float(expected), abs=1e-3)


def test_what_the_recipe_warns_of(base: Callable[[str], Path], tmp_path: Path) -> None:
    """Were it different, the page would be wrong."""
    folder = base("llama")
    made = adapter(folder, tmp_path / "a", name="adept", num_virtual_tokens=8, bottleneck=2)
    export_folded(request(folder, made, tmp_path / "folded", verify=False))
    plain, prompted = tokenizer_of(is_t5=False)("a b")["input_ids"], str(tmp_path / "folded")
    with_start = HFLM(pretrained=prompted, device="cpu", add_bos_token=True)
    assert with_start.tok_encode("a b") == plain
    text = (as_is := HFLM(pretrained=prompted, device="cpu")).apply_chat_template([{"role": "user", "content": "a"}])
    prompt = read_manifest(tmp_path / "folded").prompt_token_ids
    assert sum(one in prompt for one in as_is.tok_encode(text)) == 16
    assert sum(one in prompt for one in as_is.tok_encode("a")) == 8
