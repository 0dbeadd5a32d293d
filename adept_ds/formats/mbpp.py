"""The two forms of an MBPP problem, and the prompts made of them; EvalPlus's form is in `evalplus.py`.

- Original form: a task in words, a whole program, three asserts (`task_id`, `text`, `code`, `test_list`).
- HumanEval form (MBXP, HumanEval): a signature and docstring to be continued, the body, and `check(candidate)`
  (`task_id`, `prompt`, `canonical_solution`, `test`, `entry_point`).

`to_humaneval` derives the second form from the first with MBXP's layout, so that one file serves every protocol.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from adept_ds.errors import UserError
from adept_ds.formats.evalplus import EVALPLUS_FIELDS, PlusRecord, is_plus, parse_plus_record
from adept_ds.formats.rows import Row
from adept_ds.formats.tested import check_tests
from adept_ds.sandbox import Tests


@dataclass(frozen=True)
class MbppRecord:
    """A problem in the original form. `where` is `file:line`; `split` is None unless the record names one."""

    where: str
    task_id: str
    text: str
    code: str
    test_list: tuple[str, ...]
    test_setup_code: str
    split: str | None

    @property
    def tests(self) -> Tests:
        """For the sandbox."""
        return Tests(
            asserts=self.test_list, setup=self.test_setup_code, check="", entry_point=None, reference=self.code
        )


@dataclass(frozen=True)
class HumanEvalRecord:
    """A problem in HumanEval's form. `where` is `file:line`; `split` is None unless the record names one."""

    where: str
    task_id: str
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str
    split: str | None

    @property
    def tests(self) -> Tests:
        """For the sandbox."""
        return Tests(
            asserts=(),
            setup="",
            check=self.test,
            entry_point=self.entry_point,
            reference=self.prompt + self.canonical_solution,
        )


Record = MbppRecord | HumanEvalRecord | PlusRecord

MBPP_FIELDS = ("task_id", "text", "code", "test_list")
HUMANEVAL_FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
FEW_SHOT_OPENING = "You are an expert Python programmer, and here is your task:"
BEFORE_TESTS = "Your code should pass these tests:"


def parse_record(row: Row) -> Record:
    """Read one record of either form, or of EvalPlus's, told apart by its fields.

    UserError on missing, mistyped and empty fields, and on tests that test nothing.
    """
    if is_plus(row):
        return parse_plus_record(row)
    record = _parse_fields(row)
    check_tests(record.tests, row.where)
    return record


def _parse_fields(row: Row) -> MbppRecord | HumanEvalRecord:
    of_mbpp, of_humaneval = (sum(name in row.values for name in fields) for fields in (MBPP_FIELDS, HUMANEVAL_FIELDS))
    split = row.get("split", str) if "split" in row.values else None
    if max(of_mbpp, of_humaneval) <= 1:
        raise UserError(
            f"{row.where}: not a problem; expected the fields {', '.join(MBPP_FIELDS)} (MBPP), "
            f"{', '.join(HUMANEVAL_FIELDS)} (MBXP, HumanEval) or {', '.join(EVALPLUS_FIELDS)} (EvalPlus), found "
            f"{', '.join(row.values)}"
        )
    if of_humaneval > of_mbpp:
        prompt, solution, test, entry_point = (row.get_text(name) for name in HUMANEVAL_FIELDS[1:])
        return HumanEvalRecord(row.where, row.get_task_id(), prompt, solution, test, entry_point, split)
    tests = row.get("test_list", list)
    if not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{row.where}: test_list must be a list of assert statements, with one at least")
    return MbppRecord(
        row.where,
        row.get_task_id(),
        row.get_text("text"),
        row.get_text("code"),
        tuple(test.replace("\r\n", "\n") for test in tests),
        (row.get("test_setup_code", str) if "test_setup_code" in row.values else "").replace("\r\n", "\n"),
        split,
    )


def few_shot_prompt(record: MbppRecord, examples: Sequence[MbppRecord]) -> str:
    """Return the prompt of the MBPP paper: worked examples, then the task, ending after `[BEGIN]`."""
    shots = [_task_and_tests(example) + few_shot_target(example) + "\n\n" for example in examples]
    return "".join(shots) + _task_and_tests(record)


def few_shot_target(record: MbppRecord) -> str:
    """Return what follows `few_shot_prompt`: the program and `[DONE]`."""
    return f"{record.code.rstrip()}\n[DONE]"


def _task_and_tests(record: MbppRecord) -> str:
    tests = "\n".join(record.test_list)
    return f"{FEW_SHOT_OPENING} {record.text.strip()} {BEFORE_TESTS}\n\n{tests}\n[BEGIN]\n"


def instruct_prompt(record: MbppRecord) -> str:
    """Return the user's turn for a chat model."""
    tests = "\n".join(record.test_list)
    return (
        f"{record.text.strip()}\n\n{BEFORE_TESTS}\n\n```python\n{tests}\n```\n\n"
        "Answer with the Python code in one ```python block."
    )


def instruct_target(record: MbppRecord) -> str:
    """Return the answer that a chat model is trained to give."""
    return f"```python\n{record.code.rstrip()}\n```"


