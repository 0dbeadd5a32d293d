"""What a text is as Python: whether it compiles, what it defines, and what it needs."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import warnings
from dataclasses import dataclass


def compiles(source: str) -> bool:
    """Whether a text is Python."""
    return line_of_mistake(source) is None


def line_of_mistake(source: str) -> int | None:
    """Line of the first mistake, from 1; None if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Only compile() refuses a `return` that has slipped out of the function, only parse() what nests too deep.
            compile(source, "<answer>", "exec", dont_inherit=True)
            ast.parse(source)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, MemoryError, RecursionError):
            return 1
    return None


def statements(source: str) -> list[ast.stmt]:
    """Return the statements of a source; none if it does not compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source).body if compiles(source) else []


def body_margin(prompt: str) -> str:
    """Return the indentation of the body that a signature and docstring ask for."""
    last = prompt.rstrip().rpartition("\n")[2]
    return last[: len(last) - len(last.lstrip())] or "    "


@dataclass(frozen=True)
class Names:
    """What Python defines at its top level, and what it needs from elsewhere."""

    defined: frozenset[str] = frozenset()
    """Imports included, functions that only stand for ones still to be written not."""
    imported: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    has_definitions: bool = False
    """Whether a function or a class is among them."""


_BUILTIN = frozenset(dir(builtins)) | {"__file__", "__name__"}


def names_of(source: str) -> Names:
    """Names of a source; of one that does not compile the functions and classes that it would define."""
    if not compiles(source):
        return Names(frozenset(re.findall(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", source, re.MULTILINE)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = symtable.symtable(source, "<answer>", "exec")
    functions = [node for node in statements(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    stubs = {function.name for function in functions if _is_stub(function)}
    defined, imported, needed, has_definitions = set(), set(), set(), False
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_bound = symbol.is_assigned() or symbol.is_imported()
            if is_bound and (table is top or symbol.is_declared_global()):
                defined.add(symbol.get_name())
                imported |= {symbol.get_name()} if symbol.is_imported() else set()
                has_definitions |= symbol.is_namespace() and symbol.get_name() not in stubs
            elif symbol.is_referenced() and (table is top or symbol.is_global()):
                needed.add(symbol.get_name())
    needed -= defined | _BUILTIN
    return Names(frozenset(defined - stubs), frozenset(imported), frozenset(needed), has_definitions)


def _is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it only stands for one that is still to be written."""
    lines = (line.value if isinstance(line, ast.Expr) else line for line in function.body)
    return all(isinstance(line, ast.Pass | ast.Constant) for line in lines)
