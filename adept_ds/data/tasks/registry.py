"""The tasks of the paper's T5 experiments (its table 16), and SQuAD, which is a source task of its few-shot runs.

A task without a field `faithful` is the same in both variants.
"""

from __future__ import annotations

from typing import Any

from adept_ds.data.tasks.task import Task

HUB_IDS = {
    "glue": "nyu-mll/glue",
    "super_glue": "aps/super_glue",
    "naturalquestions": "lucadiliello/naturalquestionsshortqa",
    "hotpotqa": "lucadiliello/hotpotqa",
    "searchqa": "lucadiliello/searchqa",
    "newsqa": "lucadiliello/newsqa",
    "winogrande": "allenai/winogrande",
    "yelp_polarity": "fancyzhx/yelp_polarity",
    "scitail": "allenai/scitail",
    "paws": "google-research-datasets/paws",
    "squad": "rajpurkar/squad",
}
"""Where the data sets of the registry are on the hub now; `data.hub_ids` has the last word."""

BINARY: dict[str, Any] = {"labels": {"0": "0", "1": "1"}, "metrics": ("accuracy",)}
INFERENCE: dict[str, Any] = {"labels": {"0": "0", "1": "1", "2": "2"}, "metrics": ("accuracy",)}
GLUE: dict[str, Any] = {"dataset": "glue"}
SUPER_GLUE: dict[str, Any] = {"dataset": "super_glue", "splits": "half"}
QUESTION_ANSWERING: dict[str, Any] = {
    "source": "question: {question} context: {context}",
    "prepare": "padded_question",
    "target": "padded_answers",
    # The model is taught to pad its answers, so a padded one is as right as the answer itself.
    "references": ("answers", "padded_answers"),
    "splits": "1k",
    "max_source_length": 512,
    "metrics": ("token_f1", "exact_match"),
    "selection_metric": "exact_match",
    "faithful": {"references": ("padded_answers",), "first_reference_only": True, "reference_tokens": 20},
}
PREMISE = "premise: {premise} hypothesis: {hypothesis}"
SENTENCES = "sentence1: {sentence1} sentence2: {sentence2}"

TASKS = {
    task.name: task
    for task in (
        # GLUE
        Task(
            name="mnli",
            **(GLUE | INFERENCE),
            subset="mnli",
            source=PREMISE,
            split_names={"validation": "validation_mismatched", "test": "validation_matched"},
            train_size=392_702,
        ),
        Task(
            name="qqp",
            **(GLUE | BINARY | {"metrics": ("accuracy", "f1")}),
            subset="qqp",
            source="question1: {question1} question2: {question2}",
            splits="1k",
            train_size=362_846,
        ),
        Task(
            name="qnli",
            **(GLUE | BINARY),
            subset="qnli",
            source="question: {question} sentence: {sentence}",
            splits="1k",
            train_size=103_743,
        ),
        Task(
            name="sst2",
            **(GLUE | BINARY),
            subset="sst2",
            source="sentence: {sentence}",
            splits="1k",
            train_size=66_349,
        ),
        Task(
            name="stsb",
            **GLUE,
            subset="stsb",
            source=SENTENCES,
            prepare="similarity_in_fifths",
            splits="half",
            metrics=("pearson", "spearman"),
            train_size=5_749,
            faithful={"prepare": "similarity_in_tenths"},
        ),
        Task(
            name="mrpc",
            **(GLUE | BINARY | {"metrics": ("accuracy", "f1")}),
            subset="mrpc",
            source=SENTENCES,
            splits="half",
            train_size=3_668,
        ),
        Task(name="rte", **(GLUE | BINARY), subset="rte", source=SENTENCES, splits="half", train_size=2_490),
        Task(
            name="cola",
            **(GLUE | BINARY | {"metrics": ("matthews",)}),
            subset="cola",
            source="sentence: {sentence}",
            splits="half",
            train_size=8_551,
        ),
        # SuperGLUE
        Task(
            name="multirc",
            **(SUPER_GLUE | BINARY | {"metrics": ("f1",)}),
            subset="multirc",
            source="question: {question} answer: {answer} paragraph: {paragraph}",
            prepare="without_html",
            max_source_length=348,
            train_size=27_243,
        ),
        Task(
            name="boolq",
            **(SUPER_GLUE | BINARY),
            subset="boolq",
            source="question: {question} passage: {passage}",
            train_size=9_427,
        ),
        Task(
            name="wic",
            **(SUPER_GLUE | BINARY),
            subset="wic",
            source=SENTENCES + " word: {word}",
            train_size=5_428,
        ),
        Task(
            name="wsc",
            **(SUPER_GLUE | BINARY),
            subset="wsc.fixed",
            source="text: {text}",
            prepare="marked_spans",
            train_size=554,
        ),
        Task(
            name="cb",
            **(SUPER_GLUE | INFERENCE | {"metrics": ("accuracy", "macro_f1")}),
            subset="cb",
            source=PREMISE,
            selection_metric="macro_f1",
            train_size=250,
        ),
        Task(
            name="record",
            **(SUPER_GLUE | {"splits": "1k"}),
            subset="record",
            source="record query: {query} entities: {entities} passage: {passage}",
            prepare="record_passage",
            target="answers",
            example_per_answer="train",
            max_source_length=512,
            metrics=("token_f1", "exact_match"),
            train_size=137_484,
            faithful={"example_per_answer": "always", "first_reference_only": True, "reference_tokens": 20},
        ),
        # MRQA 2019
        Task(name="nq", **QUESTION_ANSWERING, dataset="naturalquestions", train_size=103_071),
        Task(name="hotpotqa", **QUESTION_ANSWERING, dataset="hotpotqa", train_size=71_928),
        Task(name="searchqa", **QUESTION_ANSWERING, dataset="searchqa", train_size=116_384),
        Task(name="newsqa", **QUESTION_ANSWERING, dataset="newsqa", train_size=73_160),
        Task(name="squad", **QUESTION_ANSWERING, dataset="squad", train_size=86_599),
        # Others
        Task(
            name="winogrande",
            dataset="winogrande",
            subset="winogrande_xl",
            source="sentence: {sentence} option0: {option1} option1: {option2}",
            target="answer",
            labels={"1": "0", "2": "1"},
            splits="1k",
            metrics=("accuracy",),
            train_size=39_398,
            faithful={"source": "sentence: {sentence} option0: {option1} option1: {option1}"},
        ),
        Task(
            name="yelp",
            **BINARY,
            dataset="yelp_polarity",
            source="sentence: {text}",
            splits="1k",
            split_names={"test": "test"},
            train_limit=100_000,
            train_size=100_000,
        ),
        Task(
            name="scitail",
            dataset="scitail",
            subset="snli_format",
            source="premise: {sentence1} hypothesis: {sentence2}",
            target="gold_label",
            labels={"entailment": "0", "neutral": "1"},
            metrics=("accuracy",),
            train_size=23_596,
            faithful={"splits": "half"},
        ),
        Task(
            name="paws",
            **BINARY,
            dataset="paws",
            subset="labeled_final",
            source=SENTENCES,
            train_size=49_401,
        ),
    )
}
"""Every task but MBPP, which is run instead of compared: see `adept_ds.data.problems`."""
