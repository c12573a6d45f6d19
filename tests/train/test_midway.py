"""Evaluation during training, and what a run shows of itself: in place, without a trace in the training."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import mixed_samples, write_llava
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.errors import DataError, UsageError
from genrecal.evaluate.evaluate import evaluate
from genrecal.run_folder import read_snapshots
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.logs import MACHINE, read_evaluations, read_metrics
from genrecal.train.loop import train
from genrecal.train.midway import Midway
from genrecal.train.run import Run

SMALL = "batch_size=3 accumulation=2 max_steps=5 epochs=9 lr=1e-3 lr_end=1e-4 checkpoint_every=2".split()
SETTINGS = ["data.workers=0", "measure.samples=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]


@pytest.fixture(scope="module")
def made(tiny, teacher, tmp_path_factory):
    """A cache, and questions to ask."""
    folder = tmp_path_factory.mktemp("midway")
    data = write_llava(folder / "d", mixed_samples(12))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8))
    return folder / "c", write_llava(folder / "e", mixed_samples(4))


@pytest.fixture(scope="module")
def run_of(tiny, made, tmp_path_factory):
    def make(*settings, asked=True):
        evaluation = (
            [f'evaluate.data=["{made[1]}"]', "evaluate.max_new_tokens=4", "evaluate.every=0.4"] if asked else []
        )
        config = load_config(None, [*SETTINGS, *evaluation, *settings])
        path = tmp_path_factory.mktemp("run") / "r"
        return Run(path=path, config=config, student=str(tiny("qwen2_vl")), caches=(str(made[0]),))

    return make


@pytest.fixture(scope="module")
def asked(run_of):
    run = run_of("measure.samples=8")
    train(run, stages=[1, 2, 3])
    return run


def steps_of(run):
    return [{name: value for name, value in line.items() if name not in MACHINE} for line in read_metrics(run.path)]


def test_training_is_the_same_bit_for_bit_with_and_without(run_of, asked):
    """Evaluation and the report's snapshots."""
    without = run_of(asked=False)
    train(without, stages=[1, 2, 3])
    assert steps_of(without) == steps_of(asked) and len(steps_of(asked)) == 15
    for stage in (1, 2, 3):
        ours, theirs = load_file(asked.stage_result(stage)), load_file(without.stage_result(stage))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_evaluations(without.path) == read_snapshots(without.path) == []
    assert len(read_snapshots(asked.path)) == 3


