"""The command `adept-ds`: its overview, help, completion, recipes, ranks, and all of it from an installed wheel."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adept_ds.cli import recipes as recipes_command
from adept_ds.cli.local_ranks import Children
from adept_ds.cli.main import COMMANDS, MODULES, main
from adept_ds.config.loader import load_config
from adept_ds.config.recipes import shipped_configs
from adept_ds.errors import UserError
from tests.conftest import losses, run_settings
from tests.ranks import REPOSITORY

SCREEN = (50, 100)
"""Lines and columns that a command's help has to do with."""
OWN_HELP = {"submit": ("train", "eval", "sweep", "stop"), "analyse": ("sizes", "speed", "variant", "power")}
"""Commands that have commands of their own."""
ALL_HELP = [(name,) for name in MODULES] + [(name, own) for name, words in OWN_HELP.items() for own in words]


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in MODULES)
    assert all(heading in shown for heading in COMMANDS)
    assert len(shown.splitlines()) <= SCREEN[0]


@pytest.mark.parametrize("words", ALL_HELP, ids=" ".join)
def test_a_commands_help_fits_a_screen(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(SCREEN[1]))
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert f"adept-ds {' '.join(words)}" in shown
    assert len(shown.splitlines()) <= SCREEN[0]


def test_a_command_that_is_not_there_has_a_nearest() -> None:
    with pytest.raises(UserError, match=r"tran: no such command; did you mean 'train'\?"):
        main(["tran"])


@pytest.mark.parametrize("words", [("recipes",), ("train", "--help"), ("status", "RUN")], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_without_a_reader_a_command_ends_in_silence(words: tuple[str, ...], unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "status.json").write_text('{"state": "finished", "step": 1, "total_steps": 1}')
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "adept_ds", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode != 0  # as the signal SIGPIPE would have ended it


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("OSError(errno.ENOSPC, 'No space left on device', '/x')", "error: /x: No space left on device"),
        ("OSError(errno.ENOSPC, 'No space left on device')", "error: [Errno 28] No space left on device"),
        ("PermissionError(errno.EACCES, 'Permission denied', '/x')", "error: /x: Permission denied"),
    ],
)
def test_what_lies_outside_the_program_is_no_traceback(error: str, message: str, tmp_path: Path) -> None:
    program = (
        f"import errno\nfrom adept_ds.entry_point import run_entry_point\n"
        f"def main(words):\n    raise {error}\nrun_entry_point(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def complete(line: str, tmp_path: Path) -> list[str]:
    """What a shell is told for a command line that the cursor is at the end of."""
    answer = tmp_path / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": str(REPOSITORY),
    }
    subprocess.run([sys.executable, "-m", "adept_ds"], env=environment, check=True, timeout=60)
    return [word.strip() for word in answer.read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("adept-ds tr", "train"),
        ("adept-ds train --config x --dry", "--dry_run"),
        ("adept-ds train --train.warm", "--train.warmup_steps"),
        ("adept-ds train --model.dtype b", "bf16"),
        ("adept-ds compare --o", "--out"),
    ],
)
def test_a_shell_completes_commands_flags_settings_and_choices(line: str, word: str, tmp_path: Path) -> None:
    assert word in complete(line, tmp_path)


def test_recipes_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    recipes_command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert all(20 < len(line) <= 120 for line in lines)


def test_a_recipe_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine.json"
    recipes_command.main(["t5_base", "--out", str(copy)])
    assert load_config(copy).run == load_config("ds_configs/t5_base.json").run
    with pytest.raises(UserError, match="this file is there already"):
        recipes_command.main(["t5_base", "--out", str(copy)])
    with pytest.raises(UserError, match="did you mean 't5_base'"):
        recipes_command.main(["t5_bas"])


WRITE_RANK = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text('')"
FAIL_ON_1 = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)"
RANKS = [{"RANK": str(rank)} for rank in range(3)]


def test_each_rank_is_a_process_of_its_own(tmp_path: Path) -> None:
    assert Children().run([sys.executable, "-c", WRITE_RANK, str(tmp_path)], RANKS) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_rank_that_fails_ends_the_others_and_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adept_ds.cli.local_ranks.GRACE_SECONDS", 0.5)
    started = time.monotonic()
    assert Children().run([sys.executable, "-c", FAIL_ON_1], RANKS) == 7
    assert time.monotonic() - started < 60


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adept-ds` from the wheel in an environment outside the repository, which sees this one's other packages."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # Folders that a .pth file names are searched, but their own .pth files, one of which leads to the repository, not.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    return folder / "bin" / "adept-ds"


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(installed: Path, environment: dict[str, str], tmp_path: Path) -> Call:
    """Run the installed command in an empty folder."""
    own = {name: value for name, value in environment.items() if not name.startswith(("PYTHON", "ADEPT_DS"))}

    def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [installed, *arguments], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.mark.slow
def test_the_wheel_trains_evaluates_and_tries(call: Call, tiny_llama: Path, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, Path("run"), max_steps=4, save_every=4)
    settings["eval"] = {"every_steps": 4, "generation": {"max_new_tokens": 4, "do_sample": False}}
    (tmp_path / "my.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('a file of the user, not the library')")
    done = call("train", "--config", "my.json", "--ranks", "2")
    assert len(losses(tmp_path / "run")) == 4
    assert "[INFO]" not in done.stdout + done.stderr
    call("eval", "--config", "my.json", "--adapter", "run/best", "--split", "validation", "--out", "run/eval/adept")
    assert json.loads((tmp_path / "run/eval/adept/summary.json").read_text())["problems"] == 12
    tried = call("try", "--adapter", "run/best", "--max-new-tokens", "4", "def f(x):").stdout
    assert "with" in tried
    assert "page:" in call("report", "run").stdout


@pytest.mark.slow
def test_the_wheel_writes_complete_batch_scripts(call: Call) -> None:
    script = call("submit", "train", "--config", "smollm2_135m_demo", "--gpus-per-node", "0", "--dry-run").stdout
    assert "run_ranks() {" in script
    assert "-m adept_ds train --resume auto" in script
    assert "export ADEPT_DS_ROOT=''" in script
    assert str(REPOSITORY) not in script
    assert "\nsource " not in script


@pytest.mark.slow
def test_the_wheel_has_a_doctor_and_recipes(call: Call) -> None:
    assert "'auto' uses: " in call("doctor").stdout
    assert len(call("recipes").stdout.splitlines()) == len(shipped_configs())
