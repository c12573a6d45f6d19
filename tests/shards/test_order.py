"""The order of samples: permutations that are arithmetic on (seed, epoch), and their share for every rank."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from genrecal.shards.order import MixedOrder, SampleOrder, micro_batches

shard_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=9)
seeds = st.integers(0, 2**40)


def shards_of(sizes: list[int]) -> np.ndarray:
    """The shard of each sample, `sizes[i]` samples of shard i."""
    return np.repeat(np.arange(len(sizes)), sizes)


@given(shard_sizes, seeds, st.integers(0, 1000), st.integers(1, 12))
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, epoch: int, window: int) -> None:
    order = SampleOrder(shards_of(sizes), seed=seed, window=window)
    assert np.array_equal(np.sort(order.epoch(epoch)), np.arange(sum(sizes)))


def test_an_epoch_depends_on_seed_and_number_and_on_nothing_that_ran_before() -> None:
    shards = shards_of([10] * 20)
    used = SampleOrder(shards, seed=5, window=4)
    for epoch in (3, 0, 7, 1):
        used.epoch(epoch)
    assert np.array_equal(used.epoch(2), SampleOrder(shards, seed=5, window=4).epoch(2))
    others = [used.epoch(3), SampleOrder(shards, seed=6, window=4).epoch(2), np.arange(200)]
    assert [np.array_equal(used.epoch(2), other) for other in others] == [False] * 3


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden: a change here makes a resumed run train on other samples."""
    order = SampleOrder(shards_of([3, 3, 3]), seed=1, window=2)
    assert order.slice(0, 12).tolist() == [4, 0, 2, 1, 5, 3, 8, 6, 7, 7, 1, 6]


@given(shard_sizes, seeds, st.data())
def test_resuming_is_arithmetic(sizes: list[int], seed: int, data: st.DataObject) -> None:
    order = SampleOrder(shards_of(sizes), seed=seed, window=3)
    a, b, c = sorted(data.draw(st.lists(st.integers(0, 5 * sum(sizes)), min_size=3, max_size=3)))
    fresh = SampleOrder(shards_of(sizes), seed=seed, window=3)
    assert np.array_equal(order.slice(a, c), np.concatenate([fresh.slice(a, b), fresh.slice(b, c)]))
    assert len(order.slice(a, c)) == c - a and order.slice(b, b).dtype == np.int64


@given(shard_sizes, seeds, st.integers(0, 3))
def test_the_stream_is_the_epochs_one_after_another(sizes: list[int], seed: int, epoch: int) -> None:
    order, n = SampleOrder(shards_of(sizes), seed=seed), sum(sizes)
    stream = order.slice(epoch * n, (epoch + 2) * n)
    assert np.array_equal(stream, np.concatenate([order.epoch(epoch), order.epoch(epoch + 1)]))


@given(shard_sizes, seeds, st.integers(1, 4))
def test_samples_are_mixed_within_windows_of_shards_only(sizes: list[int], seed: int, window: int) -> None:
    shards = shards_of(sizes)
    visited = shards[SampleOrder(shards, seed=seed, window=window).epoch(0)]
    seen: set[int] = set()
    at = 0
    while at < len(visited):
        # A window is as many shards as `window`, or the few that are left; its samples come before any other's.
        inside: list[int] = list(dict.fromkeys(visited[at:].tolist()))[:window]
        end = at + sum(sizes[shard] for shard in inside)
        assert set(visited[at:end].tolist()) == set(inside) and not seen & set(inside)
        seen |= set(inside)
        at = end
    assert seen == set(range(len(sizes)))


def test_samples_of_a_window_are_mixed_and_shards_are_shuffled() -> None:
    shards = shards_of([20] * 6)
    visited = shards[SampleOrder(shards, seed=0, window=3).epoch(0)]
    assert np.count_nonzero(np.diff(visited[:60])) > 20  # 2 if each shard were read through
    assert sorted(set(visited[:60].tolist())) != [0, 1, 2]


def test_shards_may_have_any_numbers_and_lie_in_any_order() -> None:
    order = SampleOrder(np.array([9, 4, 9, 4, 700]), seed=0, window=1)
    epoch = order.epoch(0).tolist()
    assert sorted(epoch) == [0, 1, 2, 3, 4]
    assert abs(epoch.index(0) - epoch.index(2)) == 1 and abs(epoch.index(1) - epoch.index(3)) == 1


# ---------------------------------------------------------------------------------------------------------- micro-batches


