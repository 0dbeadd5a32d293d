"""Turns a problem's tests into a plan that runs in the grader and asks the candidate's process for single calls.

The tests' syntax tree is checked against a list of harmless constructs and rewritten into a generator: every call of
a candidate's function becomes a `yield` of that call, answered by the value that came back. So literals, expected
values and comparisons stay in the grader. Tests that need more than plain values (objects of the program's own classes,
changes made to an argument, modules that `allowed` does not list) are `NotSplittable`; they run in the candidate's
process, and their verdicts say so. Whether that is so depends on the tests and the reference program only.
"""

from __future__ import annotations

import ast
import textwrap
import types
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adept_ds.errors import UserError

from .allowed import GROWING_CALLS, GROWING_OPERATORS, SYNTAX, surroundings
from .inside.codec import Nested, shorten
from .program import Tests


class NotSplittable(Exception):
    """The tests need the candidate's own process; the text says what for."""


@dataclass(frozen=True)
class Call:
    """A call to be made in the candidate's process."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Steps = Generator["Call | int", Any, None]
"""Yields the number of the statement it begins, and calls to be answered; ends if all tests pass, raises if not."""


@dataclass(frozen=True)
class Plan:
    """How to judge a program: `start` gives the steps in the grader, or is None if the tests run beside the program."""

    start: Callable[[], Steps] | None
    sources: tuple[str, ...]
    """The tests' statements, shortened by whoever shows them."""
    reason: str = ""
    """Why the tests could not be split."""


_DEFERRED = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _defined(reference: str) -> tuple[set[str], set[str]]:
    """Return the names of functions and of classes that the reference program defines at its top level."""
    try:
        body = ast.parse(reference).body
    except (SyntaxError, ValueError):
        return set(), set()
    functions = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            functions |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return functions, {node.name for node in body if isinstance(node, ast.ClassDef)}


class _Rewriter(ast.NodeTransformer):
    """Rewrites the tests' statements into the body of the generator."""

    def __init__(
        self, local: set[str], functions: set[str], classes: set[str], entry_point: str | None, numpy: bool
    ) -> None:
        self.visible, self.modules, self.attributes = surroundings(numpy)
        self.local, self.functions, self.classes, self.entry_point = local, functions, classes, entry_point
        self.imported: dict[str, Any] = {}
        self.sources: list[str] = []
        self.deferred = 0
        self.calls = 0

    def candidate_function(self, node: ast.expr) -> str | None:
        """Return the candidate's name for the function that a call names, or None if it is not the candidate's."""
        if not isinstance(node, ast.Name):
            return None
        if self.entry_point is not None and node.id == "candidate":
            return self.entry_point
        if node.id in self.local or node.id in self.imported:
            return None
        if node.id in self.functions or node.id in self.classes or node.id not in self.visible:
            return node.id
        return None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, SYNTAX):
            raise NotSplittable(f"{type(node).__name__} in the tests")
        if isinstance(node, _DEFERRED):
            self.deferred += 1
            node = super().generic_visit(node)
            self.deferred -= 1
            return node
        return super().generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = self.module(alias.name)
            if alias.asname is None and "." in alias.name:  # `import a.b` binds a
                self.imported[alias.name.partition(".")[0]] = self.module(alias.name.partition(".")[0])
            else:
                self.imported[alias.asname or alias.name] = module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self.module(node.module or "")
        for alias in node.names:
            if not hasattr(module, alias.name):
                raise NotSplittable(f"import of {node.module}.{alias.name} in the tests")
            self.imported[alias.asname or alias.name] = getattr(module, alias.name)

    def module(self, name: str) -> Any:
        if name not in self.modules:
            raise NotSplittable(f"import of {name or 'a relative module'} in the tests")
        return self.modules[name]

    def begin(self, node: ast.stmt) -> list[ast.stmt]:
        """Return the step that says which statement is reached; called before the statement is rewritten."""
        self.sources.append(ast.unparse(node))
        return [] if self.deferred else [ast.Expr(ast.Yield(ast.Constant(len(self.sources) - 1)))]

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [*self.begin(node), ast.Assert(self.visit(node.test), None)]

    def visit_Expr(self, node: ast.Expr) -> list[ast.stmt]:
        if not isinstance(node.value, ast.Call):
            return [ast.Expr(self.visit(node.value))]
        if self.candidate_function(node.value.func):
            raise NotSplittable("a call for its side effects")
        return [*self.begin(node), ast.Expr(self.visit(node.value))]  # one of numpy.testing, for example

    def has_candidate_call(self, node: ast.AST) -> bool:
        """Tell whether a value of the candidate's choice goes into `node`."""
        return any(isinstance(part, ast.Call) and self.candidate_function(part.func) for part in ast.walk(node))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, GROWING_OPERATORS) and self.has_candidate_call(node):
            raise NotSplittable("a product or power of a returned value, whose size would be the candidate's choice")
        return self.generic_visit(node)

    def viewed_module(self, node: ast.expr) -> types.SimpleNamespace | None:
        """Return the view of the module that an expression names, if it names one."""
        value = None
        if isinstance(node, ast.Name) and node.id not in self.local:
            value = self.imported.get(node.id, self.visible.get(node.id))
        elif isinstance(node, ast.Attribute):
            value = getattr(self.viewed_module(node.value), node.attr, None)
        return value if isinstance(value, types.SimpleNamespace) else None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        module = self.viewed_module(node.value)
        known = node.attr in self.attributes if module is None else hasattr(module, node.attr)
        if not known or node.attr.startswith("_") or not isinstance(node.ctx, ast.Load):
            raise NotSplittable(f"attribute {node.attr} in the tests")
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if self.candidate_function(node) is not None:
            raise NotSplittable(f"name {node.id} as a value")
        if node.id.startswith("__"):
            raise NotSplittable(f"name {node.id}")
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = self.candidate_function(node.func)
        if name is None:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in GROWING_CALLS.split() and self.has_candidate_call(node):
                raise NotSplittable(f"{called}() of a returned value, whose size would be the candidate's choice")
            return self.generic_visit(node)
        if self.deferred:
            raise NotSplittable("a call inside a comprehension or function of the tests")
        if name in self.classes or (name not in self.functions and name != self.entry_point and name[:1].isupper()):
            raise NotSplittable(f"an object of the program's class {name}")
        self.calls += 1
        return ast.Yield(self.call_node("__call__", name, node))

    def call_node(self, maker: str, name: str, node: ast.Call) -> ast.Call:
        if any(keyword.arg is None for keyword in node.keywords):
            raise NotSplittable("a call with ** arguments")
        args = ast.Tuple([self.argument(arg) for arg in node.args], ast.Load())
        kwargs = ast.Dict(
            [ast.Constant(keyword.arg) for keyword in node.keywords],
            [self.argument(keyword.value) for keyword in node.keywords],
        )
        return ast.Call(ast.Name(maker, ast.Load()), [ast.Constant(name), args, kwargs], [])

    def argument(self, node: ast.expr) -> ast.expr:
        """Rewrite one argument; calls of the program's own functions and classes in it are made in its process."""
        if isinstance(node, ast.Call) and (name := self.candidate_function(node.func)) is not None:
            return self.call_node("__nested__", name, node)
        if isinstance(node, (ast.List, ast.Tuple)):
            return type(node)([self.argument(item) for item in node.elts], ast.Load())
        rewritten: ast.expr = self.visit(node)
        return rewritten


