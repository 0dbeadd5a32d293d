"""Runs model-written programs in isolation and judges them by their tests.

    with Sandbox() as sandbox:
        for verdict in sandbox.run([Program("a", "def f(x): return x + 1", Tests(("assert f(1) == 2",)))]):
            print(verdict)

`run` yields verdicts as they are found: wrap it in `tqdm(..., total=len(programs))` for a progress bar. It works in a
notebook as in a script, and beside a loaded model: workers are started by exec, not forked from the caller.

Covered, where the kernel lets an unprivileged user have namespaces (see `doctor` for this machine):

- The host: no file, process, socket, device or environment variable of it is in reach; only the interpreter, the
  system's libraries and the packages that the caller names can be read. Every program has its own processes, scratch
  folder and shared memory, and they end with it.
- The machine: CPU and wall time, memory of all processes together, their number, files, descriptors and output are
  limited.
- The verdict: expected values never enter the program's process. The grader makes each call from outside and compares
  plain values itself, so to pass a program must return what is right.

Where namespaces are refused, bubblewrap or a seccomp allow-list stands in; what each tier leaves open is in
`Sandbox.isolation`, to be stored with the results.

Not covered: holes in the kernel, timing and other side channels; tests that need the program's own objects, which run
beside it and mark the verdict `in_process`; test code itself, which is checked for harmless constructs but trusted not
to be endless; what the packages bring along, which runs with the program's rights and is trusted not to hold answers.
"""

from __future__ import annotations

from .grader import Sandbox
from .inside.codec import decode
from .program import ERROR_KINDS, Limits, Program, SandboxFailure, SandboxUnavailable, Tests, Verdict
from .values import NoValue, Values

__all__ = [
    "ERROR_KINDS",
    "Limits",
    "NoValue",
    "Program",
    "Sandbox",
    "SandboxFailure",
    "SandboxUnavailable",
    "Tests",
    "Values",
    "Verdict",
    "decode",
]
