"""Where a task's rows come from, mixtures, k-shot samples, a user's own tasks, and their encoding."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset, encode
from adept_ds.data.problems import load_examples, load_problems
from adept_ds.data.tasks import TASKS, TaskExample, find_task, load_task_examples
from adept_ds.data.tasks.sources import read_split
from adept_ds.data.tasks.splits import EQUAL, k_shot, round_robin, shares, tempered
from adept_ds.errors import UserError

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzipped(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()} for row in rows
        )


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzipped,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def put(folder: Path, task: str, split: str, rows: Rows, suffix: str = ".jsonl") -> None:
    (folder / task).mkdir(exist_ok=True)
    WRITERS[suffix](folder / task / f"{split}{suffix}", rows)


def rte_rows(count: int, start: int = 0) -> Rows:
    return [
        {"sentence1": f"a {i}", "sentence2": 'b, "NA"\nnull', "label": i % 2, "idx": i}
        for i in range(start, start + count)
    ]


def config(folder: Path | None, *tasks: str, **settings: Any) -> DataConfig:
    return DataConfig(format="tasks", path=str(folder) if folder else None, tasks=tasks, **settings)


def sources(examples: Sequence[Any]) -> list[str]:
    return [example.prompt for example in examples]


# Local files


@pytest.mark.parametrize("suffix", WRITERS)
def test_local_files(tmp_path, suffix):
    put(tmp_path, "rte", "train", rte_rows(3), suffix)
    put(tmp_path, "rte", "validation", rte_rows(5, start=10), suffix)
    examples = load_task_examples(config(tmp_path, "rte"), "train")
    assert [(one.task_id, one.prompt, one.target, one.references) for one in examples] == [
        (f"rte/train/{i}", f'sentence1: a {i} sentence2: b, "NA"\nnull', str(i % 2), (str(i % 2),)) for i in range(3)
    ]
    assert isinstance(examples[-1], TaskExample)
    assert examples[-1].task_id == "rte/train/2"
    sizes = {part: len(load_examples(config(tmp_path, "rte"), part)) for part in ("train", "validation", "test")}
    assert sizes == {"train": 3, "validation": 2, "test": 3}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_lists_in_local_files(tmp_path, suffix):
    row = {"question": "Who?", "context": "[He], she", "answers": ["He", "she"], "key": "k"}
    put(tmp_path, "nq", "validation", [row], suffix)
    (example,) = load_task_examples(config(tmp_path, "nq"), "test")
    assert (example.prompt, example.target) == ("question: Who ? context: [ He ] , she", "He")
    assert example.references == ("He", "she")


def test_a_text_that_begins_with_a_bracket_is_a_text(tmp_path):
    put(tmp_path, "nq", "validation", [{"question": "q", "context": "c", "answers": "[sic]"}], ".csv")
    assert load_task_examples(config(tmp_path, "nq"), "test")[0].references == ("[sic]", "[ sic ]")


def test_record_gives_an_example_for_each_answer_in_training(tmp_path):
    rows = [
        {"passage": f"p {i}", "query": "q", "entities": ["x", "y"], "answers": ["x", "y"][: 1 + i % 2]}
        for i in range(1_010)
    ]
    put(tmp_path, "record", "train", rows)
    put(tmp_path, "record", "validation", rows[:4])
    fixed = {part: load_task_examples(config(tmp_path, "record"), part) for part in ("train", "test")}
    assert [(one.task_id, one.target, one.references) for one in fixed["test"]] == [
        ("record/test/0", "x", ("x",)),
        ("record/test/1", "x", ("x", "y")),
        ("record/test/2", "x", ("x",)),
        ("record/test/3", "x", ("x", "y")),
    ]
    expected = sum(1 + int(one.task_id.split("/")[2]) % 2 for one in fixed["train"] if one.task_id.endswith("/0"))
    assert len(fixed["train"]) == expected
    assert len({one.task_id for one in fixed["train"]}) == expected
    faithful = load_task_examples(config(tmp_path, "record", variant="faithful"), "test")
    assert [(one.task_id, one.references) for one in faithful][1:3] == [
        ("record/test/1/0", ("x",)),
        ("record/test/1/1", ("y",)),
    ]


def test_absent_files_are_told_with_their_names_and_columns(tmp_path):
    with pytest.raises(UserError, match=r"task rte: no such file is there; .*rte/train\.jsonl.*\.parquet.* sentence1,"):
        load_task_examples(config(tmp_path, "rte"), "train")


def test_two_files_of_one_split_are_an_error(tmp_path):
    put(tmp_path, "rte", "train", rte_rows(1), ".csv")
    put(tmp_path, "rte", "train", rte_rows(1), ".jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl and .*train\.csv are both there"):
        load_task_examples(config(tmp_path, "rte"), "train")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_absent_column_is_named_with_the_nearest(tmp_path, suffix):
    rows = [{"sentence_1": "a", "sentence2": "b", "label": 1}]
    put(tmp_path, "rte", "train", rows, suffix)
    with pytest.raises(UserError, match=r"'sentence1'; .*did you mean 'sentence_1'\?"):
        load_task_examples(config(tmp_path, "rte"), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 7}, r"train\.jsonl row 2: label is '7'; task rte expects one of '0', '1'"),
        ({"sentence1": None}, r"train\.jsonl row 2: sentence1 must be a text or a number, not NoneType"),
        ({"sentence1": [1]}, r"train\.jsonl cannot be read"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, changes, message):
    first, second = rte_rows(2)
    put(tmp_path, "rte", "train", [first, {**second, **changes}])
    with pytest.raises(UserError, match=message):
        list(load_task_examples(config(tmp_path, "rte"), "train"))


@pytest.mark.parametrize(
    ("suffix", "content"), [(".parquet", b"PAR"), (".csv", b"sentence1,sentence2,label\nx\n"), (".jsonl", b"{")]
)
def test_damaged_files(tmp_path, suffix, content):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / f"train{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"train{suffix}"):
        load_task_examples(config(tmp_path, "rte"), "train")


# The hub and its cache


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def cache(folder: Path, name: str, subset: str, splits: dict[str, Rows]) -> None:
    """Fill the cache as a download would: build from files, then put the result where the hub's would lie."""
    files = {}
    for split, rows in splits.items():
        files[split] = str(folder / f"{split}.parquet")
        write_parquet(Path(files[split]), rows)
    built = folder / "built"
    datasets.load_dataset("parquet", subset, data_files=files, cache_dir=str(built))
    (info,) = built.rglob("dataset_info.json")
    target = folder / "cache" / name / subset / "0.0.0" / "0123"
    shutil.copytree(info.parent, target)
    for file in target.glob("*.arrow"):
        file.rename(target / file.name.replace("parquet-", f"{name.rpartition('___')[2]}-"))


