"""Snapshots of a stage for its report: what is measured against the models themselves, and no trace in the training."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.errors import UsageError
from genrecal.objectives.base import Tier
from genrecal.run_folder import MOMENTS, POOLINGS, read_snapshots
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.shards.reader import open_cache
from genrecal.train.batches import ShardSource
from genrecal.train.config import load_config
from genrecal.train.loop import build_distiller, train
from genrecal.train.run import Run
from genrecal.train.snapshot import take_snapshot

SMALL = "batch_size=6 accumulation=1 max_steps=3 epochs=9 lr=3e-3".split()
SETTINGS = ["data.workers=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    options = CacheOptions(samples_per_shard=8, question_fraction=0.6, answer_codec="bf16", question_codec="bf16")
    run_cache_job(teacher, open_samples([write_llava(folder / "d", mixed_samples(12))]), folder / "c", options)
    return folder / "c"


def new_run(tiny, cache, path, *settings):
    config = load_config(None, [*SETTINGS, *settings])
    return Run(path=path, config=config, student=str(tiny("internvl_llama")), caches=(str(cache),))


@pytest.fixture(scope="module")
def run(tiny, cache, tmp_path_factory):
    run = new_run(tiny, cache, tmp_path_factory.mktemp("run") / "r")
    train(run, stages=[1, 2])
    return run


@pytest.fixture(scope="module")
def snapshots(run):
    return read_snapshots(run.path)


@pytest.mark.parametrize("setting", ["loss.splice_weight=0", "recalibrator.layers=0"])
def test_other_recalibrators(tiny, cache, tmp_path, setting):
    """Without the teacher's states nothing is compared; without blocks a state is what it was."""
    run, opened = new_run(tiny, cache, tmp_path / "r", "objective=genrecal-aligned", setting), open_caches([cache])
    distiller = build_distiller(run, opened, 1, torch.device("cpu"), torch.float32)
    words = dict(samples=64, moment="start", compute_dtype=torch.float32)
    found = take_snapshot(distiller, ShardSource(opened), opened, np.arange(12), **words)
    assert found.own["student"][""] > 0 and found.samples == 12
    if setting.startswith("loss"):
        assert found.keys == () and found.similarity == found.tokens == {}
    else:
        np.testing.assert_allclose(found.tokens["student before"], found.tokens["student after"], atol=1e-4)
        assert np.ptp(found.similarity["own.all"]) > 1e-3


def test_moments(snapshots, cache):
    assert [(s.stage, s.moment) for s in snapshots] == [(1, "start"), (1, "end"), (2, "end")]
    assert [s.samples for s in snapshots] == [12, 12, 12]
    expected = [record.key for record in open_cache(cache) if record.has_question]
    assert 4 <= len(expected) < 12 and all(list(s.keys) == expected for s in snapshots)
    assert all(set(s.categories) == {"test"} for s in snapshots)


def test_own_cross_entropies_are_the_models(run, snapshots, cache):
    """The student's by its own logits, the teacher's by the log-probabilities in the manifest."""
    student = run.load_student(torch.float32)
    losses, firsts = [], []
    for record in open_cache(cache):
        encoded = student.renderer.encode(record.sample)
        with torch.no_grad():
            logits = student.model(**student.on_device(student.renderer.collate([encoded]))).logits[0]
        for start, end, is_answer in encoded.segments():
            if is_answer:
                ids = torch.from_numpy(encoded.input_ids[start:end])
                losses += F.cross_entropy(logits[start - 1 : end - 1], ids, reduction="none").tolist()
                firsts += [True] + [False] * (end - start - 1)
    losses, firsts = np.array(losses), np.array(firsts)
    for snapshot in snapshots[:2]:  # stage 1 leaves the student as it is
        assert snapshot.own["student"] == pytest.approx(
            {"": losses.mean(), "_first": losses[firsts].mean(), "_later": losses[~firsts].mean()}, rel=1e-5
        )
    assert snapshots[2].own["student"][""] < snapshots[0].own["student"][""]
    opened = open_caches([cache])
    tokens = opened.column("answer_tokens")
    expected = -(opened.column("log_prob") * tokens).sum() / tokens.sum()
    assert snapshots[0].own["teacher"][""] == pytest.approx(expected, rel=1e-5)


def naive_states(distiller, record, pairing):
    """Recalibrated states of one conversation and which are an answer's, segment by segment, in plain steps."""
    student, rec = distiller.student, distiller.recalibrator
    encoded = student.renderer.encode(record.sample)
    z = student.model.base_model(**student.on_device(student.renderer.collate([encoded]))).last_hidden_state[0]
    answer, question = record.answer_rows(), record.question_rows()
    pieces, marks = [], []
    for number, (start, end, is_answer) in enumerate(encoded.segments()):
        turn = number // 2
        if is_answer and pairing != "own":
            piece = rec.rec_proj_pre(torch.from_numpy(answer.hidden[answer.turn == turn][1:]))
        elif pairing == "teacher":
            piece = rec.rec_proj_pre(torch.from_numpy(question.hidden[question.turn == turn]))
        else:
            piece = z[start:end]
        pieces.append(piece)
        marks += [is_answer] * len(piece)
    return rec(torch.cat(pieces)[None])[0], torch.tensor(marks)


