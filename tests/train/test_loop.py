"""Whole small runs: order of stages, schedules, resume, and what is refused."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import make_cache
from made_run import train_until
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import DamageError, StoppedError, TrainingError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.shards.reader import open_cache
from genrecal.train import loop
from genrecal.train.checkpoint import read_checkpoint
from genrecal.train.config import load_config
from genrecal.train.logs import MACHINE, read_metrics
from genrecal.train.loop import plan_stage, train
from genrecal.train.run import Run
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

SMALL = "batch_size=3 accumulation=2 max_steps=6 epochs=9 lr=1e-3 lr_end=1e-4 checkpoint_every=2".split()
SETTINGS = ["data.workers=0", "measure.samples=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    data = write_llava(folder / "d", mixed_samples(20))
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8, draws=12))
    return folder / "c"


@pytest.fixture(scope="module")
def new_run(tiny, cache):
    def make(path, *settings, student="internvl_qwen2", cache=cache):
        config = load_config(None, [*SETTINGS, *settings])
        return Run(path=path, config=config, student=str(tiny(student)), caches=(str(cache),))

    return make


@pytest.fixture
def run_of(new_run, tmp_path):
    return lambda name, *settings, **named: new_run(tmp_path / name, *settings, **named)


@pytest.fixture(scope="module")
def whole(new_run, tmp_path_factory):
    """All three stages in one go; nothing may change it."""
    run = new_run(tmp_path_factory.mktemp("whole") / "run")
    train(run)
    return run


def begun_from(whole, run, stage):
    """The folder of `run` as `whole` was before a stage."""
    run.path.mkdir()
    for name in ("run.json", "cache-facts.json"):
        shutil.copy(whole.path / name, run.path)
    lines = [json.dumps(line) + "\n" for line in read_metrics(whole.path) if line["stage"] < stage]
    (run.path / "metrics.jsonl").write_text("".join(lines))
    for before in range(1, stage):
        shutil.copytree(whole.path / f"stage{before}", run.path / f"stage{before}")
    return run


def untimed(run, *stages):
    lines = [{k: v for k, v in line.items() if k not in MACHINE} for line in read_metrics(run.path)]
    return [line for line in lines if not stages or line["stage"] in stages]


def test_three_stages_train_what_they_should(whole):
    run, lines = whole, untimed(whole)
    assert [(line["stage"], line["step"]) for line in lines] == [(s, i) for s in (1, 2, 3) for i in range(6)]
    terms = {stage: {k for line in lines if line["stage"] == stage for k in line} for stage in (1, 2, 3)}
    both = {f"{name}{part}" for name in ("ce", "kl") for part in ("", "_first", "_later")}
    sft = {f"sft{part}" for part in ("", "_first", "_later")}
    reg = {f"reg_{name}" for name in both}
    common = {"stage", "step", "loss", "grad_norm", "lr", "samples", "teacher_tokens", "student_tokens"}
    assert terms == {1: both | reg | common, 2: both | sft | common, 3: sft | common}
    for line in lines:  # the loss is per token of the teacher's; the student's own term is a mean over its own tokens
        parts = [line[name] for name in ("ce", "kl", "reg_ce", "reg_kl") if name in line]
        assert line["loss"] > sum(parts) if "sft" in line else line["loss"] == pytest.approx(sum(parts), rel=1e-4)
    for stage in (1, 2, 3):
        losses = [line["loss"] for line in lines if line["stage"] == stage]
        assert losses[-1] < losses[0]
    assert set(load_file(run.stage_result(1))) == {
        n for n in load_file(run.stage_result(1)) if n.startswith("recalibrator.")
    }
    assert any("lora_A" in name for name in load_file(run.stage_result(2)))
    assert not any("vision_tower" in name or "lora" in name for name in load_file(run.stage_result(3)))
    board = EventAccumulator(str(run.path / "tensorboard" / "stage1")).Reload()
    assert [e.value for e in board.Scalars("kl_first")] == pytest.approx(
        [line["kl_first"] for line in lines if line["stage"] == 1], rel=1e-5
    )


def test_learning_rate_falls_linearly_in_each_stage(whole):
    rates = [line["lr"] for line in untimed(whole)]
    assert rates == pytest.approx([1e-3 + (1e-4 - 1e-3) * i / 6 for _ in (1, 2, 3) for i in range(6)])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_from_a_checkpoint_gives_the_same_losses_and_weights(run_of, whole, stage):
    """The run's folder as a kill after step 5 of the stage leaves it: checkpoints of steps 2 and 4, metrics up to 4."""
    cut = begun_from(whole, run_of("cut"), stage)
    train_until(cut, 5, stage=stage)
    with (cut.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 1, "st')  # the last line was being written
    assert sorted(p.name for p in cut.checkpoints.iterdir()) == [f"stage{stage}-step{i:08d}" for i in (2, 4)]
    train(cut, stages=[stage])
    assert untimed(cut) == untimed(whole, *range(1, stage + 1))
    assert not list(cut.checkpoints.iterdir())  # of finished stages
    wanted, got = load_file(whole.stage_result(stage)), load_file(cut.stage_result(stage))
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


KILLED = """
import os, signal, sys
from genrecal.cli import main
plain, wanted = os.fsync, sys.argv.pop(1)

def fsync(descriptor):
    plain(descriptor)
    if os.path.exists(wanted):
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
main()
"""


@pytest.mark.slow
def test_killed_process_goes_on(whole, tmp_path):
    """A real process, killed -9 in stage 1 and in stage 2, ends with the same losses as one that was not."""
    cut = replace(whole, path=tmp_path / "cut")
    words = ["train", "--cache", cut.caches[0], "--student", cut.student, "--out", str(cut.path), "--stages", "1,2"]
    words += [part for setting in SETTINGS for part in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for stage in (1, 2):
        wanted = str(cut.checkpoints / f"stage{stage}-step00000002" / "state.json")
        killed = [sys.executable, "-c", KILLED, wanted, *words]
        assert subprocess.run(killed, capture_output=True, env=environment).returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-m", "genrecal", *words], check=True, capture_output=True, env=environment)
    assert untimed(cut) == untimed(whole, 1, 2)


def test_a_signal_saves_a_checkpoint_though_the_caches_store_is_away(run_of, whole, cache, tmp_path, monkeypatch):
    copy, plain = shutil.copytree(cache, tmp_path / "copy"), loop.learning_rate
    cut = run_of("cut", "stage1.checkpoint_every=0", cache=copy)

    def signalled(settings, step, num_steps):
        if step == 3:
            (copy / "cache.json").rename(copy / "gone")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(settings, step, num_steps)

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            StoppedError, match="SIGTERM: saved a checkpoint at stage 1, step 4; run the same command to resume"
        ),
    ):
        patch.setattr(loop, "learning_rate", signalled)
        train(cut, stages=(1,))
    (copy / "gone").rename(copy / "cache.json")
    train(cut, stages=(1,))
    assert untimed(cut) == untimed(whole, 1)


