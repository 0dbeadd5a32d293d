"""What training data looks like: examples and problems, rows of files, and the registry of `data.format`."""

from adept_ds.formats.answers import Answer, find_program
from adept_ds.formats.completions import repair_indentation, stop_at
from adept_ds.formats.records import ASSISTANT, Conversation, Example, Message, Problem, TokenLimits
from adept_ds.formats.registry import FORMATS, Format, names_with_tests
from adept_ds.formats.row_files import read_each, read_rows
from adept_ds.formats.rows import Row
from adept_ds.formats.samples import Sample, SamplesFile, read_samples

__all__ = [
    "ASSISTANT",
    "FORMATS",
    "Answer",
    "Conversation",
    "Example",
    "Format",
    "Message",
    "Problem",
    "Row",
    "Sample",
    "SamplesFile",
    "TokenLimits",
    "find_program",
    "names_with_tests",
    "read_each",
    "read_rows",
    "read_samples",
    "repair_indentation",
    "stop_at",
]
