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

from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.results import program_protocol, task_protocol
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


def test_evaluations_and_jobs_without_gpus_have_places_of_their_own(tmp_path: Path) -> None:
    arguments = ("train", "--config", config(tmp_path), "--dry-run", "--then-eval", "mbpp", "--gpus-per-node", "1")
    arguments += (
        "--partition",
        "gpu",
        "--account",
        "us",
        "--qos",
        "high",
        "--constraint",
        "a100",
        "--time",
        "20:00:00",
    )
    own = ("--eval-time", "60", "--eval-qos", "short", "--cpu-partition", "cpu", "--cpu-account", "free")
    own += ("--cpu-constraint", "avx2")
    found = {kind: places(script) for kind, script in scripts(submit(*arguments, *own, cwd=tmp_path).stdout).items()}
    assert found["train"] == ("gpu", "us", "high", "a100", "20:00:00")
    assert found["eval"] == ("gpu", "us", "short", "a100", "60")
    assert found["score"] == ("cpu", "free", None, "avx2", "02:00:00")
    assert found["report"] == found["score"]
    # What is asked for on one partition may not be there on another.
    elsewhere = scripts(submit(*arguments, "--eval-partition", "small", cwd=tmp_path).stdout)
    assert places(elsewhere["eval"]) == ("small", "us", None, None, "20:00:00")
    assert places(elsewhere["score"])[:4] == ("gpu", "us", "high", "a100")


def places(script: str) -> tuple[str | None, ...]:
    """Partition, account, QOS, constraint and time of a script."""
    values = dict(option.removeprefix("--").partition("=")[::2] for option in options(script))
    return tuple(values.get(name) for name in ("partition", "account", "qos", "constraint", "time"))


