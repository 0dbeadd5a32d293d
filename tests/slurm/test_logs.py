"""`adept-ds logs` from a run's own files, without SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adept_ds.cli.logs import last_lines, main
from adept_ds.errors import UserError

from .test_status import make_run, submitted, write_history


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tries with an evaluation, whose report has not begun."""
    run = make_run(tmp_path / "run", "finished", 100)
    submitted(run, train="7", eval="8", report="9")
    write_history(run, {}, {"try": 1})
    for path, text in (
        ("7.log", "".join(f"line {number}\n" for number in range(100))),
        ("8.log", "evaluated\n"),
        ("8.ranks/rank-0.log", "decodes\n"),
        ("ranks/7-0/rank-1.log", "first try\n"),
        ("ranks/7-0/rank-3.log", "first try only\n"),
        ("ranks/7-1/rank-1.log", "second try\n"),
    ):
        (run / "slurm" / path).parent.mkdir(parents=True, exist_ok=True)
        (run / "slurm" / path).write_text(text)
    return run


@pytest.mark.parametrize(
    ("flags", "name", "text"),
    [
        (("--lines", "2"), "7.log", "line 98\nline 99\n"),
        (("--kind", "eval"), "8.log", "evaluated\n"),
        (("--kind", "eval", "--rank", "0"), "8.ranks/rank-0.log", "decodes\n"),
        (("--rank", "1"), "ranks/7-1/rank-1.log", "second try\n"),
        (("--rank", "3"), "ranks/7-0/rank-3.log", "first try only\n"),
    ],
)
def test_a_log_is_found_and_its_end_printed(
    flags: tuple[str, ...], name: str, text: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main([str(run), *flags])
    assert capfd.readouterr().out == f"==> {run / 'slurm' / name} <==\n{text}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kind", "score"), "no score job is known; it has train, eval, report"),
        (("--kind", "report"), "9.log is not there: job 9 has not begun"),
        (("--rank", "9"), "there is no log of rank 9; there are ranks 1 to 3"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(flags: tuple[str, ...], message: str, run: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([str(run), *flags])


def test_a_member_of_a_sweep_has_its_tasks_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    submitted(sweep, ("a", "b"), train="7")
    make_run(sweep / "b")
    (sweep / "slurm" / "7_1.log").write_text("of b\n")
    main([str(sweep / "b")])
    assert capfd.readouterr().out.endswith("/slurm/7_1.log <==\nof b\n")


def test_a_job_by_hand_has_the_log_of_its_first_rank(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "slurm" / "submission.json").unlink()
    (run / "slurm" / "ranks" / "7-1" / "rank-0.log").write_text("by hand\n")
    main([str(run)])
    assert capfd.readouterr().out.endswith("/ranks/7-1/rank-0.log <==\nby hand\n")


def test_a_run_without_slurm_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train job is known, which adept-ds submit would have noted"):
        main([str(make_run(tmp_path / "run"))])


def test_the_last_lines_of_a_long_file_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [json.dumps({"step": step, "text": "x" * 500}).encode() + b"\n" for step in range(400)]
    path.write_bytes(b"".join(lines) + b"and no end")
    assert last_lines(path, 301) == b"".join(lines[-300:]) + b"and no end"
    assert last_lines(path, 10_000) == path.read_bytes()
