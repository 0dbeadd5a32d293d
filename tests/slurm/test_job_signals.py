"""Warnings, cancelling, requeues and caps of a job, on the local SLURM with the stub trainer."""

from __future__ import annotations

import pytest

from .conftest import Cluster, StubRun

pytestmark = [pytest.mark.slurm, pytest.mark.root]


def test_a_run_ends_and_its_history_has_one_line(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit()
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    (line,) = stub.history()
    assert (line["job"], line["try"], line["nodes"], line["world_size"]) == (job, 0, ["n1", "n2"], 4)
    assert (line["from_step"], line["to_step"], line["ended_by"], line["requeued"]) == (0, 20, "finished", False)
