"""The order in which samples are trained on: a pure function of the seed, over the manifest, and of nothing else.

Not of the number of ranks, nor of what ran before: step s of any run with the same global batch trains on the same
samples. So resuming is arithmetic. Shards are shuffled, then samples within windows of shards, so that reads stay near
each other on disk; within a global batch, samples of like length go together.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Order:
    """An endless stream of sample indices, epoch after epoch; subclasses make an epoch.

    The last two epochs stay in memory, 8 bytes per sample each.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self._kept = lru_cache(maxsize=2)(self.make_epoch)

    def make_epoch(self, number: int) -> np.ndarray:
        """int64 `[n]`: the sample indices of an epoch, in order."""
        raise NotImplementedError

    def epoch(self, number: int) -> np.ndarray:
        """int64 `[n]`: the sample indices of an epoch, in order."""
        return self._kept(number)

    def slice(self, start: int, end: int) -> np.ndarray:
        """int64: the indices at places [start, end) of the endless stream."""
        pieces = [np.empty(0, np.int64)]
        while start < end:
            number, place = divmod(start, self.num_samples)
            pieces.append(self.epoch(number)[place : place + end - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)


class SampleOrder(Order):
    """The order of one cache's samples: every sample once per epoch.

    Args:
        shards: int `[n]`, the shard of each sample.
        seed: 0 or more.
        window: number of shards among which samples are mixed.
        stream: another order for each number: caches of the same conversations must not run in lock step.
    """

    def __init__(self, shards: np.ndarray, *, seed: int, window: int = 16, stream: int = 0):
        super().__init__(len(shards))
        self.seed, self.window, self._stream = seed, window, [stream, 0, 0] if stream else []
        self._by_shard = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[self._by_shard])) + 1
        self._bounds = np.concatenate([[0], starts, [len(shards)]])  # of each shard, among samples sorted by shard

    def make_epoch(self, number: int) -> np.ndarray:
        shards = np.random.default_rng([self.seed, number, *self._stream]).permutation(len(self._bounds) - 1)
        windows = []
        for count, start in enumerate(range(0, len(shards), self.window)):
            mixed = shards[start : start + self.window]
            samples = np.concatenate([np.arange(self._bounds[shard], self._bounds[shard + 1]) for shard in mixed])
            windows.append(np.random.default_rng([self.seed, number, count, *self._stream]).permutation(samples))
        return self._by_shard[np.concatenate(windows)]


class MixedOrder(Order):
    """Several caches' endless streams as one, in an even mix: any stretch has of each cache its share, to a few samples.

    An epoch takes `counts[i]` samples of stream i, the ones after those of the epoch before, so that each sample of a cache
    comes as often as any other. They stand in the order of `(k + 1/2) / counts[i]`, k counting a stream's samples in the
    epoch.

    Args:
        orders: each cache's. Samples have one index over all caches, those of a cache after those of the one before.
        counts: int `[caches]`.
    """

    def __init__(self, orders: Sequence[SampleOrder], counts: np.ndarray):
        super().__init__(int(np.sum(counts)))
        self.orders, self.counts = orders, [int(count) for count in counts]
        self._starts = np.cumsum([0, *(order.num_samples for order in orders)])

    def make_epoch(self, number: int) -> np.ndarray:
        parts = [
            start + order.slice(number * count, (number + 1) * count)
            for order, count, start in zip(self.orders, self.counts, self._starts, strict=False)
        ]
        # Equal fractions are equal floats, as division rounds correctly; then the first cache comes first.
        places = np.concatenate([(2 * np.arange(count) + 1) / (2 * max(count, 1)) for count in self.counts])
        return np.concatenate(parts)[np.argsort(places, kind="stable")]


def spread_out(samples: np.ndarray, conversations: np.ndarray, size: int) -> np.ndarray:
    """The same samples, rearranged so that no stretch of `size` has a conversation twice where that can be avoided.

    Args:
        samples: int `[n]`, of whole batches of `size` but for the last. conversations: int `[n]`, of each.
    """
    count = -(-len(samples) // size)
    batches: list[dict[int, int]] = [{} for _ in range(count)]  # place among samples -> conversation
    seen: list[set[int]] = [set() for _ in range(count)]
    room = [min(size, len(samples) - number * size) for number in range(count)]
    first = 0

    def put(number: int, place: int, conversation: int) -> None:
        batches[number][place] = conversation
        seen[number].add(conversation)

    for place, conversation in enumerate(conversations.tolist()):
        while len(batches[first]) == room[first]:
            first += 1
        free = [number for number in range(first, count) if len(batches[number]) < room[number]]
        number = next((number for number in free if conversation not in seen[number]), None)
        if number is None:  # change places with a sample of a batch that is full
            number = free[0]
            for other in range(count):
                swapped = next((p for p, c in batches[other].items() if c not in seen[number]), None)
                if conversation not in seen[other] and swapped is not None:
                    moved = batches[other].pop(swapped)
                    seen[other].discard(moved)
                    put(other, place, conversation)
                    place, conversation = swapped, moved
                    break
        put(number, place, conversation)
    return samples[[place for batch in batches for place in batch]] if count else samples


def micro_batches(
    batch: np.ndarray, lengths: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """This rank's micro-batches of one global batch: samples of like length together, every rank as many steps.

    Args:
        batch: int `[G]`, sample indices of the global batch.
        lengths: int `[n]`, a length of every sample of the cache, to group by.
        batch_size: samples a rank takes in a micro-step.

    Returns:
        int arrays of up to `batch_size` indices. At each micro-step the ranks hold neighbours in length. The last ones
        may be empty, where the global batch does not fill them; no sample is left out or repeated.
    """
    ordered = batch[np.lexsort((batch, lengths[batch]))]
    steps = -(-len(ordered) // (batch_size * world_size))
    pieces = np.array_split(ordered, steps * world_size)
    return [pieces[step * world_size + rank] for step in range(steps)]
