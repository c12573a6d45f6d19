"""Several caches as one sequence: what a run trains on."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from genrecal.errors import UsageError
from genrecal.shards.head import FrozenHead
from genrecal.shards.order import MixedOrder, SampleOrder
from genrecal.shards.reader import Cache, CachedRecord

SAME_TEACHER = ("hidden_size", "head_rows", "vocab_size")  # in cache.json, of one teacher
SAME = ("top_k", "sampled_targets", "template_args")  # in cache.json of all


class Mixture(Sequence[CachedRecord]):
    """The samples of several caches, one cache after another, and how often an epoch takes each cache's.

    Where there are several, a sample's key has its cache's path before it: caches number their samples alike.

    Args:
        caches: one or more.
        weights: an epoch takes so many times each cache's samples: of weight 0.5 half of them, and the other half in the
            epoch after; of weight 2 each twice. Empty for 1 each.
        several_teachers: whether the caches may be of several teachers.

    Raises UsageError for caches of other teachers than allowed or that hold other targets, and for weights that do not fit
    them.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float] = (), *, several_teachers: bool = False):
        if weights and len(weights) != len(caches):
            raise UsageError(
                f"data.weights: expected a number for each of {len(caches)} caches, in the order of --cache, got {len(weights)}"
            )
        places = [cache.store.absolute for cache in caches]
        if repeated := [cache.path for cache in caches if places.count(cache.store.absolute) > 1]:
            raise UsageError(f"--cache {repeated[-1]}: given twice; data.weights can have its samples seen more often")
        for cache in caches[1:]:
            _check_same(caches[0], cache, several_teachers)
        self.caches, self.weights = tuple(caches), tuple(weights) or (1.0,) * len(caches)
        self._starts = np.cumsum([0, *map(len, caches)])

    @property
    def path(self) -> str:
        """Of all of them, for messages."""
        return ", ".join(cache.path for cache in self.caches)

    @property
    def first(self) -> Cache:
        """One of them, for what is the same in all: the shape of the targets, and of one teacher its head and tokenizer."""
        return self.caches[0]

    @property
    def teachers(self) -> str:
        """Their names, for messages."""
        return ", ".join(dict.fromkeys(str(cache.description["teacher"]["name"]) for cache in self.caches))

    @property
    def hidden_size(self) -> int:
        """D of the teacher."""
        return self.first.hidden_size

    @property
    def head_rows(self) -> int:
        """Rows of the teacher's head."""
        return int(self.first.description["head_rows"])

    def head(self, device: str = "cpu") -> FrozenHead:
        """The teacher's frozen head."""
        return self.first.head(device)

    def question_share(self, indices: np.ndarray) -> float:
        """Of the samples at `indices`, as often as an epoch takes each, those that come with the teacher's question states."""
        weights = np.repeat(self.weights, np.diff(self._starts))[indices]
        return float(np.average(self.column("has_question")[indices], weights=weights)) if len(indices) else 0.0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, place = self.place(index % len(self))
        record = self.caches[number][place]
        return record if len(self.caches) == 1 else replace(record, of=self.caches[number].path)

    def place(self, index: int) -> tuple[int, int]:
        """The number of a sample's cache, and its index there."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, int(index - self._starts[number])

    def arrow_column(self, name: str) -> pa.ChunkedArray:
        """A manifest column over all samples."""
        columns = [cache.arrow_column(name) for cache in self.caches]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)

    def column(self, name: str) -> np.ndarray:
        """The same as numpy."""
        return np.concatenate([cache.column(name) for cache in self.caches])

    def conversations(self) -> np.ndarray:
        """int64 `[n]`: which conversation each sample is of, by its place in the data that its cache was made from. Caches
        that name the same data, with other answers, have the same."""
        data = [json.dumps(cache.description.get("data"), sort_keys=True) for cache in self.caches]
        first = [data.index(one) << 40 for one in data]
        return np.concatenate([cache.input_rows + start for cache, start in zip(self.caches, first, strict=True)])

    def counts(self, indices: np.ndarray) -> np.ndarray:
        """int64 `[caches]`: how many samples an epoch over `indices`, which ascend, takes from each cache.

        Raises UsageError if a cache has some there and too small a weight for one.
        """
        there = np.diff(np.searchsorted(indices, self._starts))
        counts = np.rint(there * np.array(self.weights)).astype(np.int64)
        for cache, weight, has, count in zip(self.caches, self.weights, there, counts, strict=True):
            if has and not count:
                raise UsageError(
                    f"data.weights: {weight:g} takes none of the {has} samples of {cache.path} in an epoch; leave that cache "
                    "out, or give it more"
                )
        return counts

    def without_unlikely(self, indices: np.ndarray, share: float) -> np.ndarray:
        """The samples at `indices`, which ascend, without the share of each cache's whose answers its teacher finds least
        likely: by the mean log-probability per answer token."""
        log_prob, bounds = self.column("log_prob"), np.searchsorted(indices, self._starts)
        parts = [indices[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        kept = [part[np.argsort(log_prob[part], kind="stable")[round(share * len(part)) :]] for part in parts]
        return np.sort(np.concatenate(kept))

    def order(self, indices: np.ndarray, *, seed: int, window: int) -> MixedOrder:
        """Of the samples at `indices`, which ascend, by their places among these."""
        bounds = np.searchsorted(indices, self._starts)
        shards = self.column("shard")[indices]
        parts = [shards[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        orders = [SampleOrder(part, seed=seed, window=window, stream=number) for number, part in enumerate(parts)]
        return MixedOrder(orders, self.counts(indices))


def open_caches(
    paths: Iterable[str | os.PathLike[str]], weights: Sequence[float] = (), *, several_teachers: bool = False
) -> Mixture:
    """Open caches as one sequence (`Mixture`); each a directory or any fsspec URL."""
    return Mixture([Cache(path) for path in paths], weights, several_teachers=several_teachers)


def tokenizer_digest(cache: Cache) -> str:
    """sha256 over the names and digests of the teacher's tokenizer files: a cache made anew with another says so."""
    files = cache.description["teacher"]["files_sha256"]
    names = sorted(name for name in files if name != "config.json" and "processor" not in name)
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in names).encode()).hexdigest()


def _check_same(first: Cache, other: Cache, several_teachers: bool) -> None:
    def facts(cache: Cache) -> dict[str, Any]:
        return {
            "the teacher's head": cache.description["teacher"].get("head_xxh3")
            or cache.description["teacher"].get("head_sha256"),
            "the teacher's tokenizer (sha256)": tokenizer_digest(cache),
            **{name: cache.description.get(name) for name in (*SAME_TEACHER, *SAME)},
        }

    for (what, expected), got in zip(facts(first).items(), facts(other).values(), strict=True):
        if expected != got and (what in SAME or not several_teachers):
            advice = "" if what in SAME else "; objectives that read neither states nor the teacher's head take several"
            raise UsageError(
                f"--cache {other.path}: {what}: expected {expected}, as {first.path} has, got {got}; only caches of one "
                f"teacher and with targets of one kind can be mixed{advice}"
            )