def _changed_arguments(statements: list[ast.stmt], rewriter: _Rewriter) -> None:
    """Refuse tests that pass a variable to the candidate and look at it afterwards, as for in-place sorting."""
    handed: set[str] = set()
    for statement in statements:
        inside: set[int] = set()
        now: set[str] = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and rewriter.candidate_function(node.func) is not None:
                now |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}
                inside |= {id(part) for arg in node.args for part in ast.walk(arg)}
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and id(node) not in inside
                and node.id in handed
            ):
                raise NotSplittable(f"variable {node.id} is looked at after a call may have changed it")
        handed |= now


def _statements(tests: Tests) -> list[ast.stmt]:
    """Return the tests as one list of statements; raises SyntaxError for tests that do not parse."""
    statements: list[ast.stmt] = []
    for source in (tests.setup, *tests.asserts):
        statements += ast.parse(textwrap.dedent(source).strip()).body
    for node in ast.parse(tests.check).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            if tests.entry_point is None or [arg.arg for arg in node.args.args] != ["candidate"]:
                raise NotSplittable("check does not take one argument called candidate")
            statements += node.body
        else:
            statements.append(node)
    return statements


def _build(statements: list[ast.stmt], tests: Tests, more_functions: set[str], numpy: bool) -> tuple[Plan, int]:
    stored = {name for statement in statements for node in ast.walk(statement) if (name := _bound_name(node))}
    functions, classes = _defined(tests.reference)
    entry_point = tests.entry_point if tests.check else None
    rewriter = _Rewriter(stored, functions | more_functions, classes, entry_point, numpy)
    _changed_arguments(statements, rewriter)
    body: list[ast.stmt] = []
    for statement in statements:
        new = rewriter.visit(statement)
        body += new if isinstance(new, list) else [new] if new is not None else []
    never = ast.If(ast.Constant(False), [ast.Expr(ast.Yield(None))], [])
    empty = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    function = ast.FunctionDef("steps", empty, [never, *body], [])
    module = ast.fix_missing_locations(ast.Module([function], []))
    space = rewriter.visible | rewriter.imported | {"__call__": Call, "__nested__": Nested, "__builtins__": {}}
    exec(compile(module, "<tests>", "exec"), space)
    return Plan(space["steps"], tuple(rewriter.sources)), rewriter.calls


def _bound_name(node: ast.AST) -> str | None:
    """Return the name that a node binds in the tests, if it binds one."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) else None


def _outermost_calls(statements: list[ast.stmt]) -> set[str]:
    """Return the functions called at the left of the asserts: the candidate's, if it has names of builtins."""
    found = set()
    for statement in statements:
        if isinstance(statement, ast.Assert):
            left = statement.test.left if isinstance(statement.test, ast.Compare) else statement.test
            if isinstance(left, ast.Call) and isinstance(left.func, ast.Name):
                found.add(left.func.id)
    return found


@lru_cache(maxsize=8192)
def plan(tests: Tests, numpy: bool = False) -> Plan:
    """Return the plan for `tests`, which may use `numpy` or not; raises UserError if they do not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escape sequences
            statements = _statements(tests)
            built, calls = _build(statements, tests, set(), numpy)
            if calls == 0 and not tests.reference:
                built, calls = _build(_statements(tests), tests, _outermost_calls(statements), numpy)
            return built
    except NotSplittable as reason:
        return Plan(None, (*tests.asserts,), str(reason))
    except (SyntaxError, ValueError) as error:
        where = shorten((getattr(error, "text", None) or "").strip(), 100)
        raise UserError(f"tests that do not parse: {error}{where and f', in {where!r}'}") from None
