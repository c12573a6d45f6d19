"""The last projection's start: against the pseudo-inverse written out, and what the teacher's head then reads."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.errors import UsageError
from genrecal.samples import open_samples
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.shards.mixture import open_caches
from genrecal.train.last_layer import Reads
from genrecal.train.recalibrator import Recalibrator
from genrecal.train.warm_start import (
    answer_states,
    head_map,
    head_map_naive,
    shared_entries,
    warm_start,
)
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import load_vlm


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    data = write_llava(folder / "d", mixed_samples(8))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions())
    return open_caches([folder / "c"])


def random_head(rows, width, *, seed, bias=False, **transform):
    generator = torch.Generator().manual_seed(seed)
    return FrozenHead(
        weight=torch.randn(rows, width, generator=generator),
        bias=torch.randn(rows, generator=generator) if bias else None,
        transform=LogitTransform(**transform),
        vocab_size=rows,
    )


@pytest.mark.parametrize("bias", [False, True])
def test_the_map_is_the_pseudo_inverse_in_parts(bias, monkeypatch):
    """Of rows in another order, with biases and scales; 50 rows of 7 at a time."""
    monkeypatch.setattr("genrecal.train.warm_start.CHUNK_ROWS", 7)
    teacher = random_head(90, 12, seed=0, bias=bias, scale=0.5)
    student = random_head(70, 8, seed=1, bias=bias, divisor=4.0, softcap=30.0)
    rng = np.random.default_rng(0)
    ids = rng.choice(90, 50, replace=False), rng.choice(70, 50, replace=False)
    for found, expected in zip(head_map(teacher, student, *ids), head_map_naive(teacher, student, *ids), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_map_is_the_best_one_and_exact_where_there_is_an_exact_one():
    student, true = random_head(60, 8, seed=1), torch.randn(8, 6)
    teacher = dataclasses.replace(
        student, weight=student.weight @ true, bias=None
    )  # U_s = U_t W has no solution in general
    ids = np.arange(60), np.arange(60)
    weight, bias = head_map(teacher, student, *ids)

    def error(change):
        return (teacher.weight @ (weight + change) - student.weight).square().sum()

    assert not bias.any()
    assert all(error(0.01 * torch.randn(6, 8)) > error(torch.zeros(6, 8)) > 1 for _ in range(20))
    wide = dataclasses.replace(student, weight=student.weight @ torch.randn(8, 8))
    exact, _ = head_map(wide, student, *ids)
    assert torch.allclose(wide.weight @ exact, student.weight, atol=1e-4)
    rank_deficient = random_head(60, 8, seed=2)
    rank_deficient.weight[:, 5] = rank_deficient.weight[:, 4]
    found, expected = (solve(rank_deficient, student, *ids)[0] for solve in (head_map, head_map_naive))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["internvl_llama", "internvl_qwen2", "qwen2_vl"])
def test_shared_entries_stand_for_the_same_bytes(tiny, cache, family):
    teacher, student = teacher_renderer(cache.first), load_vlm(tiny(family), dtype=torch.float32).renderer
    ids_t, ids_s = shared_entries(teacher, student)
    assert len(set(ids_t.tolist())) == len(ids_t) == len(set(ids_s.tolist())) > 100
    closing = (teacher.marks.end_of_turn_id, student.marks.end_of_turn_id)
    assert closing in zip(ids_t.tolist(), ids_s.tolist(), strict=True)
    for id_t, id_s in zip(ids_t.tolist(), ids_s.tolist(), strict=True):
        pieces = teacher.byte_tokenizer.token_bytes(id_t), student.byte_tokenizer.token_bytes(id_s)
        assert pieces[0] == pieces[1] or (id_t, id_s) == closing
    if family == "internvl_llama":  # of "7" and its byte's fallback, the one that texts are made of
        at = ids_t.tolist().index(int(teacher.byte_tokenizer("7").ids[0]))
        assert ids_s[at] == student.byte_tokenizer("7").ids[0]
    if family == "qwen2_vl":
        assert (ids_t == ids_s).all()


@pytest.mark.parametrize("layers", [0, 2])
def test_what_the_teachers_head_reads_at_the_start(tiny, cache, layers):
    """The student's own logits of the shared tokens, as nearly as one map of its states can give them."""
    student, head = load_vlm(tiny("internvl_llama"), dtype=torch.float32), cache.head()
    torch.manual_seed(0)
    default = Recalibrator(student.model.config, cache.hidden_size, num_blocks=layers)
    warm = copy.deepcopy(default)
    warm_start(warm, student, head, cache)
    ids_t, ids_s = (torch.from_numpy(ids) for ids in shared_entries(teacher_renderer(cache.first), student.renderer))
    divergence, deviations = [0.0, 0.0], []
    with torch.no_grad():
        for states, rows in answer_states(student, cache):
            expected = student.frozen_head().logits(states[0, rows])[:, ids_s].log_softmax(-1)
            reads = Reads.of(rows, *states.shape[:2])
            for number, recalibrator in enumerate((default, warm)):
                got = head.logits(recalibrator(states, reads))[:, ids_t].log_softmax(-1)
                divergence[number] += (expected.exp() * (expected - got)).sum().item()
            both = warm.projected(states, reads), warm(states, reads)
            deviations.append(torch.stack([values.std(-1, correction=0) for values in both]))
            if not layers:
                assert torch.allclose(both[0], warm.rec_proj_post(states[0, rows]), atol=1e-5)
    # One map cannot give all of a random head's logits; blocks that are not trained spoil more of it.
    assert divergence[1] < 0.8 * divergence[0], divergence
    projected, normed = torch.cat(deviations, 1).mean(1)
    assert normed.item() == pytest.approx(projected.item(), rel=1e-3)


def test_with_the_students_own_head_the_map_is_the_identity(tiny, cache):
    """Teacher = student: projection and norm pass states through, but for the length that the norm gives them all."""
    student = load_vlm(tiny("qwen2_vl"), dtype=torch.float32)
    recalibrator = Recalibrator(student.model.config, cache.hidden_size, num_blocks=0)
    warm_start(recalibrator, student, cache.head(), cache)
    assert torch.allclose(recalibrator.rec_proj_post.weight, torch.eye(cache.hidden_size), atol=1e-4)
    assert recalibrator.rec_proj_post.bias.abs().max() < 1e-6
    with torch.no_grad():
        for states, rows in answer_states(student, cache):
            through = recalibrator(states, Reads.of(rows, *states.shape[:2]))
            assert torch.nn.functional.cosine_similarity(through, states[0, rows]).min() > 0.95


def test_too_few_entries_in_common_are_said(tiny, cache):
    student = load_vlm(tiny("internvl_llama"), dtype=torch.float32)
    with pytest.raises(
        UsageError, match=r"share 3\d\d entries, expected at least the 5000 values of the .*init to default"
    ):
        warm_start(Recalibrator(student.model.config, 5000), student, random_head(500, 5000, seed=0), cache)