@pytest.mark.usefixtures("_offline")
def test_the_cache_serves_offline(tmp_path):
    cache(tmp_path, "nyu-mll___glue", "rte", {"train": rte_rows(4), "validation": rte_rows(6)})
    examples = load_task_examples(config(None, "rte"), "train")
    assert sources(examples)[3] == 'sentence1: a 3 sentence2: b, "NA"\nnull'


@pytest.mark.usefixtures("_offline")
def test_the_hubs_own_parquet_files_are_found_in_the_cache_too(tmp_path):
    cache(tmp_path, "nyu-mll___glue", "default-data_dir=rte", {"train": rte_rows(2)})
    assert len(load_task_examples(config(None, "rte"), "train")) == 2


@pytest.mark.usefixtures("_offline")
def test_without_hub_or_cache_the_way_out_is_told(tmp_path):
    with pytest.raises(UserError) as raised:
        load_task_examples(config(None, "mnli"), "train")
    message = str(raised.value)
    for part in ("task mnli: nyu-mll/glue (mnli)", str(tmp_path / "cache"), "FOLDER/mnli/SPLIT.jsonl"):
        assert part in message
    assert "train, validation_mismatched, validation_matched" in message
    assert "premise, hypothesis, label" in message


def test_hub_ids_can_be_changed_even_to_a_folder(tmp_path):
    write_parquet(tmp_path / "train.parquet", rte_rows(2))
    write_parquet(tmp_path / "validation.parquet", rte_rows(4))
    task = TASKS["rte"].model_copy(update={"subset": None})
    assert len(read_split(task, "train", None, {"glue": str(tmp_path)})) == 2
    with pytest.raises(UserError, match=r"has no split 'validatoin'; .*did you mean 'validation'\?"):
        read_split(task, "validatoin", None, {"glue": str(tmp_path)})


