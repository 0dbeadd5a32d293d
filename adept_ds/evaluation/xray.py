"""What an adapter does to its backbone's input table, seen without data: the table alone is read, no layer runs.

An offset that is a function of the token can be looked at for the whole vocabulary:

    E [V, d]                    rows of the table, as the backbone's embedding layer returns them
    E + f(E)                    rows that the model reads
    h = ReLU(E W_down + b1)     units of ADePT's bottleneck [V, r]; a token v wakes unit j where h[v, j] > 0
    P [l, d]                    the prompt's vectors

Lengths are Euclidean norms, nearness is the cosine of two rows: a backbone's first norm divides by the length. Rows
without a token of the tokenizer, which some tables are padded with, are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.load import load_tokenizer
from adept_ds.backbone.table import open_table
from adept_ds.config.method import MptConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.export.token_table import loaded_method
from adept_ds.methods import create_method
from adept_ds.methods.adept import AdeptEmbedding
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.methods.soft_prompt import PromptedEmbedding
from adept_ds.storage.adapter_folder import Adapter, backbone_facts, check_backbone, load_adapter

BLOCK = 4_096
"""Rows of the table that are held as fp32 at a time."""
PRODUCTS = 400_000_000_000
"""Multiplications that the search for neighbours may take before and after each: about half a minute on a CPU."""
SHOWN_TOKENS, SHOWN_PAIRS, NEAREST, WAKING = 15, 20, 3, 5
"""Tokens moved most and least, pairs, tokens near a prompt vector, and tokens that wake a unit most, in the report."""

LONG = 10.0
"""Prompt vectors so many times as long as the longest row, or offsets so many times as long as their rows, are told."""
TOGETHER, APART, FALLEN = 0.99, 0.95, 10.0
"""Two tokens fall together where the cosine of their rows was below `APART`, is above `TOGETHER`, and its distance from
1 is `FALLEN` times smaller than before."""
NOTHING = 1e-6
"""An offset that is so small beside the rows does nothing."""

NOT_BY_TOKEN = {
    "dept": "its offset goes by a token's position and not by the token; `adept-ds analyse sizes` measures it on data",
    "attempt": "its prompt is mixed anew for each input; the prompts that it mixes are adapters of method 'pt', which "
    "can be looked at one by one",
}
IN_LAYERS = (
    "it changes the backbone's layers and not its input table, which cannot be seen without data; `adept-ds try` and "
    "`adept-ds compare` show what it changes in the answers"
)


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    text: str
    """As it stands in a text; the tokenizer's own name for it where it is a part of a character."""


@dataclass(frozen=True)
class MovedToken:
    """A token and its offset."""

    token: Token
    row: float
    """Length of its row."""
    offset: float
    """Length of its offset."""
    share: float
    """The offset's length as a share of the row's."""


@dataclass(frozen=True)
class Unit:
    """A unit of the bottleneck."""

    number: int
    """From 1."""
    woken: int
    """Number of tokens that wake it."""
    share: float
    """The same as a share of all tokens."""
    longest: float
    """Length of the longest offset that it makes."""
    state: str
    """`dead` (no token wakes it), `without effect` (what it adds is nothing), `linear` (every token wakes it), or
    `works`."""
    woken_most_by: tuple[Token, ...]


@dataclass(frozen=True)
class Neighbour:
    """A token near a vector."""

    token: Token
    cosine: float


@dataclass(frozen=True)
class PromptVector:
    """A vector of the prompt."""

    name: str
    """Its number from 1, behind the task where each has a prompt of its own."""
    length: float
    nearest: tuple[Neighbour, ...]
    """Tokens by the cosine of their rows in the table."""


@dataclass(frozen=True)
class Pair:
    """A token and the one that is its neighbour with the adapter."""

    first: Token
    second: Token
    cosines: tuple[float, float]
    """Before and after."""
    distances: tuple[float, float]
    """The same, Euclidean."""
    fallen: bool
    """Whether the two have fallen together."""


