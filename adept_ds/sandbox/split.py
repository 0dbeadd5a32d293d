"""Takes a problem's tests apart: what the judge's process runs, and the calls that the program's process is asked for.

Each call of the program in a test, with the attributes and calls that hang on it, becomes a *site*: its code goes to
the program's process and is evaluated there among the program's names, its value comes back. Expected values and
comparisons stay with the judge. This is done only for tests that mean the same so, which a list of allowed forms and
names decides; others are `NotSplittable`, run beside the program, and are stamped. What only shows when a program runs
(a value that cannot be carried over unchanged) is found out by the judge.

A second, narrower list decides after which tests the judge's process may serve the next program: after those that
cannot have left anything behind in its interpreter.
"""

from __future__ import annotations

import ast
import builtins
import decimal
import importlib
import itertools
import marshal
import re
import textwrap
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from adept_ds.errors import UserError

from .inside.codec import shorten
from .inside.judge import MODULES
from .program import ERROR_KINDS, Tests

# Expressions are all allowed but for these, statements are not but for those.
_NO_EXPRESSION = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_STATEMENTS = (
    *(ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Assert, ast.For, ast.While, ast.If, ast.Pass, ast.Break),
    *(ast.Continue, ast.Return, ast.Raise, ast.Try, ast.FunctionDef, ast.Import, ast.ImportFrom),
)
_DEFERRED = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.For, ast.While)
# They see or change what two processes do not share: names, identities, addresses, files.
_NO_BUILTINS = """
__import__ __build_class__ breakpoint compile copyright credits delattr dir eval exec exit globals hash help id input
license locals memoryview object open quit setattr super vars
"""
_BUILTINS = {name for name in dir(builtins) if not name.startswith("_")} - set(_NO_BUILTINS.split())
_NUMPY = ("numpy", "numpy.linalg", "numpy.random", "numpy.testing")
_NO_ATTRIBUTES = {
    *("ctypes", "dump", "fromfile", "genfromtxt", "load", "loadtxt", "memmap", "save", "savetxt", "savez"),
    *("savez_compressed", "seed", "set_state", "setstate", "tofile"),
}
_GENERATORS = {"Random", "SystemRandom", "default_rng", "Generator", "RandomState"}
"""What draws from a state of its own; the modules' functions draw from one that a program might have set."""
_SYS = {"maxsize", "getsizeof", "float_info", "version_info"}
_SETS_ONLY = {"len", "set", "frozenset", "isinstance", "type", "bool"}
"""Functions that give the same for a set whatever its order."""


# What leaves nothing behind: constants, functions that compute from their arguments, and `random`, which is set back.
_WHOLE_MODULES = ("bisect", "cmath", "heapq", "itertools", "math")
_NAMES_OF_MODULES = {
    "collections": "Counter OrderedDict defaultdict deque",
    "copy": "copy deepcopy",
    "functools": "cmp_to_key partial reduce",
    "json": "dumps loads",
    "numpy": "abs all allclose any arange array array_equal asarray full isclose isnan linspace ones pi zeros",
    "operator": "add and_ contains eq floordiv ge gt itemgetter le lt mod mul ne neg not_ or_ sub truediv xor",
    "random": "Random choice choices gauss randint random randrange sample shuffle uniform",
    "re": "findall finditer fullmatch match search split sub",
    "statistics": "fmean mean median mode multimode pstdev pvariance stdev variance",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits punctuation whitespace",
    "sys": "float_info maxsize version_info",
    "textwrap": "dedent fill indent shorten wrap",
}
_INERT_NAMES = {name: set(names.split()) for name, names in _NAMES_OF_MODULES.items()} | {
    name: {public for public in dir(importlib.import_module(name)) if not public.startswith("_")}
    for name in _WHOLE_MODULES
}
_INERT_BUILTINS = _BUILTINS - {"getattr", "print", "type"}
_PLAIN: tuple[type, ...] = (
    *(str, bytes, bytearray, int, float, complex, range, list, tuple, dict, set, frozenset, slice, BaseException),
    *(Counter, defaultdict, deque, decimal.Decimal, re.Match, itertools.chain, type({}.keys())),
)
_INERT_ATTRIBUTES = {name for kind in _PLAIN for name in dir(kind)} - {"encode", "decode"}
"""Of plain values; the two import, and keep, what they need for an encoding."""