# Mixtures


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    for task, count in (("rte", 7), ("mrpc", 3)):
        put(tmp_path, task, "train", rte_rows(count))
        put(tmp_path, task, "validation", rte_rows(2 * count))
    return tmp_path


def tasks_of(examples: Sequence[Any]) -> list[str]:
    return [example.task_id.split("/")[0] for example in examples]


def test_a_proportional_mixture_has_every_example_once(two_tasks):
    examples = load_task_examples(config(two_tasks, "rte", "mrpc"), "train")
    assert Counter(tasks_of(examples)) == {"rte": 7, "mrpc": 3}
    assert len({one.task_id for one in examples}) == 10


def test_an_equal_mixture_repeats_the_smaller_task(two_tasks):
    examples = load_task_examples(config(two_tasks, "rte", "mrpc", mixture="equal"), "train")
    counts = Counter(one.task_id for one in examples)
    assert Counter(tasks_of(examples)) == {"rte": 7, "mrpc": 7}
    assert sorted(counts[f"mrpc/train/{i}"] for i in range(3)) == [2, 2, 3]
    assert {counts[f"rte/train/{i}"] for i in range(7)} == {1}


def test_validation_examples_come_in_turns(two_tasks):
    examples = load_task_examples(config(two_tasks, "rte", "mrpc"), "validation")
    assert tasks_of(examples) == ["rte", "mrpc"] * 3 + ["rte"] * 4
    assert tasks_of(examples[:3]) == ["rte", "mrpc", "rte"]


def test_members_of_mixtures():
    equal = tempered([5, 2], EQUAL, 0)
    assert sorted(Counter(equal.tolist()).items()) == [(i, 1) for i in range(5)] + [(5, 3), (6, 2)]
    assert round_robin([2, 3]).tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_shares_at_a_temperature(temperature):
    sizes = [90_000, 10_000, 400]
    found = shares(sizes, temperature)
    expected = [(size / sum(sizes)) ** (1 / temperature) for size in sizes]
    assert [share / sum(found) for share in found] == pytest.approx([p / sum(expected) for p in expected], rel=1e-3)
    # Nothing is left out of a pass, and the largest task is not repeated.
    assert found[0] == sizes[0]
    assert set(tempered(sizes, temperature, 3).tolist()) == set(range(sum(sizes)))
    assert shares([0, 0], temperature) == [0, 0]


def test_a_mixture_at_a_temperature_is_a_function_of_the_seed(two_tasks):
    def members(**settings: object) -> list[int]:
        cfg = config(two_tasks, "rte", "mrpc", mixture="temperature", **settings)
        return load_task_examples(cfg, "train").members.tolist()

    assert members() == members() != members(split_seed=1)
    assert len(members(mixture_temperature=1.0)) == 10 < len(members(mixture_temperature=2.0)) < len(members()) <= 14
    with pytest.raises(ValueError, match="mixture_temperature is not for mixture: equal"):
        config(two_tasks, "rte", mixture="equal", mixture_temperature=2.0)


def test_two_tasks_of_one_name_are_an_error(two_tasks):
    with pytest.raises(UserError, match="two tasks are called 'rte'"):
        load_task_examples(config(two_tasks, "rte", "rte"), "train")


# k-shot


@pytest.mark.parametrize(("k", "expected"), [(4, {2}), (16, {8}), (5, {2, 3})])
def test_k_shot_is_balanced_over_the_labels(tmp_path, k, expected):
    rows = [{**row, "label": int(row["idx"] % 5 == 0)} for row in rte_rows(100)]
    put(tmp_path, "rte", "train", rows)
    examples = load_task_examples(config(tmp_path, "rte", k_shot=k), "train")
    assert len({one.task_id for one in examples}) == k
    assert set(Counter(one.target for one in examples).values()) == expected


