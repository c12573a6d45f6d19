"""The student's forward pass: padding without a mask, bf16, checkpointing, the frozen vision encoder."""

import functools

import numpy as np
import pytest
import tiny_models
import torch
from conftest import mixed_samples, write_llava
from transformers.utils import is_flash_attn_2_available

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import ModelError
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.recalibrator import checkpoint_activations
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import LoraConfig, TrainConfig
from genrecal.train.stages import Distiller, add_lora, select_trainable
from genrecal.vlm.loading import load_vlm

FAMILIES = sorted(name for name in tiny_models.FAMILIES if not name.endswith(("_wide", "_padded_head")))
LORA = LoraConfig(rank=4, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def cache(tiny, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forward")
    data = write_llava(folder / "d", mixed_samples(8))
    assert isinstance(teacher, HFTeacher)
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8))
    return open_caches([folder / "c"])


@pytest.fixture
def distiller_of(tiny, cache):
    def make(family, stage, *, checkpointing=False):
        folder = tiny(family)  # made at its first use, with random numbers
        torch.manual_seed(5)
        student = load_vlm(folder, dtype=torch.float32)
        if stage == 2:
            add_lora(student, LORA)
        select_trainable(stage, student, LORA)
        objective = OBJECTIVES["genrecal"](stage, TrainConfig())
        modules = objective.modules(student.model.config, cache.hidden_size)
        student.model.train(stage > 1)
        if checkpointing:
            if stage > 1:
                checkpoint_activations(student.model)
            for module in modules.values():
                module.gradient_checkpointing_enable()
        objective.prepare(student, cache, np.arange(len(cache)), modules)
        return Distiller(student, objective, modules)

    return make


def batch_of(distiller, cache, indices=range(8)):
    return BatchBuilder(ShardSource(cache), distiller.student.renderer, distiller.objective)[list(indices)].batch


def step(distiller, batch):
    distiller.zero_grad()
    loss = distiller(batch, 40).loss
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in trained_parameters(distiller).items() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mask_no_state_changes(distiller_of, cache, family):
    distiller = distiller_of(family, 1)
    batch = batch_of(distiller, cache)
    mask = batch.student_inputs["attention_mask"].bool()
    assert not mask.all() and not mask[:, -1].all()  # there is padding, on the right
    with torch.no_grad():
        masked = distiller.student.body(**batch.student_inputs, use_cache=False).last_hidden_state
        ours = distiller._student_states(batch)
    assert torch.allclose(ours[mask], masked[mask], atol=2e-6 * masked[mask].abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["internvl_llama", "qwen3_vl"])
def test_stage_1_does_not_need_the_last_answer(distiller_of, cache, family, monkeypatch):
    distiller = distiller_of(family, 1)
    results = []
    for last_answer in (True, False):
        monkeypatch.setattr(type(distiller.objective), "last_answer", last_answer)
        batch = batch_of(distiller, cache)
        results.append(
            (int(batch.student_inputs["attention_mask"].sum()), len(batch.student_ids), *step(distiller, batch))
        )
    (tokens, own_rows, loss, gradients), (fewer, fewer_rows, same, same_gradients) = results
    last = sum(distiller.student.renderer.encode(record.sample).answer_lengths[-1] for record in cache)
    assert tokens - fewer == own_rows - fewer_rows == last
    assert same == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(same_gradients[name], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_vision_encoder_keeps_nothing_for_a_backward_pass(distiller_of, cache, family, stage):
    distiller = distiller_of(family, stage)
    seen = []

    def watch(module, args, output, *, name):
        output = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        if isinstance(output, torch.Tensor):
            seen.append(name)
            assert not output.requires_grad, name

    for name, module in distiller.model.named_modules():
        own = [f"{name}.{p}" for p, _ in module.named_parameters()]
        if own and all(map(tiny_models.is_vision_encoder, own)):
            assert not module.training, name
            module.register_forward_hook(functools.partial(watch, name=name))
    _, gradients = step(distiller, batch_of(distiller, cache))
    assert len(seen) > 5 and gradients
    if stage == 3:
        trained = " ".join(gradients)
        assert "merger" in trained or "projector" in trained or "connector" in trained


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["internvl_llama", "qwen2_vl"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(distiller_of, cache, family, stage):
    results = []
    for checkpointing in (False, True):
        distiller = distiller_of(family, stage, checkpointing=checkpointing)
        batch = batch_of(distiller, cache)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            loss = distiller(batch, 40).loss
        results.append((sum(kept), *step(distiller, batch)))
        assert loss.item() == results[-1][1]
    (kept, loss, gradients), (kept_checkpointed, loss_checkpointed, gradients_checkpointed) = results
    assert loss_checkpointed == loss
    assert gradients.keys() == gradients_checkpointed.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradients_checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name
    assert kept_checkpointed < 0.7 * kept


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_stay_float32_in_a_bf16_student(tiny, family):
    narrow, wide = (load_vlm(tiny(family), dtype=dtype).model for dtype in (torch.bfloat16, torch.float32))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    buffers = {name: buffer for name, buffer in narrow.named_buffers() if "inv_freq" in name}
    assert buffers
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, wide.get_buffer(name)), name


@pytest.mark.skipif(is_flash_attn_2_available(), reason="needs flash-attn to be missing")
def test_flash_attention_that_is_not_installed_is_named(tiny):
    with pytest.raises(ModelError, match="FlashAttention2.*installed"):
        load_vlm(tiny("internvl_llama"), attention="flash_attention_2")