def test_a_step_without_a_sample_is_a_step(run_of, capfd):
    """It is counted by the progress line, and the wait of the step after it is its own."""
    run = run_of("run", "max_tokens=3", "data.max_skip=1", "log_every=1")
    train(run, stages=(1,))
    assert [line["samples"] for line in read_metrics(run.path)] == [0] * 6
    assert "stage 1: 6/6 steps" in capfd.readouterr().err


def test_worker_processes_change_nothing(run_of, whole):
    workers = run_of("workers", "data.workers=2")
    train(workers, stages=(1,))
    assert untimed(workers) == untimed(whole, 1)


def test_little_is_left_to_collect_between_steps(run_of, monkeypatch):
    """A collection of everything would stop a step for half a second, and copy the pages of a process that reads."""
    seen, step = [], loop.update

    def counted(*args):
        seen.append(gc.get_freeze_count())
        return step(*args)

    monkeypatch.setattr(loop, "update", counted)
    train(run_of("run", "stage1.max_steps=1"), stages=(1,))
    assert len(seen) == 1 and seen[0] > 100_000 and gc.get_freeze_count() == 0


def test_sft_needs_no_recalibrator_and_takes_the_same_samples(run_of, whole):
    run = run_of("sft", "objective=sft")
    train(run)
    assert [line["stage"] for line in untimed(run)] == [2] * 6 + [3] * 6
    assert not run.stage_result(1).exists()
    tokens = [line["student_tokens"] for line in untimed(run, 2)]
    assert tokens == [line["student_tokens"] for line in untimed(whole, 2)]


