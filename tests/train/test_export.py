"""An exported student is a stock checkpoint: files, keys, class, outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import mixed_samples, write_llava
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import GenrecalError, ModelError, UsageError
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.export import _check_keys, _check_outputs, export, weight_keys
from genrecal.train.loop import train
from genrecal.train.run import Run
from genrecal.vlm.loading import is_weight_file, load_processor, load_vlm

SETTINGS = ["data.workers=0", "measure.samples=0", *(f"stage{n}.{s}" for n in (1, 2, 3) for s in
            ("batch_size=4", "accumulation=1", "max_steps=2", "lr=1e-2", "lr_end=1e-3", "checkpoint_every=0"))]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    data = write_llava(folder / "d", mixed_samples(8))
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions())
    return folder / "c"


@pytest.fixture(scope="module")
def trained(tiny, cache, tmp_path_factory):
    """student family -> a finished run."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "run"
            made[family] = Run(
                path=folder, config=load_config(None, SETTINGS), student=str(tiny(family)), caches=(str(cache),)
            )
            train(made[family])
        return made[family]

    return get


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "internvl_qwen2", "llava_onevision"])
def test_exported_student_is_a_stock_checkpoint(trained, tmp_path, family, stage):
    run, out = trained(family), tmp_path / "student"
    assert export(run, out, stage=stage) == stage
    base = Path(run.student)
    others = {p.name for p in base.iterdir() if not is_weight_file(p)}
    assert {p.name for p in out.iterdir() if not is_weight_file(p)} == others
    for name in others:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert weight_keys(out) == weight_keys(base)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == json.loads((base / "config.json").read_text())["architectures"][0]
    load_processor(out)
    weights, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed and not any("vision_tower" in n or "visual.blocks" in n for n in changed)
    if stage == 2:
        assert not any("embed" in n or "lm_head" in n or "merger" in n or "projector" in n for n in changed)


def test_what_was_trained_is_what_is_exported(trained, tmp_path):
    run, out = trained("internvl_qwen2"), tmp_path / "student"
    export(run, out)
    trained_model, exported = run.student_after(3, torch.float32).model, load_vlm(out).model
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, dict(trained_model.named_parameters())[name]), name


def test_checkpoints_that_differ_are_refused(trained, tmp_path):
    run, out = trained("internvl_qwen2"), tmp_path / "student"
    export(run, out)
    weights = load_file(out / "model.safetensors")
    name = next(n for n in weights if "down_proj" in n)
    save_file({**weights, name: weights[name] + 1e-3}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="logits on sample"):
        _check_outputs(run.student_after(3, "auto"), out, mixed_samples(2), trust_remote_code=False)
    save_file({**weights, "extra": torch.zeros(1)}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the first extra: expected none"):
        _check_keys(Path(run.student), out)


def test_nothing_to_export_and_folders_in_the_way_are_refused(trained, tmp_path, cache, tiny):
    run = trained("internvl_qwen2")
    out = tmp_path / "there"
    out.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(run, out)
    fresh = Run(path=tmp_path / "fresh", config=run.config, student=run.student, caches=(str(cache),))
    with pytest.raises(UsageError, match="no student has been trained"):
        export(fresh, tmp_path / "out")
    moved = tmp_path / "moved"
    shutil.copytree(run.path, moved)
    content = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(content | {"caches": [str(tmp_path / "gone")]}))
    with pytest.raises(GenrecalError, match="give --cache"):
        export(Run.open(moved), tmp_path / "out")
    assert export(Run.open(moved), tmp_path / "out", cache=cache) == 3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_student_that_moved(tiny, trained, cache, tmp_path):
    run = trained("internvl_qwen2")
    elsewhere = shutil.copytree(run.student, tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="--student .*: another than the run's, .*: other .*config.json"):
        Run.open(run.path, student=str(tiny("qwen2_vl")))
    assert export(Run.open(run.path, student=str(elsewhere)), tmp_path / "out", cache=str(cache)) >= 2
