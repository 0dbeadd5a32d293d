"""`make gpu-check` on a CPU: the whole script with tiny models, and what it does when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adept_ds.benchmark.gpu_check import (
    ABSENT,
    BY_LAYER,
    BY_LAYER_COMPILED,
    FAILED,
    LEFT_OUT,
    MEASURED,
    ORDER,
    PACKED,
    PLAIN,
    REFUSED,
    SUBJECTS,
    Row,
    Worker,
    check,
    main,
    table,
)
from tests.ranks import REPOSITORY

LLAMA, T5 = SUBJECTS


class Broken(Row):
    """A row with other settings than it should have."""

    def __init__(self, changes: dict[str, Any]) -> None:
        super().__init__(LLAMA, "bf16", PLAIN)
        self.changes = changes

    def settings(self, folder: Path | None) -> dict[str, Any]:
        values = super().settings(folder)
        return values | {section: values.get(section, {}) | own for section, own in self.changes.items()}


def checked(rows: list[Row], folder: Path, seconds: float = 300) -> list[Row]:
    check(rows, time.monotonic() + seconds, folder, str(folder / "log"), lambda: None)
    return rows


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "adept_ds.benchmark.gpu_check", "--device", "cpu", "--no-tests"]
    done = subprocess.run(
        [*command, "--rows", "2", "--out", str(out)],
        cwd=REPOSITORY,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["Llama3-8B, bf16, plain torch", "T5-3B, bf16, plain torch"]
    for row in rows:
        assert row["state"] == MEASURED
        assert row["figures"]["tokens_per_second"] > 0
        assert row["plan_bytes"] == pytest.approx(row["figures"]["memory_bytes"]["peak"], rel=0.3)
        assert row["name"] in done.stdout
    assert "2 of 2" in done.stderr


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    rows = checked(
        [
            Broken({"model": {"attn_implementation": "eagre"}}),
            Broken({"train": {"no_such_setting": 1}}),
            Row(LLAMA, "nf4", PLAIN),
        ],
        tmp_path,
    )
    assert [row.state for row in rows] == [REFUSED, ABSENT, MEASURED]
    assert "expected one of" in rows[0].reason
    assert rows[1].reason.startswith("train.no_such_setting")
    lines = "\n".join(table(rows))
    assert "not here: train.no_such_setting" in lines
    assert "Llama3-8B, nf4, floor" in lines


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    rows = checked([Row(subject, *kind) for kind in ORDER for subject in SUBJECTS], tmp_path, seconds=0)
    assert {row.state for row in rows} == {LEFT_OUT}
    lines = list(table(rows))
    assert len(lines) == 1 + len(rows)
    assert all(line.endswith("left out: the time was over") for line in lines[1:])


def test_a_row_that_hangs_is_ended(tmp_path: Path) -> None:
    (row,) = checked([Row(LLAMA, "bf16", PLAIN)], tmp_path, seconds=5.2)  # in which the libraries are not even loaded
    assert (row.state, row.reason) == (LEFT_OUT, "it was not done within 5 s")


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_another_one_takes_its_place(tmp_path: Path) -> None:
    worker = Worker(str(tmp_path / "log"))
    request = {"settings": {}, "on_ranks": False, "is_tiny": True}
    died = worker.measure(request | {"no such argument": 1}, 300, lambda: None)
    assert died == {"state": FAILED, "reason": "its process ended with exit status 1"}
    assert worker.measure(request, 300, lambda: None)["state"] == ABSENT
    worker.stop()


def test_every_kind_of_row_is_in_the_order_once() -> None:
    assert len(set(ORDER)) == len(ORDER) == 18
    assert ("bf16", BY_LAYER) in ORDER


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_a_plain_word_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_packed_and_gathered_rows_are_what_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    by_layer, packed, t5 = checked(
        [Row(LLAMA, "bf16", BY_LAYER_COMPILED), Row(LLAMA, "fp8", PACKED), Row(T5, "bf16", PACKED)], tmp_path
    )
    assert (by_layer.state, packed.state) == (MEASURED, MEASURED)
    assert by_layer.reason.startswith("train.compile: compiled LlamaDecoderLayer")
    assert packed.figures["padding_share"] != packed.floor["padding_share"]
    assert (t5.state, t5.plan_bytes) == (REFUSED, None)
    assert "train.packing is for causal models" in t5.reason
