"""A user's own rows: which columns are taken, what is held out, and every mistake told."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from adept_ds.config.run import DataConfig
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.hub import hub_data_sets
from adept_ds.data.problems import load_examples
from adept_ds.errors import UserError
from adept_ds.formats import Conversation, Example, Message
from adept_ds.planner.dry_run import count_training_examples
from tests.test_data_chat import CHATML, tokenizer_with

Rows = list[dict[str, Any]]


def put(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(format="own", path=str(path), **settings)


def one(tmp_path: Path, row: dict[str, Any], suffix: str = ".jsonl", **settings: Any) -> tuple[Example, list[str]]:
    """The example that a row makes, and what is told of the data."""
    examples = load_examples(own(put(tmp_path / f"rows{suffix}", [row]), **settings), "train")
    return examples[0], list(examples.notes)


# Which columns are what


@pytest.mark.parametrize(
    ("row", "prompt", "target"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4"),
        ({"id": 7, "Prompt": "2 + 2 =", "Response": " 4"}, "2 + 2 =", " 4"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_prompt_is_shown_as_it_stands(tmp_path: Path, row: dict, prompt: str, target: str, suffix: str) -> None:
    example, _ = one(tmp_path, row, suffix)
    assert (example.prompt, example.target, example.turns) == (prompt, target, ())


@pytest.mark.parametrize(
    ("row", "user", "target", "without_template"),
    [
        ({"question": "Who?", "answer": "I."}, "Who?", "I.", "Who?\n"),
        ({"question": "Who?", "context": "I.", "answer": "I."}, "Who?\n\nI.", "I.", "### Input:\nI.\n\n### Response:"),
        ({"input": "x", "output": 4}, "x", "4", "x\n"),
        ({"text": "fine", "label": "good"}, "fine", "good", "fine\n"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3", "### Instruction:\nAdd.\n\n### Response:"),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is ..."},
            "Add.\n\n1, 2",
            "3",
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
        ),
    ],
)
def test_what_is_answered_is_a_users_turn(
    tmp_path: Path, row: dict, user: str, target: str, without_template: str
) -> None:
    example, notes = one(tmp_path, row)
    assert isinstance(example, Conversation)
    assert example.messages == (Message("user", user), Message("assistant", target))
    assert example.prompt.endswith(without_template)
    assert "or with" in notes[0]


@pytest.mark.parametrize(
    ("style", "prompt", "turns"),
    [
        ("plain", "Add.\n\n1, 2", ()),
        (
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
            "### Response:",
            (),
        ),
        ("chat", "", (Message("user", "Add.\n\n1, 2"),)),
    ],
)
def test_the_style_can_be_set(tmp_path: Path, style: str, prompt: str, turns: tuple[Message, ...]) -> None:
    example, _ = one(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"}, prompt_style=style)
    assert (example.prompt, example.turns) == (prompt, turns)


OPENAI = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]
PARTS = [*OPENAI[:2], {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]


@pytest.mark.parametrize(
    ("column", "chat"),
    [
        ("messages", OPENAI),
        ("conversations", SHAREGPT),
        ("messages", SHAREGPT),
        ("messages", PARTS),
        ("messages", json.dumps(OPENAI)),
        ("messages", [*OPENAI, {"role": "user", "content": "thanks"}]),
    ],
    ids=["openai", "sharegpt", "mixed", "parts", "as JSON", "ends with the user"],
)
def test_chats(tmp_path: Path, column: str, chat: Any) -> None:
    example, notes = one(tmp_path, {"id": 1, column: chat, "prompt": "U"})
    assert isinstance(example, Conversation)
    assert example.messages == (Message("system", "S"), Message("user", "U"), Message("assistant", "A"))
    assert (example.target, example.prompt) == ("A", "")
    assert notes[0].endswith(f"1 rows; {column} is a chat; not used: id, prompt")


def test_columns_can_be_set(tmp_path: Path) -> None:
    row = {"frage": "Wer?", "antwort": "Ich.", "mehr": None, "question": "Who?", "answer": "I.", "c": OPENAI}
    example, notes = one(tmp_path, row, prompt_field="frage", target_field="antwort")
    assert (example.turns[0].content, example.target) == ("Wer?", "Ich.")
    assert notes[0].endswith("antwort the target; not used: mehr, question, answer, c")
    example, _ = one(tmp_path, row, prompt_field="frage", target_field="antwort", context_field="mehr")
    assert example.prompt.endswith("### Instruction:\nWer?\n\n### Response:")
    assert len(one(tmp_path, row, messages_field="c")[0].turns) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl: no column 'fragen'; it has frage, .*did you mean 'frage'"):
        one(tmp_path, row, prompt_field="fragen", target_field="antwort")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"a": "x", "b": "y"}, r"\(a, b\); Say"),
        ({"question": "x", "b": "y"}, r"found 'question' as the prompt\. Say"),
        (
            {"prompt": "x", "question": "y", "answer": "z"},
            "found 'prompt' or 'question' as the prompt; 'answer' as the",
        ),
        ({"text": "x", "label": "y", "summary": "z"}, "'text' as the prompt; 'label' or 'summary' as the target"),
        ({"prompt": "x", "completion": "y", "messages": OPENAI}, "'messages' as the chat; 'prompt' as the prompt"),
        ({"messages": OPENAI, "conversations": SHAREGPT}, "'messages' or 'conversations' as the chat"),
    ],
)
def test_doubt_is_told_with_what_there_is(tmp_path: Path, row: dict, found: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl: which columns are what .*{found}.*data\.prompt_field"):
        one(tmp_path, row)


# Mistakes


def test_all_mistakes_of_a_file_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    lines = [
        b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n',
        b"\r\n",
        b'{"prompt": "a"}\r\n',
        b'{"prompt": "a", "completion": " "}\r\n',
        b'{"prompt": "a", "completion": ["b"]}\r\n',
        b'{"prompt": "a", "completion": \r\n',
        b'{"prompt": "\xe9", "completion": "b"}\r\n',
    ]
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError) as raised:
        load_examples(own(path), "train")
    assert [line.strip().removeprefix(f"{path}") for line in str(raised.value).splitlines()] == [
        ": 5 mistakes",
        ":3: no field 'completion'; the record has 'prompt'",
        ":4: completion is empty",
        ":5: completion must be a text, not list",
        ":6: not valid JSON, Expecting value (column 30)",
        ":7: not UTF-8 (byte 0xe9 at 13)",
    ]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "messages must be a list of messages, with one at least"),
        ("hello", "messages must be a list of messages"),
        (["hello"], r"messages\[0\] must be an object with role and content, or with from and value"),
        ([{"role": "usr", "content": "x"}], r"messages\[0\]: role is 'usr'; expected one of .*did you mean 'user'"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content must be a text, not NoneType"),
        ([{"from": "human"}], r"messages\[0\]: value must be a text"),
        ([*OPENAI, {"role": "assistant", "content": " "}], r"messages\[3\]: content is empty"),
        ([*OPENAI[:2]], "messages has no turn of the assistant's to learn from"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], r"messages\[0\]: has tool_calls, which cannot be"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]: content must be a text, not list"),
    ],
)
def test_a_chat_that_is_none_is_told(tmp_path: Path, chat: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        one(tmp_path, {"messages": chat})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.jsonl", r"mine\.jsonl: no such file"),
        ("mine", r"data\.path .*mine: how to read it cannot be told; expected \.jsonl, "),
        ("empty", r"data\.path .*empty: no file to train on in there"),
        ("empty.jsonl", r"empty\.jsonl: holds no records"),
        ("bad.jsonl", r"bad\.jsonl:1: not valid JSON"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "mine").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=message):
        load_examples(own(tmp_path / name), "train")


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="messages_field is for chats, which have no prompt_field"):
        own("x.jsonl", messages_field="m", prompt_field="p")
    with pytest.raises(ValueError, match="messages_field is not for format: jsonl; it goes with own"):
        DataConfig(format="jsonl", path="x.jsonl", messages_field="m")
    with pytest.raises(UserError, match=r"data\.subset and data\.validation_split are for the hub"):
        one(tmp_path, {"prompt": "a", "completion": "b"}, subset="x")


# What is held out


def numbered(count: int) -> Rows:
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(count)]


def prompts(cfg: DataConfig, split: str) -> list[str]:
    return [example.prompt for example in load_examples(cfg, split)]


@pytest.mark.parametrize(("count", "held"), [(19, 0), (20, 2), (100, 10), (6_000, 500)])
def test_a_tenth_is_held_out(tmp_path: Path, count: int, held: int) -> None:
    cfg = own(put(tmp_path / "rows.jsonl", numbered(count)))
    train, validation = prompts(cfg, "train"), prompts(cfg, "validation")
    assert (len(train), len(validation)) == (count - held, held)
    assert {*train, *validation} == {f"p{i}" for i in range(count)}


def test_held_out_rows_are_the_same_each_time_and_from_everywhere(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", numbered(200))
    held = prompts(own(path), "validation")
    assert held == prompts(own(path), "validation") != prompts(own(path, split_seed=1), "validation")
    assert len({int(prompt[1:]) // 50 for prompt in held}) == 4
    assert prompts(own(path), "train") == [f"p{i}" for i in range(200) if f"p{i}" not in held]


def test_what_is_held_out_can_be_set(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", numbered(40))
    assert len(prompts(own(path, validation_fraction=0.25), "validation")) == 10
    assert prompts(own(path, validation_fraction=0.0), "validation") == []
    other = put(tmp_path / "held.csv", [{"prompt": "x", "completion": "y"}])
    assert prompts(own(path, validation_path=str(other)), "validation") == ["x"]
    assert len(prompts(own(path, validation_path=str(other)), "train")) == 40


def test_a_folder_of_files(tmp_path: Path) -> None:
    put(tmp_path / "b.csv", numbered(20)[10:])
    put(tmp_path / "a.jsonl", numbered(10))
    (tmp_path / "README.md").write_text("about")
    assert prompts(own(tmp_path, validation_fraction=0.0), "train") == [f"p{i}" for i in range(20)]


def test_a_folder_by_splits(tmp_path: Path) -> None:
    for name, rows in (("train-00000-of-00002", numbered(3)), ("train-00001-of-00002", numbered(5)[3:])):
        put(tmp_path / f"{name}.parquet", rows)
    put(tmp_path / "validation.jsonl", numbered(1))
    put(tmp_path / "test.jsonl", numbered(1))
    examples = load_examples(own(tmp_path), "train")
    assert len(examples) == 5
    assert prompts(own(tmp_path), "validation") == ["p0"]
    assert f"not read in {tmp_path}: test.jsonl" in examples.notes


# The hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets` with a data set of two splits, as it is after a download."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {split: str(put(tmp_path / f"{split}.parquet", numbered(size))) for split, size in SPLITS.items()}
    datasets.load_dataset("parquet", "default", data_files=files, cache_dir=str(tmp_path / "built"))
    (info,) = (tmp_path / "built").rglob("dataset_info.json")
    target = tmp_path / "cache" / "some___chats" / "default" / "0.0.0" / "0123"
    target.parent.mkdir(parents=True)
    info.parent.rename(target)
    for file in target.glob("*.arrow"):
        file.rename(target / file.name.replace("parquet-", "chats-"))
    return tmp_path


SPLITS = {"train": 30, "validation": 4, "extra": 25}


@pytest.mark.usefixtures("hub_cache")
def test_a_data_set_of_the_hub() -> None:
    cfg = own("some/chats")
    assert hub_data_sets(cfg) == ["some/chats"]
    assert (len(prompts(cfg, "train")), prompts(cfg, "validation")) == (30, ["p0", "p1", "p2", "p3"])
    extra = own("some/chats", train_split="extra", validation_split="train")
    assert (len(prompts(extra, "train")), len(prompts(extra, "validation"))) == (25, 30)
    assert count_training_examples(cfg) == (None, "unknown, some/chats is not here")


@pytest.mark.usefixtures("hub_cache")
def test_a_split_or_data_set_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"data\.train_split is 'trian', and some/chats has .*did you mean 'train'"):
        load_examples(own("some/chats", train_split="trian"), "train")
    with pytest.raises(UserError, match=r"data\.path no/where: no such file here\. As a data set, no/where is neither"):
        load_examples(own("no/where"), "train")


# As a newcomer's file is


def test_worked_example_prompts_with_a_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "2 + 2 =", "completion": " 4"}\r\n\r\n' * 3)
    tokenizer = tokenizer_with(None)
    dataset = EncodedDataset(load_examples(own(path), "train"), tokenizer, own(path), 7, encoder_decoder=False)
    assert tokenizer.decode(dataset[0].input_ids) == "2 + 2 = 4</s>"
    assert dataset.summary().splitlines()[1:] == [
        f"  {path}: 3 rows; prompt is the prompt (as it stands), completion the target",
        "  held out for validation: none, of fewer than 20 rows",
    ]


def test_worked_example_alpaca_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.csv"
    path.write_text('instruction,input,output\nAdd them.,"1, 2",3\nGreet.,,"Hello,\nyou"\n')
    tokenizer = tokenizer_with(CHATML)
    dataset = EncodedDataset(load_examples(own(path), "train"), tokenizer, own(path), 7, encoder_decoder=False)
    texts = [tokenizer.decode(dataset[i].input_ids).partition("<|im_end|>\n")[2] for i in range(2)]
    assert texts == [
        "<|im_start|>user\nAdd them.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n",
        "<|im_start|>user\nGreet.<|im_end|>\n<|im_start|>assistant\nHello,\nyou<|im_end|>\n",
    ]
    assert "instruction + input is the prompt (as a user's turn, or with Alpaca's template" in dataset.summary()
    assert dataset.summary().endswith("found by rendering the chat up to each of them")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_no_number_is_no_text(tmp_path: Path, number: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"input": "x", "output": {number}}}\n')
    name = str(float(number))
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: output must be a text, not {name}"):
        load_examples(own(tmp_path / "rows.jsonl"), "train")


def test_prompts_and_completions_of_jsonl_are_texts(tmp_path: Path) -> None:
    """There nothing is guessed, so a number is taken for a mistake."""
    path = put(tmp_path / "rows.jsonl", [{"prompt": "2 + 2 =", "completion": 4}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: completion must be a text, not int"):
        load_examples(DataConfig(format="jsonl", path=str(path)), "train")
