"""The tasks of the paper: exact sources and targets in both variants, splits, sizes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from adept_ds.data.tasks import TASKS, Part, Task, cut_references
from adept_ds.data.tasks.prepare import pad_punctuation
from adept_ds.data.tasks.splits import part_indices, permutation
from adept_ds.errors import UserError
from adept_ds.formats.rows import Row

QUESTION_ROW = {
    "question": "Who wrote 'Über_alles', in 1990?",
    "context": "It was written\nby J.-P. Müller (1990).",
    "answers": ["J.-P. Müller", "Müller"],
}
QUESTION_SOURCE = (
    "question: Who wrote ' Über_alles ' , in 1990 ? context: It was written by J . - P . Müller ( 1990 ) ."
)
ANSWERS = ["J . - P . Müller", "Müller"]
SQUAD_ROW = {**QUESTION_ROW, "answers": {"text": QUESTION_ROW["answers"], "answer_start": [18, 24]}}
MULTIRC_SOURCE = "question: How old is it? answer: Two years paragraph: Sent 1: It is new. Sent 2: It is two."
RECORD_ROW = {
    "passage": "Rain fell in Oslo.\n@highlight\nIt was wet\n@highlight\nBergen was dry",
    "query": "In @placeholder it rained",
    "entities": ["Oslo", "Bergen"],
    "answers": ["Oslo", "oslo"],
}
RECORD_SOURCE = (
    "record query: In @placeholder it rained entities: Oslo, Bergen "
    "passage: Rain fell in Oslo. It was wet. Bergen was dry"
)
WSC_ROW = {
    "text": "Mark told Pete many lies about himself, which he believed.",
    "span1_text": "Pete",
    "span1_index": 2,
    "span2_text": "himself",
    "span2_index": 6,
    "label": 0,
}
WINOGRANDE_ROW = {
    "sentence": "Ian envied Dennis because _ was rich.",
    "option1": "Ian",
    "option2": "Dennis",
    "answer": "2",
}
SENTENCES = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
INFERENCE = {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2}
INFERENCE_SOURCE = "premise: It rains. hypothesis: It is dry."
SENTENCES_SOURCE = "sentence1: It rains. sentence2: It is wet."

# Task, raw row, source, targets.
EXAMPLES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("mnli", INFERENCE, INFERENCE_SOURCE, ["2"]),
    ("cb", {**INFERENCE, "label": 1}, INFERENCE_SOURCE, ["1"]),
    ("qqp", {"question1": "Who?", "question2": "", "label": 1}, "question1: Who? question2: ", ["1"]),
    ("qnli", {"question": "Who?", "sentence": "Me.", "label": 1}, "question: Who? sentence: Me.", ["1"]),
    ("sst2", {"sentence": "a fine film ", "label": 1}, "sentence: a fine film ", ["1"]),
    ("cola", {"sentence": "Him sleeps.", "label": 0}, "sentence: Him sleeps.", ["0"]),
    ("mrpc", SENTENCES, SENTENCES_SOURCE, ["0"]),
    ("rte", SENTENCES, SENTENCES_SOURCE, ["0"]),
    ("paws", SENTENCES, SENTENCES_SOURCE, ["0"]),
    ("stsb", {**SENTENCES, "label": 3.299999952316284}, SENTENCES_SOURCE, ["3.2"]),
    ("wic", {**SENTENCES, "word": "wet"}, SENTENCES_SOURCE + " word: wet", ["0"]),
    (
        "multirc",
        {
            "paragraph": "<b>Sent 1: </b>It is new.<br><b>Sent 2: </b>It is two.",
            "question": "How old is it?",
            "answer": "Two years",
            "label": 1,
        },
        MULTIRC_SOURCE,
        ["1"],
    ),
    ("boolq", {"question": "is it", "passage": "It is.", "label": 1}, "question: is it passage: It is.", ["1"]),
    ("wsc", WSC_ROW, "text: Mark told * Pete * many lies about # himself #, which he believed.", ["0"]),
    ("record", RECORD_ROW, RECORD_SOURCE, ["Oslo", "oslo"]),
    ("nq", QUESTION_ROW, QUESTION_SOURCE, ANSWERS),
    ("hotpotqa", QUESTION_ROW, QUESTION_SOURCE, ANSWERS),
    ("searchqa", QUESTION_ROW, QUESTION_SOURCE, ANSWERS),
    ("newsqa", QUESTION_ROW, QUESTION_SOURCE, ANSWERS),
    ("squad", SQUAD_ROW, QUESTION_SOURCE, ANSWERS),
    (
        "winogrande",
        WINOGRANDE_ROW,
        "sentence: Ian envied Dennis because _ was rich. option0: Ian option1: Dennis",
        ["1"],
    ),
    ("yelp", {"text": "Cold food.\\nNever again", "label": 0}, "sentence: Cold food.\\nNever again", ["0"]),
    (
        "scitail",
        {"sentence1": "Ice melts.", "sentence2": "Ice is solid.", "gold_label": "neutral"},
        "premise: Ice melts. hypothesis: Ice is solid.",
        ["1"],
    ),
]
FAITHFUL = {
    "stsb": (SENTENCES_SOURCE, ["3.3"]),
    "winogrande": ("sentence: Ian envied Dennis because _ was rich. option0: Ian option1: Ian", ["1"]),
}


def prepared(name: str, variant: str, row: dict[str, Any]) -> tuple[Task, Row]:
    task = TASKS[name].variant(variant)
    return task, task.prepared(Row("row", row))


def test_an_example_of_every_task_is_checked():
    assert sorted(example[0] for example in EXAMPLES) == sorted(TASKS)
    assert len(TASKS) == 23  # the paper's 22 that are compared, and SQuAD; MBPP is run


@pytest.mark.parametrize(("name", "row", "source", "targets"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
@pytest.mark.parametrize("variant", ["fixed", "faithful"])
def test_source_and_target(name, variant, row, source, targets):
    if variant == "faithful":
        source, targets = FAITHFUL.get(name, (source, targets))
    task, made = prepared(name, variant, row)
    assert task.show(made) == source
    assert task.targets(made) == targets
    assert set(task.columns()) <= set(row)


def test_question_answering_is_compared_with_every_answer():
    task, made = prepared("nq", "fixed", QUESTION_ROW)
    assert task.right_answers(made) == ("J.-P. Müller", "Müller", "J . - P . Müller")
    assert cut_references(task, ("a", "b"), tokenizer=None) == ("a", "b")  # type: ignore[arg-type]


def test_faithful_question_answering_has_one_reference_cut_at_twenty_tokens(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data/t5")
    task, made = prepared("nq", "faithful", {**QUESTION_ROW, "answers": ["one " * 30, "two"]})
    assert cut_references(task, task.right_answers(made), tokenizer) == (" ".join(["one"] * 19),)


def test_longest_answer_of_a_classification_is_its_longest_label(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data/t5")
    assert {TASKS[name].max_answer_tokens(tokenizer) for name in ("rte", "mnli", "cb")} == {3}  # "_", "0", EOS
    assert TASKS["nq"].max_answer_tokens(tokenizer) == 20
    assert TASKS["nq"].max_answer_tokens(tokenizer, 60) == 60  # data.max_target_length, as in training
    assert TASKS["rte"].max_answer_tokens(tokenizer, 60) == 3


@pytest.mark.parametrize(
    ("value", "fifths", "tenths"), [(0.0, "0.0", "0.0"), (2.25, "2.2", "2.2"), (4.71, "4.8", "4.7")]
)
def test_similarities_are_rounded(value, fifths, tenths):
    for variant, expected in (("fixed", fifths), ("faithful", tenths)):
        task, made = prepared("stsb", variant, {**SENTENCES, "label": value})
        assert task.targets(made) == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"span1_text": "himself", "span1_index": 6, "span2_text": "Pete", "span2_index": 2},
            "Mark told # Pete # many lies about * himself *, which he believed.",
        ),
        ({"span1_index": 40}, "Mark told Pete many lies about himself, which he believed."),
        ({"text": "A (b) c", "span1_text": "(b)", "span1_index": 1, "span2_text": "c"}, "A * (b) * c"),
    ],
    ids=["second span first", "index beyond the text", "special characters"],
)
def test_marked_spans(changes, expected):
    task, made = prepared("wsc", "fixed", {**WSC_ROW, "span2_index": 9, **changes})
    assert task.show(made) == f"text: {expected}"


def test_padding_leaves_letters_accents_digits_and_underscores():
    assert pad_punctuation("a_b e\u0301t 3.5%  (naïve)") == "a_b e\u0301t 3 . 5 % ( naïve )"


def test_an_undeclared_label_is_named():
    task, made = prepared("rte", "fixed", {**SENTENCES, "label": -1})
    with pytest.raises(UserError, match=r"row: label is '-1'; task rte expects one of '0', '1'"):
        task.targets(made)


# Splits

PARTS: tuple[Part, ...] = ("train", "validation", "test")
# Rows of the released data by split, and the sizes of train, validation and test that table 16 gives.
SIZES = {
    "mnli": ({"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832}, (392_702, 9_832, 9_815)),
    "qqp": ({"train": 363_846, "validation": 40_430}, (362_846, 1_000, 40_430)),
    "qnli": ({"train": 104_743, "validation": 5_463}, (103_743, 1_000, 5_463)),
    "sst2": ({"train": 67_349, "validation": 872}, (66_349, 1_000, 872)),
    "stsb": ({"train": 5_749, "validation": 1_500}, (5_749, 750, 750)),
    "mrpc": ({"train": 3_668, "validation": 408}, (3_668, 204, 204)),
    "rte": ({"train": 2_490, "validation": 277}, (2_490, 138, 139)),
    "cola": ({"train": 8_551, "validation": 1_043}, (8_551, 521, 522)),
    "multirc": ({"train": 27_243, "validation": 4_848}, (27_243, 2_424, 2_424)),
    "boolq": ({"train": 9_427, "validation": 3_270}, (9_427, 1_635, 1_635)),
    "wic": ({"train": 5_428, "validation": 638}, (5_428, 319, 319)),
    "wsc": ({"train": 554, "validation": 104}, (554, 52, 52)),
    "cb": ({"train": 250, "validation": 56}, (250, 28, 28)),
    "nq": ({"train": 104_071, "validation": 12_836}, (103_071, 1_000, 12_836)),
    "hotpotqa": ({"train": 72_928, "validation": 5_901}, (71_928, 1_000, 5_901)),
    "searchqa": ({"train": 117_384, "validation": 16_980}, (116_384, 1_000, 16_980)),
    "newsqa": ({"train": 74_160, "validation": 4_212}, (73_160, 1_000, 4_212)),
    "winogrande": ({"train": 40_398, "validation": 1_267}, (39_398, 1_000, 1_267)),
    "yelp": ({"train": 560_000, "test": 38_000}, (100_000, 1_000, 38_000)),
    "paws": ({"train": 49_401, "validation": 8_000, "test": 8_000}, (49_401, 8_000, 8_000)),
}


def indices(task: Task, part: Part, rows: dict[str, int]) -> np.ndarray:
    return part_indices(task, part, rows[task.split_name(part)], 42)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_table_16(name):
    rows, sizes = SIZES[name]
    assert tuple(len(indices(TASKS[name], part, rows)) for part in PARTS) == sizes
    assert TASKS[name].train_size == sizes[0]


def test_scitail_has_its_own_splits_or_as_published_halves_of_one():
    rows = {"train": 23_596, "validation": 1_304, "test": 2_126}
    sizes = {
        variant: tuple(len(indices(TASKS["scitail"].variant(variant), part, rows)) for part in PARTS)
        for variant in ("fixed", "faithful")
    }
    assert sizes == {"fixed": (23_596, 1_304, 2_126), "faithful": (23_596, 652, 652)}


@pytest.mark.parametrize("name", ["rte", "sst2"])
def test_validation_shares_no_row_with_what_is_cut_from_the_same_split(name):
    rows = SIZES[name][0]
    other: Part = "test" if TASKS[name].splits == "half" else "train"
    cut = [indices(TASKS[name], part, rows) for part in ("validation", other)]
    assert sorted(np.concatenate(cut).tolist()) == list(range(rows[TASKS[name].split_name("validation")]))


def test_the_seed_changes_the_split():
    assert permutation(100, 42).tolist() != permutation(100, 43).tolist()


def test_a_training_split_too_small_to_give_validation_is_an_error():
    with pytest.raises(UserError, match=r"task sst2: 1,000 of its training examples become validation, and it has 900"):
        part_indices(TASKS["sst2"], "train", 900, 42)


def sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(",".join(map(str, rows.tolist())).encode()).hexdigest()


def test_permutations_are_the_published_ones(shared_dir):
    prints = json.loads((shared_dir / "data/split_fingerprints.json").read_text())
    names = {"yelp_polarity": "yelp"}
    checked = 0
    for key, expected in prints.items():
        if key.startswith("_"):
            continue
        name = names.get(key, key.removeprefix("superglue-").removesuffix(".fixed"))
        task = TASKS[name].variant("faithful")
        rest: Part = "test" if expected["rule"] == "S" else "train"
        assert sha256(part_indices(task, "validation", expected["n"], 42)) == expected["sha256_validation"], name
        key_of_rest = "sha256_train" if "sha256_train" in expected else "sha256_rest"
        assert sha256(part_indices(task, rest, expected["n"], 42)) == expected[key_of_rest], name
        checked += 1
    assert checked == 20
