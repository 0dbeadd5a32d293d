"""What training data looks like: examples and problems, rows of files, and the registry of `data.format`."""

from adept_ds.formats.completions import Sample, extract_code, read_samples, repair_indentation, stop_at
from adept_ds.formats.records import ASSISTANT, Conversation, Example, Message, Problem, TokenLimits
from adept_ds.formats.registry import FORMATS, Format, names_with_tests
from adept_ds.formats.row_files import read_each, read_rows
from adept_ds.formats.rows import Row

__all__ = [
    "ASSISTANT",
    "FORMATS",
    "Conversation",
    "Example",
    "Format",
    "Message",
    "Problem",
    "Row",
    "Sample",
    "TokenLimits",
    "extract_code",
    "names_with_tests",
    "read_each",
    "read_rows",
    "read_samples",
    "repair_indentation",
    "stop_at",
]
