"""The program in an answer: forms in which models write it, and where an answer is complete."""

from __future__ import annotations

import time

import pytest

from adept_ds.formats.answers import continue_prompt, find_program

F = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return 0\n"
INDENTED = "   def f(x):\n       return x + 1\n"
BODY = "    return x + 1\n"
QUOTED = 'def f(x):\n    """Add one.\n\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n'


def block(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}{fence}\n"


FORMS = {
    # Nothing around it.
    "plain": F,
    "plain, windows line ends": F.replace("\n", "\r\n"),
    "plain, old line ends": F.replace("\n", "\r"),
    "plain, byte order mark": "\ufeff" + F,
    "plain, tabs": F.replace("    ", "\t"),
    "plain, all indented": INDENTED,
    "plain, one blank before it": " " + F,
    "plain, main guard": F + '\nif __name__ == "__main__":\n    print(f(1))\n',
    "fence in a docstring": QUOTED,
    "few-shot marks": f"[BEGIN]\n{F}[DONE]\n\nYou are an expert Python programmer, and here is your task: ...",
    "few-shot end mark only": F + "[DONE]",
    # Languages and fences.
    "python": "Here it is:\n\n" + block(F),
    "py": block(F, "py"),
    "python3": block(F, "python3"),
    "Python": block(F, "Python"),
    "python 3.11": block(F, "python3.11"),
    "blank before the language": block(F, " python"),
    "attributes": block(F, '{.python .numberLines startFrom="1"}'),
    "file name": block(F, "python:solution.py"),
    "title": block(F, 'python title="solution.py"'),
    "no language": block(F, ""),
    "no language, then prose": "So:\n" + block(F, "") + "That's it.",
    "four backticks": block(F, "python", "````"),
    "tildes": block(F, "python", "~~~"),
    "tildes without a language": "So:\n" + block(F, "", "~~~"),
    "windows line ends": ("So:\n" + block(F)).replace("\n", "\r\n"),
    "tabs": block(F.replace("    ", "\t")),
    "blanks behind the fences": "``` python  \n" + F + "```  \n",
    "closing fence behind the code": "```python\n" + F.rstrip() + "```\nDone.",
    "prose behind the closing fence": "```python\n" + F + "``` This adds one.\n",
    "no closing fence": "```python\n" + F,
    "no closing fence, then prose": "```python\n" + F + "\nThis function adds one.\n",
    "no closing fence, then another block": "```python\n" + F + "\nUse it:\n\n```python\nf(1)\n```\n",
    "cut off in a later function": "```python\n" + F + "\ndef g(x):\n    return (x +",
    "no opening fence": F + "```\nThis function adds one.",
    "code beside the opening fence": "```def f(x):\n    return x + 1\n```",
    "code beside the language": "```python def f(x):\n    return x + 1\n```",
    "within a line": "Use ```python def f(x): return x + 1``` for that.",
    "fence in a docstring of a block": "So:\n" + block(QUOTED) + "Done.",
    "fence in a docstring of a block without a language": block(QUOTED, ""),
    "fence in a string": block(F + 's = """\n```\n"""\n' + "def g(x):\n    return s\n"),
    "fence in a comment": block("# ```\n" + F),
    # Where the fence stands.
    "behind a word": "Answer: ```python\n" + F + "```",
    "behind a word, without a language": "Answer: ```\n" + F + "```",
    "behind bold": "**Solution:** ```python\n" + F + "```",
    "numbered list": "1. So:\n   ```python\n" + INDENTED + "   ```\n2. Done.",
    "fence beside the number": "1. ```python\n" + INDENTED + "   ```\n",
    "fence beside the bullet": "- ```python\n  def f(x):\n      return x + 1\n  ```\n",
    "list, code at the margin": "- So:\n\n  ```python\n" + F + "  ```\n",
    "list by tabs": "-\tSo:\n\n\t```python\n\tdef f(x):\n\t\treturn x + 1\n\t```\n",
    "quotation": "> So:\n>\n> ```python\n> def f(x):\n>     return x + 1\n> ```\n",
    # Several blocks.
    "usage after it": block(F) + "Use it:\n" + block("print(f(1))\n"),
    "usage before it": "You want this:\n" + block("assert f(1) == 2\n") + "So:\n" + block(F),
    "usage before it, without languages": block("assert f(1) == 2\n", "") + block(F, ""),
    "bash first": "First:\n" + block("pip install numpy\n", "bash") + "Then:\n" + block(F),
    "bash first, without languages": block("$ pip install numpy\n", "") + "Then\n" + block(F, ""),
    "json first": block('{"x": 1}\n', "json") + block(F),
    "output after it": block(F) + block("2\n", "output"),
    "other language first": block("function f(x) { return x + 1 }\n", "javascript") + block(F),
    "named wrongly": block(F, "java"),
    "an outline first": "The outline:\n" + block("def f(x):\n    pass\n") + "All of it:\n" + block(F),
    "an outline that is no Python first": block("def f(x):\n    # your code\n") + block(F),
    "another way after it": block(F) + "Another way:\n" + block("f = lambda x: 1 + x\n"),
    "broken first": "A try:\n" + block("def f(x:\n    return x\n") + "Mended:\n" + block(F),
    "imports first": block("from operator import add\n") + "Then:\n" + block("def f(x):\n    return add(x, 1)\n"),
    "helper first": block("def one():\n    return 1\n") + block("def f(x):\n    return x + one()\n"),
    "helper after it": block("def f(x):\n    return x + one()\n") + "With\n" + block("def one():\n    return 1\n"),
    "helper of a helper": block("A = 1\n")
    + block("def g():\n    return A\n")
    + block("def f(x):\n    return x + g()\n"),
    "program outside, example in a fence": F + "\nExample:\n" + block(">>> f(1)\n2\n", ""),
    "markdown around it": block("# Title\n\n" + block(F), "markdown", "````"),
    "markdown around it, same fence": "```markdown\nSo:\n\n```python\n" + F + "```\n\nDone.\n```\n",
    # Thinking.
    "thinking": f"<think>\nPerhaps\n{block(WRONG)}No.\n</think>\n\nSo:\n{block(F)}",
    "thinking, plain answer": f"<think>\nPerhaps\n{block(WRONG)}</think>\n{F}",
    "half thinking": f"Perhaps\n{block(WRONG)}No.\n</think>\n\n{block(F)}",
    "half thinking, ended in a line": f"Perhaps\n{block(WRONG)}No.</think>\n{block(F)}",
    "thinking, open fence": f"<think>\n```python\n{WRONG}\nHm.\n</think>\n{block(F)}",
    "thinking again behind the answer": f"<think>\n{block(WRONG)}</think>\n{block(F)}\n<think>\nOr {block(WRONG)}",
    "reasoning": f"<reasoning>{block(WRONG)}</reasoning>\n{block(F)}",
    "thinking in brackets": f"[THINK]{block(WRONG)}[/THINK]{block(F)}",
    "thinking mark in a string": block('MARK = "</think>"\n' + F),
    # Consoles, pages, templates.
    "console": block(">>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2\n", "pycon"),
    "console without a language": block(">>> def f(x):\n...     return x + 1\n>>> f(1)\n2\n", ""),
    "console without a fence": "So:\n\n>>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2\n",
    "entities": block("def f(x):\n    return x + 1 if x &lt; 5 &amp;&amp; 1 else 0\n".replace("&amp;&amp;", "and")),
    "entities that are Python by chance": block("def f(x):\n    return x + (x &gt; 0)\n    x &lt; 1\n"),
    "entities in a string": block('PAGE = "&lt;p&gt;"\n' + F),
    "entities without a fence": "So:\n\ndef f(x):\n    return x + 1 if x &lt; 5 else 0\n",
    "entities in a page": '<pre><code class="language-python">def f(x):\n    return x + (x &gt; 0)\n</code></pre>\n',
    "hard blanks": block(F.replace("    ", "\xa0\xa0\xa0\xa0")),
    "end mark": F + "<|im_end|>\n<|im_start|>user\nThanks!",
    "end mark behind the fence": "```python\n" + F + "```<|eot_id|>",
    "end mark behind the code": F.rstrip() + "</s>",
    "end mark, a second answer": block(F) + "<|endoftext|>" + block(WRONG),
    "tags of code": f"[PYTHON]\n{F}[/PYTHON]\n",
    "tags of an answer": f"<answer>```python\n{F}```</answer>",
    "mark of a tool": f"<|python_tag|>{F}<|eom_id|>",
    "role before it": "assistant\n\n" + F,
    "role mark before it": "<|im_start|>assistant\n" + F + "<|im_end|>",
    "marks of HTML in a string": block('PAGE = "<s></s><b></b>"\n' + F),
    "end mark in a string": block('MARK = "</s>"\n' + F),
    # Prose.
    "prose before it": "Here is the code:\n\n" + F,
    "prose after it": F + "\nThis function adds one, as it's asked.\n",
    "prose around it": "Sure! Here's the code:\n\n" + F + "\nIt runs in O(1). Don't forget:\n- tests\n",
    "prose, indented code": "Here is the code:\n\n    def f(x):\n        return x + 1\n\nThat's all.",
    "prose between": "First:\n\nfrom operator import add\n\nThen:\n\ndef f(x):\n    return add(x, 1)\n\nDone!",
    "prose, one word after it": "Here is the code:\n\n" + F + "\nDone\n",
    "prose, main guard": "So:\n\n" + F + '\nif __name__ == "__main__":\n    print(f(1))\n\nThat is all, folks!',
    "prose, bracket at the margin": "So:\n\nA = [\n    1,\n]\n\ndef f(x):\n    return x + A[0]\n\nThat's all.",
    "prose, decorator": "So:\n\nfrom functools import cache\n\n@cache\ndef f(x):\n    return x + 1\n\nThat's all.",
    "code in a sentence": "Use `f = lambda x: x + 1`, that's all.",
    "prose that looks like code": "from there import is easy to see:\nx = one of them\n\n" + F,
}
"""Answers that hold a program in which `f(1)` is 2."""


