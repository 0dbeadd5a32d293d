"""Verdicts on a disk that takes no more."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from adept_ds.sandbox import Limits, Program, Tests, Verdict
from adept_ds.sandbox.cache import VerdictCache


def test_a_cache_that_cannot_be_written_any_more_is_told_once(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path, Limits(), {})
    programs = [Program(name, f"{name} = 1", Tests()) for name in ("a", "b")]
    verdicts = [Verdict(program.id, "passed", None, "", 0.1, False) for program in programs]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # No file may grow, as on a full disk.
    try:
        with pytest.warns(UserWarning, match="sandbox cache .*verdicts that cannot be kept") as told:
            list(map(cache.put, programs, verdicts))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1
    assert [cache.get(program) for program in programs] == [None, None]
    cache.put(programs[0], verdicts[0])
    assert cache.get(programs[0]) == verdicts[0]
