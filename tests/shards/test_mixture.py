"""Several caches as one: what may be mixed, what a mixture holds, and what it says of a sample."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_cache import FRACTION, SAMPLES, make_cache

from genrecal.errors import DamageError, UsageError
from genrecal.shards.layout import tar_name
from genrecal.shards.mixture import Mixture, open_caches
from genrecal.shards.order import SampleOrder, spread_out
from genrecal.shards.reader import open_cache
from genrecal.train.batches import StageData

CACHED = SAMPLES - 1  # one of them is skipped


@pytest.fixture
def two(tmp_path):
    return [make_cache(tmp_path / name) for name in ("first", "second")]


def change(cache, **settings):
    """Other values in cache.json."""
    path = cache / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_one_cache_is_itself(two):
    alone, mixture = open_cache(two[0]), open_caches(two[:1])
    assert len(mixture) == len(alone) and [r.sample.key for r in mixture] == [r.key for r in alone]
    assert mixture.column("answer_tokens").tolist() == alone.column("answer_tokens").tolist()
    assert (
        mixture.question_share(np.arange(CACHED)) == alone.column("has_question").mean()
        and mixture.hidden_size == alone.hidden_size
    )
    everything = np.arange(len(alone))
    order, shards = mixture.order(everything, seed=3, window=2), alone.column("shard")
    assert order.slice(0, 25).tolist() == SampleOrder(shards, seed=3, window=2).slice(0, 25).tolist()


def test_records_of_each_cache_by_their_paths(two):
    mixture, (first, second) = open_caches(two), map(open_cache, two)
    assert len(mixture) == 2 * CACHED and mixture.column("images").tolist() == 2 * first.column("images").tolist()
    assert mixture.arrow_column("category").to_pylist() == 2 * first.arrow_column("category").to_pylist()
    keys = [record.sample.key for record in mixture]
    assert keys == [f"{cache.path}/{record.key}" for cache in (first, second) for record in cache]
    found = [mixture[i].record() for i in (3, CACHED + 3, 2 * CACHED - 1)]
    assert [record.sample.key for record in found] == [keys[3], keys[CACHED + 3], keys[-1]]
    for record, index in zip(found, (3, 3, CACHED - 1), strict=True):
        assert np.array_equal(record.answer.hidden, first[index].hidden())
    assert mixture[-1].key == second[-1].key and [r.key for r in mixture[CACHED - 1 : CACHED + 1]] == [
        first[-1].key, second[0].key,
    ]  # fmt: skip
    with pytest.raises(IndexError):
        mixture[2 * CACHED]


def test_a_damaged_record_is_named_and_the_others_are_read(two):
    hurt = open_cache(two[1])[2].row
    member = next(m for m in hurt["members"] if m["name"].endswith(".answer.arrow"))
    tar = two[1] / tar_name(member["tier"], hurt["shard"])
    data = bytearray(tar.read_bytes())
    data[member["offset"] + 5] ^= 1
    tar.write_bytes(data)
    mixture = open_caches(two)
    mixture[2].record()
    with pytest.raises(DamageError, match=re.escape(str(tar))):
        mixture[CACHED + 2].record()


def test_weights_say_how_many_samples_an_epoch_takes(two):
    mixture = open_caches(two, [2, 0.5])
    assert mixture.counts(np.arange(len(mixture))).tolist() == [2 * CACHED, CACHED // 2]
    assert mixture.counts(np.arange(4, CACHED + 4)).tolist() == [2 * (CACHED - 4), 2]
    order = mixture.order(np.arange(4, CACHED + 4), seed=0, window=2)
    epochs = order.slice(0, 2 * order.num_samples)
    times = np.bincount(epochs, minlength=CACHED)  # of the samples by their places among those chosen
    assert times.tolist() == [4] * (CACHED - 4) + [1] * 4
    with pytest.raises(UsageError, match="0.01 takes none of the 10 samples of .*second in an epoch"):
        open_caches(two, [1, 0.01]).counts(np.arange(2 * CACHED))


def test_questions_of_the_mixture(two, monkeypatch):
    """A cache without a question tier counts as one: by what its manifests say, whatever share was asked for."""
    mixture = open_caches(two, [1, 3])
    has, column = open_cache(two[0]).column("has_question"), Mixture.column
    assert 0 < has.mean() < 1 and open_cache(two[1]).description["question_fraction"] == FRACTION
    without = np.arange(2 * CACHED) < CACHED  # as the manifests of a cache without the tier say
    monkeypatch.setattr(Mixture, "column", lambda self, name: column(self, name) & without)
    assert mixture.question_share(np.arange(2 * CACHED)) == pytest.approx(has.mean() / 4)
    assert mixture.question_share(np.arange(CACHED)) == pytest.approx(has.mean())
    assert mixture.question_share(np.arange(CACHED, 2 * CACHED)) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 3}, "top_k: expected 4, as .*first has, got 3"),
        ({"head_rows": 64}, "head_rows: expected 60, as .*first has, got 64"),
        ({"sampled_targets": 0}, "sampled_targets: expected 5, as .*first has, got 0"),
    ],
)
def test_other_targets_are_refused(two, settings, message):
    change(two[1], **settings)
    with pytest.raises(UsageError, match=f"--cache .*second: {message}; only caches of one teacher"):
        open_caches(two)


def test_another_teacher_is_refused(two):
    teacher = open_cache(two[1]).description["teacher"]
    change(two[1], teacher=teacher | {"head_xxh3": "0" * 32})
    with pytest.raises(UsageError, match=r"second: the teacher's head: expected .*, got 0{32}"):
        open_caches(two)
    files = teacher["files_sha256"] | {"tokenizer.json": "1" * 64}
    change(two[1], teacher=teacher | {"files_sha256": files})
    with pytest.raises(UsageError, match=r"second: the teacher's tokenizer \(sha256\)"):
        open_caches(two)
    change(two[1], teacher=teacher | {"files_sha256": teacher["files_sha256"] | {"config.json": "2" * 64}})
    assert len(open_caches(two)) == 2 * CACHED  # another config.json beside the same head and tokenizer is no other


def test_weights_that_do_not_fit(two):
    with pytest.raises(UsageError, match="expected a number for each of 2 caches, in the order of --cache, got 1"):
        open_caches(two, [1])
    with pytest.raises(UsageError, match="first: given twice"):
        open_caches([two[1], two[0], two[0].parent / "second/../first"])


def test_caches_of_the_same_conversations_do_not_run_in_lock_step(two):
    """A step of 10 from two caches of the same 10 conversations has each of them once, in any epoch."""
    mixture = open_caches(two)
    everything = np.arange(2 * CACHED)
    conversations = mixture.conversations()
    assert conversations[:CACHED].tolist() == conversations[CACHED:].tolist() == open_cache(two[0]).input_rows.tolist()
    order = mixture.order(everything, seed=0, window=16)
    one, other = (order.slice(0, 2 * CACHED)[number::2] % CACHED for number in (0, 1))
    assert (one != other).sum() > CACHED / 2  # each its own order
    data = StageData(
        order=order, lengths=np.zeros(2 * CACHED), tokens=np.ones(2 * CACHED), global_batch=CACHED,
        last_sample=50 * CACHED, batch_size=2, conversations=conversations,
    )  # fmt: skip
    steps = [data.step(number) for number in range(50)]
    assert sorted(np.concatenate(steps)) == sorted(order.slice(0, 50 * CACHED))
    twice = sum(len(set(conversations[step])) < CACHED for step in steps)
    assert twice == 0 and [data.step(number).tolist() for number in (17, 3)] == [steps[17].tolist(), steps[3].tolist()]


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_conversation_comes_twice_where_it_can_be_avoided(size, count, random):
    ids = np.array([random.randrange(random.randrange(1, 20)) for _ in range(size * count)])
    found = spread_out(np.arange(len(ids)), ids, size)
    assert sorted(found) == list(range(len(ids)))
    if np.bincount(ids).max() <= count:
        assert all(len(set(ids[found[i : i + size]])) == size for i in range(0, len(ids), size))
