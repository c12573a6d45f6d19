"""The Recalibrator over the tiny families: its shape is the student's, it is causal, and padding changes nothing."""

import re

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    SmolLM3Config,
)

from genrecal.train.last_layer import Reads
from genrecal.train.recalibrator import Recalibrator, checkpoint_activations

FAMILIES = sorted(set(tiny_models.FAMILIES) - {"qwen2_vl_padded_head"})


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_students_decoder_blocks(tiny, family):
    config = AutoConfig.from_pretrained(tiny(family))
    recalibrator = Recalibrator(config, 48)
    student = AutoModelForImageTextToText.from_pretrained(tiny(family)).get_decoder()
    blocks = list(recalibrator.rec_body.layers)
    assert len(blocks) == 2
    for block in blocks:
        assert type(block) is type(student.layers[0])
        shapes = {name: parameter.shape for name, parameter in block.named_parameters()}
        assert shapes == {name: parameter.shape for name, parameter in student.layers[0].named_parameters()}
    names = {name.split(".")[0] for name, _ in recalibrator.named_parameters()}
    assert names == {"rec_proj_pre", "rec_body", "rec_proj_post", "rec_norm"}
    assert not any("embed_tokens" in name for name, _ in recalibrator.named_parameters())


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


def read_both_ways(recalibrator, lengths, *, seed=0):
    """Value and gradients with the last block at the places read alone, and with it everywhere (the plain forward)."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    splice = torch.randn(len(lengths), longest, recalibrator.rec_proj_pre.out_features, generator=generator)
    read = [torch.nonzero(torch.rand(n, generator=generator) < 0.4)[:, 0] + s * longest for s, n in enumerate(lengths)]
    reads = Reads.of(torch.cat(read), len(lengths), longest)
    slope = torch.randn(sum(map(len, read)), 48, generator=generator)
    found = []
    for trims in (True, False):
        recalibrator.trims_last_block = trims
        recalibrator.zero_grad()
        splice = splice.detach().requires_grad_()
        states = recalibrator(splice, reads)
        (states * slope).sum().backward()
        gradients = {name: p.grad for name, p in recalibrator.named_parameters() if p.grad is not None}
        found.append((states.detach(), gradients | {"splice": splice.grad}))
    assert torch.allclose(found[1][0], recalibrator(splice).flatten(0, 1)[torch.cat(read)], atol=1e-6)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_at_the_places_read_is_that_of_all_places(tiny, family, checkpointing):
    torch.manual_seed(0)
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny(family)), 48)
    assert recalibrator.trims_last_block
    for parameter in recalibrator.parameters():  # norms and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    if checkpointing:
        checkpoint_activations(None, recalibrator)
    (some, gradients), (whole, whole_gradients) = read_both_ways(recalibrator, [5, 12, 9])
    assert torch.allclose(some, whole, atol=1e-5)
    assert gradients.keys() == whole_gradients.keys() and len(gradients) > 10
    for name, gradient in whole_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name


def test_the_last_block_does_less_and_keeps_less(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("internvl_qwen2")), 48)
    splice, reads = torch.randn(2, 40, recalibrator.rec_proj_pre.out_features), Reads.of(torch.tensor([39, 50]), 2, 40)
    found = []
    for trims in (True, False):
        recalibrator.trims_last_block = trims
        kept = []
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
                recalibrator(splice, reads).sum().backward()
        found.append((counter.get_total_flops(), sum(kept)))
    (flops, kept), (whole_flops, whole_kept) = found
    assert flops < 0.65 * whole_flops and kept < 0.75 * whole_kept


def test_no_place_at_all_gives_every_parameter_a_gradient_of_zero(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("qwen2_vl")), 48)
    splice = recalibrator.rec_proj_pre(torch.randn(2, 4, 48))
    states = recalibrator(splice, Reads.of(torch.zeros(0, dtype=torch.int64), 2, 4))
    assert states.shape == (0, 48)
    states.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in recalibrator.parameters())


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=8, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (Phi3Config(**SMALL), "sdpa"),  # queries, keys and values are one product
        (Olmo2Config(**SMALL), "sdpa"),  # the norms come after
        (SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), "sdpa"),  # looks alike, but its last layer turns no keys
        (LlamaConfig(**SMALL), "eager"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_block_of_another_shape_runs_everywhere(config, attention, caplog):
    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="genrecal"):
        recalibrator = Recalibrator(config, 48, attention=attention)
    assert not recalibrator.trims_last_block
    assert "forward" not in vars(recalibrator.rec_body.layers[-1])
    assert re.search(rf"last block \(\w+, {attention}\) runs on all rows", caplog.text)
    splice, rows = torch.randn(2, 6, 32), torch.tensor([0, 5, 7])
    states = recalibrator(splice, Reads.of(rows, 2, 6))
    assert torch.allclose(states, recalibrator(splice).flatten(0, 1)[rows], atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 8), max_size=9, unique=True).map(sorted), min_size=1, max_size=4))
def test_reads_name_each_place_in_its_order(places):
    flat = [place + 9 * sample for sample, own in enumerate(places) for place in own]
    reads = Reads.of(torch.tensor(flat, dtype=torch.int64), len(places), 9)
    assert reads.positions.shape == (len(places), max(1, *map(len, places), 0))
    whole = torch.arange(len(places) * 9).reshape(len(places), 9, 1)
    assert reads.take(whole).flatten().tolist() == flat


def test_without_layers_it_is_one_map_of_each_state(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("qwen2_vl")), 48, num_blocks=0, takes_teacher=False)
    assert {name.split(".")[0] for name, _ in recalibrator.named_parameters()} == {"rec_proj_post", "rec_norm"}
    states = torch.randn(2, 9, recalibrator.rec_proj_post.in_features)
    expected = recalibrator.rec_norm(states @ recalibrator.rec_proj_post.weight.T + recalibrator.rec_proj_post.bias)
    assert torch.allclose(recalibrator(states), expected, atol=1e-5)
    rows = torch.tensor([0, 4, 17])
    assert torch.allclose(recalibrator(states, Reads.of(rows, 2, 9)), expected.flatten(0, 1)[rows], atol=1e-5)


def test_every_parameter_is_trained(tiny):
    recalibrator = Recalibrator(AutoConfig.from_pretrained(tiny("internvl_qwen2")), 48)
    answers, questions = torch.randn(3, 48), torch.randn(4, recalibrator.rec_proj_pre.out_features)
    splice = torch.cat([questions, recalibrator.rec_proj_pre(answers)])[None]
    recalibrator(splice).square().sum().backward()
    missing = [name for name, parameter in recalibrator.named_parameters() if parameter.grad is None]
    assert not missing
