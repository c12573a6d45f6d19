"""The Recalibrator over the tiny families: its shape is the student's, it is causal, and padding changes nothing."""

import pytest
import tiny_models
import torch
from torch.nn import Linear
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma3nTextConfig,
    GptOssConfig,
    Qwen3MoeConfig,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from genrecal.objectives.recalibrator import Recalibrator

FAMILIES = sorted(set(tiny_models.FAMILIES) - {"qwen2_vl_padded_head"})


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_plain_and_of_the_students_sizes(tiny, family):
    config = AutoConfig.from_pretrained(tiny(family))
    recalibrator = Recalibrator(config, 48)
    student = AutoModelForImageTextToText.from_pretrained(tiny(family)).get_decoder()
    blocks = list(recalibrator.rec_body.layers)
    assert [type(block) for block in blocks] == [Qwen2DecoderLayer] * 2
    own = {
        name: module.weight.shape for name, module in student.layers[0].named_modules() if isinstance(module, Linear)
    }
    for block in blocks:
        assert own == {n: m.weight.shape for n, m in block.named_modules() if isinstance(m, Linear)}
    names = {name.split(".")[0] for name, _ in recalibrator.named_parameters()}
    assert names == {"rec_proj_pre", "rec_body", "rec_proj_post", "rec_norm"}
    assert not any("embed_tokens" in name for name, _ in recalibrator.named_parameters())


MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, intermediate_size=999, head_dim=8)


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        (Qwen3MoeConfig(**MOE, hidden_size=32, num_attention_heads=4, num_key_value_heads=2), (96, 4, 2, 8)),
        (DeepseekV3Config(hidden_size=48, num_attention_heads=4, moe_intermediate_size=16, n_shared_experts=1,
                          num_experts_per_tok=2, n_routed_experts=4, kv_lora_rank=8), (48, 4, 4, 12)),
        (GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=16), (48, 4, 2, 16)),
        (Gemma3nTextConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
         (64, 4, 2, 8)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_blocks_of_experts_latent_attention_and_other_kinds_are_dense_too(config, widths):
    recalibrator = Recalibrator(config, 48)
    made = recalibrator.rec_body.config
    assert (made.intermediate_size, made.num_attention_heads, made.num_key_value_heads, made.head_dim) == widths
    states = recalibrator(torch.randn(2, 5, config.hidden_size))
    assert states.shape == (2, 5, 48) and states.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_and_blind_to_padding(tiny, family):
    torch.manual_seed(0)
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny(family)), 48).eval()
    splices = [torch.randn(length, recalibrator.rec_proj_pre.out_features) for length in (5, 9)]
    padded = torch.nn.utils.rnn.pad_sequence(splices, batch_first=True, padding_value=7.0)
    with torch.no_grad():
        together = recalibrator(padded)
        assert together.shape == (2, 9, 48)
        for row, splice in zip(together, splices, strict=True):
            assert torch.allclose(row[: len(splice)], recalibrator(splice[None])[0], atol=1e-5)
        changed = padded.clone()
        changed[:, 4] += 1
        different = (recalibrator(changed) - together).abs().amax(-1) > 1e-5
    assert not different[:, :4].any() and different[:, 4:].all()


def test_no_place_at_all_gives_every_parameter_a_gradient_of_zero(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("qwen2_vl")), 48)
    splice = recalibrator.rec_proj_pre(torch.randn(2, 4, 48))
    states = recalibrator(splice, torch.zeros(0, dtype=torch.int64))
    assert states.shape == (0, 48)
    states.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in recalibrator.parameters())


def test_without_layers_it_is_one_map_of_each_state(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("qwen2_vl")), 48, num_blocks=0, takes_teacher=False)
    assert {name.split(".")[0] for name, _ in recalibrator.named_parameters()} == {"rec_proj_post", "rec_norm"}
    states = torch.randn(2, 9, recalibrator.rec_proj_post.in_features)
    expected = recalibrator.rec_norm(states @ recalibrator.rec_proj_post.weight.T + recalibrator.rec_proj_post.bias)
    assert torch.allclose(recalibrator(states), expected, atol=1e-5)
    rows = torch.tensor([0, 4, 17])
    assert torch.allclose(recalibrator(states, rows), expected.flatten(0, 1)[rows], atol=1e-5)


def test_every_parameter_is_trained(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("internvl_qwen2")), 48)
    answers, questions = torch.randn(3, 48), torch.randn(4, recalibrator.rec_proj_pre.out_features)
    splice = torch.cat([questions, recalibrator.rec_proj_pre(answers)])[None]
    recalibrator(splice).square().sum().backward()
    missing = [name for name, parameter in recalibrator.named_parameters() if parameter.grad is None]
    assert not missing
