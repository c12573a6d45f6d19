"""The two tests that guard everything.

1. Teacher = student: capture, tar, reader, splice, head and loss give a KL of about 0, and shifting anything by one
   position does not.
2. Shards = live teacher: the same losses, term by term, for 20 steps of stage 1 and of stage 2.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples, write_llava
from torch import nn

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher, LiveTeacher
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.base import map_tensors
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.config import LossConfig, TrainConfig, load_config
from genrecal.train.logs import MACHINE, read_metrics
from genrecal.train.loop import train
from genrecal.train.run import Run
from genrecal.train.stages import Distiller
from genrecal.vlm.loading import load_vlm

FAMILIES = ["qwen2_vl", "internvl_qwen2", "internvl_llama", "llava_onevision"]


class Unchanged(nn.Module):
    """A Recalibrator that passes states through: with teacher = student, its output is the teacher's own states."""

    def __init__(self):
        super().__init__()
        self.rec_proj_pre = nn.Identity()

    def forward(self, splice, rows):
        return splice.flatten(0, 1)[rows]


@pytest.fixture(scope="module")
def same_model(tiny, tmp_path_factory):
    """family -> (model, cache that it wrote of mixed samples)."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            teacher = HFTeacher.load(tiny(family), dtype=torch.float32)
            data = write_llava(folder / "data", mixed_samples(12))
            run_cache_job(
                teacher,
                open_samples([data]),
                folder / "cache",
                CacheOptions(samples_per_shard=5, top_k=16, draws=1000, answer_codec="bf16", question_codec="bf16"),
            )
            made[family] = (load_vlm(tiny(family), dtype=torch.float32), open_caches([folder / "cache"]))
        return made[family]

    return get


def targets_late(batch):
    return dataclasses.replace(batch, target=map_tensors(batch.target, lambda t: t.roll(1, 0)))


def terms(model, cache, *, change=None, target="topk"):
    """Means of the Recalibrator's terms over the whole cache, as stage 1 computes them; `change` spoils the batch."""
    objective = OBJECTIVES["genrecal-aligned"](1, TrainConfig(loss=LossConfig(target=target)))
    modules = {"recalibrator": Unchanged()}
    objective.prepare(model, cache, np.arange(len(cache)), modules)
    batch = BatchBuilder(ShardSource(cache), model.renderer, objective)[range(len(cache))].batch
    if change is not None:
        batch = change(batch)
    with torch.no_grad():
        output = Distiller(model, objective, modules)(batch, len(batch.target_ids))
    return {name: (value / output.counts[name]).item() for name, value in output.sums.items()}


