"""Encoder, projector and language model of today's families, LoRA in them and routers, on models without weights."""

from types import SimpleNamespace

import pytest
from families import NEEDS_TIMM, SPECS, write_files

from genrecal.train.config import LoraConfig
from genrecal.train.stages import add_lora, describe_trained, select_trainable, try_stages
from genrecal.vlm.parts import find_parts
from genrecal.vlm.shape import meta_model, shape_of_model

LORA = LoraConfig(rank=4)
FAMILIES = sorted(SPECS.keys() - NEEDS_TIMM)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_parts_and_can_be_trained(family, tmp_path):
    model = meta_model(write_files(family, tmp_path))
    parts = find_parts(model, path=family)
    named = [name for name, _ in model.named_parameters()]
    assert sorted([*parts.encoder, *parts.projector, *parts.language, *parts.other]) == sorted(named)
    if getattr(model.config, "vision_config", None) is not None:
        assert parts.encoder and parts.projector and parts.encoders
    student = SimpleNamespace(path=family, model=model)
    try_stages(student, LORA)
    assert set(select_trainable(3, student, LORA)) == {*parts.projector, *parts.language} - parts.routers
    shape = shape_of_model(model, name=family)
    assert 0 < shape.text_parameters <= shape.parameters
    assert bool(parts.experts) == bool(parts.routers) == ("moe" in family or family in EXPERTS)


EXPERTS = {"glm5_next", "internvl_gpt_oss", "kimi_k25", "llama4"}


@pytest.mark.parametrize(
    ("family", "projector"),
    [("glm4v", "visual.downsample"), ("hunyuan_vl", "patch_merger"), ("qwen3_vl_moe", "deepstack_merger_list"),
     ("granite4_vision", "spatial_projectors"), ("mistral3", "multi_modal_projector")],
)  # fmt: skip
def test_projectors_under_other_names(family, projector, tmp_path):
    parts = find_parts(meta_model(write_files(family, tmp_path)), path=family)
    assert any(projector in name for name in parts.projector)
    assert not any(projector in name for name in parts.encoder)


def test_lora_of_experts_and_what_is_said(tmp_path):
    student = SimpleNamespace(path="glm4v_moe", model=meta_model(write_files("glm4v_moe", tmp_path)))
    add_lora(student, LORA)
    chosen = select_trainable(2, student, LORA)
    assert chosen and not any(".experts." in name or ".gate." in name or "visual" in name for name in chosen)
    said = describe_trained(student, LORA, 2)
    assert said.startswith("trains LoRA ") and "experts" in said.partition("frozen")[2]
    assert "routers" in said.partition("frozen")[2]
