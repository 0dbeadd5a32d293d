"""Problem files: forms, splits, prompts, and the errors for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adept_ds.config.run import DataConfig
from adept_ds.data.problems import load_examples, load_problems, read_problems
from adept_ds.errors import UserError
from adept_ds.formats import read_rows
from adept_ds.formats.mbpp import MbppRecord, parse_record, task_in_words, to_humaneval

MBPP_ROW = {
    "task_id": 601,
    "text": "Write a function that adds two numbers.",
    "code": "def plus(a, b):\r\n    return a + b\r\n",
    "test_list": ["assert plus(1, 2) == 3", "assert plus(0, 0) == (0)"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def mbpp_record(**changes) -> MbppRecord:
    fields = {
        "where": "f:1",
        "task_id": "MBPP/1",
        "text": "Add.",
        "code": "def plus(a, b):\n    return a + b",
        "test_list": ("assert plus(1, 2) == 3",),
        "test_setup_code": "",
        "split": None,
    }
    return MbppRecord(**{**fields, **changes})


# The real files


@pytest.mark.parametrize("name", ["mbpp.jsonl", "mbxp_mbpp_release_v1.jsonl"])
def test_paper_protocol_halves_the_file_in_its_order(shared_dir, name):
    cfg = DataConfig(path=str(shared_dir / "data" / name))
    train, test = load_problems(cfg, "train"), load_problems(cfg, "test")
    assert [problem.task_id for problem in train] == [f"MBPP/{i}" for i in range(1, 488)]
    assert [problem.task_id for problem in test] == [f"MBPP/{i}" for i in range(488, 975)]


def test_usual_split_of_the_original_form(shared_dir):
    cfg = DataConfig(format="mbpp", path=str(shared_dir / "data/mbpp.jsonl"))
    ids = {
        split: [problem.task_id for problem in load_problems(cfg, split)] for split in ("train", "validation", "test")
    }
    assert ids["test"] == [f"MBPP/{i}" for i in range(11, 511)]
    assert ids["validation"] == [f"MBPP/{i}" for i in range(511, 601)]
    assert ids["train"] == [f"MBPP/{i}" for i in range(601, 975)]


def test_no_carriage_return_of_the_original_file_is_left(shared_dir):
    problems = read_problems(str(shared_dir / "data/mbpp.jsonl"))
    assert not [p.task_id for p in problems if "\r" in p.prompt + p.target + p.tests.reference + p.tests.setup]


def test_derived_form_is_the_published_one(shared_dir):
    """Byte-equal but for ten problems.

    64 and 966: the published docstring takes its indentation from a comment; 160: its text replacement hit a string;
    341, 642: task and code were revised; 367, 927: it drops the setup code; 596, 601: values were folded;
    769: brackets.
    """
    original, published = (
        [parse_record(row) for row in read_rows(shared_dir / "data" / name)]
        for name in ("mbpp.jsonl", "mbxp_mbpp_release_v1.jsonl")
    )
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    different = [
        ours.task_id
        for ours, theirs in zip(map(to_humaneval, original), published, strict=True)
        if any(getattr(ours, name) != getattr(theirs, name) for name in fields)
    ]
    assert different == [f"MBPP/{i}" for i in (64, 160, 341, 367, 596, 642, 769, 912, 927, 966)]


# Prompts


def test_derived_form_layout():
    derived = to_humaneval(
        mbpp_record(
            code="import math\ndef helper(x):\n  return x\ndef plus (a, b): # adds\n  return helper(a) + b",
            test_list=("assert plus(1, 2) == 3", "assert not plus(0, 0)"),
        )
    )
    assert derived.entry_point == "plus"
    assert derived.prompt == '\n\ndef plus (a, b):\n  """\n  Add.\n  >>> plus(1, 2)\n  3\n  """\n'
    assert derived.canonical_solution == (
        "  import math\n  def helper(x):\n    return x\n   # adds\n  return helper(a) + b"
    )
    assert derived.test == (
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
        "    assert candidate(1, 2) == 3\n    assert not candidate(0, 0)\n\n"
    )


def test_derivation_replaces_the_name_and_not_the_same_word_in_strings():
    derived = to_humaneval(mbpp_record(test_list=("assert plus('é plus', plus('a', 'b')) == 'plus'",)))
    assert "    assert candidate('é plus', candidate('a', 'b')) == 'plus'\n" in derived.test


@pytest.mark.parametrize(
    "code", ["def plus(a, b): return a + b", "import math\ndef plus(\n    a: int = {1: 2}[1],\n    b=3): return a + b"]
)
def test_derivation_of_one_line_functions_runs(code):
    derived = to_humaneval(mbpp_record(code=code))
    scope: dict = {}
    exec(derived.prompt + derived.canonical_solution + derived.test, scope)
    scope["check"](scope["plus"])


def test_derivation_keeps_setup_code_before_the_check():
    derived = to_humaneval(mbpp_record(test_setup_code="one = 1", test_list=("assert plus(one, 2) == 3",)))
    assert derived.test.index("one = 1") < derived.test.index("def check")


@pytest.mark.parametrize("code", ["class plus:\n    pass", "@cache\ndef plus(a, b):\n    return a + b"])
def test_underivable_problem_is_named_with_a_way_out(code):
    with pytest.raises(UserError, match=r"f:1: no signature and docstring .* data\.format: mbpp"):
        to_humaneval(mbpp_record(code=code))


def test_few_shot_prompt_takes_tasks_2_3_4_and_ends_ready_for_code(shared_dir):
    cfg = DataConfig(format="mbpp", path=str(shared_dir / "data/mbpp.jsonl"), few_shot=3)
    shots = load_problems(DataConfig(format="mbpp", path=cfg.path, few_shot=0), "test")[0].prompt
    prompt = load_problems(cfg, "test")[0].prompt
    assert prompt.endswith(shots)
    assert shots.startswith("You are an expert Python programmer, and here is your task: ")
    assert shots.endswith("\n[BEGIN]\n")
    assert prompt.count("[DONE]\n\n") == 3
    positions = [prompt.index(name) for name in ("similar_elements", "is_not_prime", "heap_queue_largest")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("format", ["mbpp-paper", "mbpp", "mbpp-instruct"])
def test_a_prompt_of_any_form_tells_its_task_in_words(shared_dir, format):
    problems = load_problems(
        DataConfig(format=format, path=str(shared_dir / "data/mbpp.jsonl"), few_shot=3 * (format == "mbpp")), "test"
    )
    told = {problem.task_id: task_in_words(problem.prompt) for problem in problems}
    rows = [json.loads(line) for line in (shared_dir / "data/mbpp.jsonl").read_text().splitlines()]
    texts = {f"MBPP/{row['task_id']}": " ".join(row["text"].partition(">>>")[0].split()) for row in rows}
    assert told == {task_id: texts[task_id] for task_id in told}


def test_a_prompt_that_states_no_task_is_told_as_none():
    assert task_in_words("def f(x):\n") == ""


def test_few_shot_needs_examples(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", MBPP_ROW)
    with pytest.raises(UserError, match=r"data\.few_shot is 3, but .*p\.jsonl has 0 examples"):
        load_problems(DataConfig(format="mbpp", path=path, few_shot=3), "train")


def test_targets_hold_the_program_in_each_form(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", MBPP_ROW, {**MBPP_ROW, "task_id": 602})
    few_shot = load_problems(DataConfig(format="mbpp", path=path, few_shot=0), "train")[0]
    assert few_shot.target == "def plus(a, b):\n    return a + b\n[DONE]"
    instruct = load_problems(DataConfig(format="mbpp-instruct", path=path), "train")[0]
    assert instruct.target == "```python\ndef plus(a, b):\n    return a + b\n```"
    assert instruct.chat
    paper = load_problems(DataConfig(path=path), "train")[0]
    assert paper.prompt + paper.target.rstrip() == (
        '\n\ndef plus(a, b):\n    """\n    Write a function that adds two numbers.\n    >>> plus(1, 2)\n    3\n'
        '    >>> plus(0, 0)\n    (0)\n    """\n    \n    return a + b'
    )


