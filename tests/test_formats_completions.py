"""Stop strings, fenced answers, repair of the indentation."""

from __future__ import annotations

import pytest

from adept_ds.formats import extract_code, repair_indentation, stop_at

PROMPT = '\n\ndef f(x):\n    """\n    Task.\n    """\n'


def runs(prompt: str, completion: str, argument):
    scope: dict = {}
    exec(prompt + completion, scope)
    return scope["f"](argument)


def test_stop_at_the_earliest_of_several_strings():
    assert stop_at("    return x\nprint(1)\ndef g():", ("\ndef", "\nprint")) == "    return x"


def test_no_stop_string_leaves_the_text():
    assert stop_at("    return x", ("\ndef",)) == "    return x"
    assert stop_at("    return x", ()) == "    return x"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here it is:\n\n```python\ndef f():\n    pass\n```\nUse it:\n```python\nf()\n```", "def f():\n    pass\n"),
        ("```\n$ pip install x\n```\nThen\n```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("def f():\n    pass\n[DONE]\nmore", "def f():\n    pass"),
        ("[BEGIN]\nx = 1\n[DONE]", "x = 1"),
        ("x = 1", "x = 1"),
    ],
    ids=["first of two", "python before bare", "bare", "unclosed", "in a list", "done", "begin", "plain"],
)
def test_extract_code(answer, code):
    assert extract_code(answer) == code


def test_working_indentation_is_left_alone():
    completion = "    if x:\n      return 1\n    return 2  "
    assert repair_indentation(PROMPT, completion) == completion


@pytest.mark.parametrize(
    "completion",
    [
        "return x + 1",
        "  y = x\n  return y + 1",
        "\ty = x\n\treturn y + 1",
        "y = x\n    return y + 1",
        "     y = x\n    return y + 1",
        "        for i in range(1):\n            x += 1\n        return x",
        "for i in range(1):\n        x += 1\n    return x",
        "    if x > 100:\n        return 0\n      else:\n        return x + 1",
        "      y = [\n  x,\n    1]\n      return sum(y)",
        "     # a comment: (\n      y = ':('\n      return x + 1",
    ],
    ids=["none", "two", "tab", "first lost", "first deeper", "deep", "loop", "else", "brackets", "marks in strings"],
)
def test_repaired_indentation_runs(completion):
    assert runs(PROMPT, repair_indentation(PROMPT, completion), 1) == 2


def test_repair_takes_the_unit_of_the_prompt():
    tabbed = PROMPT.replace("    ", "\t")
    repaired = repair_indentation(tabbed, "    if x:\n        return 2")
    assert repaired == "\tif x:\n\t\treturn 2"


def test_other_mistakes_are_not_repaired():
    with pytest.raises(SyntaxError):
        runs(PROMPT, repair_indentation(PROMPT, "    return (x"), 1)
