"""Stop strings, repair of the indentation."""

from __future__ import annotations

import pytest

from adept_ds.formats import repair_indentation, stop_at

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
