"""An early end: a signal reaches every rank once, ranks save in their own time, and a second signal ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPOSITORY

RANK = """
import os, pathlib, sys, time
from adept_ds.training.stopping import StopRequest

folder, name = pathlib.Path(sys.argv[1]), os.environ.get("RANK", "0")
stop = StopRequest()
(folder / f"ready-{name}").touch()
while stop.received is None:
    time.sleep(0.01)
(folder / f"saving-{name}").write_text(stop.received)
time.sleep(float(sys.argv[2]))
(folder / f"saved-{name}").touch()
while len(list(folder.glob("saved-*"))) < int(os.environ.get("WORLD_SIZE", "1")):
    time.sleep(0.01)  # a run ends together
stop.close()
"""
"""Writes what a rank does on a signal; a save takes as many seconds as the second argument says."""
STARTER = """
import sys
from adept_ds.cli.local_ranks import Children

sys.exit(Children().run([sys.executable, *sys.argv[1:]], [{"RANK": "0"}, {"RANK": "1"}]))
"""

Begin = Callable[..., subprocess.Popen]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start a rank, by a starter if one is given, and wait until `ranks` of them take signals."""
    (tmp_path / "rank.py").write_text(RANK)
    # Tests may run under `nohup`, which programs inherit.
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    begun: list[subprocess.Popen] = []

    def start(*starter: str, seconds: float = 0.5, ranks: int = 1) -> subprocess.Popen:
        others = ("RANK", "WORLD_SIZE", "SLURM_JOB_ID")
        variables = {name: value for name, value in os.environ.items() if name not in others}
        begun.append(
            subprocess.Popen(
                [*(starter or [sys.executable]), str(tmp_path / "rank.py"), str(tmp_path), str(seconds)],
                env=variables | {"PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
        )
        wait_for(tmp_path, "ready", ranks)
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    signal.signal(signal.SIGHUP, usual)


def wait_for(folder: Path, what: str, count: int) -> list[str]:
    """What so many ranks have written under a name."""
    deadline = time.monotonic() + 60
    while len(found := sorted(folder.glob(f"{what}-*"))) < count:
        assert time.monotonic() < deadline, f"{len(found)} ranks are {what}"
        time.sleep(0.02)
    time.sleep(0.05)
    return [path.read_text() for path in found]


def test_ranks_save_in_their_own_time_and_the_command_waits_for_them(begin: Begin, tmp_path: Path) -> None:
    command = begin(sys.executable, "-c", STARTER, ranks=2)
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == 0
    assert wait_for(tmp_path, "saving", 2) == ["SIGTERM", "SIGTERM"]
    assert len(wait_for(tmp_path, "saved", 2)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_echo_of_a_signal_changes_nothing(number: signal.Signals, begin: Begin, tmp_path: Path) -> None:
    rank = begin()
    for _ in range(3):
        rank.send_signal(number)
        time.sleep(0.05)
    assert rank.wait(60) == 0
    assert wait_for(tmp_path, "saved", 1)


def test_a_second_signal_ends_a_run_at_once(begin: Begin, tmp_path: Path) -> None:
    rank = begin(seconds=600)
    rank.terminate()
    time.sleep(2.2)
    rank.terminate()
    assert rank.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("saved-*"))


def test_a_second_signal_to_the_command_kills_its_ranks(begin: Begin, tmp_path: Path) -> None:
    command = begin(sys.executable, "-c", STARTER, seconds=600, ranks=2)
    command.terminate()
    time.sleep(2.2)
    command.terminate()
    assert command.wait(20) == 128 + signal.SIGKILL
    assert not list(tmp_path.glob("saved-*"))


def test_ranks_of_a_command_that_is_killed_save_and_end(begin: Begin, tmp_path: Path) -> None:
    command = begin(sys.executable, "-c", STARTER, ranks=2)
    command.kill()
    assert wait_for(tmp_path, "saving", 2) == [f"the end of process {command.pid}, which had started it"] * 2
    assert len(wait_for(tmp_path, "saved", 2)) == 2


DEEPSPEED = ("deepspeed", "--num_gpus", "2", "--no_local_rank")
"""With any port: these ranks do not meet."""


@pytest.fixture
def with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("with_deepspeed")
def test_deepspeeds_launcher_is_halted_while_its_ranks_save(begin: Begin, tmp_path: Path) -> None:
    """It would kill them after half a minute."""
    command = begin(*DEEPSPEED, seconds=3, ranks=2)
    (launcher,) = psutil.Process(command.pid).children()
    os.killpg(command.pid, signal.SIGTERM)
    wait_for(tmp_path, "saving", 2)
    assert launcher.status() == psutil.STATUS_STOPPED
    assert len(wait_for(tmp_path, "saved", 2)) == 2
    assert launcher.wait(60) is None


@pytest.mark.slow
@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("generation", ["command", "launcher"])
def test_ranks_of_deepspeed_do_not_outlive_it(generation: str, begin: Begin, tmp_path: Path) -> None:
    command = begin(*DEEPSPEED, ranks=2)
    killed = psutil.Process(command.pid) if generation == "command" else psutil.Process(command.pid).children()[0]
    killed.kill()
    assert wait_for(tmp_path, "saving", 2) == [f"the end of process {killed.pid}, which had started it"] * 2
    assert len(wait_for(tmp_path, "saved", 2)) == 2


OUTLIVES = """
import sys
from adept_ds.entry_point import outlive_console
outlive_console()
for number in range(20_000):
    print("step", number)
print("done", file=sys.stderr)
"""


def test_a_run_outlives_its_console() -> None:
    """As of `adept-ds train | tee log`, where Ctrl-C ends `tee` too."""
    program = subprocess.Popen([sys.executable, "-c", OUTLIVES], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.close()
    assert program.communicate()[1] == b"done\n"
    assert program.returncode == 0


def test_output_that_nobody_reads_ends_a_command_quietly() -> None:
    command = f"{sys.executable} -m adept_ds train --help all | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
