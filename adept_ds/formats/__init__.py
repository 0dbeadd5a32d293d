"""What training data looks like: examples and problems, rows of files, and the registry of `data.format`."""

from adept_ds.formats.completions import extract_code, repair_indentation, stop_at
from adept_ds.formats.records import Example, Problem, TokenLimits
from adept_ds.formats.registry import FORMATS, Format, names_with_tests
from adept_ds.formats.rows import Row, Sample, read_rows, read_samples

__all__ = [
    "FORMATS",
    "Example",
    "Format",
    "Problem",
    "Row",
    "Sample",
    "TokenLimits",
    "extract_code",
    "names_with_tests",
    "read_rows",
    "read_samples",
    "repair_indentation",
    "stop_at",
]