@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=70), st.integers(1, 5), st.sampled_from([1, 2, 4, 8]), st.data()
)
def test_the_ranks_share_a_global_batch_exactly(
    batch: list[int], batch_size: int, world_size: int, data: st.DataObject
) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=20, max_size=20)))
    ranks = [
        micro_batches(np.array(batch), lengths, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = {len(pieces) for pieces in ranks}
    assert steps == {-(-len(batch) // (batch_size * world_size))}  # as many on every rank, and no more than are needed
    assert sorted(np.concatenate([piece for pieces in ranks for piece in pieces]).tolist()) == sorted(batch)
    assert max(len(piece) for pieces in ranks for piece in pieces) <= batch_size
    # In the order of steps, and of ranks within a step, lengths never fall: neighbours in length go together.
    along = np.concatenate([ranks[rank][step] for step in range(steps.pop()) for rank in range(world_size)])
    assert np.all(np.diff(lengths[along]) >= 0)


@given(st.permutations(range(16)), st.sampled_from([1, 2, 4]))
def test_the_share_does_not_depend_on_the_batchs_own_order(batch: list[int], world_size: int) -> None:
    lengths = np.array([5, 1, 4, 4, 4, 2, 9, 9, 1, 3, 3, 3, 8, 2, 2, 7])
    for rank in range(world_size):
        options = dict(batch_size=2, rank=rank, world_size=world_size)
        shuffled, sorted_ = (
            micro_batches(np.array(batch), lengths, **options),
            micro_batches(np.arange(16), lengths, **options),
        )
        assert [piece.tolist() for piece in shuffled] == [piece.tolist() for piece in sorted_]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_step_trains_on_the_same_samples_at_any_number_of_ranks(world_size: int) -> None:
    order = SampleOrder(shards_of([8] * 5), seed=3)
    lengths = np.arange(40)[::-1]
    pieces = [
        piece
        for rank in range(world_size)
        for piece in micro_batches(order.slice(16, 32), lengths, batch_size=2, rank=rank, world_size=world_size)
    ]
    assert sorted(np.concatenate(pieces).tolist()) == sorted(order.slice(16, 32).tolist())
    assert [len(piece) for piece in pieces] == [2] * 8


# ----------------------------------------------------------------------------------------------------------- several caches

cache_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
epoch_weights = st.sampled_from([0.25, 0.5, 1, 2, 3.3])


def mixed_order(sizes: list[int], counts: list[int], seed: int) -> MixedOrder:
    orders = [SampleOrder(np.arange(size) // 4, seed=seed, window=2) for size in sizes]
    return MixedOrder(orders, np.array(counts))


def caches_by_sorting(counts: list[int]) -> list[int]:
    """Of which cache an epoch's samples are: the k-th of n at (k + 1/2) / n, exactly."""
    places = [(Fraction(2 * k + 1, n), number) for number, n in enumerate(counts) for k in range(n)]
    return [number for _, number in sorted(places)]


@given(cache_sizes, seeds, st.data())
def test_a_mix_is_what_sorting_gives_in_whatever_pieces(sizes: list[int], seed: int, data: st.DataObject) -> None:
    counts = [round(size * data.draw(epoch_weights)) for size in sizes]
    assume(sum(counts))
    order, starts, n = mixed_order(sizes, counts, seed), np.cumsum([0, *sizes]), sum(counts)
    whole = order.slice(0, 3 * n)
    cuts = sorted(data.draw(st.lists(st.integers(0, 3 * n), max_size=4)))
    pieces = [order.slice(a, b) for a, b in zip([0, *cuts], [*cuts, 3 * n], strict=True)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert (np.searchsorted(starts, whole, "right") - 1).tolist() == 3 * caches_by_sorting(counts)
    for number, count in enumerate(counts):  # of each cache, its own order, without a gap from epoch to epoch
        own = whole[(whole >= starts[number]) & (whole < starts[number + 1])] - starts[number]
        assert np.array_equal(own, order.orders[number].slice(0, 3 * count))


def test_a_mix_of_one_is_its_own_order() -> None:
    own = SampleOrder(np.arange(30) // 4, seed=2, window=3)
    assert np.array_equal(MixedOrder([own], np.array([30])).slice(7, 95), own.slice(7, 95))


def test_the_mix_is_the_same_in_every_version() -> None:
    """Golden: a change here makes a resumed run train on other samples."""
    order = mixed_order([4, 3, 8], [4, 6, 2], seed=1)
    assert order.slice(0, 14).tolist() == [4, 0, 5, 12, 1, 6, 6, 2, 4, 7, 3, 5, 4, 2]


def test_every_stretch_of_a_mix_of_millions_has_its_share() -> None:
    order = MixedOrder(
        [SampleOrder(np.arange(n) // 256, seed=0) for n in (6_000_000, 50_000)], np.array([6_000_000, 100_000])
    )
    batch = order.slice(123_456_789, 123_456_789 + 61_000)
    assert abs(np.count_nonzero(batch >= 6_000_000) - 1000) <= 2