@pytest.mark.parametrize("stage", [1, 2])
def test_similarity_is_that_of_the_means(run, snapshots, cache, stage):
    """Against states that are put together and recalibrated one by one, after a stage's training."""
    opened = open_caches([cache])
    distiller = build_distiller(run, opened, stage, torch.device("cpu"), torch.float32)
    weights = run.load_result(stage)
    distiller.load_state_dict(weights, strict=False)
    assert set(weights) <= set(distiller.state_dict())
    distiller.eval()
    snapshot = next(s for s in snapshots if (s.stage, s.moment) == (stage, "end"))
    records = [opened.first.by_key(key) for key in snapshot.keys]
    with torch.no_grad():
        states = {p: [naive_states(distiller, r, p) for r in records] for p in ("own", "splice", "teacher")}
    for pairing in ("own", "splice"):
        for pooling in POOLINGS:

            def mean(pair, pooling=pooling):
                chosen = {"all": slice(None), "answer": pair[1], "question": ~pair[1]}[pooling]
                return pair[0][chosen].mean(0)

            ours, theirs = ([mean(pair) for pair in states[name]] for name in (pairing, "teacher"))
            expected = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in theirs]) for a in ours])
            found = snapshot.similarity[f"{pairing}.{pooling}"]
            np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
            assert np.ptp(found) > 1e-3


def test_tokens_keep_their_distances(run, snapshots, cache):
    """The student's states before the Recalibrator: distances among the tokens that are kept are those of the states."""
    snapshot = snapshots[0]
    student = run.load_student(torch.float32)
    kept = snapshot.tokens["student before"]
    assert kept.shape[1] <= 50 and {len(v) for n, v in snapshot.tokens.items() if "student" in n} == {len(kept)}
    assert len(snapshot.token_is_answer["student"]) == len(kept)
    states = []
    for key in snapshot.keys:
        encoded = student.renderer.encode(open_cache(cache).by_key(key).sample)
        with torch.no_grad():
            z = student.hidden(student.renderer.collate([encoded]))[0].numpy()
        for part in (False, True):
            rows = np.concatenate([np.arange(s, e) for s, e, is_answer in encoded.segments() if is_answer is part])
            if len(rows) > 8:
                rows = rows[np.linspace(0, len(rows) - 1, 8).round().astype(int)]
            states.append(z[rows])
    expected = np.concatenate(states)
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (expected, kept)]
    np.testing.assert_allclose(*distances, atol=0.1 * distances[0].max())
    assert np.corrcoef(distances[0].ravel(), distances[1].ravel())[0, 1] > 0.99


def test_without_question_states_and_with_damage(tiny, cache, run, tmp_path):
    """The question tier may be deleted after stage 1: no comparison then, and a damaged sample is left out."""
    opened = open_caches([cache])
    distiller = build_distiller(run, opened, 2, torch.device("cpu"), torch.float32)

    class Damaged(ShardSource):
        def fetch(self, indices, tier):
            from genrecal.errors import DamageError

            if tier == Tier.QUESTIONS or indices == [3]:
                return [DamageError("gone")]
            return super().fetch(indices, tier)

    compared = int(opened.column("has_question").sum())
    snapshot = take_snapshot(
        distiller, Damaged(opened), opened, np.arange(12), samples=64, moment="end", compute_dtype=torch.float32
    )
    assert snapshot.samples == 12 - compared - (not opened.column("has_question")[3])
    assert snapshot.similarity == snapshot.tokens == {} and snapshot.own["student"][""] > 0
    snapshot.write(tmp_path)
    assert read_snapshots(tmp_path) == [snapshot]


def broken(facts=None, **tensors):
    whole = {"stage": 1, "moment": "end", "samples": 2, "own": {}, "keys": ["a", "b"], "categories": ["", ""]}
    return safetensors.numpy.save(tensors, {"genrecal": json.dumps(whole | (facts or {}))})


@pytest.mark.parametrize("data", [
    b"not safetensors", safetensors.numpy.save({"x": np.zeros(1)}), broken({"own": 3}),
    broken({"categories": []}), broken(**{"similarity/own.all": np.zeros((2, 2), np.float32)}),
    broken(**{"tokens/student before": np.zeros((2, 2), np.float32)}), broken({"keys": ["k"] * 9999}),
])  # fmt: skip
def test_what_is_no_snapshot_is_one_line(tmp_path, data):
    path = tmp_path / "snapshots" / f"stage1-{MOMENTS[0]}.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not a snapshot of a run") as error:
        read_snapshots(tmp_path)
    assert str(path) in str(error.value)
