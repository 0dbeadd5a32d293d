"""A server as a SLURM job: it says where it is, and comes back under the same file's name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.serving import make_family

from .conftest import REPOSITORY, Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.root, pytest.mark.slow]
STUB = """#!{python}
import http.server, sys
if sys.argv[1] == "-I":
    print('["vllm", "0.32.0"]')
else:
    values = dict(zip(sys.argv, sys.argv[1:]))
    http.server.test(http.server.SimpleHTTPRequestHandler, port=int(values["--port"]), bind=values["--host"])
"""
"""Says that it has vLLM, and serves the folder that it is started in."""
ASK = "import sys, urllib.request as u; print(u.build_opener(u.ProxyHandler({})).open('http://' + sys.argv[1]).status)"


def test_the_file_leads_to_the_server(cluster: Cluster, tmp_path: Path) -> None:
    family = make_family(tmp_path / "served", {"short": (3, 1)})
    python, address = tmp_path / "python", tmp_path / "server.txt"
    python.write_text(STUB.format(python=sys.executable))
    python.chmod(0o755)
    resources = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=10", "--output=serve.log")
    job = cluster.sbatch(
        *(*resources, REPOSITORY / "launchers" / "slurm" / "serve.sbatch", address),
        *("--base", family.serving, "--folder", family.tasks),
        cwd=tmp_path,
        ADEPT_VLLM_PYTHON=str(python),
    )

    def said() -> str:
        return (tmp_path / "serve.log").read_text() if (tmp_path / "serve.log").exists() else "no log"

    def answers() -> bool:
        where = address.read_text().strip() if address.exists() else ""
        node, _, port = where.partition(":")
        return (
            bool(node) and cluster.execute(node, sys.executable, "-c", ASK, f"127.0.0.1:{port}", check=False) == "200\n"
        )

    wait_for(answers, 60, said)
    assert "serving base (no adapter), short at http://127.0.0.1:" in said()
    cluster.run("scontrol", "requeue", job)
    wait_for(lambda: not address.exists(), 30, said)
    cluster.wait(job, "RUNNING", restarts=1)
    wait_for(answers, 60, said)
    cluster.run("scancel", job)
    wait_for(lambda: not address.exists(), 30, said)
