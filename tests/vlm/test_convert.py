"""The original InternVL layout in transformers' own: the same tensors, the same config, the same logits."""

import json
import shutil

import pytest
import tiny_models
import torch
from conftest import mixed_samples
from safetensors.torch import load_file, save_file

from genrecal.cli import main
from genrecal.errors import ModelError, UsageError
from genrecal.vlm.convert import convert_internvl
from genrecal.vlm.loading import load_vlm

# Text models of Qwen2, InternLM2 (queries that share a key head, and several key heads) and Llama 3; both encoders.
FAMILIES = ("internvl2_5_1b", "internvl2_5_2b", "internvl2_76b")


@pytest.fixture
def original(tiny, tmp_path):
    return lambda family: tiny_models.make_original(tiny(family), tmp_path / "original")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_same(original, tiny, tmp_path, family):
    native, out = tiny(family), tmp_path / "out"
    convert_internvl(original(family), out, processor=native)
    got, want = load_file(out / "model.safetensors"), load_file(native / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    ours, theirs = (load_vlm(folder, dtype=torch.float32) for folder in (out, native))
    for part in ("text_config", "vision_config", None):
        got, want = (vlm.model.config.to_dict() for vlm in (ours, theirs))
        got, want = (got[part], want[part]) if part else (got, want)
        different = {name for name in want if got.get(name) != want[name]} - {"text_config", "vision_config"}
        assert different <= {"_name_or_path"}, part
    inputs = ours.renderer.collate([ours.renderer.encode(sample) for sample in mixed_samples(4)])
    with torch.no_grad():
        assert torch.equal(ours.model(**inputs).logits, theirs.model(**inputs).logits)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (native / name).read_bytes()
    eos = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert eos == ours.renderer.marks.end_of_turn_id


def test_several_files_stay_several(original, tiny, tmp_path):
    folder = original("internvl2_5_2b")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_internvl(folder, tmp_path / "out", processor=tiny("internvl2_5_2b"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    ours, theirs = (load_vlm(path, dtype=torch.float32) for path in (tmp_path / "out", tiny("internvl2_5_2b")))
    parameters = dict(theirs.model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in ours.model.named_parameters())


def test_the_command_and_who_sends_there(original, tiny, tmp_path, capsys):
    folder = original("internvl2_5_2b")
    with pytest.raises(ModelError, match="run `genrecal convert MODEL --processor .* --out DIR`"):
        load_vlm(folder)
    with pytest.raises(SystemExit) as status:
        main(["convert", str(folder), "--processor", str(tiny("internvl2_5_2b")), "--out", str(tmp_path / "out")])
    assert status.value.code == 0 and "in transformers' layout" in capsys.readouterr().out.replace("\n", " ")
    load_vlm(tmp_path / "out")
    with pytest.raises(UsageError, match="expected nothing or an empty folder, found a model"):
        convert_internvl(folder, tmp_path / "out", processor=tiny("internvl2_5_2b"))


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("spoil", "processor", "reason"),
    [
        (lambda folder: None, "internvl2_5_1b", "another vocabulary: .* tokens differ, the first .*: expected id"),
        (lambda folder: None, "qwen2_vl_2b", "expected an InternVL in transformers' layout"),
        (lambda folder: change(folder, ps_version="v1"), "internvl2_5_2b", "ps_version is 'v1'"),
        (lambda folder: change(folder, llm_config={"model_type": "phi3"}), "internvl2_5_2b", "text model is 'phi3'"),
        (lambda folder: change(folder, downsample_ratio=0.25), "internvl2_5_2b", "has 4 tokens a tile, .* has 1"),
        (lambda folder: change(folder, model_type="llava"), "internvl2_5_2b", "expected a model of the original"),
    ],
    ids=["vocabulary", "processor", "shuffle", "text model", "tiles", "layout"],
)
def test_what_cannot_be_converted_says_why(original, tiny, tmp_path, spoil, processor, reason):
    folder = original("internvl2_5_2b")
    spoil(folder)
    with pytest.raises((ModelError, UsageError), match=reason):
        convert_internvl(folder, tmp_path / "out", processor=tiny(processor))
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_found(original, tiny, tmp_path):
    folder = shutil.copytree(original("internvl2_5_1b"), tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors["mlp1.1.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors are missing or not expected, the first .*linear_1\.bias"):
        convert_internvl(folder, tmp_path / "out", processor=tiny("internvl2_5_1b"))
    assert {path.name for path in tmp_path.iterdir()} == {"original", "less"}