@pytest.mark.parametrize("format", ["mbpp-paper", "mbpp", "mbpp-instruct"])
def test_the_target_as_completion_gives_a_program_that_passes(format):
    for problem in load_problems(DataConfig(format=format), "validation"):
        scope: dict = {}
        exec(problem.program(problem.target), scope)
        exec(problem.tests.check + "\n".join(problem.tests.asserts), scope)
        if problem.tests.entry_point:
            scope["check"](scope[problem.tests.entry_point])


def test_stop_strings_do_not_cut_the_bundled_targets():
    problems = load_problems(DataConfig(format="mbpp-paper"), "train")
    assert not [p.task_id for p in problems if any(stop in p.target for stop in p.stop)]


def test_the_bundled_answers_are_complete_where_they_end():
    for problem in load_problems(DataConfig(format="mbpp-instruct"), "train"):
        assert problem.answer(problem.target).is_complete
        assert not problem.answer(problem.target[:-1]).is_complete
        assert problem.program(problem.target).strip() in problem.target


def test_humaneval_is_read_from_its_own_package():
    problems = load_problems(DataConfig(format="humaneval"), "test")
    assert len(problems) == 164
    assert problems[0].task_id == "HumanEval/0"
    assert problems[0].program("    pass").endswith('"""\n    pass')


