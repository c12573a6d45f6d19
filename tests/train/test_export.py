"""An exported student is a stock checkpoint: files, keys, class, outputs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import mixed_samples, write_llava
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.errors import GenrecalError, ModelError, UsageError
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.export import Exported, _check_outputs, check_layout, export
from genrecal.train.loop import train
from genrecal.train.run import Run
from genrecal.vlm.checkpoint import Checkpoint
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
    assert export(run, out, stage=stage) == Exported(stage=stage, notes=[])
    base = Path(run.student)
    others = {p.name for p in base.iterdir() if not is_weight_file(p)}
    assert {p.name for p in out.iterdir() if not is_weight_file(p)} == others
    for name in others:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert Checkpoint(out).shapes() == Checkpoint(base).shapes()
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
    student = run.student_after(3, "auto")
    with pytest.raises(ModelError, match="1 tensors differ after reloading, the first .*down_proj"):
        _check_outputs(student, load_vlm(out, prompt=run.prompt), mixed_samples(2))
    save_file({n: w for n, w in weights.items() if n != name}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its files lack 1 tensors of InternVL.*down_proj"):
        load_vlm(out)


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
    assert export(Run.open(moved), tmp_path / "out", cache=cache).stage == 3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_student_that_moved(tiny, trained, cache, tmp_path):
    run = trained("internvl_qwen2")
    elsewhere = shutil.copytree(run.student, tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="--student .*: another than the run's, .*: other .*config.json"):
        Run.open(run.path, student=str(tiny("qwen2_vl")))
    assert export(Run.open(run.path, student=str(elsewhere)), tmp_path / "out", cache=str(cache)).stage == 3


# --------------------------------------------------------------------------------------- students as they are found


def changed(base, out, change):
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(base, out)
    tensors = change(load_file(out / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def with_extra(tensors):
    """A head for multi-token prediction, which the class does not have."""
    return tensors | {"mtp.layers.0.weight": torch.arange(6.0).reshape(2, 3), "mtp.norm.weight": torch.ones(4)}


def with_stored_head(tensors):
    """A head that is the embedding, stored once more."""
    return tensors | {
        "lm_head.weight": next(tensor for name, tensor in tensors.items() if "embed_tokens" in name).clone()
    }


def with_newer_names(tensors):
    """The names that transformers has in memory; it writes the older ones."""
    return {
        re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name)): tensor
        for name, tensor in tensors.items()
    }


def without_prefix(tensors):
    """The names of a checkpoint of the body alone, such as older ones have; the class writes them with its prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "family, change",
    [
        ("qwen2_vl", with_extra),
        ("qwen2_vl", with_stored_head),
        ("qwen2_vl", with_newer_names),
        ("idefics3", without_prefix),
    ],
)
def test_a_student_with_other_tensors_than_its_class_writes(tiny, cache, tmp_path, capsys, family, change):
    """Nothing is lost and nothing is stale: stock loading gives what was trained, and what was not trained is as it was."""
    base = changed(tiny(family), tmp_path / "base", change)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"weights")
    (base / ".cache").mkdir()
    (base / ".cache" / "etag").write_text("x")
    words = ["--cache", str(cache), "--student", str(base), "--out", str(tmp_path / "run"), "--stages", "2,3"]
    words += [word for setting in [*SETTINGS, "objective=sft"] for word in ("--set", setting)]
    with pytest.raises(SystemExit) as stop:
        main(["train", *words, "--dry-run"])
    said = capsys.readouterr().err
    assert stop.value.code == 0 and ("export: " in said) == (change in (with_extra, without_prefix)), said
    run = Run(
        path=tmp_path / "run",
        config=load_config(None, [*SETTINGS, "objective=sft"]),
        student=str(base),
        caches=(str(cache),),
    )
    train(run, stages=(2, 3))
    out = tmp_path / "out"
    notes = export(run, out).notes
    assert [f"genrecal: export: {note}" for note in notes] == said.splitlines()
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    trained = run.student_after(3, torch.float32).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    shapes, before = Checkpoint(out).shapes(), Checkpoint(base).shapes()
    if change is without_prefix:
        assert shapes == Checkpoint(tiny(family)).shapes() and "before: connector." in notes[0]
    else:
        assert shapes == before
    written = Checkpoint(out)
    for name in before.keys() & {"mtp.layers.0.weight", "mtp.norm.weight"}:
        assert torch.equal(written.tensor(name), Checkpoint(base).tensor(name)) and "mtp.layers.0.weight" in notes[0]
    if change is with_stored_head:
        assert torch.equal(written.tensor("lm_head.weight"), trained["lm_head.weight"])
        assert not torch.equal(written.tensor("lm_head.weight"), Checkpoint(base).tensor("lm_head.weight"))
    others = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and not is_weight_file(path)}
    assert "additional_chat_templates/tools.jinja" in others
    assert not any("etag" in name for name in others) and not (out / "onnx" / "model.onnx").exists()
    assert main_exit(capsys, "evaluate", "--model", out, "--data", cache.parent / "d" / "data.json", "--limit", 1) == 0


def main_exit(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_a_student_that_lacks_tensors_is_refused_before_anything_is_trained(tiny, cache, tmp_path):
    base = changed(tiny("internvl_qwen2"), tmp_path / "base", lambda tensors: dict(list(tensors.items())[1:]))
    run = Run(path=tmp_path / "run", config=load_config(None, SETTINGS), student=str(base), caches=(str(cache),))
    with pytest.raises(ModelError, match="its files lack 1 tensors of InternVL.*random numbers"):
        train(run)
    assert not run.path.exists()


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_every_family_is_written_in_its_own_layout(tiny, family):
    layout = check_layout(str(tiny(family)))
    assert (layout.carried, dict(layout.tied), layout.renamed) == ((), {}, ())
