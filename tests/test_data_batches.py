"""The order of examples over epochs and ranks."""

from __future__ import annotations

import random

import pytest

from adept_ds.config.batch import BatchArithmetic
from adept_ds.data.batches import global_batches, pack_rows, rank_micro_batches, rank_rows
from adept_ds.data.encode import Encoded
from adept_ds.data.micro_batches import MicroBatches

LENGTHS = random.Random(0).choices(range(10, 600), k=487)


def padding(batches: list[list[int]]) -> int:
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_example_once_and_only_the_last_batch_smaller(group_by_length):
    batches = global_batches(LENGTHS, 4, seed=1, epoch=0, group_by_length=group_by_length)
    assert sorted(index for batch in batches for index in batch) == list(range(487))
    assert [len(batch) for batch in batches] == [4] * 121 + [3]


@pytest.mark.parametrize("group_by_length", [True, False])
def test_order_follows_from_seed_and_epoch(group_by_length):
    def order(seed: int, epoch: int) -> list[list[int]]:
        return global_batches(LENGTHS, 4, seed, epoch, group_by_length)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2) != order(2, 1)


def test_grouping_saves_most_of_the_padding():
    grouped, plain = (global_batches(LENGTHS, 4, 1, 0, group_by_length) for group_by_length in (True, False))
    assert padding(grouped) < 0.2 * padding(plain)


def test_grouped_batches_come_in_random_order():
    longest = [LENGTHS[batch[0]] for batch in global_batches(LENGTHS, 4, 1, 0, group_by_length=True)]
    assert longest != sorted(longest, reverse=True)
    assert max(longest[:10]) - min(longest[:10]) > 200


def test_small_sets_get_new_batches_each_epoch():
    first, second = (
        {frozenset(batch) for batch in global_batches(LENGTHS[:81], 4, 1, epoch, group_by_length=True)}
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 2


def test_fewer_examples_than_one_batch():
    assert [sorted(batch) for batch in global_batches([5, 6, 7], 8, 0, 0, True)] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)]
)
def test_ranks_share_the_same_global_batches(world_size, micro, accumulation):
    for batch in global_batches(LENGTHS, 8, seed=3, epoch=1, group_by_length=True):
        shares = [rank_micro_batches(batch, rank, world_size, micro, accumulation) for rank in range(world_size)]
        assert sorted(i for share in shares for micro_batch in share for i in micro_batch) == sorted(batch)
        assert all(len(share) == accumulation for share in shares)
        assert all(len(micro_batch) <= micro for share in shares for micro_batch in share)


def test_small_batch_leaves_empty_micro_batches():
    assert [rank_micro_batches([7], rank, 2, 1, 2) for rank in (0, 1)] == [[[7], []], [[], []]]


def test_ranks_get_like_numbers_of_tokens():
    totals = [0, 0]
    for batch in global_batches(LENGTHS, 8, seed=3, epoch=0, group_by_length=False):
        for rank in (0, 1):
            totals[rank] += sum(LENGTHS[i] for micro in rank_micro_batches(batch, rank, 2, 4, 1) for i in micro)
    assert abs(totals[0] - totals[1]) < 0.02 * sum(totals)


def test_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match="larger than"):
        rank_micro_batches([0, 1, 2], 0, 1, 2, 1)


ROW = 600


def rows_of_epoch(size: int = 32) -> list[list[list[int]]]:
    return [pack_rows(batch, LENGTHS, ROW) for batch in global_batches(LENGTHS, size, 3, 0, group_by_length=False)]


def test_packed_rows_hold_each_example_once_and_no_more_than_fits():
    rows = [row for batch in rows_of_epoch() for row in batch]
    assert sorted(index for row in rows for index in row) == list(range(487))
    assert all(sum(LENGTHS[index] for index in row) <= ROW for row in rows)


def test_packing_is_near_the_fewest_rows():
    for rows in rows_of_epoch():
        fewest = -(-sum(LENGTHS[index] for row in rows for index in row) // ROW)
        assert len(rows) <= 11 / 9 * fewest + 1


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 1), (2, 3), (8, 2)])
def test_ranks_share_the_same_packed_rows_in_equally_many_micro_batches(world_size, micro):
    for rows in rows_of_epoch():
        shares = [rank_rows(rows, rank, world_size, micro) for rank in range(world_size)]
        assert {len(share) for share in shares} == {-(-len(rows) // (world_size * micro))}
        assert len({len(micro_batch) for share in shares for micro_batch in share}) == 1
        assert len(shares[0][0]) <= micro
        assert sum(map(len, shares[0])) * world_size < len(rows) + world_size * len(shares[0])
        own = [[row for micro_batch in share for row in micro_batch if row] for share in shares]
        assert sorted(row for share in own for row in share) == sorted(rows)
        assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_share_of_padding_is_that_of_the_tensors(world_size):
    examples = [Encoded([5] * length, [5] * length, False, False, False) for length in LENGTHS]
    batches = global_batches(LENGTHS, 32, 3, 0, group_by_length=True)
    for arithmetic in (
        BatchArithmetic(32, 2, 16 // world_size, world_size),
        BatchArithmetic(32, 2, 16 // world_size, world_size, packing=ROW + 7),
    ):
        micro_batches = MicroBatches(examples, arithmetic, num_virtual_tokens=7, pad_token_id=0)
        prompt = 0 if arithmetic.packing else 7
        made = [micro for b in batches for rank in range(world_size) for micro in micro_batches.of_rank(b, rank)]
        held = [micro for micro in made if arithmetic.packing or (micro["labels"] != -100).any()]
        positions = sum(micro["input_ids"].numel() + prompt * len(micro["input_ids"]) for micro in held)
        filled = sum(LENGTHS) + 7 * len(LENGTHS)
        assert micro_batches.padding(batches) == pytest.approx(1 - filled / positions)