@dataclass(frozen=True)
class XRay:
    """What was seen."""

    adapter: str
    backbone: str
    method: dict[str, Any]
    tokens: int
    """Number of tokens that were looked at."""
    rows: Tensor
    """Length of each token's row [tokens]."""
    prompt: tuple[PromptVector, ...]
    offsets: Tensor | None = None
    """Length of each token's offset [tokens]; None for a method without offsets, as for all that follows."""
    moved_most: tuple[MovedToken, ...] = ()
    moved_least: tuple[MovedToken, ...] = ()
    units: tuple[Unit, ...] = ()
    """None unless the offset comes from a bottleneck."""
    nearest: Tensor | None = None
    """Cosine of each row that was looked at with its neighbour's, before and after [rows, 2]."""
    mean_cosine: tuple[float, float] | None = None
    """Of two tokens, before and after, on average."""
    pairs: tuple[Pair, ...] = ()
    """Those that came together most, first."""
    fallen: int = 0
    """Number of pairs that have fallen together, of those looked at."""
    warnings: tuple[str, ...] = ()
    """What is wrong; empty for a healthy adapter."""
    notes: tuple[str, ...] = ()
    """What was left out, sampled, or is worth knowing."""

    @property
    def shares(self) -> Tensor:
        """Each offset's length as a share of its row's, of the tokens whose row is not zero."""
        assert self.offsets is not None
        some = self.rows > 0
        return self.offsets[some] / self.rows[some]


def xray(source: Path, model: ModelConfig) -> XRay:
    """Look at an adapter on its backbone's input table.

    Args:
        source: Adapter folder, or an adapter's hub id.
        model: Its backbone, of which the config, the tokenizer and the table are read.

    Raises:
        UserError: The folder holds no whole adapter, one whose method is no function of the token, or one of another
            backbone; or the backbone's table cannot be had.
    """
    adapter = load_adapter(source)
    _check_method(adapter)
    with open_table(model) as opened, torch.no_grad():
        check_backbone(adapter, backbone_facts(opened.backbone))
        tokenizer = load_tokenizer(model)
        method = cast(PromptedMethod, loaded_method(adapter, opened))
        return _Look(adapter, method.embedding.eval(), tokenizer).seen(str(source), model.name_or_path)


def _check_method(adapter: Adapter) -> None:
    """Refuse a method whose change of the input is no function of the token."""
    name = adapter.method.name
    if name in NOT_BY_TOKEN or not isinstance(create_method(adapter.method), PromptedMethod):
        raise UserError(
            f"{adapter.folder} is an adapter of method {name!r}: {NOT_BY_TOKEN.get(name, IN_LAYERS)} (expected one of "
            "adept, pt, p_tuning, pt_embedding, dpt, residual_pt, mpt)"
        )


@dataclass
class _Best:
    """The best columns of each row of a matrix that comes in blocks of columns."""

    count: int
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def add(self, scores: Tensor, ids: Tensor) -> None:
        """Take in a block [n, B] whose columns are `ids` [B]."""
        best = scores.topk(min(self.count, scores.shape[1]), dim=1)
        if not self.ids.numel():
            self.scores, self.ids = best.values, ids[best.indices]
            return
        values, places = torch.cat([self.scores, best.values], 1), torch.cat([self.ids, ids[best.indices]], 1)
        self.scores, chosen = values.topk(min(self.count, values.shape[1]), dim=1)
        self.ids = places.gather(1, chosen)


