"""What tests may use when they run in the grader: syntax, builtins, modules and attributes, all harmless by themselves.

The lists are of what is allowed, never of what is not; tests that use anything else run in the candidate's process.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import types
from functools import lru_cache
from typing import Any

SYNTAX = (
    # statements
    ast.Module,
    ast.Expr,
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Assert,
    ast.For,
    ast.If,
    ast.Pass,
    ast.Break,
    ast.Continue,
    ast.Return,
    ast.Raise,
    ast.Try,
    ast.ExceptHandler,
    # functions
    ast.FunctionDef,
    ast.Lambda,
    ast.arguments,
    ast.arg,
    ast.Call,
    ast.keyword,
    ast.Starred,
    # names and parts
    ast.Name,
    ast.Load,
    ast.Store,
    ast.Attribute,
    ast.Subscript,
    ast.Slice,
    # values
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.JoinedStr,
    ast.FormattedValue,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.comprehension,
    # operations
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.IfExp,
    ast.boolop,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)

_BUILTINS = """
abs all any ascii bin bool bytearray bytes chr complex dict divmod enumerate filter float frozenset hash hex int
isinstance issubclass iter len list map max min next object oct ord pow print range repr reversed round set slice sorted
str sum tuple type zip Ellipsis NotImplemented
"""
_EXCEPTIONS = [
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
]
_MODULES = """
math cmath random copy string itertools collections operator functools statistics fractions decimal datetime heapq
bisect numbers re
"""
_HIDDEN = {"operator": {"attrgetter", "methodcaller"}, "functools": {"singledispatch", "singledispatchmethod"}}
_PLAIN_TYPES = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice)

# numpy has functions that read files, map memory or run code, so what is shown of it is listed.
_NUMPY = {
    "numpy": """
    abs absolute all allclose amax amin any append arange argmax argmin argsort array array_equal array_equiv asarray
    atleast_1d atleast_2d average bool bool_ broadcast_to ceil clip column_stack complex128 complex64 concatenate cos
    count_nonzero cross cumprod cumsum degrees diag diff dot dtype e empty equal exp expand_dims eye flip fliplr flipud
    float16 float32 float64 floating floor full full_like generic hstack identity inf inner int16 int32 int64 int8
    int_ integer isclose isfinite isin isinf isnan isscalar linspace log log10 log2 logical_and logical_not logical_or
    logspace matmul max maximum mean median min minimum mod nan nan_to_num nanmax nanmean nanmin nansum ndarray ndim
    newaxis nonzero number ones ones_like outer percentile pi prod quantile radians ravel repeat reshape roll rot90
    round rint shape sign sin size sort sqrt squeeze stack std str_ subtract sum tan tanh tile trace transpose trapezoid
    tril triu uint16 uint32 uint64 uint8 unique var vstack where zeros zeros_like
    """,
    "numpy.linalg": "cond cholesky det eig eigh eigvals eigvalsh inv lstsq matrix_rank norm pinv qr solve svd",
    "numpy.random": "default_rng RandomState",
    "numpy.testing": """
    assert_allclose assert_almost_equal assert_array_almost_equal assert_array_equal assert_equal
    """,
}
_NUMPY_ATTRIBUTES = """
T all allclose any argmax argmin argsort array_equal astype choice copy diagonal dot dtype flatten imag integers item
kind max mean min name ndim nonzero normal permutation prod rand randint randn random ravel real reshape round shape
size squeeze std sum tolist trace transpose uniform var
"""

# What may be far larger than the values that it is made of.
GROWING_OPERATORS = (ast.Pow, ast.LShift, ast.Mult, ast.MatMult)
GROWING_CALLS = """
bytes bytearray pow range comb factorial perm repeat center ljust rjust zfill arange broadcast_to dot empty eye full
identity inner linspace logspace matmul ones outer tile zeros
"""


def _module(name: str) -> types.SimpleNamespace:
    """A view of a module that shows its allowed functions and classes, and no way to other modules."""
    if name == "sys":  # MBPP compares sizes
        return types.SimpleNamespace(getsizeof=importlib.import_module("sys").getsizeof, maxsize=2**63 - 1)
    module = importlib.import_module(name)
    listed = _NUMPY[name].split() if name in _NUMPY else getattr(module, "__all__", None)
    names = listed or [key for key in dir(module) if not key.startswith("_")]
    public = {key: getattr(module, key) for key in names if key not in _HIDDEN.get(name, ()) and hasattr(module, key)}
    return types.SimpleNamespace(
        **{key: value for key, value in public.items() if not isinstance(value, types.ModuleType)}
    )


@lru_cache(maxsize=2)
def surroundings(numpy: bool) -> tuple[dict[str, Any], dict[str, Any], frozenset[str]]:
    """Return the names that tests see without an import, the modules they may import, the attributes they may read.

    `numpy` adds views of numpy; the names `numpy` and `np` are then seen without an import, as `math` is.
    """
    visible: dict[str, Any] = {name: getattr(builtins, name) for name in _BUILTINS.split() + _EXCEPTIONS}
    modules: dict[str, Any] = {name: _module(name) for name in [*_MODULES.split(), "sys"]}
    visible |= modules
    owners: list[type] = list(_PLAIN_TYPES)
    owners += [value for module in modules.values() for value in vars(module).values() if isinstance(value, type)]
    attributes = {name for module in modules.values() for name in vars(module)}
    attributes |= {name for owner in owners for name in dir(owner)} - {"format", "format_map"}
    if numpy:
        parts = {name: _module(name) for name in _NUMPY}
        for name, part in parts.items():
            attributes |= set(vars(part)) | {name.rpartition(".")[2]}
            if name != "numpy":
                setattr(parts["numpy"], name.rpartition(".")[2], part)
        attributes |= set(_NUMPY_ATTRIBUTES.split())
        modules |= parts
        visible |= {"numpy": parts["numpy"], "np": parts["numpy"]}
    return visible, modules, frozenset(name for name in attributes if not name.startswith("_"))
