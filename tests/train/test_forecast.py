"""The dry run against what training really holds and counts; every recipe in it; and the profile of real steps."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import mixed_samples, write_llava
from known_models import STUDENTS, make_known
from planned_cache import planned_cache

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher_shape import KNOWN
from genrecal.cli import main
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import RECIPES, TrainConfig, load_config
from genrecal.train.forecast import SHOWN_ENGINES, Parameters, count_parameters, make_forecast, memory_of
from genrecal.train.loop import build_distiller, plan_stage, stages_to_train
from genrecal.train.run import Run
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


@pytest.mark.parametrize(
    "stage, settings",
    [
        (1, []), (1, [*ALIGNED, "loss.splice_weight=0", "recalibrator.layers=0"]),
        (2, []), (2, ["lora.rank=0"]), (3, []), (2, ["objective=dskd"]), (3, ["objective=uld", "loss.target=exact"]),
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
    head = [distiller.objective.head.weight] if distiller.objective.head is not None else []
    memory = memory_of("none", counted, 0, 1)
    assert counted.num_trained == sum(parameter.numel() for parameter in own.values())
    frozen = sum(p.numel() for p in [*distiller.parameters(), *head] if not p.requires_grad)
    assert sum(counted.frozen.values()) == frozen
    assert memory["weights"] == sum(tensor.nbytes for tensor in [*distiller.parameters(), *head])
    assert memory["gradients"] == sum(parameter.grad.nbytes for parameter in own.values())
    assert memory["optimizer"] == sum(moment.nbytes for moment in moments)
    assert ("LoRA" in counted.trained) == (stage == 2 and "lora.rank=0" not in settings)


def test_zero_shares_out_optimizer_gradients_and_weights_in_turn():
    counted = Parameters(trained={"student": 8}, frozen={"student": 80}, frozen_bytes=320)
    by_engine = {engine: memory_of(engine, counted, 1000, 4) for engine in SHOWN_ENGINES}
    assert by_engine["none"] == by_engine["ddp"]
    assert [memory["optimizer"] for memory in by_engine.values()] == [64, 64, 24, 24, 24]  # ZeRO's own copy with it
    assert [memory["gradients"] for memory in by_engine.values()] == [32, 32, 32, 8, 8]
    assert [memory["weights"] for memory in by_engine.values()] == [352, 352, 352, 352, 352 // 4]
    assert memory_of("zero3", counted, 0, 4, offload=True)["weights"] == 0
    assert memory_of("zero1", counted, 0, 4, offload=True)["optimizer"] == 0


def call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, words)])
    return stop.value.code, capsys.readouterr().out


def test_steps_and_samples_are_those_of_the_run(trained, cache, capsys):
    run = trained("internvl_qwen2", 2)
    settings = ["--set", "stage2.batch_size=3", "--set", "stage2.accumulation=2"]
    words = ["--cache", cache.path, "--student", run.student, "--out", run.path, "--stages", "2", "--gpus", "2"]
    status, text = call(capsys, *words, "--dry-run", "--json", *settings)
    shown = json.loads(text)
    (stage,) = shown["stages"]
    assert status == 0 and shown["fits"] and shown["engine"] == "ddp"
    plan = plan_stage(run.config.stage2, cache, global_batch=12)
    assert (stage["steps"], stage["samples"], stage["global_batch"]) == (plan.num_steps, plan.num_samples, 12)


def test_profile_runs_two_steps_and_keeps_nothing(trained, cache, capsys, tmp_path):
    student = trained("internvl_qwen2", 1).student
    words = ["--cache", cache.path, "--student", student, "--out", tmp_path / "run", "--profile", "2"]
    left = tmp_path / "run.profile" / ".profile"  # as a kill leaves it
    left.parent.mkdir()
    left.touch()
    status, text = call(capsys, *words, "--set", "data.workers=0", "--set", "stage1.accumulation=1",
                        "--set", "stage2.accumulation=1", "--set", "stage3.accumulation=1")  # fmt: skip
    assert status == 0
    assert re.findall(r"^stage (\d)   (\d) samples, \d+ student tokens", text, re.M) == [
        ("1", "4"),
        ("2", "2"),
        ("3", "4"),
    ]
    for part in ("data", "forward", "backward", "optimizer"):
        assert len(re.findall(rf"^  {part} +\d+\.\d+ s", text, re.M)) == 3
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- recipes, command line


def test_a_config_and_manifests_are_enough(tmp_path, capsys):
    """No weights, no processor, no head, no tar: none of them is there."""
    student = "qwen2-vl-2b"
    planned_cache(tmp_path / "c", head_rows=152_064)
    folder = make_known(student, tmp_path / "s")
    words = ["--cache", tmp_path / "c", "--student", folder, "--out", tmp_path / "r", "--dry-run"]
    status, text = call(capsys, *words, "--gpu-gigabytes", "4", "--stages", "1", "--set", "precision=bf16")
    assert status == 1 and "NOT enough room" in text and "NOT enough samples" not in text
    _, text = call(capsys, *words, "--stages", "1,3", "--set", "stage3.accumulation=999999")
    assert "NOT enough samples: `genrecal train` would stop: " in text and "--set stage3.accumulation=" in text
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


@pytest.mark.parametrize(
    "name, student, room", [("single-24gb", "internvl2.5-1b", 24.0), ("single-80gb", "internvl2.5-4b", 80.0)]
)
def test_a_recipe_of_one_gpu_fits_on_it_as_it_says(tmp_path, name, student, room):
    cache = planned_cache(tmp_path / "c", head_rows=152_064)
    folder = make_known(student, tmp_path / "s")
    recipe = RECIPES / f"{name}.toml"
    forecast = make_forecast(load_config(recipe), str(folder), cache, gpu_gigabytes=room)
    said = re.search(r"up to 3,333 tokens: ([\d.]+), ([\d.]+) and ([\d.]+) GB", recipe.read_text())
    assert forecast.fits and {stage.global_batch for stage in forecast.stages} == {64}
    for stage, size in zip(forecast.stages, said.groups(), strict=True):
        assert stage.total("none") / 1e9 == pytest.approx(float(size), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("teacher, student", [paper_pairs()[0], paper_pairs()[3]])
def test_a_pairs_recipe_fits_on_eight_gpus_of_80_gb(tmp_path, teacher, student):
    recipe = RECIPES / f"{teacher}-to-{student}.toml"
    cache = planned_cache(tmp_path / "c", head_rows=KNOWN[teacher].head_rows)
    folder = make_known(student, tmp_path / "s")
    forecast = make_forecast(load_config(recipe), str(folder), cache, gpus=8)
    assert all(map(forecast.has_room, forecast.stages)) and [stage.stage for stage in forecast.stages] == [1, 2, 3]
    assert "stage1.accumulation" in forecast.too_few and not forecast.fits  # for a planned cache of 64 samples
    assert forecast.stages[2].samples == len(cache) // 2  # without general VQA
    assert [stage.global_batch for stage in forecast.stages] == [512, 256, 512]
