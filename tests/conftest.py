"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real MBPP files and the T5 tokenizer; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ADEPT_DS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data folder at {folder} (set ADEPT_DS_SHARED)")
    return folder