@pytest.mark.parametrize("splice_weight", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_the_aligned_objective_logs_its_terms_apart(run_of, splice_weight):
    """Beside the paper's or alone, where neither question tier nor Rec-proj-pre is used."""
    run = run_of("run", "objective=genrecal-aligned", f"loss.splice_weight={splice_weight}", "loss.aligned_weight=0.5")
    train(run)
    lines = untimed(run)
    assert [line["stage"] for line in lines] == [1] * 6 + [2] * 6 + [3] * 6
    for line in lines:
        paper = {1: {"ce", "kl", "reg_ce", "reg_kl"}, 2: {"ce", "kl"}, 3: set()}[line["stage"]]
        names = {name for name in line if name.split("_")[-1] in ("ce", "kl") or name == "sft"}
        aligned = {"aligned_ce", "aligned_kl"} if line["stage"] < 3 else set()
        assert names == (paper if splice_weight else set()) | aligned | ({"sft"} if line["stage"] > 1 else set())
        if line["stage"] == 1:  # per token of the teacher's: of these some have an aligned row
            weights = {name: 0.5 * line["aligned_share"] if name in aligned else 1.0 for name in names}
            assert line["loss"] == pytest.approx(sum(line[name] * weight for name, weight in weights.items()), rel=1e-4)
        if aligned:
            assert {"aligned_ce_first", "aligned_kl_later"} <= line.keys() and 0 < line["aligned_share"] <= 1
    for stage in (1, 2):
        of_stage = [line["loss"] for line in lines if line["stage"] == stage]
        assert of_stage[-1] < of_stage[0]
    names = set(load_file(run.stage_result(1)))
    assert any("rec_proj_pre" in name for name in names) == bool(splice_weight)


def test_a_run_keeps_its_recalibrator(run_of):
    """Projections alone; with other layers the run is another."""
    run = run_of("run", "recalibrator.layers=0", "objective=genrecal-aligned")
    train_until(run, 3)
    (checkpoint,) = map(read_checkpoint, run.checkpoints.iterdir())
    train(run, stages=(1,))
    weights = load_file(run.stage_result(1))
    assert {name.split(".")[1] for name in weights} == {"rec_proj_pre", "rec_proj_post", "rec_norm"}
    lines = [line["aligned_kl"] for line in untimed(run)]
    assert lines[-1] < lines[0]
    with pytest.raises(UsageError, match=r"holds another run: recalibrator\.layers was 0, now 2"):
        train(run_of("run", "objective=genrecal-aligned"))
    other = run_of("other", "objective=genrecal-aligned")
    with pytest.raises(TrainingError, match=r"a checkpoint of another run: recalibrator\.layers was 0, now 2"):
        other.check_checkpoint(checkpoint, 1, other.description(open_caches(other.caches)))


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.target=exact"],
        ["loss.target=sample"],
        ["lora.rank=0", "precision=bf16", "gradient_checkpointing=false"],
    ],
)
def test_other_settings_train_too(run_of, settings):
    run = run_of("run", *settings, "stage1.max_steps=2")
    train(run, stages=(1, 2))
    losses = [line["loss"] for line in untimed(run, 2)]
    assert losses[-1] < losses[0]


def test_plan_counts_every_sample_once_an_epoch(cache):
    opened = open_caches([cache])
    config = load_config(None, ["stage1.batch_size=3", "stage1.accumulation=2", "stage1.epochs=1.5"])
    plan = plan_stage(config.stage1, opened)
    assert (plan.num_samples, plan.num_steps, plan.global_batch) == (30, 5, 6)
    odd = plan_stage(load_config(None, ["stage1.batch_size=7", "stage1.accumulation=1"]).stage1, opened)
    assert (odd.num_samples, odd.num_steps) == (20, 3)  # the last step takes the 6 that are left
    with pytest.raises(UsageError, match="no step to train"):
        plan_stage(load_config(None, ["stage1.epochs=0"]).stage1, opened)
    with pytest.raises(UsageError, match="no sample is left"):
        plan_stage(load_config(None, ['stage3.exclude_categories=["test"]']).stage3, opened)


def test_answers_that_the_teacher_finds_unlikely_are_left_out(tmp_path):
    """The same share of each cache, and of what the categories leave."""
    opened = open_caches([make_cache(tmp_path / name) for name in ("first", "second")])
    log_prob, half = opened.column("log_prob"), len(opened) // 2
    plan = plan_stage(load_config(None, ["stage2.drop_unlikely=0.3"]).stage2, opened)
    expected = [start + np.argsort(log_prob[start : start + half])[round(0.3 * half) :] for start in (0, half)]
    assert plan.indices.tolist() == sorted(np.concatenate(expected).tolist())
    settings = ["stage2.drop_unlikely=0.5", 'stage2.include_categories=["kind 1"]']
    chosen = np.flatnonzero(opened.column("category") == "kind 1")
    plan = plan_stage(load_config(None, settings).stage2, opened)
    assert set(plan.indices) < set(chosen) and len(plan.indices) == len(chosen) // 2
    with pytest.raises(UsageError, match="drop_unlikely 1.0: expected a share"):
        load_config(None, ["stage2.drop_unlikely=1.0"])


