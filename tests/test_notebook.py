"""The notebook: every cell runs, one after the other, as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "own_data.ipynb"


@pytest.mark.slow
def test_the_notebook_trains_tries_and_packs(tiny_llama: Path, environment: dict[str, str], tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    program = "\n\n".join("".join(cell["source"]) for cell in cells)
    own = {"ADEPT_DS_NOTEBOOK_MODEL": str(tiny_llama), "ADEPT_DS_NOTEBOOK_EPOCHS": "2", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with the adapter:" in done.stdout
    assert "training loss: " in done.stdout
    assert "adapter_config.json adapter_model.safetensors" in done.stdout
    assert (tmp_path / "capitals-adapter.zip").is_file()
