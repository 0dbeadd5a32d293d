"""Published adapters: the authors' own DePT files, and files in the form of the published ADePT code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from adept_ds.backbone.load import resolve_architecture
from adept_ds.config.method import AdeptConfig, DeptConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.tools.import_adapter import import_adapter
from tests.conftest import RunRanks
from tests.tolerances import assert_equal_up_to_rounding

A, B = "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as the published ADePT code saves it, for T5-base."""
    folder = tmp_path_factory.mktemp("published")
    tensors = {"prompt_embeddings": torch.randn(60, 768), A: torch.randn(768, 19), B: torch.randn(19, 768)}
    tensors |= {f"{A[:-1]}a": torch.randn(19), f"{A[:-1]}b": torch.randn(768)}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "t5-base"}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)


def shallow_t5_base(folder: Path) -> AdaptedModel:
    """An adapter on a T5-base of one layer with random weights."""
    architecture, _ = resolve_architecture(ModelConfig(name_or_path="t5-base"))
    architecture.num_layers = architecture.num_decoder_layers = 1
    return AdaptedModel.from_pretrained(AutoModelForSeq2SeqLM.from_config(architecture), folder).eval()


@pytest.mark.parametrize(("task", "length", "rank"), [("sst2", 60, 30), ("cola", 80, 15)])
def test_the_authors_dept_adapters(shared_dir: Path, tmp_path: Path, task: str, length: int, rank: int) -> None:
    source = shared_dir / "data" / "dept_adapters" / task
    settings = import_adapter(source, tmp_path / "adapter")
    assert settings == DeptConfig(num_virtual_tokens=length, rank=rank, max_positions=256)
    model, tensors = shallow_t5_base(tmp_path / "adapter"), tensors_of(source)
    assert torch.equal(model.trainable_parameters()["soft_prompt"], tensors["prompt_embeddings"])
    ids, seen = torch.randint(3, 32_000, (1, 256)), []
    model.method.embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long))
    offsets = seen[0][0, length:] - model.method.embedding.table(ids[0])
    expected = 8 / rank**0.5 * tensors[A] @ tensors[B]
    # What is left of sums with the embeddings, which round those.
    assert_equal_up_to_rounding(offsets, expected, float(seen[0].abs().max()))


def test_one_without_its_low_rank_pair_is_refused(shared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"not a whole DePT adapter: {A}, {B} missing"):
        import_adapter(shared_dir / "data" / "dept_adapters" / "nq", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_the_published_adept_code(published: Path, tmp_path: Path) -> None:
    assert import_adapter(published, tmp_path) == AdeptConfig(num_virtual_tokens=60, bottleneck=19)
    tensors, embedding = tensors_of(published), shallow_t5_base(tmp_path).method.embedding
    e = embedding.table.weight[100:110]
    offset = torch.relu(e @ tensors[A] + tensors[f"{A[:-1]}a"]) @ tensors[B] + tensors[f"{A[:-1]}b"]
    torch.testing.assert_close(embedding(torch.arange(100, 110)), e + offset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(B), f"not a whole ADePT adapter: {B} missing"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "not a whole ADePT adapter: other not known"),
        (lambda tensors: tensors.update({B: torch.ones(19, 700)}), r"w_up has shape \(19, 700\), expected \(19, 768\)"),
        (lambda tensors: tensors.update({B: Path("x")}), "is damaged or holds more than tensors"),
    ],
)
def test_what_does_not_fit_is_refused(published: Path, tmp_path: Path, change, message: str) -> None:
    tensors = tensors_of(published)
    change(tensors)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text((published / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=message):
        import_adapter(tmp_path, tmp_path / "adapter")


def test_command(published: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    module = "adept_ds.import_adapter"
    done = run_ranks(0, module, None, str(published), str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    assert "'num_virtual_tokens': 60" in done.stdout
    failed = run_ranks(0, module, None, str(tmp_path / "nothing"), str(tmp_path / "x"))
    assert (failed.returncode, failed.stderr) == (
        2,
        f"error: {tmp_path / 'nothing'} is not a published adapter: it has no adapter_config.json\n",
    )