def test_categories_alone_or_left_out(tmp_path):
    opened = open_caches([make_cache(tmp_path / "made")])
    kind = opened.column("category")
    for chosen, expected in (
        (['include_categories=["kind 1"]'], np.flatnonzero(kind == "kind 1")),
        (['exclude_categories=["kind 1"]'], np.flatnonzero(kind == "kind 0")),
        (
            ['include_categories=["kind 0", "kind 1"]', 'exclude_categories=["kind 0"]'],
            np.flatnonzero(kind == "kind 1"),
        ),
    ):
        plan = plan_stage(load_config(None, [f"stage1.{setting}" for setting in chosen]).stage1, opened)
        assert plan.indices.tolist() == expected.tolist() and 0 < plan.num_samples < len(opened)
    with pytest.raises(
        UsageError, match="include_categories: no sample has the category 'nope'; the cache has kind 0, kind 1"
    ):
        plan_stage(load_config(None, ['stage1.include_categories=["nope"]']).stage1, opened)


def test_another_run_in_the_same_folder_is_refused(new_run, whole):
    with pytest.raises(UsageError, match="holds another run: seed was 0, now 5"):
        train(new_run(whole.path, "seed=5"), stages=(2,))
    with pytest.raises(UsageError, match="student was"):
        train(new_run(whole.path, student="internvl_llama"), stages=(2,))


def test_a_loss_that_is_not_finite_stops_before_the_update(run_of):
    run = run_of("run", "stage1.lr=1e30", "stage1.lr_end=1e29", "stage1.max_grad_norm=0")
    with pytest.raises(TrainingError, match=r"is (nan|inf).* on samples 0000"):
        train(run, stages=(1,))
    assert not run.stage_result(1).exists()


