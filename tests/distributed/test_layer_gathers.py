"""Frozen weights that are gathered by their layers: the same numbers as DeepSpeed's own gathers give."""

from __future__ import annotations

import json

import pytest

from tests.conftest import RunRanks

from .layer_gathers_rank import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("layers") / "found.json"
    result = run_ranks(2, "tests/distributed/layer_gathers_rank.py", None, str(out))
    assert result.returncode == 0, result.stdout
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_training_validation_and_uneven_generation_are_the_same(case: str, found: dict[str, dict]) -> None:
    by_weight, by_layer = found[case]["weight"], found[case]["layer"]
    assert by_layer["losses"] == pytest.approx(by_weight["losses"], rel=1e-6)
    assert by_layer["tokens"] == by_weight["tokens"]
    assert (by_weight["layers"], by_layer["layers"] > 1) == (0, True)
