"""The dry run against what training really holds, counts and reads; and every recipe in it."""

import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava
from known_models import STUDENTS, make_known
from planned_cache import planned_cache
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher_shape import KNOWN
from genrecal.cli import main
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.activations import StepShape, TeacherSide, activation_bytes
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import RECIPES, TrainConfig, load_config
from genrecal.train.forecast import (
    SHOWN_ENGINES,
    ForecastOptions,
    Parameters,
    count_parameters,
    host_memory,
    make_forecast,
    memory_of,
)
from genrecal.train.forecast import _Lengths as Lengths
from genrecal.train.handover import pack
from genrecal.train.loop import build_distiller, plan_stage, stages_to_train
from genrecal.train.run import Run
from genrecal.train.stages import Denominators, wanted_by
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.shape import meta_model

ALIGNED = ["objective=genrecal-aligned"]


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    data = write_llava(folder / "d", mixed_samples(20))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8, draws=12))
    return open_caches([folder / "c"])


@pytest.fixture(scope="module")
def trained(tiny, cache, tmp_path_factory):
    """Runs whose earlier stages stand as if they had been trained."""

    def make(family, stage, *settings):
        config = load_config(None, ["data.workers=0", *settings])
        run = Run(
            path=tmp_path_factory.mktemp("run"), config=config, student=str(tiny(family)), caches=(str(cache.path),)
        )
        for before in stages_to_train(config, range(1, stage)):
            distiller = build_distiller(run, cache, before, torch.device("cpu"), torch.float32)
            run.save_result(before, {name: p.detach() for name, p in trained_parameters(distiller).items()})
        return run

    return make


def measured_peak(run, cache, stage, dtype, size):
    """Bytes that a real micro-step takes at its peak beyond what stood before it, by torch's allocator; and its shape."""
    distiller = build_distiller(run, cache, stage, torch.device("cpu"), dtype)
    builder = BatchBuilder(ShardSource(cache), distiller.student.renderer, wanted_by(stage, run.config))
    batch = builder[list(range(size))].batch
    for parameter in trained_parameters(distiller).values():
        parameter.grad = torch.zeros_like(parameter)
    rows = Denominators(teacher_rows=10, student_rows=10, aligned_rows=10)
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
        answers=len(batch.target_ids) if batch.target_ids is not None else 0,
        most_answers=int(cache.column("answer_tokens")[:size].max()) if batch.target_ids is not None else 0,
        questions=len(batch.question_states) if batch.reg_splice else 0,
        student_answers=len(batch.sft_ids),
    )
    return peak, shape


@pytest.mark.parametrize(
    "stage, checkpointing, dtype, settings",
    [
        pytest.param(1, "true", torch.float32, [], marks=pytest.mark.slow),
        (2, "false", torch.bfloat16, []),
        pytest.param(2, "false", torch.bfloat16, ALIGNED, marks=pytest.mark.slow),
        pytest.param(1, "true", torch.float32, [*ALIGNED, "loss.splice_weight=0"], marks=pytest.mark.slow),
        pytest.param(3, "true", torch.float32, [], marks=pytest.mark.slow),
        pytest.param(2, "true", torch.float32, ["objective=uld"], marks=pytest.mark.slow),
        pytest.param(3, "true", torch.float32, ["objective=dskd"], marks=pytest.mark.slow),
    ],
)
def test_activations_are_those_of_a_real_step(trained, cache, stage, checkpointing, dtype, settings):
    """Within a fifth: at this size what a step holds of pictures and indices is a tenth of it."""
    run = trained("internvl_qwen2", stage, f"gradient_checkpointing={checkpointing}", *settings)
    peak, shape = measured_peak(run, cache, stage, dtype, 8)
    teacher = TeacherSide(hidden_size=cache.hidden_size, head_rows=cache.head_rows, top_k=64)
    forecast = activation_bytes(meta_model(run.student).config, stage, run.config, teacher, shape, dtype)
    assert forecast == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize(
    "stage, settings",
    [
        (1, []), (1, [*ALIGNED, "loss.splice_weight=0"]), (1, [*ALIGNED, "recalibrator.layers=0"]),
        (2, []), (2, ["lora.rank=0"]), (3, []),
        (2, ["objective=uld"]), (2, ["objective=dskd"]), (3, ["objective=uld", "loss.target=exact"]),
    ],
)  # fmt: skip
def test_parameters_and_what_stands_in_memory(trained, cache, stage, settings):
    run = trained("internvl_qwen2", stage, *settings)
    counted = count_parameters(stage, meta_model(run.student), run.config, cache, torch.bfloat16)
    distiller = build_distiller(run, cache, stage, torch.device("cpu"), torch.bfloat16)
    own = trained_parameters(distiller)
    optimizer = torch.optim.AdamW(own.values())
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    head = [distiller.head.weight] if distiller.head is not None else []
    memory = memory_of("none", counted, 0, 1)
    assert counted.num_trained == sum(parameter.numel() for parameter in own.values())
    assert counted.num_frozen == sum(p.numel() for p in [*distiller.parameters(), *head] if not p.requires_grad)
    assert memory["weights"] == sum(tensor.nbytes for tensor in [*distiller.parameters(), *head])
    assert memory["gradients"] == sum(parameter.grad.nbytes for parameter in own.values())
    assert memory["optimizer"] == sum(moment.nbytes for moment in moments)
    assert ("LoRA" in counted.trained) == (stage == 2 and "lora.rank=0" not in settings)


