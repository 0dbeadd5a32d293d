"""The order of examples over epochs and ranks."""

from __future__ import annotations

import random

import pytest

from adept_ds.data.batches import global_batches, rank_micro_batches

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
