"""What goes into the sandbox and what comes out: programs with their tests, limits, verdicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from adept_ds.errors import UserError

Status = Literal["passed", "failed", "error", "timeout", "sandbox_error"]
ERROR_KINDS = ("exception", "exit", "signal", "memory", "output", "syntax", "import", "protocol", "violation")
"""Why a program ended without an answer: an exception at module level; an exit before the last answer; a fatal signal
(also one sent by the system call filter); too much memory or output; source that does not compile; a missing module;
nonsense on, or the loss of, the channel to the grader; more processes or files than allowed, where the kernel does not
itself refuse them."""

MIN_MEMORY_MB = 64


class SandboxUnavailable(UserError):
    """The isolation asked for cannot be had here; the message names the missing facility."""


class SandboxFailure(RuntimeError):
    """The sandbox itself failed repeatedly on one program, so no verdict would be honest."""


@dataclass(frozen=True)
class Tests:
    """The tests of one problem, in MBPP's form (`asserts`, `setup`) or HumanEval's (`check`, `entry_point`)."""

    __test__ = False

    asserts: tuple[str, ...] = ()
    """Statements in order, run after the candidate's code and after `setup`."""
    setup: str = ""
    """Code that runs after the candidate's and before the asserts (MBPP's `test_setup_code`)."""
    check: str = ""
    """Source that defines `check(candidate)`."""
    entry_point: str | None = None
    """Name of the function that is handed to `check`."""
    reference: str = ""
    """A reference program; what it defines fixes whether the tests are kept out of the candidate's process."""


@dataclass(frozen=True)
class Program:
    """A whole candidate program and the tests that it is to pass."""

    id: str
    source: str
    tests: Tests
    cpu_seconds: float = 0.0
    """CPU time that it is given if the limits give less; wall time grows by the same factor."""


@dataclass(frozen=True)
class Limits:
    """What one program may use; all figures are for the program with all its child processes."""

    wall_seconds: float = 20.0
    """From the start of the program to its last answer."""
    cpu_seconds: float = 10.0
    """CPU time of all its processes."""
    memory_mb: int = 1024
    """Resident memory of all its processes, with the files in its scratch folder."""
    address_space_extra_mb: int = 768
    """Address space that a process may map beyond `memory_mb`: libraries and thread stacks that are never touched."""
    processes: int = 64
    """Processes and threads at one time."""
    file_size_mb: int = 64
    """Size of one file."""
    scratch_mb: int = 128
    """Size of the private scratch folder."""
    scratch_files: int = 4096
    """Files and folders in the scratch folder."""
    open_files: int = 128
    """Open descriptors of one process."""
    output_bytes: int = 32_000_000
    """What is written to stdout and stderr is read and thrown away; more than this is taken for output without end."""
    answer_bytes: int = 8_000_000
    """Size of one returned value in the grader's encoding."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise UserError(f"sandbox limit {name} = {value!r}: expected a positive number")
        if self.memory_mb < MIN_MEMORY_MB:
            raise UserError(f"sandbox limit memory_mb = {self.memory_mb}: the interpreter alone needs {MIN_MEMORY_MB}")
        if self.open_files < 32:
            raise UserError(f"sandbox limit open_files = {self.open_files}: expected at least 32")

    def of(self, program: Program) -> Limits:
        """The limits of one program."""
        more = max(1.0, program.cpu_seconds / self.cpu_seconds)
        return replace(self, cpu_seconds=more * self.cpu_seconds, wall_seconds=more * self.wall_seconds)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one program."""

    id: str
    status: Status
    kind: str | None
    """For `error` one of `ERROR_KINDS`; for `failed` "exception" if a tested call raised, None if a value was wrong."""
    detail: str
    """The failed assertion with what was got, or an exception's type and text, shortened."""
    seconds: float
    """Wall time from the start of the program to its end."""
    in_process: bool
    """The tests had to run inside the candidate's process, where a hostile program can reach them."""
    reason: str = ""
    """Why they had to."""
