"""The throughput benchmark on real ZeRO-3 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adept_ds.benchmark import Options, benchmark
from adept_ds.config.run import RunConfig
from tests.conftest import BY_LAUNCHER, Launch, RunRanks, run_settings

pytestmark = pytest.mark.slow


def test_ranks_split_the_work_and_show_the_time_spent_gathering(launch: Launch, tiny_llama: Path, tmp_path: Path):
    settings = run_settings(tiny_llama, tmp_path)
    settings["model"] |= {"quantization": "nf4"}
    out = tmp_path / "throughput.json"
    flags = ["--random_init", "--synthetic", "40", "--steps", "2", "--rounds", "2", "--out", str(out)]
    process = launch(2, "evals/throughput.py", settings, "--against", "peft", *flags)
    assert process.returncode == 0, process.stdout
    split = json.loads(out.read_text())
    options = Options(steps=2, rounds=1, random_init=True, synthetic=(40,))
    whole = benchmark(RunConfig.model_validate(settings), options)
    assert (split["ranks"], split["zero_stage"], split["tokens"]) == (2, 3, whole["tokens"])
    own, alone = split["contenders"]["adept_ds"], whole["contenders"]["adept_ds"]
    assert list(split["contenders"]) == ["adept_ds"]
    assert "left out on ranks: the bare backbone, peft;" in process.stdout
    assert own["phase_shares"]["gather"] > 0
    assert own["padded_tokens_per_second"] / own["tokens_per_second"] == pytest.approx(45 / 40)
    assert own["memory_bytes"]["held"] < 0.65 * alone["memory_bytes"]["held"]


def test_gathers_by_layer_and_by_weight_are_compared_with_plain_torch(
    run_ranks: RunRanks, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "throughput.json"
    flags = ["--random_init", "--synthetic", "40", "--steps", "1", "--rounds", "2", "--out", str(out)]
    settings = run_settings(tiny_llama, tmp_path)
    process = run_ranks(2, "evals/throughput.py", settings, "--against", "plain", "by-weight", *flags, *BY_LAUNCHER)
    assert process.returncode == 0, process.stdout
    ours, by_weight, plain = json.loads(out.read_text())["contenders"].values()
    assert ours["gathered_bytes"] > 0 < by_weight["gathered_bytes"]
    assert ours["collectives"] > 0 < by_weight["collectives"]
    assert (plain["collectives"], plain["gathered_bytes"]) == (0, 0)
    assert all(own["cpu_seconds_per_step"] > 0 for own in (ours, by_weight, plain))
