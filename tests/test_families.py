"""The table of what works on which architecture."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from adept_ds.tools.families import COLUMNS, FAMILIES
from tests.ranks import REPOSITORY

PAGE = REPOSITORY / "docs" / "families.md"


def test_the_page_has_a_row_for_every_architecture_and_nothing_that_is_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ", text.partition("| bottleneck |\n")[2], re.MULTILINE)
    assert rows == list(FAMILIES)
    assert "WRONG" not in text
    assert "ERROR" not in text


@pytest.mark.slow
def test_the_script_finds_what_the_page_says() -> None:
    """On one of each kind: rotary with a cap behind the head, absolute positions, experts, encoder and decoder."""
    names = ["gemma2", "gpt2", "mixtral", "bart"]
    command = [sys.executable, "-m", "adept_ds.tools.families", "--only", *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        found, stated = (_cells(text, name) for text in (run.stdout, page))
        assert len(found) == len(COLUMNS)
        assert found == stated


def _cells(text: str, name: str) -> list[str]:
    """The row of an architecture, without the numbers of notes."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [re.sub(r" \(\d+\)", "", cell).strip() for cell in row.split("|")[2:-1]]
