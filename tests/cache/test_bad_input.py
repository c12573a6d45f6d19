"""Five hundred odd, broken and hostile records: each cached or skipped with its reason, the same in every run."""

import re
from collections import Counter

import pytest
import torch
from bad_inputs import EITHER, make_corpus
from conftest import conversation, write_llava
from made_cache import tree

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.errors import DataError, ModelError, SampleError
from genrecal.inspect import summarize
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

COUNT = 500
OPTIONS = dict(max_tokens=2000, samples_per_shard=64, top_k=4, batch_tokens=4096)


@pytest.fixture(scope="module")
def corpus(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    path, expected = make_corpus(folder / "data", count=COUNT, seed=0)
    options = CacheOptions(max_skip=1.0, **OPTIONS)
    report = run_cache_job(teacher, open_samples([path]), folder / "cache", options, WorkOptions(threads=3))
    return path, expected, folder / "cache", report


def test_every_record_is_cached_or_has_its_reason(corpus):
    path, expected, cache, report = corpus
    rows = open_cache(cache).manifest().to_pylist()
    assert len(rows) == len(expected) == COUNT
    wrong = []
    for number, (row, (kind, wanted)) in enumerate(zip(rows, expected, strict=True)):
        assert row["key"].startswith(f"{number:08d}")
        if row["status"] == "skipped":
            assert row["reason"].startswith(f"{path}:{number + 1}: ")
            assert "0x" not in row["reason"]
        reason = (row["reason"] or "").partition(": ")[2]
        right = (reason == "") if wanted is None else True if wanted is EITHER else bool(re.search(wanted, reason))
        if not right:
            wrong.append((kind, wanted, row["status"], reason))
    assert wrong == []
    statuses = Counter(row["status"] for row in rows)
    assert (statuses["cached"], statuses["skipped"]) == (report.cached, report.skipped)
    assert sum(report.reasons.values()) == report.skipped
    assert sum(summarize(open_cache(cache)).skip_reasons.values()) == report.skipped
    assert 100 < report.skipped < 350 and len({kind for kind, _ in expected}) > 60
    assert verify_cache(cache).whole


def test_another_run_gives_the_same_reasons_and_bytes(corpus, teacher, tmp_path):
    path, _, cache, _ = corpus
    options = CacheOptions(max_skip=1.0, **OPTIONS)
    run_cache_job(teacher, open_samples([path]), tmp_path / "again", options, WorkOptions(threads=1))
    assert tree(tmp_path / "again") == tree(cache)


def test_max_skip_is_the_last_share_that_passes(corpus, teacher, tmp_path):
    path, _, _, report = corpus
    share = report.skipped / COUNT
    fits, over = CacheOptions(max_skip=share, **OPTIONS), CacheOptions(max_skip=share - 0.001, **OPTIONS)
    assert run_cache_job(teacher, open_samples([path]), tmp_path / "fits", fits).skipped == report.skipped
    with pytest.raises(DataError, match=rf"of {COUNT} samples cannot be used.*--max-skip"):
        run_cache_job(teacher, open_samples([path]), tmp_path / "over", over)
    # Whoever allows more goes on with the shards that were finished: the limit is no part of a cache.
    assert run_cache_job(teacher, open_samples([path]), tmp_path / "over", fits).shards_found > 0
    assert tree(tmp_path / "over") == tree(tmp_path / "fits")


def test_more_tokens_than_the_teacher_has_positions(teacher):
    with pytest.raises(SampleError, match=r"\d+ tokens, over the 4096 positions that this teacher has"):
        teacher.encode(conversation(("q", "word " * 5000)))


def test_what_does_not_fit_into_memory(teacher, tmp_path, monkeypatch):
    """One sample alone is skipped; a batch of several is a setting that must be changed."""
    path = write_llava(tmp_path / "d", [conversation((f"q{i}", "a " * (1 + 50 * i)), key=str(i)) for i in range(4)])
    plain = teacher._states

    def states(batch, *words):
        if max(map(len, batch)) > 120:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(batch, *words)

    monkeypatch.setattr(teacher, "_states", states)
    options = CacheOptions(max_skip=0.5, batch_tokens=150)
    report = run_cache_job(teacher, open_samples([path]), tmp_path / "one", options)
    assert report.skipped and all("do not fit into the teacher's memory" in reason for reason in report.reasons)
    with pytest.raises(ModelError, match=r"samples of up to \d+ tokens do not fit.*smaller --batch-tokens"):
        run_cache_job(teacher, open_samples([path]), tmp_path / "all", CacheOptions(batch_tokens=10_000))