def test_humaneval_has_no_training_split():
    with pytest.raises(UserError, match=r"unknown split 'train'.*humaneval.*test"):
        load_problems(DataConfig(format="humaneval"), "train")


# Splits


def test_unknown_split_names_the_nearest():
    with pytest.raises(UserError, match=r"'valid'.*train, validation, test; did you mean 'validation'\?"):
        load_problems(DataConfig(), "valid")


def test_a_file_without_validation_split_has_an_empty_one(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", *({**MBPP_ROW, "task_id": i} for i in range(1, 21)))
    assert load_problems(DataConfig(path=path), "validation") == []


def test_validation_is_held_out_of_train_on_request(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", *({**MBPP_ROW, "task_id": i} for i in range(1, 41)))
    cfg = DataConfig(path=path, validation_fraction=0.1)
    ids = {split: [p.task_id for p in load_problems(cfg, split)] for split in ("train", "validation", "test")}
    assert ids["train"] == [f"MBPP/{i}" for i in range(1, 19)]
    assert ids["validation"] == ["MBPP/19", "MBPP/20"]
    assert ids["test"] == [f"MBPP/{i}" for i in range(21, 41)]


def test_split_field_of_the_records_wins(tmp_path):
    rows = ({**MBPP_ROW, "task_id": i, "split": split} for i, split in enumerate(["test", "train", "validation"], 1))
    cfg = DataConfig(path=write_rows(tmp_path / "p.jsonl", *rows))
    assert [load_problems(cfg, split)[0].task_id for split in ("train", "validation", "test")] == [
        "MBPP/2",
        "MBPP/3",
        "MBPP/1",
    ]


@pytest.mark.parametrize("second", [{"split": "tset"}, {}])
def test_every_record_names_a_known_split_or_none_does(tmp_path, second):
    path = write_rows(tmp_path / "p.jsonl", {**MBPP_ROW, "split": "train"}, {**MBPP_ROW, "task_id": 2, **second})
    with pytest.raises(UserError, match=r"p\.jsonl:2: split is .* expected prompt, train, validation, test"):
        load_problems(DataConfig(path=path), "train")


def test_ids_outside_mbpp_need_a_split_field(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", {**MBPP_ROW, "task_id": "mine/1"})
    with pytest.raises(UserError, match=r"p\.jsonl:1: task_id 'mine/1' has no place .* field split"):
        load_problems(DataConfig(format="mbpp", path=path), "train")


def test_split_without_records_is_an_error(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", {**MBPP_ROW, "split": "train"})
    with pytest.raises(UserError, match=r"p\.jsonl: no record belongs to the split 'test'"):
        load_problems(DataConfig(path=path), "test")


# Forms


def test_humaneval_form_cannot_serve_the_original_prompts(shared_dir):
    cfg = DataConfig(format="mbpp-instruct", path=str(shared_dir / "data/mbxp_mbpp_release_v1.jsonl"))
    with pytest.raises(
        UserError, match=r"jsonl:11: this file has HumanEval's form .* MBPP's .* or data\.format mbpp-paper"
    ):
        load_problems(cfg, "test")


def test_scorer_reads_original_form_for_either_protocol(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", MBPP_ROW)
    program = "def plus(a, b):\n    return a + b\n"
    assert read_problems(path)[0].program(program).strip() == program.strip()
    assert read_problems(path, "mbpp-paper")[0].program("    return a + b").startswith('\n\ndef plus(a, b):\n    """')


def test_hub_layout_is_read_in_task_order(tmp_path, monkeypatch):
    """A local folder with the hub's layout: configurations in README.md, one file a split."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "mbpp"
    folder.mkdir()
    write_rows(folder / "train.jsonl", *({**MBPP_ROW, "task_id": i} for i in (3, 4)))
    write_rows(folder / "test.jsonl", *({**MBPP_ROW, "task_id": i} for i in (1, 2)))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: full\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    cfg = DataConfig(path=str(folder))
    assert [problem.task_id for problem in load_problems(cfg, "train")] == ["MBPP/1", "MBPP/2"]


# The user's own JSON lines


def test_jsonl_reads_named_fields(tmp_path):
    train = write_rows(tmp_path / "t.jsonl", {"question": "2 + 2?", "answer": "4"})
    validation = write_rows(tmp_path / "v.jsonl", {"question": "3 + 3?", "answer": "6"})
    cfg = DataConfig(
        format="jsonl", path=train, validation_path=validation, prompt_field="question", target_field="answer"
    )
    (example,) = load_examples(cfg, "train")
    assert (example.prompt, example.target, example.task_id) == ("2 + 2?", "4", f"{train}:1")
    assert load_examples(cfg, "validation")[0].target == "6"


def test_jsonl_missing_field_names_line_fields_and_nearest(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"})
    with pytest.raises(UserError, match=r"t\.jsonl:2: no field 'completion'; .*'prompt', 'completions'; did you mean"):
        load_examples(DataConfig(format="jsonl", path=path), "train")


@pytest.mark.parametrize(
    ("row", "field"),
    [({"prompt": " ", "completion": "b"}, "prompt"), ({"prompt": "a", "completion": ""}, "completion")],
)
def test_jsonl_empty_prompt_or_target(tmp_path, row, field):
    path = write_rows(tmp_path / "t.jsonl", row)
    with pytest.raises(UserError, match=rf"t\.jsonl:1: {field} is empty"):
        load_examples(DataConfig(format="jsonl", path=path), "train")


def test_jsonl_has_no_problems(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match=r"data\.format jsonl has no tests"):
        load_problems(DataConfig(format="jsonl", path=path), "train")


# Bad files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p\.jsonl: holds no records"),
        (b'{"task_id": 1}\n{"task_id": \n', r"p\.jsonl:2: not valid JSON, .*column"),
        (b"[1, 2]\n", r"p\.jsonl:1: expected a JSON object, found list"),
        (b"\xff\xfe\x00", r"p\.jsonl: is UTF-16 text; expected UTF-8"),
        (b'{"question": "x"}\n', r"p\.jsonl:1: not a problem; expected the fields task_id, text, .* found question"),
    ],
)
def test_unreadable_file(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_problems(DataConfig(path=str(tmp_path / "p.jsonl")), "train")


def test_absent_file():
    with pytest.raises(UserError, match=r"no/such\.jsonl: no such file"):
        load_problems(DataConfig(path="no/such.jsonl"), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": ""}, r"p\.jsonl:1: code is empty"),
        ({"text": 3}, r"p\.jsonl:1: text must be a string, not int"),
        ({"test_list": []}, r"p\.jsonl:1: test_list must be a list of assert statements"),
        ({"test_list": "assert"}, r"p\.jsonl:1: test_list must be a list, not str"),
        ({"test_list": ["pass"]}, r"p\.jsonl:1: test_list tests nothing, .* expected asserts about .* \(plus\)"),
        ({"test_list": ["x = 1", "assert x"]}, r"p\.jsonl:1: test_list tests nothing"),
        ({"test_setup_code": "import ("}, r"p\.jsonl:1: test_setup_code is not valid Python"),
        ({"test_list": ["assert True"]}, r"p\.jsonl:1: test_list tests nothing"),
        (
            {"code": "import sys\n" + MBPP_ROW["code"], "test_list": ["assert sys"]},
            r"p\.jsonl:1: test_list tests nothing",
        ),
        ({"test_list": ["assert minus(1, 2) == 3"]}, r"p\.jsonl:1: test_list tests nothing"),
        (
            {"test_list": ["assert (plus(1, 2) == 3, 'no')"]},
            r"`assert \(plus\(1, 2\) == 3, 'no'\)` .* for every program",
        ),
        ({"test_list": ["assert plus(1, 2"]}, r"p\.jsonl:1: test_list, test 1 is not valid Python"),
        ({"test_list": ["assert plus(1, 2) == 3"] * 10_001}, r"p\.jsonl:1: test_list has 10,001 .* may have 10,000"),
        ({"code": "def plus(:"}, r"p\.jsonl:1: code or test_list is not valid Python"),
    ],
)
def test_bad_field(tmp_path, changes, message):
    path = write_rows(tmp_path / "p.jsonl", {**MBPP_ROW, **changes})
    with pytest.raises(UserError, match=message):
        load_problems(DataConfig(path=path), "test")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("def check(candidate):\n    assert True", r"p\.jsonl:1: check in test tests nothing, .* about candidate"),
        ("def check(candidate):\n    assert (candidate(1, 2) == 3, 'no')", r"p\.jsonl:1: `assert .* for every program"),
        ("def check():\n    assert plus(1, 2) == 3", r"p\.jsonl:1: test defines no function check\(candidate\)"),
        ("assert plus(1, 2) == 3", r"p\.jsonl:1: test defines no function check\(candidate\)"),
        ("def check(candidate):\n" + "    assert candidate(1, 2) == 3\n" * 10_001, r"test has 10,00\d statements"),
    ],
    ids=["constant", "tuple", "no argument", "no check", "many"],
)
def test_a_check_that_checks_nothing(tmp_path, test, message):
    row = {"task_id": 1, "prompt": "def plus(a, b):\n", "canonical_solution": "    return a + b", "entry_point": "plus"}
    path = write_rows(tmp_path / "p.jsonl", {**row, "test": test})
    with pytest.raises(UserError, match=message):
        read_problems(path)


def test_misspelt_field_is_named_with_the_nearest(tmp_path):
    row = {("test_lists" if key == "test_list" else key): value for key, value in MBPP_ROW.items()}
    with pytest.raises(UserError, match=r"p\.jsonl:1: no field 'test_list'; .* did you mean 'test_lists'\?"):
        load_problems(DataConfig(path=write_rows(tmp_path / "p.jsonl", row)), "train")


def test_duplicate_task_id_names_both_lines(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", MBPP_ROW, {**MBPP_ROW, "task_id": "MBPP/601"})
    with pytest.raises(UserError, match=r"p\.jsonl:2: task_id 'MBPP/601' was used before, at .*p\.jsonl:1"):
        load_problems(DataConfig(path=path), "train")