def test_an_unfinished_cache_is_refused(run_of, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    content = json.loads((copy / "cache.json").read_text())
    del content["totals"]
    (copy / "cache.json").write_text(json.dumps(content))
    (copy / "manifest" / "00001.parquet").unlink()
    run = run_of("run")
    with pytest.raises(UsageError, match="2 of 3 shards are finished"):
        train(replace(run, caches=(str(copy),)), stages=(1,))


def test_samples_the_student_cannot_take_are_skipped_counted_and_named(run_of, tiny, cache):
    renderer = Renderer(load_processor(tiny("internvl_qwen2")))
    lengths = {record.key: len(renderer.encode(record.sample)) for record in open_cache(cache)}
    limit = sorted(lengths.values())[14]
    long = {key for key, length in lengths.items() if length > limit}
    settings = [f"max_tokens={limit}", "stage1.max_steps=0", "stage1.epochs=1"]
    run = run_of("run", *settings, "data.max_skip=0.5")
    train(run, stages=(1,))
    lines = read_metrics(run.path)
    skipped = [text for line in lines for text in line.get("skipped", [])]
    assert {text.split(":")[0] for text in skipped} == long and len(skipped) == len(long) > 0
    assert all(f"over the limit of {limit}" in text for text in skipped)
    assert sum(line["samples"] for line in lines) == 20 - len(long)
    with pytest.raises(TrainingError, match=rf"the student cannot take .* of 20 samples.*max_skip.*limit of {limit}"):
        train(run_of("strict", *settings), stages=(1,))


def test_a_damaged_shard_is_named_in_one_line_wherever_it_is_read(run_of, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    path = copy / "questions" / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    run = run_of("run", "data.workers=2")
    with pytest.raises(DamageError, match=r"questions/00001\.tar: member 000000\d\d") as error:
        train(replace(run, caches=(str(copy),)), stages=(1,))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_damaged_samples_are_skipped_and_counted_if_asked_for(run_of, cache, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    path = copy / "samples" / "00001.tar"
    data = bytearray(path.read_bytes())
    hurt = open_cache(copy).by_key("00000009-s9").row["members"][0]
    data[hurt["offset"] + 3] ^= 1
    path.write_bytes(data)
    settings = ["data.on_damage=skip", "stage1.max_steps=0", "stage1.epochs=1"]
    run = run_of("run", *settings, "data.max_skip=0.05")
    train(replace(run, caches=(str(copy),)), stages=(1,))
    lines = read_metrics(run.path)
    (damaged,) = (text for line in lines for text in line.get("damaged", []))
    assert "samples/00001.tar: member 00000009-s9.json" in damaged
    assert sum(line["samples"] for line in lines) == 19
    assert "1 of 20 samples were skipped since they are damaged" in capfd.readouterr().err
    strict = run_of("strict", *settings)
    with pytest.raises(TrainingError, match=r"and 1 are damaged.*data\.max_skip.*00000009-s9"):
        train(replace(strict, caches=(str(copy),)), stages=(1,))


def test_what_a_cache_lacks_is_said_before_anything_is_written(teacher, run_of, tmp_path):
    bare = tmp_path / "c"
    data = write_llava(tmp_path / "d", mixed_samples(6))
    run_cache_job(teacher, open_samples([data]), bare, CacheOptions(question_codec="none"))
    for settings, pattern in (
        ([], r"this cache has none; set loss\.reg_weight=0"),
        (["loss.target=sample"], r"loss\.target sample .* has none; .*--targets sample:50"),
    ):
        run = run_of("run", *settings, cache=bare)
        with pytest.raises(UsageError, match=pattern):
            train(run)
        assert not run.path.exists()
    without = run_of("without", "loss.reg_weight=0", "stage1.max_steps=1", cache=bare)
    train(without, stages=(1,))
    assert "reg_ce" not in read_metrics(without.path)[0]


def test_another_head_in_the_cache_is_damage(run_of, cache, tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    HFTeacher.load(tiny("qwen2_5_vl"), dtype=torch.float32).head.save(copy / "head.safetensors")
    run = run_of("run")
    with pytest.raises(DamageError, match=r"head\.safetensors: expected sha256"):
        train(replace(run, caches=(str(copy),)), stages=(1,))


def test_damaged_results_and_leftovers_of_a_killed_process(run_of, whole):
    run = begun_from(whole, run_of("run"), 2)
    leftover = run.checkpoints / "stage2-step00000002"  # without its state.json
    leftover.mkdir(parents=True)
    whole = run.stage_result(1).read_bytes()
    run.stage_result(1).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=r"stage1/trained\.safetensors: cannot be read"):
        train(run, stages=(2,))
    run.stage_result(1).write_bytes(whole)
    train(run, stages=(2,))
    assert not leftover.exists() and run.stage_result(2).exists()
    (run.path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"not a run: run\.json"):
        train(run, stages=(3,))


# ----------------------------------------------------------------------------------------------------------- several caches


@pytest.fixture(scope="module")
def parts(tiny, cache, tmp_path_factory):
    """The samples of `cache` in two caches of the same teacher, 12 and 8."""
    folder = tmp_path_factory.mktemp("parts")
    teacher, samples = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32), mixed_samples(20)
    for name, part in (("a", samples[:12]), ("b", samples[12:])):
        data = write_llava(folder / f"data-{name}", part)
        run_cache_job(teacher, open_samples([data]), folder / name, CacheOptions(samples_per_shard=8, draws=12))
    return folder / "a", folder / "b"


def mixed_run(run, parts):
    return replace(run, caches=tuple(map(str, parts)))


def test_caches_together_are_the_cache_of_all_their_samples(run_of, parts):
    whole = "stage1.batch_size=20", "stage1.accumulation=1", "stage1.max_steps=2"
    one, several = run_of("one", *whole), mixed_run(run_of("several", *whole), parts)
    for run in (one, several):
        train(run, stages=(1,))
    for a, b in zip(untimed(one), untimed(several), strict=True):
        assert a.keys() == b.keys() and a["samples"] == b["samples"] == 20
        assert b == {name: pytest.approx(value, rel=2e-5) for name, value in a.items()}


@pytest.mark.slow
def test_a_mixed_run_in_pieces_is_the_run_in_one(run_of, parts):
    settings = "data.weights=[0.5, 2]", "stage1.max_steps=0", "stage1.epochs=1.5", "stage1.checkpoint_every=3"
    whole = mixed_run(run_of("whole", *settings), parts)
    train(whole, stages=(1,))
    lines = untimed(whole)
    assert sum(line["samples"] for line in lines) == 33  # 1.5 x (6 + 16)
    cut = mixed_run(run_of("cut", *settings), parts)
    train_until(cut, 4)
    train(cut, stages=(1,))
    assert untimed(cut) == lines
    with pytest.raises(UsageError, match=r"cache was .*/a, .*/b, now .*/b, .*/a with another"):
        train(mixed_run(cut, parts[::-1]), stages=(1,))


def test_samples_are_named_with_their_cache(run_of, parts):
    run = mixed_run(run_of("run", "max_tokens=3", "data.max_skip=0.1"), parts)
    with pytest.raises(
        TrainingError, match=f"{re.escape(str(parts[0]))}/000000.*3 tokens|{re.escape(str(parts[1]))}/000000"
    ):
        train(run, stages=(1,))