def test_k_shot_depends_on_its_seed_alone(tmp_path):
    put(tmp_path, "rte", "train", rte_rows(100))
    drawn = [
        sources(load_task_examples(config(tmp_path, "rte", k_shot=8, k_shot_seed=seed), "train")) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_k_shot_without_labels_and_with_too_few_examples():
    assert len(k_shot(TASKS["nq"], None, 50, 16, 0)) == 16
    with pytest.raises(UserError, match=r"task nq: data\.k_shot is 16, and it has 10"):
        k_shot(TASKS["nq"], None, 10, 16, 0)
    with pytest.raises(UserError, match=r"task rte: data\.k_shot 4 takes 2 examples of label '1', and it has 1"):
        k_shot(TASKS["rte"], ["0", "0", "0", "1"], 4, 4, 0)


# A user's own task

OWN = {
    "files": {"train": "train.csv", "validation": "valid.jsonl"},
    "source": "tweet: {text}",
    "target": "mood",
    "labels": {"-1": "bad", "1": "good"},
    "metrics": ["accuracy", "f1"],
}


def declare(folder: Path, **changes: Any) -> str:
    values = {key: value for key, value in {**OWN, **changes}.items() if value is not None}
    (folder / "moods.json").write_text(json.dumps(values))
    return str(folder / "moods.json")


def test_a_task_of_ones_own(tmp_path):
    write_csv(tmp_path / "train.csv", [{"text": "fine", "mood": 1}, {"text": "no", "mood": -1}])
    write_jsonl(tmp_path / "valid.jsonl", [{"text": "so so", "mood": 1}])
    cfg = config(None, declare(tmp_path))
    assert [(one.task_id, one.prompt, one.target) for one in load_examples(cfg, "train")] == [
        ("moods/train/0", "tweet: fine", "good"),
        ("moods/train/1", "tweet: no", "bad"),
    ]
    assert sources(load_examples(cfg, "validation")) == ["tweet: so so"]
    assert not load_examples(cfg, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sorce": "x"}, r"sorce: unknown field; did you mean 'source'\?"),
        ({"source": None}, r"source: missing; What the model reads"),
        ({"source": "no column"}, r"source shows no column"),
        ({"source": "{text[0]}"}, r"source has \{text\[0\]\}; expected the bare name of a column"),
        ({"metrics": ["acuracy"]}, r"metrics\.0 = \"acuracy\": .*did you mean 'accuracy'\?"),
        ({"metrics": ["pearson"]}, r"metrics has 'pearson', which is not for labels"),
        ({"labels": None}, r"metrics has 'accuracy', which needs labels"),
        ({"labels": {"a": "x", "b": "y", "c": "z"}}, r"metrics has 'f1', which needs two label words"),
        ({"prepare": "without_htm"}, r"prepare is 'without_htm'; .*did you mean 'without_html'\?"),
        ({"files": None}, r"give exactly one of dataset and files"),
        ({"files": {"training": "x.csv"}}, r"files\.training"),
        ({"splits": "halves"}, r"splits = \"halves\": .*did you mean 'half'\?"),
        ({"max_source_length": "256"}, r"max_source_length = \"256\": input should be a valid integer"),
        ({"faithful": {"splits": "x"}}, r"splits = \"x\""),
    ],
)
def test_mistakes_in_a_declaration_are_named(tmp_path, changes, message):
    path = declare(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"(?s)moods\.json: \d mistake.*{message}"):
        find_task(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": }', r"own\.json, line 1, column 12: not JSON"),
        ('{"source": "a", "source": "b"}', r"own\.json: 'source' is given twice"),
        ("[]", r"own\.json: expected an object with the fields of a task, got list"),
    ],
)
def test_a_declaration_that_is_no_object(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(UserError, match=message):
        find_task(str(tmp_path / "own.json"))


def test_unknown_tasks():
    with pytest.raises(UserError, match=r"unknown task 'SST-2'; .*did you mean 'sst2'\?"):
        find_task("SST-2")
    with pytest.raises(UserError, match=r"expected data\.format mbpp-paper"):
        find_task("mbpp")
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        find_task("nowhere.json")


def test_tasks_have_no_tests_to_run(two_tasks):
    with pytest.raises(UserError, match=r"data\.format tasks has no tests"):
        load_problems(config(two_tasks, "rte"), "train")


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "tasks"},
        {"format": "mbpp", "tasks": ["rte"]},
        {"format": "mbpp", "k_shot": 4},
        {"format": "tasks", "tasks": ["rte"], "max_length": 100},
    ],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(ValidationError, match="format"):
        DataConfig.model_validate(settings)


