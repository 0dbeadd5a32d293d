"""The order of the examples: the same global batches for any number of ranks, then each rank's share of one.

A rank reads its share as micro-batches of rows, of one example each (`rank_micro_batches`) or packed (`pack_rows`,
`rank_rows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

MEGA_BATCHES = 50


def global_batches(
    lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Return the epoch's batches of example indices, a function of the arguments alone.

    Every example occurs once; the last batch is smaller if the sizes do not divide. With `group_by_length`, batches
    are cut from stretches of the random order (up to 50 batches long, at least four stretches where there are
    enough examples) that are sorted by length, and then come in random order. Within a batch the longest examples
    come first, which `rank_micro_batches` relies on for its balance.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    # The remainder is random too: it is not the shortest examples that always end up in the small batch.
    full = len(order) - len(order) % global_batch_size
    order, remainder = order[:full], order[full:]
    if group_by_length:
        count = full // global_batch_size
        stretch = global_batch_size * max(1, min(MEGA_BATCHES, count // 4))
        order = [
            index
            for start in range(0, full, stretch)
            for index in sorted(order[start : start + stretch], key=lambda index: -lengths[index])
        ]
    batches = [order[start : start + global_batch_size] for start in range(0, full, global_batch_size)]
    if group_by_length:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if remainder:
        batches.append(remainder)
    return [sorted(batch, key=lambda index: -lengths[index]) for batch in batches]


def rank_micro_batches(
    batch: Sequence[int], rank: int, world_size: int, micro_batch_size: int, accumulation: int
) -> list[list[int]]:
    """Return this rank's `accumulation` micro-batches of a global batch; those of a small batch may be empty.

    The batch, longest example first, is cut into one share for each accumulation step, and a share is dealt to the
    ranks to and fro (0, 1, 1, 0, 0, ...). So the ranks have rows of like length at the same time, which is when they
    wait for one another. Each example goes to exactly one rank. Raises ValueError if the batch is larger than
    `world_size * micro_batch_size * accumulation`.
    """
    share = world_size * micro_batch_size
    if len(batch) > share * accumulation:
        raise ValueError(f"a batch of {len(batch)} is larger than {world_size} * {micro_batch_size} * {accumulation}")
    micro_batches: list[list[int]] = [[] for _ in range(accumulation)]
    for position, index in enumerate(batch):
        if rank == _dealt_to(position, world_size):
            micro_batches[position // share].append(index)
    return micro_batches


def pack_rows(batch: Sequence[int], sizes: Sequence[int], row_size: int) -> list[list[int]]:
    """Return the rows of a global batch: its examples, each in the first row that has room for it, the largest first.

    First fit decreasing takes at most 11/9 of the fewest possible rows, and one more. Rows follow from the batch alone,
    whatever the number of ranks, and come in the order in which they were begun.

    Args:
        batch: Indices of examples.
        sizes: Positions that each example takes, by its index.
        row_size: Positions of a row; no example is larger.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(batch, key=lambda index: (-sizes[index], index)):
        number = next((number for number, left in enumerate(room) if sizes[index] <= left), len(rows))
        if number == len(rows):
            rows.append([])
            room.append(row_size)
        rows[number].append(index)
        room[number] -= sizes[index]
    return rows


def rank_rows(rows: Sequence[list[int]], rank: int, world_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Return this rank's micro-batches of at most so many packed rows each.

    Rows are dealt to the ranks to and fro. All ranks have equally many micro-batches, as few as possible, and all of
    these equally many rows, as few as possible; where there are not enough, the last ones are empty.
    """
    micro_batches = -(-len(rows) // (world_size * micro_batch_size))
    height = -(-len(rows) // (world_size * micro_batches))
    own = [row for number, row in enumerate(rows) if rank == _dealt_to(number, world_size)]
    own += [[] for _ in range(micro_batches * height - len(own))]
    return [own[start : start + height] for start in range(0, len(own), height)]


def _dealt_to(position: int, world_size: int) -> int:
    """Rank that the so-manieth is dealt to: 0, 1, 1, 0, 0, ..."""
    row, column = divmod(position, world_size)
    return column if row % 2 == 0 else world_size - 1 - column
