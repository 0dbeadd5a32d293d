"""What the sections of a config are made of: their base class, strict numbers, sizes; and what is wrong with values."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

LARGEST = 2**32 - 1
"""Beyond it there is no size of a tensor, and no seed that every library takes."""
LARGEST_FLOAT = 1e38
"""Tensors are fp32 at most."""


def _fits(value: float) -> float:
    # Not a bound of the schema: it would stand in every line of the help.
    limit = LARGEST if isinstance(value, int) else LARGEST_FLOAT
    if value > limit:
        raise ValueError(f"expected at most {limit:,}" if isinstance(value, int) else f"expected at most {limit:g}")
    return value


Count = Annotated[StrictInt, Field(ge=1), AfterValidator(_fits)]
CountOrZero = Annotated[StrictInt, Field(ge=0), AfterValidator(_fits)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True), AfterValidator(_fits)]
FloatFromOne = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True), AfterValidator(_fits)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True), AfterValidator(_fits)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]


BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Return a size such as 80GB or 79.6GiB in bytes; ValueError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]i?b)?", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r}: expected a size such as 80GB or 79.6GiB")
    return int(float(match[1]) * BYTES[(match[2] or "").upper()])


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def validation_problems(error: ValidationError) -> str:
    """Return all that is wrong with a value as one line: each key with its problem."""
    problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
    return "; ".join(f"{key}: {message}" if key else message for key, message in problems)