@pytest.mark.parametrize("target", ["topk", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equal_student_gives_no_kl(same_model, family, target):
    model, cache = same_model(family)
    means = terms(model, cache, target=target)
    # What is left is the rounding of the stored answer states to bfloat16; a first token comes from the student's own.
    assert means["kl"] < 2e-3 and means["reg_kl"] < 2e-3, means
    assert means["aligned_share"] == 1  # one tokenizer
    if target == "topk":
        assert abs(means["kl_first"]) < 1e-5, means
        assert abs(means["aligned_kl"]) < 1e-5, means  # all of its states are the student's own
    else:
        assert means["aligned_kl"] < 2e-3, means


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equal_student_gives_no_kl_but_chance_from_draws(same_model, family):
    """Within four standard errors of 0; another row's draws are not."""
    model, cache = same_model(family)
    means = terms(model, cache, target="sample")
    variances = []
    for record in cache:
        rows = record.answer_rows()
        log_p = cache.head().logits(torch.from_numpy(rows.hidden[rows.predicts])).double().log_softmax(-1)
        p = log_p.exp()
        variances += ((p * log_p**2).sum(-1) - (p * log_p).sum(-1) ** 2).tolist()  # of -log p(id), one draw
    error = (sum(variances) / 1000) ** 0.5 / len(variances)
    assert abs(means["kl"]) < 2e-3 + 4 * error, (means, error)
    shifted_draws = terms(model, cache, target="sample", change=targets_late)
    assert shifted_draws["kl"] > 0.3
    assert means["aligned_kl"] == pytest.approx(means["kl"], abs=2e-3)  # the same draws


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_through_the_shards_is_the_models_own(same_model, family):
    model, cache = same_model(family)
    means = terms(model, cache)
    weights = cache.column("answer_tokens")
    assert means["ce"] == pytest.approx(-np.average(cache.column("log_prob"), weights=weights), abs=5e-3)
    losses = []
    with torch.no_grad():
        for record in cache:
            encoded = model.renderer.encode(record.sample)
            logits = model.model(**model.renderer.collate([encoded])).logits[0]
            for start, end, is_answer in encoded.segments():
                if is_answer:
                    ids = torch.from_numpy(encoded.input_ids[start:end])
                    losses.append(nn.functional.cross_entropy(logits[start - 1 : end - 1], ids, reduction="none"))
    assert means["ce"] == pytest.approx(torch.cat(losses).mean().item(), abs=5e-3)
    assert means["aligned_ce"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def in_splice(**changes):
    """Changes tensors of the batch's splice."""
    return lambda b: dataclasses.replace(
        b, splice=dataclasses.replace(b.splice, **{name: change(b.splice) for name, change in changes.items()})
    )


def shifted(by):
    return in_splice(predicts=lambda s: (s.predicts + by).clamp(0, s.rows.numel() - 1))


MISALIGNMENTS = {
    "read one position late": shifted(1),
    "read one position early": shifted(-1),
    "answer states one late": in_splice(answers=lambda s: s.answers.roll(1, 0)),
    "answer states one early": in_splice(answers=lambda s: s.answers.roll(-1, 0)),
    "targets one late": targets_late,
    "splice rows one late": in_splice(rows=lambda s: s.rows.roll(1, 1)),
}


@pytest.mark.parametrize("name", MISALIGNMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_misalignment_by_one_position_shows(same_model, family, name):
    model, cache = same_model(family)
    assert terms(model, cache, change=MISALIGNMENTS[name])["kl"] > 0.3


def moved(rows, by):
    return (rows + by).clamp_min(0)


ALIGNED_MISALIGNMENTS = {
    "read one position late": lambda b: dataclasses.replace(b, aligned_at=moved(b.aligned_at, 1)),
    "read one position early": lambda b: dataclasses.replace(b, aligned_at=moved(b.aligned_at, -1)),
    "rows one late": lambda b: dataclasses.replace(b, aligned_rows=b.aligned_rows.roll(1)),
    "targets one late": targets_late,
}


@pytest.mark.parametrize("name", ALIGNED_MISALIGNMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_misalignment_by_one_position_shows_in_the_aligned_pass(same_model, family, name):
    model, cache = same_model(family)
    means = terms(model, cache, change=ALIGNED_MISALIGNMENTS[name])
    assert means["aligned_kl"] > 0.3
    assert name == "targets one late" or means["kl"] < 2e-3


def test_question_states_one_late_show_in_the_regularisation(same_model):
    model, cache = same_model("qwen2_vl")

    def late(batch):
        reg = dataclasses.replace(batch.regularisation, questions=batch.regularisation.questions.roll(1, 0))
        return dataclasses.replace(batch, regularisation=reg)

    means = terms(model, cache, change=late)
    assert means["reg_kl_first"] > 0.3 and means["kl_first"] < 1e-5


def test_shards_and_live_teacher_give_the_same_losses(tiny, tmp_path):
    """Another family as student; 20 steps of stage 1 and of stage 2, fp32, LoRA dropout on (same seed)."""
    samples = [*mixed_samples(23), conversation(("Who is shown?", "system users"), key="00000023")]
    data = write_llava(tmp_path / "data", samples)
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    run_cache_job(
        teacher,
        open_samples([data]),
        tmp_path / "cache",
        CacheOptions(samples_per_shard=10, answer_codec="bf16", question_codec="bf16"),
    )
    stage = "batch_size=3 accumulation=2 max_steps=20 epochs=9 lr=1e-3 lr_end=1e-4 checkpoint_every=0".split()
    config = load_config(
        None, ["data.workers=0", "objective=genrecal-aligned", *(f"stage{n}.{s}" for n in (1, 2) for s in stage)]
    )
    lines = {}
    for source in ("cache", "live"):
        run = Run(
            path=tmp_path / f"run-{source}",
            config=config,
            student=str(tiny("internvl_llama")),
            caches=(str(tmp_path / "cache"),),
            teacher=source,
        )
        live = LiveTeacher(teacher, top_k=64) if source == "live" else None
        train(run, stages=(1, 2), live_teacher=live)
        lines[source] = read_metrics(run.path)
    assert len(lines["cache"]) == len(lines["live"]) == 40
    for cached, live in zip(lines["cache"], lines["live"], strict=True):
        assert cached.keys() == live.keys() >= {"ce_first", "ce_later", "kl_first", "kl_later"}
        for name in cached.keys() - MACHINE:
            # Only the width of the teacher's batch differs, which moves float32 sums in their last digits.
            assert cached[name] == pytest.approx(live[name], rel=1e-4, abs=1e-5), (
                cached["stage"],
                cached["step"],
                name,
            )
    assert "reg_kl_first" in lines["cache"][0] and "sft_first" in lines["cache"][-1]
    assert all({"aligned_ce_first", "aligned_kl_later"} <= line.keys() for line in lines["cache"])
    assert 0.9 < np.mean([line["aligned_share"] for line in lines["cache"]]) < 1  # two tokenizers
