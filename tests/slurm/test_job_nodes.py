"""The check of the nodes and the staging of weights, on the local SLURM with the stub trainer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from .conftest import Cluster, StubRun
from .test_job_signals import warn

pytestmark = [pytest.mark.slurm, pytest.mark.root]


def test_faults_of_one_node_end_the_job_before_anything_is_loaded(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run = StubRun(cluster, tmp_path, data={"format": "jsonl", "path": str(data / "train.jsonl")})
    # Of another version on n2, as its metadata say, which are all that is looked at.
    metadata = importlib.metadata.distribution("accelerate").locate_file(
        f"accelerate-{importlib.metadata.version('accelerate')}.dist-info/METADATA"
    )
    other = tmp_path / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.0.1\n")
    cluster.execute("n2", "mkdir", "-p", "/mnt/small")
    cluster.execute("n2", "mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", "/mnt/small")
    cluster.execute("n2", "mount", "-t", "tmpfs", "tmpfs", str(data))
    cluster.execute("n2", "mount", "--bind", str(other), str(metadata))
    try:
        job = run.submit(ADEPT_DS_NODE_CHECK="1", ADEPT_DS_SCRATCH="/mnt/small", HF_HUB_OFFLINE="0")
        assert cluster.wait(job, timeout=60)["JobState"] == "FAILED"
    finally:
        for place in (metadata, data, "/mnt/small"):
            cluster.execute("n2", "umount", str(place))
    log = run.last_words()
    assert "n2: 0.0 GB are free on ADEPT_DS_SCRATCH /mnt/small, expected 1" in log
    assert f"n2: data.path is '{data}/train.jsonl': no such file or folder" in log
    assert f"n2: accelerate is 0.0.1, on n1 it is {importlib.metadata.version('accelerate')}" in log
    assert "  n1: " not in log
    assert "--exclude=n2" in log
    assert not (run.run_dir / "seen").exists()
    (line,) = run.history()
    assert line["ended_by"] == "failed"
    assert "--exclude=n2" in line["error"]


def test_a_fault_of_all_nodes_excludes_none(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit("--nodes=1", ADEPT_DS_NODE_CHECK="1", HF_HUB_OFFLINE="1")
    assert cluster.wait(job, timeout=60)["JobState"] == "FAILED"
    log = stub.last_words()
    assert "n1: model.name_or_path is 'stub/model', of which config.json is not in this machine's cache" in log
    assert "--exclude" not in log


def test_weights_are_copied_once_to_each_node_and_used_again(cluster: Cluster, tmp_path: Path) -> None:
    model = tmp_path / "my model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (model / name).write_text(f"{name} of {tmp_path}")
    run = StubRun(cluster, tmp_path, model={"name_or_path": str(model)})
    job = run.submit(ADEPT_DS_STAGE="1", STUB_STEP_SECONDS="0.2")
    run.wait_for_step(2)
    warn(cluster, job)
    assert cluster.wait(job, restarts=1)["JobState"] == "COMPLETED", run.last_words()
    log = run.last_words()
    for node in ("n1", "n2"):
        assert log.count(f"{node}: copied") == 1
        assert log.count("is there already") == 2
    (staged,) = {rank["model"] for restarts in (0, 1) for rank in run.seen(restarts)}
    assert staged.startswith("/mnt/scratch/models/")
    assert staged.endswith("/my model")
    for node in ("n1", "n2"):
        assert cluster.execute(node, "ls", staged).split() == ["config.json", "model.safetensors"]
    assert not Path(staged).exists()  # they are the nodes' own disks
