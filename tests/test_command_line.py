"""The command line of `launchers/train.py`: flags, overrides, help, and how it ends on a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adept_ds.cli.main import MODULES
from adept_ds.config.command_line import parse_command_line, parse_flags
from adept_ds.config.loader import flatten, load_config
from adept_ds.config.schema import declared_settings, method_docs
from adept_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = str(REPOSITORY / "ds_configs" / "llama3_8b.json")


def parse(*arguments: str):
    return parse_command_line(arguments, "train.py", "Trains.")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert not caught.value.code
    return capsys.readouterr().out


def message(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        ("--train.learning_rate.soft_prompt", "3e-1"),
        ("--train.learning_rate.soft_prompt=3e-1",),
        ("--train.learning-rate.soft-prompt", "0.3"),
    ],
)
def test_an_override_in_every_spelling(override):
    assert parse("--config", CONFIG, *override)[1].run.train.learning_rate.soft_prompt == 0.3


def test_a_negative_number_is_a_value(tmp_path):
    assert "train.seed = -1 (command line)" in message("--config", CONFIG, "--train.seed", "-1")


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_the_rank_that_the_deepspeed_launcher_passes_is_accepted(flag):
    assert parse(flag, "--config", CONFIG)[1].run.model.name_or_path == "meta-llama/Meta-Llama-3-8B"


def test_a_shipped_config_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "llama3_8b")[1].run == load_config(CONFIG).run
    (tmp_path / "llama3_8b").write_text('{"model": {"name_or_path": "mine"}, "train": {"epochs": 1}}')
    assert parse("--config", "llama3_8b")[1].run.model.name_or_path == "mine"


def test_training_flags():
    flags, _ = parse("--config", CONFIG, "--dry-run", "--resume", "auto", "--world-size", "4")
    assert (flags.dry_run, flags.resume, flags.world_size) == (True, "auto", 4)


def test_an_entry_point_adds_its_own_flags():
    arguments = ["--config", CONFIG, "--num-shots", "2"]
    flags, _ = parse_command_line(arguments, "x", "x", lambda parser: parser.add_argument("--num_shots", type=int))
    assert flags.num_shots == 2
    assert "dry_run" not in flags


def test_help_documents_every_setting(capsys):
    text = printed(capsys, "--help", "all")
    words = " ".join(text.split())
    for setting in [setting for method in method_docs() for setting in declared_settings(method).values()]:
        assert f"--{setting.key}  {setting.type}, " in text
        assert setting.doc in words
        assert setting.doc


def test_help_of_a_section_has_its_settings_alone(capsys):
    text = printed(capsys, "--help", "eval")
    keys = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert keys == [f"--{key}" for key in declared_settings() if key.startswith("eval.")]
    assert "--help tran: expected one of" in message("--help", "tran")


def test_help_shows_each_method_with_its_settings(capsys):
    text = printed(capsys, "--help", "method")
    for name, doc in method_docs().items():
        assert " ".join(f"method {name}: {doc}".split()) in " ".join(text.split())
    assert text.count("--method.name ") == 1


def test_print_config_prints_a_config_that_loads(capsys, tmp_path):
    text = printed(capsys, "--config", CONFIG, "--train.epochs", "3", "--print_config")
    path = tmp_path / "printed.json"
    path.write_text(text)
    assert load_config(path).run == load_config(CONFIG, ["train.epochs=3"]).run


def test_print_config_sources_names_the_source_of_every_value(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = printed(capsys, "--config", CONFIG, "--train.epochs", "3", "--print-config", "sources")
    lines = text.splitlines()
    assert "train.epochs = 3  (command line)" in lines
    assert "train.micro_batch_size = 2  (derived for world size 2)" in lines
    assert 'train.schedule = "linear"' in text
    assert "train.save_every = null  (default)" in lines
    assert len(lines) == len(flatten(load_config(CONFIG).run.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--config FILE is needed"),
        (("--config", "llama3_8"), "--config llama3_8: no such file; did you mean 'llama3_8b'?"),
        (("--confg", CONFIG), "--confg: unknown flag; did you mean '--config'?"),
        (("--config", CONFIG, "--epochs", "3"), "--epochs: unknown flag (unknown key; did you mean train.epochs?)"),
        (("--config", CONFIG, "--train.epochs"), "--train.epochs: expected a value"),
        (("--config", CONFIG, "train.epochs=3"), "train.epochs=3: unexpected"),
        (("--config", CONFIG, "--train.epoch", "3"), "train.epoch = 3 (command line)\n      unknown key; did you mean"),
        (("--config", CONFIG, "--world_size", "0"), "expected an integer >= 1"),
        (("--config", CONFIG, "--print_config", "yaml"), "'yaml'"),
        (("--config",), "--config"),
        (("--config", CONFIG.replace("llama3", "lama3")), "llama3_8b.json'?"),
    ],
)
def test_a_mistake_on_the_command_line(arguments, expected):
    assert expected in message(*arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--out", "x", "a", "b"), "b: unexpected; expected no more than that before it"),
        (("--adapter", "a"), "--adapter: unknown flag; it is told without one: usage: tool [-h] [--out OUT] adapter"),
        (("a", "--uot=3"), "--uot=3: unknown flag; did you mean '--out'?"),
    ],
)
def test_a_mistake_where_no_config_is_read(arguments, expected):
    def add(parser):
        parser.add_argument("adapter")
        parser.add_argument("--out")

    with pytest.raises(UserError) as caught:
        parse_flags(arguments, "tool", "", add)
    assert expected in str(caught.value)


def test_problems_of_flags_and_settings_are_told_together():
    text = message("--config", CONFIG, "--dryrun", "--train.epochs", "0", "--model.dtype", "fp8")
    assert "--dryrun: unknown flag; did you mean '--dry_run'?" in text
    assert "train.epochs = 0 (command line)" in text
    assert 'model.dtype = "fp8" (command line)' in text


def run_launcher(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launchers/train.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model": {"name_or_path": "x"}, "train": {"epoch": 3}}', "train.epoch = 3"),
        ('{"model": {"name_or_path": "x"}, "train": {"epochs": 3},}', "line 1, column 57"),
        ('{"model": {"name_or_path": "x"}, "train": {"epochs": 3}, "deepspeed": {"optimizer": {}}}', "two learning"),
    ],
)
def test_the_launcher_ends_with_the_message_and_a_failure_status(tmp_path, text, expected):
    path = tmp_path / "run.json"
    path.write_text(text)
    process = run_launcher("--config", str(path))
    assert process.returncode != 0
    assert expected in process.stderr
    assert "Traceback" not in process.stderr


def test_the_launcher_prints_the_resolved_config():
    process = run_launcher("--config", CONFIG, "--print_config")
    assert process.returncode == 0
    assert json.loads(process.stdout)["train"]["epochs"] == 10


def test_settings_are_read_without_torch_or_deepspeed():
    code = (
        "import sys; from adept_ds.config.command_line import parse_command_line as parse;"
        f"parse(['--config', {CONFIG!r}], 'x', 'x');"
        "assert not {'torch', 'deepspeed', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_commands_start_without_torch_and_before_the_hub_has_read_its_settings():
    # `submit --env HF_HOME=..` counts only while no library has read it.
    modules = ", ".join(f"adept_ds.{module}" for module in MODULES.values() if module.startswith("cli."))
    code = (
        f"import sys, {modules};"
        "found = {'torch', 'deepspeed', 'transformers', 'huggingface_hub', 'datasets'} & sys.modules.keys();"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
