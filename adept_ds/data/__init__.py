"""Problems and examples, their encoding, batches and order, and what is run of a completion."""

from adept_ds.data.batches import global_batches, rank_micro_batches
from adept_ds.data.encode import (
    Encoded,
    EncodedDataset,
    collate,
    encode,
    encode_prompt,
    longest_example,
    task_number,
)
from adept_ds.data.problems import load_examples, load_problems, read_problems
from adept_ds.formats.completions import extract_code, repair_indentation, stop_at
from adept_ds.formats.records import Example, Problem
from adept_ds.formats.rows import Sample, read_samples

__all__ = [
    "Encoded",
    "EncodedDataset",
    "Example",
    "Problem",
    "Sample",
    "collate",
    "encode",
    "encode_prompt",
    "extract_code",
    "global_batches",
    "load_examples",
    "load_problems",
    "longest_example",
    "rank_micro_batches",
    "read_problems",
    "read_samples",
    "repair_indentation",
    "stop_at",
    "task_number",
]
