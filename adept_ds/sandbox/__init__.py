"""Runs model-written programs in isolation and judges them by their tests."""

from __future__ import annotations

from .grader import Sandbox
from .program import (
    ERROR_KINDS,
    Limits,
    Program,
    SandboxFailure,
    SandboxUnavailable,
    Tests,
    Verdict,
)

__all__ = ["ERROR_KINDS", "Limits", "Program", "Sandbox", "SandboxFailure", "SandboxUnavailable", "Tests", "Verdict"]
