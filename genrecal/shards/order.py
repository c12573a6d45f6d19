"""The order in which samples are trained on: a pure function of the seed, over the manifest, and of nothing else.

Not of the number of ranks, nor of what ran before: step s of any run with the same global batch trains on the same
samples. So resuming is arithmetic. Shards are shuffled, then samples within windows of shards, so that reads stay near
each other on disk; within a global batch, samples of like length go together.
"""

from functools import lru_cache

import numpy as np


class SampleOrder:
    """The endless stream of sample indices of all epochs.

    Args:
        shards: int `[n]`, the shard of each sample, in input order.
        seed: 0 or more.
        window: number of shards among which samples are mixed.
    """

    def __init__(self, shards: np.ndarray, *, seed: int, window: int = 16):
        self.seed, self.window = seed, window
        self._members = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
        self.num_samples = len(shards)
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> np.ndarray:
        """int64 `[n]`: every sample index once, in the order of that epoch."""
        rng = np.random.default_rng([self.seed, number])
        shuffled = [self._members[i] for i in rng.permutation(len(self._members))]
        windows = [np.concatenate(shuffled[i : i + self.window]) for i in range(0, len(shuffled), self.window)]
        return np.concatenate([rng.permutation(window) for window in windows])

    def slice(self, start: int, end: int) -> np.ndarray:
        """int64: the indices at places [start, end) of the endless stream."""
        pieces = []
        while start < end:
            number, at = divmod(start, self.num_samples)
            taken = min(end - start, self.num_samples - at)
            pieces.append(self.epoch(number)[at : at + taken])
            start += taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


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
