"""The order in which samples are trained on: a pure function of the seed, over the manifest, and of nothing else.

Not of the number of ranks, nor of what ran before: step s of any run with the same global batch trains on the same
samples. So resuming is arithmetic. Shards are shuffled, then samples within windows of shards, so that reads stay near
each other on disk; within a global batch, samples of like length go together.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class SampleOrder:
    """The endless stream of sample indices of all epochs.

    Every window of an epoch has a random generator of its own, so any place of the stream is found without what stands
    before it: resuming within an epoch of millions of samples draws one window.

    Args:
        shards: int `[n]`, the shard of each sample; in input order, so that a shard's samples stand together.
        seed: 0 or more.
        window: number of shards among which samples are mixed.
        stream: another order for each number: caches of the same conversations must not run in lock step.
    """

    def __init__(self, shards: np.ndarray, *, seed: int, window: int = 16, stream: int = 0):
        self.seed, self.window, self.num_samples = seed, window, len(shards)
        self._stream = [stream, 0, 0] if stream else []
        in_order = bool(np.all(shards[:-1] <= shards[1:]))
        self._by_shard = None if in_order else np.argsort(shards, kind="stable")
        ordered = shards if self._by_shard is None else shards[self._by_shard]
        starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(shards) else np.empty(0, np.int64)
        self._bounds = np.append(starts, len(shards))  # of each shard, among samples sorted by shard
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch, and where each of its windows starts."""
        shards = np.random.default_rng([self.seed, epoch, *self._stream]).permutation(len(self._bounds) - 1)
        sizes = np.add.reduceat(np.diff(self._bounds)[shards], np.arange(0, len(shards), self.window))
        return shards, np.append(0, np.cumsum(sizes))

    def _make_window(self, epoch: int, number: int) -> np.ndarray:
        shards = self._plan(epoch)[0][number * self.window : (number + 1) * self.window]
        samples = np.concatenate([np.arange(self._bounds[shard], self._bounds[shard + 1]) for shard in shards])
        samples = np.random.default_rng([self.seed, epoch, number, *self._stream]).permutation(samples)
        return samples if self._by_shard is None else self._by_shard[samples]

    def epoch(self, number: int) -> np.ndarray:
        """int64 `[n]`: every sample index once, in the order of that epoch."""
        return self.slice(number * self.num_samples, (number + 1) * self.num_samples)

    def slice(self, start: int, end: int) -> np.ndarray:
        """int64: the indices at places [start, end) of the endless stream."""
        pieces = []
        while start < end:
            epoch, place = divmod(start, self.num_samples)
            starts = self._plan(epoch)[1]
            number = int(np.searchsorted(starts, place, "right")) - 1
            taken = min(end - start, int(starts[number + 1]) - place)
            at = place - int(starts[number])
            pieces.append(self._window(epoch, number)[at : at + taken])
            start += taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


class MixedOrder:
    """Several caches' endless streams as one, in an even mix: any stretch has of each cache its share, to a few samples.

    An epoch takes `counts[i]` samples of stream i, the ones after those of the epoch before, so that each sample of a cache
    comes as often as any other. They stand in the order of `(k + 1/2) / counts[i]`, k counting a stream's samples in the
    epoch; this places them without those before, as `SampleOrder` does.

    Args:
        orders: each cache's. Samples have one index over all caches, those of a cache after those of the one before.
        counts: int `[caches]`.
    """

    def __init__(self, orders: Sequence[SampleOrder], counts: np.ndarray):
        self.orders, self.counts = orders, [int(count) for count in counts]
        self.num_samples = sum(self.counts)
        self._starts = np.cumsum([0, *(order.num_samples for order in orders)])

    def slice(self, start: int, end: int) -> np.ndarray:
        """int64: the indices at places [start, end) of the endless stream."""
        pieces = []
        while start < end:
            epoch, place = divmod(start, self.num_samples)
            taken = min(end - start, self.num_samples - place)
            pieces.append(self._of_epoch(epoch, place, place + taken))
            start += taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _of_epoch(self, epoch: int, start: int, end: int) -> np.ndarray:
        found = np.empty(end - start, np.int64)
        slack = len(self.counts) + 1  # no sample stands further than this from its share of the places
        for number, (order, count) in enumerate(zip(self.orders, self.counts, strict=True)):
            first = max(start * count // self.num_samples - slack, 0)
            last = min(end * count // self.num_samples + slack, count)
            samples = np.arange(first, last)
            places = self._places(number, samples)
            inside = (places >= start) & (places < end)
            if inside.any():
                ahead = epoch * count + int(samples[inside][0])
                taken = order.slice(ahead, ahead + int(inside.sum()))
                found[places[inside] - start] = self._starts[number] + taken
        return found

    def _places(self, number: int, samples: np.ndarray) -> np.ndarray:
        """Where an epoch's samples stand, which are its first, second, ... of a stream: after as many as come before them."""
        places, count = samples.copy(), self.counts[number]
        for other, others in enumerate(self.counts):
            # Of another stream's samples m: (2 m + 1) / others is smaller, or the same and its cache is before this one.
            ahead = (2 * samples + 1) * others - count
            if other != number:
                places += ahead // (2 * count) + 1 if other < number else -(-ahead // (2 * count))
        return places


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