def test_each_evaluation_is_a_line_a_file_and_on_the_board(asked):
    """Stage 1 leaves the student as it is: once, at its start. 0.4 of five steps is two."""
    lines = read_evaluations(asked.path)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 0), *((n, s) for n in (2, 3) for s in (2, 4, 5))]
    assert [line["evaluation"]["done"] for line in lines] == [0.0, *[0.4, 0.8, 1.0] * 2]
    for line in lines:
        evaluation = line["evaluation"]
        path = asked.path / "evaluations" / f"stage{line['stage']}-step{line['step']:08d}.jsonl"
        answers = [json.loads(text) for text in path.read_text().splitlines()]
        assert len(answers) == evaluation["overall"]["n"] == 7
        assert evaluation["overall"]["accuracy"] == pytest.approx(sum(a["score"] for a in answers) / 7)
        assert set(evaluation["by_category"]) == {"test"} and evaluation["skipped"] == 0
    board = EventAccumulator(str(asked.path / "tensorboard" / "stage3")).Reload()
    assert [event.step for event in board.Scalars("evaluation/accuracy/test")] == [1, 3, 4]
    assert [event.step for event in board.Scalars("memory_gb")] == [0, 1, 2, 3, 4]
    text = board.Tensors("evaluation/answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "What is shown?" in text and "a red square" in text


def test_the_last_evaluation_is_that_of_the_finished_student(asked, made):
    for stage in (2, 3):
        again = evaluate(asked.student_after(stage, torch.float32), open_samples([made[1]]), max_new_tokens=4)
        (line,) = [line for line in read_evaluations(asked.path) if (line["stage"], line["step"]) == (stage, 5)]
        assert line["evaluation"]["overall"]["log_loss"] == pytest.approx(again.overall.log_loss, rel=1e-4)


def test_a_run_that_goes_on_asks_nothing_twice_and_nothing_less(run_of, asked, monkeypatch):
    """Stopped in the step after an evaluation, of which the newest checkpoint is the one before it."""
    run, calls = run_of(), []
    original = Midway.ask

    def ask(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise DataError("stopped here")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Midway, "ask", ask)
    with pytest.raises(DataError, match="stopped here"):
        train(run, stages=[1, 2])
    train(run, stages=[1, 2])
    assert len(calls) == 5
    ours = [line for line in read_evaluations(asked.path) if line["stage"] < 3]
    assert read_evaluations(run.path) == ours
    assert steps_of(run) == [line for line in steps_of(asked) if line["stage"] < 3]


def test_other_questions_do_not_make_another_run(run_of, asked):
    before = read_evaluations(asked.path)
    train(replace(asked, config=run_of("evaluate.every=0.5", "evaluate.limit=2", asked=False).config))
    assert read_evaluations(asked.path) == before


@pytest.mark.parametrize(
    "every, steps, points", [(0.2, 10, {2, 4, 6, 8, 10}), (0.3, 10, {3, 6, 9, 10}), (1.0, 7, {7}), (0.2, 2, {1, 2})]
)
def test_points(every, steps, points):
    config = load_config(None, [f"evaluate.every={every}"])
    midway = Midway(config.evaluate, [])
    assert midway.points(2, steps) == midway.points(3, steps) == points and midway.points(1, steps) == {0}


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("engine=zero3", "zero3.*cannot answer.*zero2"),
        ("evaluate.metric=bleu", "evaluate.metric 'bleu': expected auto or one of exact"),
        ('evaluate.data=["nowhere.jsonl"]', "nowhere.jsonl"),
        ("evaluate.every=1.5", "evaluate.every 1.5: expected a share of a stage"),
        ("wandb=mine", r"wandb = 'mine' needs Weights & Biases: pip install \"genrecal\[wandb\]\""),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(run_of, setting, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((UsageError, DataError), match=reason):
        Midway.of(run_of(setting).config)
        train(run_of(setting), stages=[1])


def test_data_that_hold_nothing_to_ask(run_of, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "conversations": []}\n')
    with pytest.raises(DataError, match="evaluate.data: no record can be asked: .*bad.jsonl"):
        Midway.of(run_of(f'evaluate.data=["{tmp_path}/bad.jsonl"]').config)


def test_fields_and_roles_of_the_questions_may_have_other_names(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "q", "gold": 7}\n')
    config = load_config(
        None, [f'evaluate.data=["{tmp_path}/d.jsonl"]', 'evaluate.fields=["question=q", "answer=gold"]']
    )
    assert Midway.of(config).samples[0].answers == ("7",)
    with pytest.raises(UsageError, match="--role Tutor=robot: expected user, assistant or system"):
        Midway.of(load_config(None, [f'evaluate.data=["{tmp_path}/d.jsonl"]', 'evaluate.roles=["Tutor=robot"]']))


def wandb_records(file):
    """The records of an offline run's file, which has the form of LevelDB's log: pieces of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end that no header fits in
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_weights_and_biases_offline(run_of, monkeypatch):
    """With the real package, which writes what it would send; a run that goes on has the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_of("wandb=genrecal-tests")
    train(run, stages=[1])
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    name = (run.path / "wandb-id").read_text()
    for _ in range(2400):  # its own process writes the file, late where the machine is busy
        records = list(wandb_records(file))
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.25)
    (begun,) = [record.run for record in records if record.HasField("run")][:1]
    assert (begun.run_id, begun.project) == (name, "genrecal-tests") and name in file.name
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    steps = [row for row in rows if "stage1/loss" in row]
    assert [(row["stage1/step"], row["stage1/loss"]) for row in steps] == [
        (line["step"], line["loss"]) for line in read_metrics(run.path)
    ]
    assert any("stage1/evaluation/answers" in key for row in rows for key in row)
    train(run, stages=[1, 2])
    assert {file.stem for file in run.path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{name}"}