def test_zero_shares_out_optimizer_gradients_and_weights_in_turn():
    counted = Parameters(trained={"student": 8}, frozen={"student": 80}, frozen_bytes=320, head_bytes=32)
    by_engine = {engine: memory_of(engine, counted, 1000, 4) for engine in SHOWN_ENGINES}
    assert by_engine["none"] == by_engine["ddp"]
    assert [memory["optimizer"] for memory in by_engine.values()] == [64, 64, 24, 24, 24]  # ZeRO's own copy with it
    assert [memory["gradients"] for memory in by_engine.values()] == [32, 32, 32, 8, 8]
    assert [memory["weights"] for memory in by_engine.values()] == [352, 352, 352, 352, 32 + 320 // 4]
    assert memory_of("zero3", counted, 0, 4, offload=True)["weights"] == 32
    assert memory_of("zero1", counted, 0, 4, offload=True)["optimizer"] == 0


def test_the_cpus_memory_is_counted_too(tiny):
    model, language_model = (meta_model(tiny(family)) for family in ("internvl_qwen2", "llama3"))
    counted = Parameters(trained={"student": 8}, frozen={"student": 80}, frozen_bytes=320, head_bytes=32)

    def counts(stage, student, *settings):
        return host_memory(stage, student, load_config(None, ["data.workers=0", *settings]), counted, 4, 1000)

    for stage, student, expected in ((1, model, 2e9), (2, model, 2e9), (3, model, 0), (1, language_model, 0)):
        assert sum(counts(stage, student, "data.vision_cache_gb=2").values()) == expected
    assert counts(1, model, "engine=zero2") == {}
    offloads = [counts(1, model, f"engine=zero{stage}", "offload=true") for stage in (2, 3)]
    assert offloads == [{"offloaded": 24}, {"offloaded": 104}]
    read = counts(2, model, "data.workers=1", "stage2.batch_size=3", "stage2.accumulation=5")
    assert read == {"two steps' samples (/dev/shm)": 2 * 15 * 1000}


@pytest.mark.parametrize(
    "stage, dtype", [(1, torch.float32), (1, torch.bfloat16), (2, torch.float32), (3, torch.float32)]
)
def test_bytes_that_are_handed_over(tiny, cache, stage, dtype):
    """What the forecast leaves out, ids and places, is a larger part of so narrow a teacher's samples than of a real one's."""
    config, student = load_config(None, []), str(tiny("internvl_qwen2"))
    wanted = wanted_by(stage, config)
    builder = BatchBuilder(
        ShardSource(cache), Renderer(load_processor(student)), wanted, max_tokens=config.max_tokens, states_dtype=dtype
    )
    indices = np.arange(len(cache))
    found = sum(pack(builder[[place]]).buffer.numel() for place in indices) / len(cache)
    side = TeacherSide(
        hidden_size=cache.hidden_size, head_rows=cache.head_rows, top_k=cache.first.description["top_k"], draws=0
    )
    lengths = Lengths.measure(cache, student, len(cache), config, trust_remote_code=False)
    assert 0.75 * found < lengths.sample_bytes(indices, wanted, side, dtype) < found


@pytest.mark.parametrize("objective", ["genrecal", pytest.param("genrecal-aligned", marks=pytest.mark.slow)])
def test_steps_bytes_and_flops_are_those_of_the_run(trained, cache, capsys, objective):
    """FLOPs are compared with torch's count over the four kinds of samples that the cache repeats, each alone. Torch takes
    causal attention for a full square, and the gradient of the first of two layers' input, which nobody needs, is a tenth
    of the work here."""
    settings = ["gradient_checkpointing=false", "lora.rank=0", "stage2.batch_size=3", "stage2.accumulation=2"]
    settings.append(f"objective={objective}")
    run = trained("internvl_qwen2", 2, *settings)
    words = [
        "--cache",
        str(cache.path),
        "--student",
        run.student,
        "--out",
        str(run.path),
        "--stages",
        "2",
        "--gpus",
        "2",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["train", *words, "--dry-run", "--json", *(word for setting in settings for word in ("--set", setting))])
    shown = json.loads(capsys.readouterr().out)
    (stage,) = shown["stages"]
    assert stop.value.code == 0 and shown["fits"] and shown["rendered"] and shown["engine"] == "ddp"

    plan = plan_stage(run.config.stage2, cache, global_batch=12)
    assert (stage["steps"], stage["samples"], stage["global_batch"]) == (plan.num_steps, plan.num_samples, 12)
    members = [member for record in cache for member in record.row["members"] if member["tier"] == "samples"]
    read = sum(member["size"] for member in members)
    assert stage["read_bytes"] == read // len(cache)
    renderer = Renderer(load_processor(run.student))
    longest = max(len(renderer.encode(record.sample)) for record in cache)
    assert (stage["shape"]["samples"], stage["shape"]["student_tokens"]) == (3, longest)
    assert stage["read_rate"] * 1e6 == pytest.approx(read / stage["hours"] / 3600, rel=1e-4)
    assert stage["hours"] * 3600 == pytest.approx(stage["flops"] * stage["samples"] / (2 * 989e12 * 0.4))

    distiller = build_distiller(run, cache, 2, torch.device("cpu"), torch.float32)
    builder = BatchBuilder(ShardSource(cache), distiller.student.renderer, wanted_by(2, run.config))
    with FlopCounterMode(display=False) as counter:
        for index in range(4):
            rows = Denominators(teacher_rows=10, student_rows=10, aligned_rows=10)
            distiller(builder[[index]].batch, rows).loss.backward()
    assert stage["flops"] == pytest.approx(counter.get_total_flops() / 4, rel=0.25)


# ------------------------------------------------------------------------------------------------- recipes, command line


def test_a_config_and_manifests_are_enough(tmp_path, capsys):
    """No weights, no processor, no head, no tar: none of them is there."""
    student = "qwen2-vl-2b"
    planned_cache(tmp_path / "c", head_rows=152_064)
    folder = make_known(student, tmp_path / "s")
    words = [
        "train",
        "--cache",
        str(tmp_path / "c"),
        "--student",
        str(folder),
        "--out",
        str(tmp_path / "r"),
        "--dry-run",
    ]
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *words,
                "--gpu-gigabytes",
                "4",
                "--stages",
                "1",
                "--set",
                "precision=bf16",
                "--set",
                "data.vision_cache_gb=2",
            ]
        )
    text = capsys.readouterr().out
    assert "of the CPU's memory a process: two steps' samples (/dev/shm) " in text
    assert ", pictures' embeddings 2 GB\n" in text
    assert stop.value.code == 1 and "NOT enough room" in text and "has no processor" in text
    assert f"{STUDENTS[student][1]} billion parameters" in text and not (tmp_path / "r").exists()


