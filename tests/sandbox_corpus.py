"""The programs of `sandbox_corpus.txt` with the verdict that each deserves in each tier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RIGHT = "def add(a, b):\n    return a + b\n"
ASSERTS = (
    "assert add(1, 2) == 3",
    "assert add(-4, 4) == 0",
    "assert add('a', 'b') == 'ab'",
    "assert math.isclose(add(.1, .2), .3)",
)


@dataclass(frozen=True)
class Entry:
    """One program; `verdicts` maps a tier, or "" for all others, to the verdicts that are right there."""

    name: str
    source: str
    verdicts: dict[str, list[str]]

    def deserved(self, tier: str) -> list[str]:
        """Return the verdicts that are right in `tier`; an error or failure carries its kind behind a colon."""
        return self.verdicts.get(tier, self.verdicts[""])


def _read() -> list[Entry]:
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    entries = []
    for block in text.split("\n### ")[1:]:
        head, _, source = block.partition("\n")
        name, verdict, *others = head.split(" | ")
        verdicts = {"": verdict.split(" or ")}
        verdicts |= {tier: text.split(" or ") for tier, text in (other.split(": ") for other in others)}
        entries.append(Entry(name, source.partition("\n# ----")[0], verdicts))
    return entries


# What a text file cannot hold.
_BYTES = [
    Entry("crlf", RIGHT.replace("\n", "\r\n"), {"": ["passed"]}),
    Entry("byte_order_mark", "\ufeff" + RIGHT, {"": ["passed"]}),
    Entry("coding_line", "# -*- coding: latin-1 -*-\nassert len('é') == 1\n" + RIGHT, {"": ["passed"]}),
    Entry("nul_byte", RIGHT + "\0", {"": ["error:syntax"]}),
    Entry("lone_surrogate", RIGHT + "x = '\ud800'", {"": ["error:syntax"]}),
]
ENTRIES = [*_read(), *_BYTES]
TIMEOUTS = [entry for entry in ENTRIES if entry.deserved("") == ["timeout"]]
PROMPT = [entry for entry in ENTRIES if entry not in TIMEOUTS]