def task_in_words(prompt: str) -> str:
    """Return the task that a prompt of one of the forms states, on one line; empty if it states none.

    Of worked examples it is the last one, of a signature with its docstring what stands before the first example.
    """
    stated, has_tests, _ = prompt.rpartition(BEFORE_TESTS)
    if has_tests:
        text = stated.rpartition(FEW_SHOT_OPENING)[2]
    else:
        last_function = prompt[max(0, prompt.rfind("\ndef ")) :]
        parts = re.split(r"\"{3}|'{3}", last_function)
        text = parts[1] if len(parts) > 1 else ""
    return " ".join(text.partition(">>>")[0].split())


def to_humaneval(record: MbppRecord) -> HumanEvalRecord:
    """Derive the HumanEval form of an original-form problem, in MBXP's layout.

    The prompt is the tested function's signature with a docstring of the task and of every assert of the form
    `f(...) == value` as a doctest-like example. The canonical solution is what stands before the function (imports,
    helpers), moved into its body, then the rest of the signature's line, the body, and what follows the function.
    Setup code, which MBXP drops, stands in the test in front of `check`.

    Raises UserError if no function of the program is called by the asserts, or if it is decorated.
    """
    try:
        functions = {node.name: node for node in _parse(record.code).body if isinstance(node, ast.FunctionDef)}
        tests = [_parse(test) for test in record.test_list]
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{record.where}: code or test_list is not valid Python ({error})") from error
    called = [name for test in tests for node in ast.walk(test) for name in functions if _is_call_of(node, name)]
    if not called or functions[called[0]].decorator_list:
        raise UserError(
            f"{record.where}: no signature and docstring can be made of this problem, its test_list must call a "
            "plain function that its code defines at the top level; use data.format: mbpp for such problems"
        )
    function = functions[called[0]]
    signature, rest_of_line = _split_signature(record.code, function)
    lines = record.code.split("\n")
    first = function.body[0]
    signature_end = function.lineno - 1 + signature.count("\n")
    on_one_line = first.lineno - 1 == signature_end
    indent = "    " if on_one_line else lines[first.lineno - 1][: first.col_offset]

    examples = []
    for test, parsed in zip(record.test_list, tests, strict=True):
        example = _call_and_value(test, parsed, function.name)
        if example is not None:
            examples += [f">>> {example[0]}", example[1]]
    docstring = ['"""', record.text.strip(), *examples, '"""']
    prompt = f"\n\n{signature}\n" + "".join(f"{indent}{line}\n" for line in docstring)

    before = [f"{indent}{line}" for line in lines[: function.lineno - 1]]
    # Of a one-line function, the rest is the body itself.
    rest = rest_of_line.lstrip() if on_one_line else rest_of_line
    solution = "\n".join([*before, indent + rest, *lines[signature_end + 1 :]])

    asserts = "".join(f"    {_with_candidate(test, function.name)}\n" for test in record.test_list)
    setup = f"{record.test_setup_code.strip()}\n\n\n" if record.test_setup_code.strip() else ""
    test = f"\n\n{setup}METADATA = {{}}\n\n\ndef check(candidate):\n{asserts}\n"
    return HumanEvalRecord(record.where, record.task_id, prompt, solution, test, function.name, record.split)


def _parse(source: str) -> ast.Module:
    # Not the user's code: its invalid escapes in strings are none of the user's business.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _split_signature(code: str, function: ast.FunctionDef) -> tuple[str, str]:
    """Return the text from `def` to its colon, and the rest of the colon's line."""
    lines = code.split("\n")
    text = "\n".join(lines[function.lineno - 1 :])
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if token.string == ":" and depth == 0:
            break
    row, column = token.end
    text_lines = text.split("\n")
    return "\n".join([*text_lines[: row - 1], text_lines[row - 1][:column]]), text_lines[row - 1][column:]


def _call_and_value(test: str, parsed: ast.Module, name: str) -> tuple[str, str] | None:
    """Return the two sides of `assert name(...) == value` as written, or None for another form."""
    statement = parsed.body[0]
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        return None
    left, operators = statement.test.left, statement.test.ops
    if len(operators) != 1 or not isinstance(operators[0], ast.Eq):
        return None
    if not any(_is_call_of(node, name) for node in ast.walk(left)):
        return None
    # The value is not taken from the syntax tree, which leaves its brackets out.
    call = ast.get_source_segment(test, left) or ""
    return call, test.partition(call)[2].partition("==")[2].strip()


def _with_candidate(test: str, name: str) -> str:
    """Return the assert with `candidate` in place of the function's name."""
    lines = test.split("\n")
    parts, position = [], 0
    names = [node for node in ast.walk(_parse(test)) if isinstance(node, ast.Name) and node.id == name]
    for node in sorted(names, key=lambda node: (node.lineno, node.col_offset)):
        # Column offsets of the syntax tree count bytes.
        column = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        start = sum(len(line) + 1 for line in lines[: node.lineno - 1]) + column
        parts += [test[position:start], "candidate"]
        position = start + len(name)
    return "".join(parts) + test[position:]
