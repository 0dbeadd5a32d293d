"""Sites, checks and scripts of `launchers/submit.py`, all that needs no SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adept_ds.errors import UserError
from adept_ds.slurm.script import quote_option, quote_variable, render
from adept_ds.slurm.site import SiteConfig, parse_time
from adept_ds.slurm.submission import job_name

from .conftest import REPOSITORY

SUBMIT = REPOSITORY / "launchers" / "submit.py"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
HOSTILE = """a b'c"d $(touch x) `touch y` \\n #; & | > *"""


def submit(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call submit.py where there is no SLURM."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ADEPT_DS_", "HF_"))
    }
    return subprocess.run(
        [sys.executable, SUBMIT, *map(str, arguments)],
        cwd=cwd,
        env={**environment, "PATH": f"{cwd / 'nothing'}", "PWD": str(cwd), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def config(folder: Path, **sections: Any) -> Path:
    """A config whose model is a hub id."""
    settings = {
        "model": {"name_or_path": "owner/model"},
        "train": {"max_steps": 20, "warmup_steps": 1, "global_batch_size": 8},
        "logging": {"run_dir": "runs/x"},
        **sections,
    }
    path = folder / "run.json"
    path.write_text(json.dumps(settings))
    return path


def scripts(output: str) -> dict[str, str]:
    """The scripts that --dry-run prints, by kind."""
    parts = re.split(r"^==> .*?(\w+)\.sbatch'? <==\n", output, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def run_site_block(script: str, variables: list[str], cwd: Path) -> list[str]:
    """The variables, and the positional arguments, that a node's shell has after the site's lines."""
    lines = script.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("# --- site"))
    end = next(number for number, line in enumerate(lines) if line.startswith("# --- job"))
    show = "printf '%s\\0' " + " ".join(f'"${name}"' for name in variables) + ' "$@"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*lines[start:end], show])],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_a_dry_run_prints_complete_scripts_and_writes_nothing(tmp_path: Path) -> None:
    path = config(tmp_path)
    done = submit(
        *("train", "--config", path, "--nodes", "2", "--gpus-per-node", "4", "--then-eval", "mbpp", "--dry-run"),
        *("--partition", "gpu", "--cpu-partition", "cpu", "--qos", "high", "--account", "us", "--mem", "0"),
        *("--exclusive", "--extra=--mail-type=END", "--warning-seconds", "60"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = scripts(done.stdout)
    assert list(found) == ["train", "eval", "score", "report"]
    train = options(found["train"])
    assert set(train) >= {
        *("--partition=gpu", "--qos=high", "--account=us", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"),
        *("--cpus-per-task=8", "--mem=0", "--exclusive", "--time=24:00:00", "--signal=B:USR1@60", "--requeue"),
        *(
            "--dependency=singleton",
            "--mail-type=END",
            f"--chdir={tmp_path}",
            f"--output={tmp_path}/runs/x/slurm/%j.log",
        ),
    }
    score = options(found["score"])
    assert {"--partition=cpu", "--account=us", "--ntasks=1", "--kill-on-invalid-dep=yes"} <= set(score)
    assert not any(option.startswith(("--gpus", "--qos", "--exclusive", "--mem")) for option in score)
    assert "--nodes=1" in options(found["eval"])
    assert "--dependency=afterok:JOB_ID_OF_TRAIN" in done.stdout
    assert len({option for script in found.values() for option in options(script) if "job-name" in option}) == 4
    for script in found.values():
        assert "source " not in re.sub(r"^#.*$", "", script, flags=re.MULTILINE)  # complete in itself
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        if SHELLCHECK:
            subprocess.run([SHELLCHECK, "--severity=warning", "-"], input=script, text=True, check=True)
    assert sorted(tmp_path.iterdir()) == [path]


def test_flags_beat_the_site_and_the_site_beats_defaults(tmp_path: Path) -> None:
    site = tmp_path / "site.json"
    site.write_text(json.dumps({"partition": "gpu", "gpus_per_node": 4, "gpu_request": "gres", "gpu_type": "a100"}))
    arguments = ("train", "--config", config(tmp_path), "--dry-run", "--partition", "other")
    for flags, variables in (({"--site": site}, {}), ({}, {"ADEPT_DS_SITE": str(site)})):
        words = [word for pair in flags.items() for word in pair]
        done = submit(*arguments, *words, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        assert {"--partition=other", "--gres=gpu:a100:4", "--cpus-per-task=8"} <= set(
            options(scripts(done.stdout)["train"])
        )


@pytest.mark.parametrize("name", ["online_modules.json", "offline_container.json"])
def test_the_example_sites_work(name: str, tmp_path: Path) -> None:
    site = REPOSITORY / "launchers" / "slurm" / "sites" / name
    path = config(tmp_path, data={"path": "nope.jsonl"})
    done = submit("train", "--config", path, "--site", site, "--dry-run", cwd=tmp_path)
    assert "it would be refused here: data.path is 'nope.jsonl'" in done.stderr
    assert ("owner/model" in done.stderr) == json.loads(site.read_text()).get("offline", False)
    assert "module load" in done.stdout or "export ADEPT_DS_CONTAINER='apptainer exec" in done.stdout


def test_the_cluster_page_lists_every_key_of_a_site_with_its_default() -> None:
    page = (REPOSITORY / "docs" / "slurm.md").read_text()
    for name, field in SiteConfig.model_fields.items():
        default = "" if field.default in (None, "", (), {}) else f"`{json.dumps(field.default)}`"
        assert f"| `{field.alias or name}` | {default} |" in page


def test_everything_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "run" $(touch x)'
    folder.mkdir()
    path = config(folder, logging={"run_dir": HOSTILE.replace("\\", "").replace("/", "")})
    done = submit(
        *(
            "train",
            "--config",
            path,
            "--dry-run",
            "--env",
            f"HOSTILE={HOSTILE}",
            "ANSWER=${HOME}/x",
            "LAST=$",
            "--scratch",
        ),
        *("/scratch/$USER a", "--then-eval", "mbpp", "--gpus-per-node", "0"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found = scripts(done.stdout)
    home = os.environ["HOME"]
    os.environ.setdefault("USER", "me")
    names = ["HOSTILE", "ANSWER", "LAST", "ADEPT_DS_SCRATCH"]
    run_dir = folder / HOSTILE.replace("\\", "").replace("/", "")
    for kind, arguments in (("train", [str(run_dir / "slurm" / "config.json")]), ("report", [run_dir.name])):
        values = run_site_block(found[kind], names, tmp_path)
        assert values == [HOSTILE, f"{home}/x", "$", f"/scratch/{os.environ['USER']} a", *arguments]
    assert [path for name in "xy" for path in tmp_path.rglob(name)] == []


@pytest.mark.parametrize(
    ("option", "quoted"),
    [
        ("--time=1-00:00:00", "--time=1-00:00:00"),
        ("--output=a b/%j.log", '--output="a b/%j.log"'),
        ('--comment=it\'s # "x" \\', '--comment="it\'s # \\"x\\" \\\\"'),
        ("--chdir=/ä", '--chdir="/ä"'),
    ],
)
def test_options_are_quoted_for_sbatch(option: str, quoted: str) -> None:
    assert quote_option(option) == quoted


def test_only_names_are_variables_in_a_value() -> None:
    text = "$HOME ${HOME} $(id) `id` $1x \\ \" ' ${HOME:-x}"
    done = subprocess.run(["bash", "-c", f"printf %s {quote_variable(text)}"], capture_output=True, text=True)
    home = os.environ["HOME"]
    assert done.stdout == text.replace("${HOME}", home, 1).replace("$HOME", home)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    site = tmp_path / "site.json"
    site.write_text('{"partitoin": "gpu", "gpus_per_node": "8", "time": "soon", "env": {"a b": "x"}, "extra": ["x"]}')
    done = submit(
        "train", "--config", config(tmp_path), "--site", site, "--model.dtpe", "x", "--nods", "2", cwd=tmp_path
    )
    assert done.returncode == 2
    for message in (
        "--nods: unknown flag; did you mean '--nodes'?",
        'partitoin = "gpu" (',
        "did you mean partition or cpu_partition?",
        "write the number without quotes",
        "'soon': expected a time such as",
        "'a b' is no name of an environment variable",
        "'x': expected an option of sbatch",
        "did you mean model.dtype?",
    ):
        assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_would_fail_in_the_queue_is_told_before(tmp_path: Path) -> None:
    path = config(tmp_path, data={"path": "nope.jsonl"}, model={"name_or_path": "./model"})
    done = submit("train", "--config", path, "--nodes", "3", "--gpus-per-node", "1", "--time", "5", cwd=tmp_path)
    assert done.returncode == 2
    for message in (
        "is not submitted: 5 problems",
        "the global batch must divide by the world size",
        "warning_seconds is 300, and time is '5'",
        "model.name_or_path is './model': no such folder",
        "data.path is 'nope.jsonl': no such file or folder",
        "SLURM is not installed here (no sbatch)",
    ):
        assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_offline_nodes_need_what_the_hub_has_in_the_cache(tmp_path: Path) -> None:
    path = config(tmp_path, data={"format": "tasks", "tasks": ["rte"]})
    done = submit(
        *("train", "--config", path, "--offline", "--dry-run", "--env", f"HF_HOME={tmp_path / 'hub'}"),
        *("--gpus-per-node", "0"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "config.json is not in this machine's cache, and the nodes are offline" in done.stderr
    assert "is not in this machine's cache, and the nodes are offline; fetch it where the hub" in done.stderr
    values = run_site_block(scripts(done.stdout)["train"], ["HF_HUB_OFFLINE", "HF_DATASETS_CACHE"], tmp_path)
    assert values[:2] == ["1", str(tmp_path / "hub" / "datasets")]


def test_the_planner_is_asked_where_the_memory_is_known(tmp_path: Path) -> None:
    model = tmp_path / "model"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(model)
    torch.manual_seed(0)
    path = config(tmp_path, model={"name_or_path": str(model)})
    arguments = ("train", "--config", path, "--dry-run", "--gpus-per-node", "1")
    fits = submit(*arguments, "--gpu-memory", "80GB", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    too_large = submit(*arguments, "--gpu-memory", "1MB", cwd=tmp_path)
    assert too_large.returncode == 1
    assert "the run does not fit into gpu_memory 1MB" in too_large.stderr


def test_a_run_with_other_settings_is_refused_before_the_queue(tmp_path: Path) -> None:
    path = config(tmp_path)
    shown = submit("train", "--config", path, "--print-config", cwd=tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.json").write_text(shown.stdout)
    done = submit("train", "--config", path, "--train.seed", "7", "--gpus-per-node", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds a run with other settings: train.seed was 42 and is now 7" in done.stderr


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    path = config(tmp_path)
    run_dir = tmp_path / "runs" / "x"
    (run_dir / "eval" / "adept").mkdir(parents=True)
    (run_dir / "status.json").write_text('{"state": "finished", "step": 20, "total_steps": 20}')
    done = submit("train", "--config", path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/x is finished; nothing to do\n")
    arguments = ("train", "--config", path, "--then-eval", "mbpp", "--dry-run")
    assert list(scripts(submit(*arguments, cwd=tmp_path).stdout)) == ["eval", "score", "report"]
    (run_dir / "eval" / "adept" / "generation.json").write_text("{}")
    assert list(scripts(submit(*arguments, cwd=tmp_path).stdout)) == ["score", "report"]
    (run_dir / "eval" / "adept" / "summary.json").write_text("{}")
    assert "nothing to do" in submit(*arguments, cwd=tmp_path).stdout


def test_tasks_are_scored_where_they_are_generated(tmp_path: Path) -> None:
    path = config(tmp_path, data={"format": "tasks", "tasks": ["rte", "cb"], "path": str(tmp_path)})
    arguments = ("train", "--config", path, "--dry-run", "--then-eval")
    found = scripts(submit(*arguments, "text2text", cwd=tmp_path).stdout)
    assert list(found) == ["train", "eval", "report"]
    (command,) = (line for line in found["eval"].splitlines() if line.startswith("set -- "))
    assert command.endswith("/slurm/config.json --adapter runs/x/best --out runs/x/eval/adept")
    assert "-m adept_ds text2text" in found["eval"]
    assert "--dependency=afterok:JOB_ID_OF_EVAL" in submit(*arguments, "text2text", cwd=tmp_path).stdout

    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "status.json").write_text('{"state": "finished"}')
    for task, left in (("rte", ["eval", "report"]), ("cb", [])):
        folder = tmp_path / "runs" / "x" / "eval" / "adept" / task
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        assert list(scripts(submit(*arguments, "text2text", cwd=tmp_path).stdout)) == left

    refused = submit(*arguments, "mbpp", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--then-eval mbpp: data.format is 'tasks', expected --then-eval text2text" in refused.stderr
    refused = submit("eval", "--config", path, "--k", "1", "10", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--k and --paper-scoring are MBPP's; data.format is 'tasks'" in refused.stderr


def test_adapters_that_a_run_starts_from_are_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    method = {
        "name": "mpt",
        "tasks": ["rte", "cb"],
        "teachers": {"rte": "teacher", "cb": "teachr"},
        "init_from": "runs/source/best",
    }
    data = {"format": "tasks", "tasks": ["rte", "cb"], "path": str(tmp_path)}
    path = config(tmp_path, data=data, method=method)
    done = submit("train", "--config", path, "--dry-run", cwd=tmp_path)
    assert done.returncode == 1
    assert "method.teachers.cb is 'teachr': no such folder; did you mean 'teacher'?" in done.stderr
    assert "method.init_from is 'runs/source/best': no such folder" in done.stderr
    assert "method.teachers.rte" not in done.stderr
    # An adapter that is trained does not need them any more.
    done = submit("eval", "--config", path, "--adapter", "teacher", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_names_of_jobs_tell_run_folders_apart(tmp_path: Path) -> None:
    assert job_name(tmp_path / "a" / "run") != job_name(tmp_path / "b" / "run")
    assert re.fullmatch(r"adept_ds-it_s_-[0-9a-f]{8}\.eval", job_name(Path("/x/it's "), "eval"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("1-12", 129_600),
        ("1-00:30:05", 88_205),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


def test_a_script_without_its_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sbatch").write_text("#!/bin/bash\n")
    with pytest.raises(UserError, match="there is no line '# --- resources'"):
        render(tmp_path / "x.sbatch", [], [], [])