def test_pyxis_starts_a_container_by_options_of_srun(tmp_path: Path) -> None:
    done = submit(
        *("train", "--config", config(tmp_path), "--dry-run", "--container-runtime", "pyxis"),
        *("--container", "nvcr.io#nvidia/pytorch:25.01-py3", "--container-mounts", "/data", "/nvme:/scratch"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    script = scripts(done.stdout)["train"]
    names = ["ADEPT_DS_CONTAINER_IMAGE", "ADEPT_DS_CONTAINER_MOUNTS", "ADEPT_DS_PYTHON", "ADEPT_DS_TOOL_PYTHON"]
    image, mounts, python, tool = run_site_block(script, names, tmp_path)[:4]
    assert image == "nvcr.io#nvidia/pytorch:25.01-py3"
    assert f"{tmp_path}:{tmp_path}" in mounts.split(",")
    assert mounts.endswith(",/data:/data,/nvme:/scratch")
    # Ranks run in the container; what the batch script itself runs cannot.
    assert (python, tool) == ("python3", sys.executable)
    shared = (REPOSITORY / "launchers" / "slurm" / "job.sh").read_text()
    shell = shared + '\nsrun() { printf \'%s\\n\' "$@"; }\nexec() { "$@"; }\nrun_ranks /logs/rank -m adept_ds train\n'
    ran = subprocess.run(
        ["bash", "-c", shell],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", names[0]: image, names[1]: mounts, names[2]: python},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.splitlines()
    assert f"--container-image={image}" in words
    assert f"--container-mounts={mounts}" in words
    assert f"--container-workdir={tmp_path}" in words


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--container", "nowhere/image.sif"), "container is 'nowhere/image.sif': no such file or folder"),
        (("--container", "imge"), "container is 'imge': no such file or folder"),
        (("--container", "/x.sqsh", "--container-runtime", "pyxis"), "container is '/x.sqsh': no such file or folder"),
        (("--container", "docker://python:3.11"), None),
        (("--container", "nvidia/pytorch:25.01-py3", "--container-runtime", "pyxis"), None),
        (("--container", "image", "--container-command", "podman run"), None),
        (("--python", "/nowhere/python"), "python is '/nowhere/python': no such file"),
        (("--python", "python3"), None),
    ],
)
def test_an_image_or_interpreter_that_is_not_there_is_told_before(
    flags: tuple[str, ...], problem: str | None, tmp_path: Path
) -> None:
    done = submit("train", "--config", config(tmp_path), "--dry-run", "--gpus-per-node", "1", *flags, cwd=tmp_path)
    assert done.returncode == (problem is not None)
    assert (problem or "") in done.stderr


def test_what_makes_a_rank_is_no_setting_of_a_site(tmp_path: Path) -> None:
    done = submit("train", "--config", config(tmp_path), "--env", "MASTER_PORT=29500", cwd=tmp_path)
    assert done.returncode == 2
    assert "MASTER_PORT differs from rank to rank or job to job, and is set by the job itself" in done.stderr


def test_a_run_folder_below_a_file_is_told_before(tmp_path: Path) -> None:
    path = config(tmp_path, logging={"run_dir": "run.json/x"})
    done = submit("train", "--config", path, "--dry-run", "--gpus-per-node", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert f"logging.run_dir is 'run.json/x', and {path} is no folder" in done.stderr


def test_a_shells_rank_does_not_silence_a_mistake(tmp_path: Path) -> None:
    done = submit("train", "--config", "nope.json", cwd=tmp_path, RANK="3", WORLD_SIZE="8")
    assert done.returncode == 2
    assert "nope.json" in done.stderr


def test_leftovers_of_a_login_shell_do_not_reach_the_ranks(tmp_path: Path) -> None:
    left_over = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMI_RANK")
    left_over += ("OMPI_COMM_WORLD_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_CPU_BIND", "ACCELERATE_USE_DEEPSPEED")
    kept = {"SLURM_JOB_ID": "1", "OMPI_MCA_btl": "tcp", "NCCL_SOCKET_IFNAME": "ib0"}
    script = (REPOSITORY / "launchers" / "slurm" / "job.sh").read_text() + "\nenv\n"
    environment = {"PATH": os.environ["PATH"], **dict.fromkeys(left_over, "7"), **kept}
    shown = subprocess.run(["bash", "-uc", script], env=environment, capture_output=True, text=True, check=True).stdout
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert not names & set(left_over)
    assert names >= kept.keys()


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
    write_adapter(run_dir / "best", "new")
    samples = write_samples(run_dir / "eval" / "adept", path, "new")
    assert list(scripts(submit(*arguments, cwd=tmp_path).stdout)) == ["score", "report"]
    (samples.parent / "summary.json").write_text('{"samples_sha256": "of other samples"}')
    assert list(scripts(submit(*arguments, cwd=tmp_path).stdout)) == ["score", "report"]
    (samples.parent / "summary.json").write_text('{"samples_sha256": "s"}')
    assert "nothing to do" in submit(*arguments, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("adapter", "change", "reason"),
    [
        ("old", {}, "not of the adapter that is in runs/x/best now"),
        (None, {}, "not of the adapter that is in runs/x/best now"),
        ("new", {"split": "validation"}, "by another protocol (split)"),
        ("new", {"generation": {}}, "by another protocol (generation)"),
        ("new", {"k": [1, 10]}, "of other settings (k)"),
        ("new", {"max_examples": 5}, "of other settings (max_examples)"),
    ],
)
def test_figures_of_another_adapter_or_protocol_do_not_count(
    adapter: str | None, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = config(tmp_path)
    run_dir = tmp_path / "runs" / "x"
    write_adapter(run_dir / "best", "new")
    (run_dir / "status.json").write_text('{"state": "finished", "step": 20, "total_steps": 20}')
    samples = write_samples(run_dir / "eval" / "adept", path, adapter, **change)
    (samples.parent / "summary.json").write_text('{"samples_sha256": "s"}')
    done = submit("train", "--config", path, "--then-eval", "mbpp", "--dry-run", cwd=tmp_path)
    assert list(scripts(done.stdout)) == ["eval", "score", "report"]
    assert f"evaluated anew: runs/x/eval/adept/generation.json: {reason}" in done.stderr


def test_a_tuned_model_without_a_digest_is_told_by_time(tmp_path: Path) -> None:
    path = config(tmp_path)
    run_dir = tmp_path / "runs" / "x"
    samples = write_samples(run_dir / "eval" / "adept", path, None)
    (samples.parent / "summary.json").write_text('{"samples_sha256": "s"}')
    (run_dir / "status.json").write_text('{"state": "finished", "step": 20, "total_steps": 20}')
    (run_dir / "best").mkdir()
    (run_dir / "best" / "config.json").write_text("{}")
    arguments = ("train", "--config", path, "--then-eval", "mbpp", "--dry-run")
    for age, left in ((60, []), (-60, ["eval", "score", "report"])):
        now = samples.stat().st_mtime
        os.utime(run_dir / "best" / "config.json", (now - age, now - age))
        assert list(scripts(submit(*arguments, cwd=tmp_path).stdout)) == left


def write_adapter(folder: Path, digest: str) -> None:
    """What an adapter folder says of its tensors."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"tensors_sha256": digest}))


def write_samples(out: Path, path: Path, digest: str | None, **change: Any) -> Path:
    """A `generation.json` of the run of a config and of an adapter, with some of it changed."""
    run = RunConfig.model_validate(json.loads(path.read_text()))
    protocol = program_protocol(run, "test")
    protocol |= {name: value for name, value in change.items() if name in protocol}
    facts = {"adapter": "runs/x/best", "adapter_sha256": digest, "protocol": protocol, "samples_sha256": "s"}
    stored = {
        "facts": facts,
        "data": run.data.model_dump(mode="json"),
        "max_examples": run.eval.max_examples,
        "k": [1],
        "paper_scoring": False,
    }
    stored |= {name: value for name, value in change.items() if name in stored}
    out.mkdir(parents=True, exist_ok=True)
    (out / "generation.json").write_text(json.dumps(stored))
    return out / "generation.json"


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
    write_adapter(tmp_path / "runs" / "x" / "best", "new")
    run = RunConfig.model_validate(json.loads(path.read_text()))
    for task, digest, left in (
        ("rte", "new", ["eval", "report"]),
        ("cb", "new", []),
        ("cb", "old", ["eval", "report"]),
    ):
        folder = tmp_path / "runs" / "x" / "eval" / "adept" / task
        folder.mkdir(parents=True, exist_ok=True)
        protocol = {**task_protocol(run, task, "test"), "max_new_tokens": 4}
        (folder / "summary.json").write_text(json.dumps({"adapter_sha256": digest, "protocol": protocol}))
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
