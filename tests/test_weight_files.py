"""The files of a backbone: whether they are whole, and by what its weights are recognised."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adept_ds.backbone.load import load_architecture, load_tokenizer, weight_files
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError

NAME = "model.safetensors"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of a model folder."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def fingerprint_of(folder: Path) -> str:
    return fingerprint(weight_files(ModelConfig(name_or_path=str(folder))))


def test_the_same_weights_have_one_fingerprint_wherever_they_lie(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert (tmp_path / "split" / "model.safetensors.index.json").is_file()
    assert fingerprint_of(tmp_path / "split") == fingerprint_of(model)


def test_other_weights_of_the_same_shape_have_another(model: Path) -> None:
    before = fingerprint_of(model)
    tensors = load_file(model / NAME)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, model / NAME, metadata={"format": "pt"})
    assert fingerprint_of(model) != before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def write_header(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text.encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "fetch or copy it again"),
        (lengthen, "fetch or copy it again"),
        (point, "is a pointer of git-lfs"),
        (lambda path: path.write_bytes(b""), "is no whole safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 100), "is no whole safetensors file"),
        (write_header("[]"), "its header cannot be read"),
        (write_header("{"), "its header cannot be read"),
        (write_header('{"x": {"data_offsets": "ab"}}'), "its header cannot be read"),
        (write_header('{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 0]}}'), "is no safetensors file"),
    ],
)
def test_a_file_that_is_not_whole_is_named(damage: Callable[[Path], object], message: str, model: Path) -> None:
    damage(model / NAME)
    with pytest.raises(UserError, match=rf"{model / NAME}.*{message}"):
        fingerprint_of(model)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', "{"])
def test_an_odd_index_is_named(index: str, model: Path) -> None:
    (model / NAME).unlink()
    (model / f"{NAME}.index.json").write_text(index)
    with pytest.raises(UserError, match=rf"{NAME}\.index\.json is no index"):
        fingerprint_of(model)


def test_an_index_to_a_file_that_is_not_there_is_told(model: Path) -> None:
    (model / NAME).unlink()
    (model / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}))
    with pytest.raises(UserError, match=r"model-1\.safetensors cannot be read: No such file"):
        fingerprint_of(model)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"model_type": 7}', '{"model_type": "llama", "hidden_size": "wide"}', ""]
)
def test_an_odd_config_is_told(content: str, model: Path) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.name_or_path is"):
        load_architecture(ModelConfig(name_or_path=str(model)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_an_odd_tokenizer_is_told(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    with pytest.raises(UserError, match=r"model\.name_or_path is"):
        load_tokenizer(ModelConfig(name_or_path=str(model)))


def test_code_of_a_model_folder_is_never_run_nor_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    with pytest.raises(UserError, match="it brings code of its own, which is not run here"):
        load_architecture(ModelConfig(name_or_path=str(model)))
    assert not (tmp_path / "was run").exists()


def test_a_model_that_transformers_has_is_taken_without_the_code_beside_it(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    assert load_architecture(ModelConfig(name_or_path=str(model))).model_type == "llama"