class NotSplittable(Exception):
    """The tests need the program's own process; the text says what for."""


@dataclass(frozen=True)
class Plan:
    """How to judge a program.

    `judge` is the job of the judge's process, `names` what the program's process compares; both are None if the tests
    run beside the program, for the `reason`.
    """

    judge: dict[str, Any] | None
    names: dict[str, Any] | None
    sources: tuple[str, ...]
    reason: str = ""
    leaves_nothing: bool = False
    """The judge's interpreter is as before when the tests have run."""


def _definitions(reference: str) -> dict[str, ast.stmt]:
    """Return what the reference program defines at its top level, functions and classes, by name."""
    try:
        body = ast.parse(reference).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _bound_names(node: ast.AST) -> list[str]:
    """Return the names that a node itself binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or (isinstance(node, ast.ExceptHandler) and node.name):
        return [cast(str, node.name)]
    return []


def _parts(*nodes: ast.AST) -> list[ast.AST]:
    """Return the nodes and all that is below them; without contexts, and faster than ast.walk."""
    parts = list(nodes)
    for part in parts:
        for field in part._fields if type(part) is not ast.Constant else ():
            value = getattr(part, field, None)
            if type(value) is list:
                parts += [item for item in value if isinstance(item, ast.AST)]
            elif field != "ctx" and isinstance(value, ast.AST):
                parts.append(value)
    return parts


def _all_bound(parts: Iterable[ast.AST]) -> set[str]:
    return {name for part in parts for name in _bound_names(part)}


def _loads(parts: Iterable[ast.AST]) -> list[str]:
    """Return the names whose values are looked at; one that is augmented is looked at, too."""
    return [
        name.id
        for part in parts
        for name in [part.target if isinstance(part, ast.AugAssign) else part]
        if isinstance(name, ast.Name) and (name is not part or isinstance(name.ctx, ast.Load))
    ]


class _Rewriter(ast.NodeTransformer):
    """Puts sites in the place of the program's calls, and refuses what would not mean the same apart from it."""

    def __init__(self, tests: Tests, statements: list[ast.stmt], numpy: bool) -> None:
        self.modules = _modules_at_hand(numpy)
        self.entry_point = tests.entry_point if tests.check else None
        self.defined = _definitions(tests.reference)
        self.setup = _all_bound(_parts(ast.parse(tests.setup)))
        nodes = _parts(*statements)
        self.bound = _all_bound(nodes)
        self.imported = _all_bound(node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
        self.module_names, self.leaves_nothing = dict(self.modules), True
        for alias in [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names if alias.asname]:
            self.leaves_nothing &= self.module_names.setdefault(str(alias.asname), alias.name) == alias.name
        self.functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        self.spans: dict[str, tuple[int, int]] = {}
        self.catches = False
        self.left = Counter(name for name in _loads(nodes) if name in self.bound)
        self.above: list[ast.AST] = []
        self.lone: set[ast.AST] = set()
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        self.called = {function.id for function in calls if isinstance(function, ast.Name)}
        self.sites: list[dict[str, Any]] = []
        self.helpers: set[str] = set()
        self.setup_names: set[str] = set()
        self.assumed: set[str] = set()
        self.assumed_modules: dict[str, str] = {}
        self.drawn: set[str] = set()
        self.deferred = 0

    def is_own(self, name: str) -> bool:
        """Tell whether the program is asked for what a name of the tests stands for."""
        if self.entry_point is not None:
            return name in ("candidate", self.entry_point)
        if name in self.bound or name in self.setup:
            return False
        if self.defined:
            return name in self.defined
        return name in self.called and not (hasattr(builtins, name) or name in self.modules)

    def visit_statements(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Rewrite statements."""
        rewritten = []
        for node in statements:
            loads = _loads(_parts(node)) if self.bound else []
            rewritten.append(cast(ast.stmt, self.visit(node)))
            self.left.subtract(loads)
        return rewritten

    def visit(self, node: ast.AST) -> Any:
        """Rewrite a node, if its kind is allowed."""
        if isinstance(node, ast.stmt):
            if not isinstance(node, _STATEMENTS):
                raise NotSplittable(f"{type(node).__name__} in the tests")
            self.catches |= isinstance(node, ast.Try)
            span = node.lineno, node.end_lineno or node.lineno
            self.spans |= {str(line): span for line in range(span[0], span[1] + 1)}
        if isinstance(node, _NO_EXPRESSION):
            raise NotSplittable(f"{type(node).__name__} in the tests")
        if isinstance(node, ast.expr) and self.is_site(node):
            site = {"call": self.call_code(node), "names": list(self.values), "moved": self.moved}
            return self.site(site, node, list(self.values.values()))
        return self._visit_inside(node)

    def _visit_inside(self, node: ast.AST) -> Any:
        deferred = isinstance(node, _DEFERRED)
        self.deferred += deferred
        self.above.append(node)
        rewritten = super().visit(node)
        self.above.pop()
        self.deferred -= deferred
        return rewritten

    def is_site(self, node: ast.expr) -> bool:
        """Tell whether an expression hangs on one of the program's names and calls it."""
        called = False
        while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
            if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
                return False
            called = called or isinstance(node, ast.Call)
            node = node.func if isinstance(node, ast.Call) else node.value
        return called and isinstance(node, ast.Name) and self.is_own(node.id)

    def call_code(self, node: ast.expr) -> str:
        """Return the code of a function of the tests' own values that makes the call; sets `values` and `moved`."""
        parts = _parts(node)
        for part in parts:
            if isinstance(part, ast.Name) and part.id == "candidate" and self.entry_point is not None:
                part.id = self.entry_point
            if isinstance(part, _NO_EXPRESSION) or (isinstance(part, ast.Name) and part.id.startswith("__")):
                raise NotSplittable(f"{getattr(part, 'id', type(part).__name__)} in a call")
        loads = _loads(parts)
        names = sorted(self.bound.difference(self.imported, _all_bound(parts)).intersection(loads))
        if handed := self.functions.intersection(names):
            raise NotSplittable(f"the tests' function {min(handed)} in a call")
        # Not looked at any more, whatever the call does to it.
        self.moved = [name for name in names if self.left[name] == 1 and not self.deferred]
        copies = _Copies(set(names))
        if any(map(_is_deepcopy, parts)):
            copies.visit(node)
            loads = _loads(_parts(node))
        self.values = {name: _at(node, ast.Name(name, ast.Load())) for name in names if name in loads}
        self.values |= {name: self.visit(copy) for name, copy in copies.found.items()}
        self.moved += copies.found
        names_only = [_at(node, ast.arg(name)) for name in self.values]
        arguments = ast.arguments([], names_only, None, [], [], None, [])
        return _code(ast.Expression(_at(node, ast.Lambda(arguments, node))), "<test>", "eval")

    def site(self, site: dict[str, Any], node: ast.AST, values: Sequence[ast.expr] = ()) -> ast.expr:
        """Return the judge's call of a site with values of the tests."""
        parent = self.above[-1]
        called = parent.func.id if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) else None
        site["orderless"] = isinstance(parent, (ast.Compare, ast.Assert, ast.UnaryOp)) or called in _SETS_ONLY
        site["against"] = parent in self.lone
        deferring = [above for above in self.above if isinstance(above, _DEFERRED)]
        site["repeats"] = bool(deferring) and isinstance(deferring[-1], (ast.For, ast.While))
        self.sites.append(site)
        function, number = ast.Name("__call__", ast.Load()), ast.Constant(len(self.sites) - 1)
        return _at(node, ast.Call(_at(node, function), [_at(node, number), *values], []))

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        """Let an import happen in both processes, since the program may rely on it."""
        for alias in node.names:
            self.check_module(alias.name)
            self.leaves_nothing &= alias.name in _INERT_NAMES
            if alias.name == "sys" and alias.asname:
                raise NotSplittable(f"{ast.unparse(node)} in the tests")
        return self.both(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        """Let an import happen in both processes, since the program may rely on it."""
        self.check_module(node.module or "")
        inert = _INERT_NAMES.get(node.module or "", set())
        self.leaves_nothing &= inert.issuperset(alias.name for alias in node.names)
        if node.module == "sys" or any(alias.name in (*_NO_ATTRIBUTES, "*") for alias in node.names):
            raise NotSplittable(f"{ast.unparse(node)} in the tests")
        return self.both(node)

    def check_module(self, name: str) -> None:
        """Refuse a module that is not on the list."""
        if name not in self.modules.values():
            raise NotSplittable(f"import of {name or 'a relative module'} in the tests")

    def both(self, node: ast.stmt) -> ast.stmt:
        """Return a statement that the program's process and the judge execute."""
        if self.deferred:
            raise NotSplittable(f"{ast.unparse(node)} inside a function or loop of the tests")
        run = _at(node, ast.Expr(self.site({"run": ast.unparse(node)}, node)))
        return _at(node, ast.If(_at(node, ast.Constant(True)), [run, node], []))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Find out whose a name is."""
        name = node.id
        if name.startswith("__"):
            raise NotSplittable(f"name {name}")
        if name in self.module_names or (hasattr(builtins, name) and name not in _INERT_BUILTINS):
            self.leaves_nothing = False
        if name in self.bound:
            if name in self.imported and name in self.modules:  # it may be imported further down only
                self.assumed_modules[name] = self.modules[name]
        elif name in self.setup:
            self.setup_names.add(name)
        elif self.entry_point is not None and name in self.defined and not self.is_own(name):
            self.helpers.add(name)
        elif self.is_own(name):
            raise NotSplittable(f"name {name} as a value")
        elif name in self.modules:
            self.assumed_modules[name] = self.modules[name]
        elif name in _BUILTINS:
            self.assumed.add(name)
        else:
            raise NotSplittable(f"name {name}")
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Refuse what leads to a state that processes do not share."""
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        of_random = (owner or getattr(node.value, "attr", "")) == "random"
        if of_random and node.attr not in _GENERATORS:
            self.drawn.update(_loads(_parts(node.value)))
        if node.attr.startswith("_") or node.attr in _NO_ATTRIBUTES or (owner == "sys" and node.attr not in _SYS):
            raise NotSplittable(f"attribute {node.attr} in the tests")
        module = self.module_names.get(owner)
        inert = _INERT_ATTRIBUTES if module is None else _INERT_NAMES.get(module, set())
        was = self.leaves_nothing and node.attr in inert and isinstance(node.ctx, ast.Load)
        visited = self.generic_visit(node)
        self.leaves_nothing = was and (module is not None or self.leaves_nothing)
        return visited

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Refuse to measure a returned value: a copy may have another size."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "getsizeof" and self.has_site(node):
            raise NotSplittable("the size of a returned value")
        return self.generic_visit(node)

    def has_site(self, node: ast.AST) -> bool:
        """Tell whether the program is asked for something in a node."""
        return any(isinstance(part, ast.expr) and self.is_site(part) for part in _parts(node))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Allow identity only with what there is one of."""
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides[:-1], sides[1:], strict=True):
            if isinstance(operator, (ast.Is, ast.IsNot)) and not (_is_single(left) or _is_single(right)):
                raise NotSplittable("identity of values")
        if sum(map(self.has_site, sides)) == 1:
            self.lone.add(node)
        return self.generic_visit(node)


class _Copies(ast.NodeTransformer):
    """Puts names in the place of deep copies of variables: such a copy is a value that nothing else refers to."""

    def __init__(self, variables: set[str]) -> None:
        self.variables = variables
        self.found: dict[str, ast.expr] = {}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace `copy.deepcopy(variable)`."""
        is_copy = _is_deepcopy(node.func) and len(node.args) == 1
        if is_copy and self.variables.issuperset(_loads(_parts(node.args[0]))):
            name = f"__copy_{len(self.found) + 1}__"
            self.found[name] = node
            return _at(node, ast.Name(name, ast.Load()))
        return self.generic_visit(node)


def _at(node: ast.AST, new: Any) -> Any:
    """Return a new node, in the place of `node`."""
    return ast.copy_location(new, node)


def _is_deepcopy(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "deepcopy" and isinstance(node.value, ast.Name) and node.value.id == "copy"
    return isinstance(node, ast.Name) and node.id == "deepcopy"


def _code(node: ast.Module | ast.Expression, name: str, mode: str) -> str:
    """Return compiled tests as they are sent: the interpreter inside is of the same version."""
    return marshal.dumps(compile(node, name, mode, 0, True, 0)).hex()


def _is_single(node: ast.expr) -> bool:
    """Tell whether an expression is one of the values that every process has exactly one of."""
    if isinstance(node, ast.Constant):
        return node.value is None or node.value is True or node.value is False or node.value is Ellipsis
    return isinstance(node, ast.Name) and isinstance(getattr(builtins, node.id, None), type)


def _parsed(tests: Tests) -> tuple[str, list[ast.stmt]]:
    """Return the tests as one text and as its statements; raises SyntaxError for tests that do not parse."""
    ast.parse(tests.setup)
    text, statements = "", []
    for source in tests.asserts:
        source = textwrap.dedent(source).strip()
        statements += ast.parse("\n" * text.count("\n") + source).body
        text += "\n".join(re.split("\r\n?|\n", source)) + "\n"
    for node in ast.parse("\n" * text.count("\n") + tests.check).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            if tests.entry_point is None or [arg.arg for arg in node.args.args] != ["candidate"]:
                raise NotSplittable("check does not take one argument called candidate")
            statements += node.body
        else:
            statements.append(node)
    return text + "\n".join(re.split("\r\n?|\n", tests.check)), statements


def _modules_at_hand(numpy: bool) -> dict[str, str]:
    """Return the modules that tests may use, by the names that they have without an import."""
    return {name: name for name in (*MODULES, *(_NUMPY if numpy else ()))} | ({"np": "numpy"} if numpy else {})


def modules_named(tests: Tests, numpy: bool) -> dict[str, str]:
    """Return the modules that are at hand for tests beside a program, imported or not, by the names that they use."""
    sources = (tests.setup, tests.check, *tests.asserts)
    named = {name for source in sources for name in _loads(_parts(ast.parse(textwrap.dedent(source).strip())))}
    return {name: module for name, module in _modules_at_hand(numpy).items() if name in named}


def _build(tests: Tests, numpy: bool) -> Plan:
    text, statements = _parsed(tests)
    rewriter = _Rewriter(tests, statements, numpy)
    body = rewriter.visit_statements(statements)
    if not any("call" in site for site in rewriter.sites):
        raise NotSplittable("no call of the program in the tests")
    try:
        code = _code(ast.Module(body, []), "<tests>", "exec")
    except SyntaxError as error:
        raise NotSplittable(f"tests that do not compile: {error.msg}") from None
    before = [tests.reference] if rewriter.helpers else []
    if rewriter.setup_names:
        before.append(tests.setup)
    leaves_nothing = rewriter.leaves_nothing and not (rewriter.catches or before)
    judge = {
        "code": code,
        "text": text,
        "spans": rewriter.spans,
        "sites": rewriter.sites,
        "before": before,
        "setup_names": sorted(rewriter.setup) if rewriter.setup_names else [],
        "modules": sorted(set(rewriter.modules.values())),
        "visible": rewriter.assumed_modules,
        "catches": rewriter.catches,
        "kinds": list(ERROR_KINDS),
        "alone": not leaves_nothing,
    }
    shared = rewriter.bound if tests.asserts else set()  # those of a check stay apart from the program's
    names = {
        "builtins": sorted(rewriter.assumed),
        "modules": rewriter.assumed_modules,
        "bound": sorted((shared - rewriter.imported) | rewriter.drawn),
    }
    return Plan(judge, names, tests.asserts, leaves_nothing=leaves_nothing)


@lru_cache(maxsize=8192)
def plan(tests: Tests, numpy: bool = False) -> Plan:
    """Return the plan for `tests`, which may use `numpy` or not; raises UserError if they do not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escape sequences
            return _build(tests, numpy)
    except NotSplittable as reason:
        return Plan(None, None, tests.asserts, str(reason))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = shorten((getattr(error, "text", None) or "").strip(), 100)
        raise UserError(
            f"tests that do not parse: {error or type(error).__name__}{where and f', in {where!r}'}"
        ) from None
