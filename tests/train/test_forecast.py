"""The dry run against what training really holds, counts and reads; and every recipe in it."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from conftest import mixed_samples, write_llava
from torch.profiler import ProfilerActivity, profile

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.train.activations import StepShape, TeacherSide, activation_bytes
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import load_config
from genrecal.train.forecast import ForecastOptions, count_parameters, make_forecast, memory_of
from genrecal.train.loop import build_distiller, plan_stage
from genrecal.train.run import Run
from genrecal.train.stages import Denominators, wanted_by
from genrecal.vlm.shape import meta_model


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    data = write_llava(folder / "d", mixed_samples(20))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8, draws=12))
    return open_cache(folder / "c")


@pytest.fixture(scope="module")
def trained(tiny, cache, tmp_path_factory):
    """Runs whose earlier stages stand as if they had been trained."""

    def make(family, stage, *settings):
        config = load_config(None, ["data.workers=0", *settings])
        run = Run(path=tmp_path_factory.mktemp("run"), config=config, student=str(tiny(family)), cache=str(cache.path))
        for before in range(1, stage):
            distiller = build_distiller(run, cache, before, torch.device("cpu"), torch.float32)
            run.save_result(before, trained_parameters(distiller))
        return run

    return make


def measured_peak(run, cache, stage, dtype, size):
    """Bytes that a real micro-step takes at its peak beyond what stood before it, by torch's allocator; and its shape."""
    distiller = build_distiller(run, cache, stage, torch.device("cpu"), dtype)
    builder = BatchBuilder(ShardSource(cache), distiller.student.renderer, wanted_by(stage, run.config))
    batch = builder[list(range(size))].batch
    for parameter in trained_parameters(distiller).values():
        parameter.grad = torch.zeros_like(parameter)
    rows = Denominators(teacher_rows=10, student_rows=10)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            output = distiller(batch.to(torch.device("cpu"), dtype), rows)
        output.loss.backward()
    inputs = [getattr(batch, item.name) for item in fields(batch) if item.name != "student_inputs"]
    now = peak = sum(value.nbytes for value in inputs if isinstance(value, torch.Tensor))  # on a GPU they are copied
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    shape = StepShape(
        samples=size,
        student_tokens=batch.student_inputs["input_ids"].shape[1],
        splice=batch.splice.rows.shape[1] if batch.splice else 0,
        reg_splice=batch.reg_splice.rows.shape[1] if batch.reg_splice else 0,
        answers=len(batch.answer_states) if batch.splice else 0,
        questions=len(batch.question_states) if batch.reg_splice else 0,
        student_answers=len(batch.sft_ids),
    )
    return peak, shape


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activations(trained, cache, stage, checkpointing):
    run = trained("internvl_qwen2", stage, f"gradient_checkpointing={checkpointing}")
    for dtype in (torch.float32, torch.bfloat16):
        peak, shape = measured_peak(run, cache, stage, dtype, 8)
        teacher = TeacherSide(hidden_size=cache.hidden_size, head_rows=cache.description["head_rows"], top_k=64)
        forecast = activation_bytes(meta_model(run.student).config, stage, run.config, teacher, shape, dtype)
        print(stage, checkpointing, dtype, peak, forecast, forecast / peak)