# Encoding


def test_a_long_source_is_cut_from_the_right_and_the_label_is_whole(tokenizer, tmp_path):
    put(tmp_path, "rte", "train", rte_rows(1))
    cfg = config(tmp_path, "rte", max_source_length=12, max_target_length=1)
    row = encode(load_examples(cfg, "train")[0], tokenizer, cfg, 60, encoder_decoder=True)
    assert tokenizer.decode(row.input_ids) == "sentence1: </s>"
    assert tokenizer.decode(row.labels) == "0</s>"
    assert (len(row.input_ids), row.prompt_truncated, row.target_truncated) == (12, True, False)


def test_a_causal_model_reads_a_line_break_behind_the_source(tokenizer, tmp_path):
    put(tmp_path, "nq", "validation", [{"question": "q", "context": "c" * 40, "answers": ["four"]}])
    cfg = config(tmp_path, "nq", max_source_length=30, max_target_length=3)
    row = encode(load_examples(cfg, "test")[0], tokenizer, cfg, 60, encoder_decoder=False)
    assert tokenizer.decode(row.input_ids) == "question: q context: cccccccc\nfou"
    assert [label for label in row.labels if label != -100] == row.input_ids[30:]
    assert (row.prompt_truncated, row.target_truncated) == (True, True)


def test_an_encoded_mixture_holds_each_example_once_and_gives_it_as_often_as_asked(tokenizer, two_tasks):
    cfg = config(two_tasks, "rte", "mrpc", mixture="equal")
    examples = load_task_examples(cfg, "train")
    dataset = EncodedDataset(examples, tokenizer, cfg, 60, encoder_decoder=True)
    assert len(dataset) == 14
    assert len(examples.unique()[0]) == 10
    for index in range(14):
        assert dataset[index] == encode(examples[index], tokenizer, cfg, 60, encoder_decoder=True)
        assert dataset.lengths[index] == len(dataset[index].input_ids) + len(dataset[index].labels)


def test_examples_read_one_by_one_in_slices_and_in_passing_are_the_same(two_tasks):
    examples = load_task_examples(config(two_tasks, "rte", "mrpc", mixture="equal"), "train")
    assert list(examples) == [examples[i] for i in range(len(examples))] == [*examples[:5], *examples[5:]]
    with pytest.raises(IndexError):
        examples[len(examples)]
    unique, positions = examples.unique()
    assert [unique[position] for position in positions] == list(examples)


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "..", "", "x" * 101, "two\nlines"])
def test_a_tasks_name_is_no_path(tmp_path, name):
    write_jsonl(tmp_path / "rows.jsonl", [{"x": "a", "y": "b"}])
    declared = {
        "name": name,
        "files": {"train": "rows.jsonl"},
        "source": "{x}",
        "target": "y",
        "metrics": ["exact_match"],
    }
    (tmp_path / "own.json").write_text(json.dumps(declared | {"name": name}))
    with pytest.raises(UserError, match="name"):
        find_task(str(tmp_path / "own.json"))


def test_a_label_of_forty_digits_is_told_with_its_line(tmp_path):
    put(tmp_path, "rte", "train", [*rte_rows(2), {**rte_rows(1)[0], "label": int("1" * 40)}])
    with pytest.raises(UserError, match=r"train\.jsonl:3: label is an integer of 40 digits"):
        load_task_examples(config(tmp_path, "rte"), "train")