def paper_pairs():
    """(teacher, student, Table) of the paper: rows whose scores it gives."""
    teachers = ["internvl2.5-78b", "internvl2-76b", "nvlm-d-72b", "qwen2-vl-72b"]
    return [
        *((teachers[0], student) for student in STUDENTS),
        *((teacher, "internvl2.5-8b") for teacher in teachers[1:]),
        *((teachers[3], student) for student in ("qwen2-vl-7b", "qwen2-vl-2b")),
    ]


def test_every_row_of_the_paper_has_a_recipe_with_its_settings():
    names = {f"{teacher}-to-{student}.toml" for teacher, student in paper_pairs()}
    assert {path.name for path in RECIPES.glob("*.toml")} == names | {
        "paper.toml",
        "single-24gb.toml",
        "single-80gb.toml",
    }
    for name in names:
        config, defaults = load_config(RECIPES / name), TrainConfig()
        assert config.stage3.exclude_categories == ("General VQA",)
        changed = replace(config.stage3, exclude_categories=())
        paper = replace(config, stage3=changed, precision=defaults.precision, engine=defaults.engine)
        assert paper == defaults, name


@pytest.mark.slow
@pytest.mark.parametrize("teacher, student", [*paper_pairs()[:7]])  # each student, and each head but one of a size here
def test_a_pairs_recipe_fits_on_eight_gpus_of_80_gb(tmp_path, teacher, student):
    recipe = RECIPES / f"{teacher}-to-{student}.toml"
    cache = planned_cache(tmp_path / "c", head_rows=KNOWN[teacher].head_rows)
    folder = make_known(student, tmp_path / "s")
    forecast = make_forecast(load_config(recipe), str(folder), cache, ForecastOptions(gpus=8))
    assert forecast.fits and [stage.stage for stage in forecast.stages] == [1, 2, 3]
    assert forecast.stages[2].samples == len(cache) // 2  # without general VQA
    assert [stage.global_batch for stage in forecast.stages] == [512, 256, 512]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, student, room", [("single-24gb", "internvl2.5-1b", 24.0), ("single-80gb", "internvl2.5-4b", 80.0)]
)
def test_a_recipe_of_one_gpu_fits_on_it_as_it_says(tmp_path, name, student, room):
    cache = planned_cache(tmp_path / "c", head_rows=152_064)
    folder = make_known(student, tmp_path / "s")
    recipe = RECIPES / f"{name}.toml"
    forecast = make_forecast(load_config(recipe), str(folder), cache, ForecastOptions(gpu_gigabytes=room))
    said = re.search(r"up to 3,333 tokens: ([\d.]+), ([\d.]+) and ([\d.]+) GB", recipe.read_text())
    assert forecast.fits and {stage.global_batch for stage in forecast.stages} == {64}
    assert max(stage.shape.student_tokens for stage in forecast.stages) == 3333
    for stage, size in zip(forecast.stages, said.groups(), strict=True):
        assert stage.total("none") / 1e9 == pytest.approx(float(size), rel=0.06)
