"""A whole chain on the local SLURM with real programs: ZeRO-3 ranks, decoding, sandbox, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_settings

from .conftest import REPOSITORY, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.root, pytest.mark.slow]


def test_train_evaluate_report(cluster: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, Path("runs/tiny"), max_steps=4, warmup_steps=1)
    settings["eval"] = {"max_examples": 6, "generation": {"max_new_tokens": 12}, "sandbox": {"workers": 1}}
    (tmp_path / "c.json").write_text(json.dumps(settings))

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, REPOSITORY / "launchers" / script, *arguments],
            cwd=tmp_path,
            env={**cluster.environment, "PWD": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    flags = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--cpu-partition", "urgent")
    done = call("submit.py", "train", "--config", "c.json", *flags, "--then-eval", "mbpp")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"
    jobs = json.loads((run / "slurm" / "submission.json").read_text())["jobs"]
    cluster.jobs.extend(jobs.values())
    for job in jobs.values():
        log = run / "slurm" / f"{job}.log"
        facts = cluster.wait(job, timeout=400)
        assert facts["JobState"] == "COMPLETED", log.read_text() if log.exists() else facts
    assert cluster.job(jobs["score"])["Partition"] == "urgent"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "runs"]

    summary = json.loads((run / "eval" / "adept" / "summary.json").read_text())
    assert (summary["problems"], summary["samples"], summary["adapter"]) == (6, 6, "runs/tiny/best")
    assert summary["isolation"]["tier"] != "none"
    assert "pass@1" in (run / "report.html").read_text()
    shown = call("status.py", "runs/tiny", "--json")
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["state"], row["step"], row["total_steps"]) == ("finished", 4, 4)
    assert row["score"] == f"adept pass@1 {100 * summary['pass@1']['mean']:.1f} %"
    again = call("submit.py", "train", "--config", "c.json", *flags, "--then-eval", "mbpp")
    assert again.stdout == "runs/tiny is finished; nothing to do\n"
