"""Frozen weights on a disk: the same losses, on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from tests.conftest import Launch, losses, run_settings
from tests.models import llama_config, save, seeded, t5_config

pytestmark = pytest.mark.slow
WIDTH = 768
"""A rank's half of such a square matrix is above the megabyte, in fp32, from which a weight goes to the disk."""

WRITE = """
import sys, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
assert AsyncIOBuilder().is_compatible()
handle = AsyncIOBuilder().load(verbose=False).aio_handle()
handle.sync_pwrite(handle.new_cpu_locked_tensor(1 << 20, torch.zeros(0)).zero_(), sys.argv[1])
"""


@pytest.fixture(scope="module")
def extensions(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with DeepSpeed's extension for asynchronous reading, which takes minutes to build the first time."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(_get_build_directory("async_io", False)).parent)
    variables = environment | {"TORCH_EXTENSIONS_DIR": str(folder)}
    program = [sys.executable, "-c", WRITE, tmp_path_factory.mktemp("disk") / "file"]
    done = subprocess.run(program, env=variables, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        pytest.skip(f"DeepSpeed's async_io does not work here (a C++ compiler, Debian's libaio-dev): {reason}")
    return folder


@pytest.fixture(scope="module")
def models(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of two layers whose matrices are all large enough for the disk."""
    llama = llama_config(vocab_size=2 * WIDTH, hidden_size=WIDTH, intermediate_size=WIDTH)
    t5 = t5_config(vocab_size=2 * WIDTH, d_model=WIDTH, d_ff=WIDTH, d_kv=WIDTH // 4, num_heads=4)
    made = {
        "llama": seeded(lambda: LlamaForCausalLM(llama)),
        "t5": seeded(lambda: T5ForConditionalGeneration(t5)),
    }
    return {name: save(model, tiny_tokenizer, tmp_path_factory.mktemp(name)) for name, model in made.items()}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", [(None, False), (None, True), ("nf4", False)]),
        ("t5", [("nf4", True)]),
    ],
)
def test_weights_on_a_disk_give_the_losses_of_weights_in_memory(
    name: str,
    kinds: list[tuple[str | None, bool]],
    models: dict[str, Path],
    extensions: Path,
    launch: Launch,
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    runs, pairs = [], []
    for quantization, checkpointed in kinds:
        pairs.append([tmp_path / f"{quantization}-{checkpointed}-{device}" for device in ("none", "nvme")])
        for run_dir, offload in zip(pairs[-1], ({}, {"device": "nvme", "nvme_path": str(disk)}), strict=True):
            settings = run_settings(models[name], run_dir, max_steps=4, activation_checkpointing=checkpointed)
            settings["model"]["quantization"] = quantization
            # As from a disk: a weight that lies elsewhere in memory may be multiplied with other last bits.
            settings["train"]["gather"] = "weight"
            settings["deepspeed"]["zero_optimization"]["offload_param"] = offload
            runs.append(settings)
    # By the real launcher: what a rank has put on the disk goes when its process ends, and a fork ends in its own way.
    result = launch(2, "tests/distributed/run_all.py", runs, TORCH_EXTENSIONS_DIR=str(extensions))
    assert result.returncode == 0, result.stdout[-6000:]
    assert "Offloading to NVMe" in result.stdout
    for kept, moved in pairs:
        assert len(losses(kept)) == 4
        assert losses(moved) == losses(kept)
    assert list(disk.iterdir()) == []
