"""Whole chains on the local SLURM with real programs: ZeRO-3 ranks, decoding, sandbox, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_settings

from .conftest import REPOSITORY, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.root, pytest.mark.slow]


class Chain:
    """submit.py and status.py in a folder, with a config that trains in its `runs/tiny`."""

    FLAGS = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--cpu-partition", "urgent")

    def __init__(self, cluster: Cluster, folder: Path, settings: dict[str, Any]) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "runs" / "tiny"
        (folder / "c.json").write_text(json.dumps(settings))

    def call(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, REPOSITORY / "launchers" / script, *arguments],
            cwd=self.folder,
            env={**self.cluster.environment, "PWD": str(self.folder)},
            capture_output=True,
            text=True,
        )

    def submit(self, benchmark: str) -> subprocess.CompletedProcess[str]:
        return self.call("submit.py", "train", "--config", "c.json", *self.FLAGS, "--then-eval", benchmark)

    def to_its_end(self, benchmark: str) -> dict[str, str]:
        """Submit, wait until all jobs have ended well, and return their ids by kind."""
        done = self.submit(benchmark)
        assert done.returncode == 0, done.stdout + done.stderr
        jobs: dict[str, str] = json.loads((self.run / "slurm" / "submission.json").read_text())["jobs"]
        self.cluster.jobs.extend(jobs.values())
        for job in jobs.values():
            log = self.run / "slurm" / f"{job}.log"
            facts = self.cluster.wait(job, timeout=400)
            assert facts["JobState"] == "COMPLETED", log.read_text() if log.exists() else facts
        return jobs

    def score(self) -> str:
        """What status.py says of the finished run's evaluation."""
        shown = self.call("status.py", "runs/tiny", "--json")
        assert shown.returncode == 0, shown.stderr
        (row,) = json.loads(shown.stdout)
        assert (row["state"], row["step"], row["total_steps"]) == ("finished", 4, 4)
        return row["score"]


def test_train_evaluate_report(cluster: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, Path("runs/tiny"), max_steps=4, warmup_steps=1)
    settings["eval"] = {"max_examples": 6, "generation": {"max_new_tokens": 12}, "sandbox": {"workers": 1}}
    chain = Chain(cluster, tmp_path, settings)
    jobs = chain.to_its_end("mbpp")
    assert cluster.job(jobs["score"])["Partition"] == "urgent"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "runs"]
    summary = json.loads((chain.run / "eval" / "adept" / "summary.json").read_text())
    assert (summary["problems"], summary["samples"], summary["adapter"]) == (6, 6, "runs/tiny/best")
    assert summary["isolation"]["tier"] != "none"
    assert "pass@1" in (chain.run / "report.html").read_text()
    assert chain.score() == f"adept pass@1 {100 * summary['pass@1']['mean']:.1f} %"
    assert chain.submit("mbpp").stdout == "runs/tiny is finished; nothing to do\n"


def test_train_evaluate_report_on_tasks(cluster: Cluster, tiny_t5: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rte"
    folder.mkdir()
    rows = [{"sentence1": f"{['no', 'yes'][i % 2]} {i}", "sentence2": "it is so", "label": i % 2} for i in range(24)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = run_settings(tiny_t5, Path("runs/tiny"), max_steps=4, warmup_steps=1)
    settings["data"] = {"format": "tasks", "tasks": ["rte"], "path": str(tmp_path)}
    chain = Chain(cluster, tmp_path, settings)
    jobs = chain.to_its_end("text2text")
    assert list(jobs) == ["train", "eval", "report"]
    assert (cluster.job(jobs["eval"])["NumNodes"], cluster.job(jobs["report"])["Partition"]) == ("1", "urgent")
    summary = json.loads((chain.run / "eval" / "adept" / "rte" / "summary.json").read_text())
    assert (summary["protocol"]["split"], summary["adapter"]) == ("test", "runs/tiny/best")
    assert "rte" in (chain.run / "report.html").read_text()
    assert chain.score() == f"adept/rte accuracy {100 * summary['metrics']['accuracy']['value']:.1f} %"
    assert chain.submit("text2text").stdout == "runs/tiny is finished; nothing to do\n"