@pytest.mark.parametrize("answer", FORMS.values(), ids=FORMS.keys())
def test_the_program_is_found(answer: str) -> None:
    scope: dict = {"__name__": "program"}
    exec(find_program(answer, ["f"]).program, scope)
    assert scope["f"](1) == 2


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("half thinking")])
def test_a_complete_answer_does_not_change_any_more(form: str) -> None:
    """Decoding that ends where the answer is complete gives the program that the whole answer has."""
    answer = FORMS[form]
    ends = (end for end in range(len(answer)) if find_program(answer[:end], ["f"]).is_complete)
    end = next(ends, None)
    if end is not None:
        assert find_program(answer[:end], ["f"]).program == find_program(answer, ["f"]).program


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (block(F) + "Use it", F + "```"),
        (block(F, "") + "Use it", F + "```"),
        (block("pip install x\n", "bash") + block(F) + "Use it", F + "```"),
        (block("assert f(1) == 2\n") + block(F) + "Use it", F + "```"),
        (block(QUOTED) + "Use it", QUOTED + "```"),
        (block("def f(x):\n    return g(x)\n") + block("def g(x):\n    return x\n") + "Use", "return x\n```"),
        (f"<think>\n{block(WRONG)}</think>\n{block(F)}Use it", F + "```"),
        (block(F, "python", "````") + "Use it", F + "````"),
        ("So:\n" + block(F, "python", "~~~") + "Use it", F + "~~~"),
    ],
    ids=["one", "bare", "bash", "usage", "docstring", "helper", "thinking", "four", "tildes"],
)
def test_an_answer_is_complete_with_the_fence_that_closes_it(answer: str, end: str) -> None:
    first = next(at for at in range(len(answer)) if find_program(answer[:at], ["f"]).is_complete)
    assert answer[:first].endswith(end)
    assert "Use" not in answer[:first]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (F, "as it stands"),
        (block(F), "fenced"),
        (block("def one():\n    return 1\n") + block("def f(x):\n    return one()\n"), "fenced, joined"),
        ("```python\n" + F + "\nIt adds one.", "fenced, cut"),
        ("```python\n" + F.replace("f(", "g(") + "\nIt adds one.", "fenced, cut"),
        (block(F.replace("f(", "g(")), "fenced"),
        (block("def g(:\n"), "fenced"),
        (block("ls\n", "bash"), "no program"),
        ("So:\n\n" + F, "between prose"),
        ("I cannot do that.", "no program"),
        ("", "no program"),
        ("<think>\n" + block(F), "unfinished thinking"),
    ],
)
def test_how_a_program_stood_is_told(answer: str, found: str) -> None:
    assert find_program(answer, ["f"]).found == found


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\n" + block(F),
        block("def f(x):\n    return (x + 1\n"),
        "```python\ndef f(x):\n    y = x\n    return (y",
        "def f(x):\n    y = x\n    return (y",
        block(F + "print f(1)\n"),
        "I cannot do that.",
    ],
    ids=["in thinking", "broken", "broken off", "broken off, plain", "python 2", "refusal"],
)
def test_a_program_is_not_mended(answer: str) -> None:
    program = find_program(answer, ["f"]).program
    with pytest.raises((SyntaxError, NameError)):
        exec(f"{program}\nf(1)", {})