class _Look:
    """One adapter on one table."""

    def __init__(self, adapter: Adapter, embedding: PromptedEmbedding, tokenizer: PreTrainedTokenizerBase) -> None:
        self.adapter, self.embedding, self.tokenizer = adapter, embedding, tokenizer
        vocabulary = sorted({id for id in tokenizer.get_vocab().values() if id < embedding.num_embeddings})
        self.ids = torch.tensor(vocabulary)
        self.warnings: list[str] = []
        self.notes: list[str] = []
        if left := embedding.num_embeddings - len(vocabulary):
            self.notes.append(f"Rows of the table that belong to no token, left out: {left:,}.")

    def seen(self, adapter: str, backbone: str) -> XRay:
        """Look at everything; the names are for the report."""
        self.network = self.embedding.network if isinstance(self.embedding, AdeptEmbedding) else None
        has_offsets = type(self.embedding).add_offset is not PromptedEmbedding.add_offset
        prompt = self._prompt()
        near, woken_most = _Best(NEAREST), _Best(WAKING)
        rows, offsets, woken = [], [], torch.zeros(self.network.b1.numel() if self.network else 0, dtype=torch.long)
        for ids in self.ids.split(BLOCK):
            before, after = self._rows(ids)
            rows.append(before.norm(dim=1))
            offsets.append((after - before).norm(dim=1))
            if len(prompt):
                near.add(F.normalize(prompt, dim=1) @ F.normalize(before, dim=1).T, ids)
            if self.network:
                hidden = self.network.hidden(before)
                woken += (hidden > 0).sum(0)
                woken_most.add(hidden.T, ids)
        self.rows, self.offsets = torch.cat(rows), torch.cat(offsets)
        seen: dict[str, Any] = {"prompt": self._prompt_vectors(prompt, near)}
        if has_offsets:
            seen |= {"offsets": self.offsets, **self._moved(), **self._units(woken, woken_most), **self._pairs()}
        return XRay(
            adapter=adapter,
            backbone=backbone,
            method=self.adapter.method.model_dump(mode="json"),
            tokens=len(self.ids),
            rows=self.rows,
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
            **seen,
        )

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of tokens [n, d] as the layer returns them, and with their offsets, in fp32."""
        before = self.embedding.table(ids).float()
        return before, self.embedding.add_offset(before, ids)

    def _token(self, id: int) -> Token:
        text = str(self.tokenizer.decode([id]))
        return Token(id, str(self.tokenizer.convert_ids_to_tokens(id)) if not text or "\ufffd" in text else text)

    def _prompt(self) -> Tensor:
        """All prompts' vectors, one prompt after another [n l, d]."""
        module = self.embedding.soft_prompt
        if module is None:
            return torch.empty(0, self.embedding.embedding_dim)
        vectors: Tensor = module(torch.arange(len(self._names())))
        return vectors.float()

    def _names(self) -> list[str]:
        config = self.adapter.method
        numbers = [str(number + 1) for number in range(config.num_virtual_tokens)]
        tasks = config.tasks if isinstance(config, MptConfig) else ()
        return [f"{task} {number}" for task in tasks for number in numbers] or numbers

    def _prompt_vectors(self, prompt: Tensor, near: _Best) -> tuple[PromptVector, ...]:
        if not len(prompt):
            return ()
        lengths, longest = prompt.norm(dim=1), float(self.rows.max())
        if (times := float(lengths.max()) / max(longest, 1e-30)) > LONG:
            count = int((lengths > LONG * longest).sum())
            self.warnings.append(
                f"{count} of the prompt's {len(prompt)} vectors are more than {LONG:g} times as long as the longest "
                f"row of the table, up to {times:,.0f} times: the prompt has run away; train it at a lower "
                "train.learning_rate.soft_prompt"
            )
        return tuple(
            PromptVector(
                name,
                float(length),
                tuple(Neighbour(self._token(id), cosine) for id, cosine in zip(ids, cosines, strict=True)),
            )
            for name, length, ids, cosines in zip(
                self._names(), lengths, near.ids.tolist(), near.scores.tolist(), strict=True
            )
        )

    def _moved(self) -> dict[str, Any]:
        config = self.adapter.method
        if not getattr(config, "offset_in_evaluation", True):
            self.notes.append(
                "offset_in_evaluation is false: in evaluation this adapter's prompt is used alone; the offsets are "
                "shown as in training."
            )
        has_row = self.rows > 0
        if zero := int((~has_row).sum()):
            self.notes.append(f"Tokens with a row of zeros, not among those moved most and least: {zero:,}.")
        kept = has_row.nonzero()[:, 0]
        order = kept[(self.offsets[kept] / self.rows[kept]).argsort(descending=True)]
        self.by_offset = order
        typical = float((self.offsets[kept] / self.rows[kept]).median())
        if float(self.offsets.max()) <= NOTHING * float(self.rows.median()):
            self.warnings.append("the offset is zero for every token: it does nothing, as before the first step")
        elif typical > LONG:
            self.warnings.append(
                f"the offsets are typically {typical:,.0f} times as long as the rows that they are added to, which "
                "drown in them; train at a lower train.learning_rate.network"
            )
        if self.network is None and (still := int((self.offsets == 0).sum())):
            self.notes.append(
                f"Tokens without an offset, since no training text had them: {still:,} of {len(self.ids):,}."
            )
        return {
            "moved_most": tuple(map(self._moved_token, order[:SHOWN_TOKENS].tolist())),
            "moved_least": tuple(map(self._moved_token, order.flip(0)[:SHOWN_TOKENS].tolist())),
        }

    def _moved_token(self, place: int) -> MovedToken:
        row, offset = float(self.rows[place]), float(self.offsets[place])
        return MovedToken(self._token(int(self.ids[place])), row, offset, offset / row)

    def _units(self, woken: Tensor, woken_most: _Best) -> dict[str, Any]:
        if self.network is None:
            return {}
        total, lengths = len(self.ids), self.network.w_up.float().norm(dim=1)
        units = []
        for index, count in enumerate(woken.tolist()):
            longest = float(woken_most.scores[index, 0] * lengths[index])
            state = "dead" if count == 0 else "linear" if count == total else "works"
            if count and longest <= NOTHING * float(self.rows.median()):
                state = "without effect"
            wakers = [id for id, h in zip(woken_most.ids[index], woken_most.scores[index], strict=True) if h > 0]
            tokens = tuple(self._token(int(id)) for id in wakers)
            units.append(Unit(index + 1, count, count / total, longest, state, tokens))
        in_words = {
            "dead": "is woken by no token: it does nothing",
            "without effect": "adds nothing to any token: its row of W_up is zero",
            "linear": "is woken by every token: it is a linear function of the row",
        }
        is_zero = float(self.offsets.max()) <= NOTHING * float(self.rows.median())
        for unit in units:
            # Where the whole offset is zero that has been said, in one sentence.
            if unit.state in in_words and not (is_zero and unit.state == "without effect"):
                text = f"unit {unit.number} of {len(units)} {in_words[unit.state]}"
                self.notes.append(f"{text}.") if unit.state == "linear" else self.warnings.append(text)
        return {"units": tuple(units)}

    def _pairs(self) -> dict[str, Any]:
        """Each token's neighbour before and after, and the pairs that the adapter has brought together."""
        asked = self.ids[self._looked_up()]
        found, means = self._neighbours(asked)
        partners = found[1].ids[:, 0]
        sides = list(zip(self._rows(asked), self._rows(partners), strict=True))
        cosines = torch.stack([F.cosine_similarity(*side) for side in sides], 1).clamp(-1, 1)
        distances = torch.stack([(first - second).norm(dim=1) for first, second in sides], 1)
        before, after = (1 - cosines).clamp(min=1e-9).unbind(1)
        fallen = (cosines[:, 0] < APART) & (cosines[:, 1] > TOGETHER) & (before > FALLEN * after)
        pairs: dict[frozenset[int], int] = {}
        # Those that have fallen first, then those that came together most.
        for place in (after / before - 1e9 * fallen.float()).argsort().tolist():
            pairs.setdefault(frozenset((int(asked[place]), int(partners[place]))), place)
        places = list(pairs.values())
        shown = [
            Pair(
                self._token(int(asked[place])),
                self._token(int(partners[place])),
                (float(cosines[place, 0]), float(cosines[place, 1])),
                (float(distances[place, 0]), float(distances[place, 1])),
                bool(fallen[place]),
            )
            for place in places[:SHOWN_PAIRS]
        ]
        if count := int(fallen[places].sum()):
            named = [f"{pair.first.text!r} and {pair.second.text!r}" for pair in shown[: min(count, 3)]]
            more = [f"{count - 3:,} more pairs"] if count > 3 else []
            self.warnings.append(
                f"tokens fall together, whose rows were apart and are nearly the same now: {', '.join(named + more)}"
            )
        nearest = torch.cat([best.scores for best in found], 1).clamp(-1, 1)
        return {"nearest": nearest, "mean_cosine": means, "pairs": tuple(shown), "fallen": count}

    def _neighbours(self, asked: Tensor) -> tuple[list[_Best], tuple[float, float]]:
        """The nearest other token of each of those asked for, before and after, and the mean cosine of all."""
        both = [F.normalize(rows, dim=1) for rows in self._rows(asked)]
        found = [_Best(1), _Best(1)]
        sums = torch.zeros(2, self.embedding.embedding_dim)
        for ids in self.ids.split(BLOCK):
            itself = asked[:, None] == ids
            for side, rows in enumerate(self._rows(ids)):
                directions = F.normalize(rows, dim=1)
                sums[side] += directions.sum(0)
                found[side].add((both[side] @ directions.T).masked_fill_(itself, -2), ids)
        before, after = (
            float((side @ total - 1).mean()) / (len(self.ids) - 1) for side, total in zip(both, sums, strict=True)
        )
        return found, (before, after)

    def _looked_up(self) -> Tensor:
        """Places of the tokens whose neighbours are looked for: all, or what `PRODUCTS` allows, half of them those that
        are moved most."""
        total = len(self.ids)
        count = max(2, PRODUCTS // (total * self.embedding.embedding_dim))
        if count >= total:
            return torch.arange(total)
        moved = self.by_offset[: count // 2]
        others = torch.ones(total, dtype=torch.bool)
        others[moved] = False
        rest = others.nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[: count - len(moved)]]
        self.notes.append(
            f"Neighbours were looked for among all {total:,} tokens, for {count:,} of them: the {len(moved):,} that "
            f"are moved most, and {len(drawn):,} drawn at random. A pair of two others is not seen."
        )
        return torch.cat([moved, drawn])
