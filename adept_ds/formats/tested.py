"""What the tests of a problem are about, and whether they test anything."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

from adept_ds.errors import UserError
from adept_ds.formats.python_source import names_of
from adept_ds.sandbox import Tests

MOST_TESTS = 10_000
"""Statements that the tests of one problem may have: the grader takes seconds for as many, with every program."""


def tested_names(tests: Tests) -> frozenset[str]:
    """Return what a program must define: the entry point, or what of the reference program the asserts mention."""
    if tests.entry_point is not None:
        return frozenset([tests.entry_point])
    mentioned = {name for source in (tests.setup, *tests.asserts) for name in _mentioned(_parse(source))}
    names = names_of(tests.reference)
    return ((names.defined - names.imported) & mentioned) - names_of(tests.setup).defined


def check_tests(tests: Tests, where: str) -> None:
    """Raise UserError for tests that are no Python, that are too many, or that every program would pass.

    Such are those that mention nothing which the program defines, and an assert of a tuple with its message in it.
    `where`: file and line of the problem, for the message.
    """
    field = "test_list" if tests.entry_point is None else "test"
    sources = tests.asserts if tests.entry_point is None else (tests.check,)
    if len(sources) > MOST_TESTS:
        raise _too_many(where, field, len(sources))
    _parsed(tests.setup, f"{where}: test_setup_code")
    parsed = [
        _parsed(source, f"{where}: {field}, test {number}" if tests.entry_point is None else f"{where}: {field}")
        for number, source in enumerate(sources, 1)
    ]
    count = sum(isinstance(node, ast.stmt) for tree in parsed for node in ast.walk(tree))
    if count > MOST_TESTS:
        raise _too_many(where, field, count)
    for tree in parsed:
        if (always := next(_always_true(tree), None)) is not None:
            raise UserError(
                f"{where}: `{ast.unparse(always)[:80]}` in {field} is true for every program; expected `assert "
                "CONDITION, MESSAGE` without brackets around both"
            )
    if tests.entry_point is None:
        if not tested_names(tests):
            defined = ", ".join(sorted(names_of(tests.reference).defined)) or "nothing"
            raise UserError(
                f"{where}: test_list tests nothing, every program would pass it; expected asserts about what code "
                f"defines ({defined})"
            )
        return
    check = next((node for node in parsed[0].body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None or not check.args.args:
        raise UserError(f"{where}: test defines no function check(candidate)")
    if check.args.args[0].arg not in _mentioned(check) and tests.entry_point not in _mentioned(check):
        raise UserError(
            f"{where}: check in test tests nothing, every program would pass it; expected asserts about "
            f"{check.args.args[0].arg}"
        )


def _too_many(where: str, field: str, count: int) -> UserError:
    return UserError(
        f"{where}: {field} has {count:,} statements, and one problem may have {MOST_TESTS:,}; expected loops over the "
        "values, or fewer of them"
    )


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _parsed(source: str, which: str) -> ast.Module:
    try:
        return _parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{which} is not valid Python ({error})") from None


def _mentioned(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _always_true(tree: ast.AST) -> Iterator[ast.Assert]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            condition = node.test
            is_display = isinstance(condition, ast.Tuple | ast.List | ast.Set) and condition.elts
            if is_display or isinstance(condition, ast.Lambda):
                yield node