def test_without_names_the_program_is_the_first_that_defines_anything() -> None:
    assert find_program(block("x = 1\n") + block(F) + block("def g():\n    return 0\n")).program == F


PROMPT = 'from operator import add\n\n\ndef f(x):\n    """Add one."""\n'

CONTINUATIONS = {
    "body": BODY,
    "body and a helper": BODY + "\n\ndef g():\n    return 0\n",
    "function again": "\n" + F,
    "fenced function": "So:\n" + block("def f(x):\n    return add(x, 1)\n"),
    "fenced function behind thinking": f"<think>{block(WRONG)}</think>\n" + block(F),
    "fenced body": block(BODY),
    "fenced body at the margin": block("return x + 1\n"),
    "end mark": BODY + "<|im_end|>\n<|im_start|>user\nThanks!",
    "thinking, body": f"<think>{block(WRONG)}</think>\n" + BODY,
    "future import": block("from __future__ import annotations\n" + F),
}


@pytest.mark.parametrize("completion", CONTINUATIONS.values(), ids=CONTINUATIONS.keys())
def test_a_completion_goes_on_with_its_prompt(completion: str) -> None:
    exec(continue_prompt(PROMPT, completion, ["f"]).program, scope := {})
    assert scope["f"](1) == 2


@pytest.mark.parametrize("completion", [BODY + "\nIt adds one.\n", "    return (x", "So: x"])
def test_a_completion_without_a_fence_is_gone_on_with_to_the_letter(completion: str) -> None:
    assert continue_prompt(PROMPT, completion, ["f"]).program == PROMPT + completion


@pytest.mark.parametrize(
    "text",
    [
        "```\n" * 5_000,
        "```python\n" * 5_000,
        'x = """\n```\n' * 3_000,
        "x = \n" * 5_000,
        "(" * 50_000,
        "x = " + "-" * 50_000 + "1",
        "x = y" + ".z" * 50_000,
        "<think>" * 9_000,
        "\n".join("`" * length for length in range(1_500, 3, -1)),
        "".join(block(f"def f{n}():\n    return f{n + 1}()\n") for n in range(1_000)).replace("f0(", "f("),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_nonsense_is_read_in_seconds(text: str) -> None:
    start = time.process_time()
    find_program(text, ["f"])
    assert time.process_time() - start < 10
