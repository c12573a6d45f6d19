"""Single tensors of a checkpoint: the same head and norm that the loaded model has."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from genrecal.errors import ModelError
from genrecal.shards.head import LogitTransform
from genrecal.vlm.checkpoint import Checkpoint
from genrecal.vlm.loading import load_vlm


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_vl_padded_head", "qwen2_5_vl", "internvl_llama", "llava_onevision", "idefics3", "gemma3"],
)
def test_head_and_norm_are_the_models_own(tiny, family):
    vlm, checkpoint = load_vlm(tiny(family), dtype=torch.float32), Checkpoint(tiny(family))
    assert checkpoint.dtype() == torch.float32
    want = vlm.frozen_head()
    got = checkpoint.head(dtype=torch.float32, vocab_size=len(vlm.renderer.tokenizer), transform=LogitTransform())
    assert torch.equal(want.weight, got.weight) and want.vocab_size == got.vocab_size
    assert got.bias is None and want.bias is None
    norm = checkpoint.final_norm()
    assert torch.equal(norm.weight, vlm.body.get_decoder().norm.weight) and norm.bias is None
    assert checkpoint.text_config["num_hidden_layers"] == vlm.text_config.num_hidden_layers


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a model with a head of its own, to change."""
    return shutil.copytree(tiny("internvl_wide"), tmp_path / "model")


def read(folder, dtype=torch.float32):
    return Checkpoint(folder).head(dtype=dtype, vocab_size=10, transform=LogitTransform())


def test_a_checkpoint_in_several_files(folder):
    whole = read(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    (folder / "model.safetensors").unlink()
    places = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(read(folder).weight, whole.weight)
    assert read(folder, torch.bfloat16).weight.dtype == torch.bfloat16


def test_names_of_internlm2(folder):
    tensors = load_file(folder / "model.safetensors")
    head, norm = tensors["language_model.lm_head.weight"], tensors["language_model.model.norm.weight"]
    tensors["language_model.output.weight"] = tensors.pop("language_model.lm_head.weight")
    tensors["language_model.model.tok_embeddings.weight"] = tensors.pop("language_model.model.embed_tokens.weight")
    tensors["vision_model.attention.output.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(read(folder).weight, head)
    assert torch.equal(Checkpoint(folder).final_norm().weight, norm)


def test_a_head_with_a_bias(folder):
    tensors = load_file(folder / "model.safetensors")
    bias = torch.randn(len(tensors["language_model.lm_head.weight"]))
    save_file(tensors | {"language_model.lm_head.bias": bias}, folder / "model.safetensors")
    assert torch.equal(read(folder).bias, bias)


def test_what_cannot_be_told_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="tie_word_embeddings.*differ; correct the config"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"other.lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"expected one tensor named like lm_head.weight, found .*lm_head.weight, .*lm_head"
    ):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="found neither; its head cannot be read. Save the model as safetensors"):
        Checkpoint(folder)
