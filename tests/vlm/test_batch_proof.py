"""A model is tried at load: a batch of conversations against each alone, and its inputs against its own processor's."""

import pytest
import torch
from conftest import mixed_samples
from families import can_run, make_family, write_files
from tokenizers import processors
from transformers.utils import is_torchvision_available

from genrecal.cache.proof import prove_batch
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import ModelError
from genrecal.samples import Message
from genrecal.train.batches import student_batch
from genrecal.vlm.batch_proof import off_share, why_alone
from genrecal.vlm.loading import load_processor, load_renderer, load_vlm
from genrecal.vlm.rendering import Renderer


def test_a_family_whose_batches_are_wrong_runs_alone(tmp_path, capsys):
    """GLM 5 pools blocks of keys, padding included."""
    teacher = HFTeacher.load(make_family("glm5_next", tmp_path), dtype=torch.float32)
    assert "each conversation runs alone, which is slower: a batch changes" in capsys.readouterr().err
    items = [teacher.encode(sample) for sample in mixed_samples(4)]
    with torch.inference_mode():
        alone = [teacher.vlm.hidden(teacher.renderer.collate([item]))[0] for item in items]
        batch = teacher.vlm.hidden(teacher.renderer.collate(items))
    assert any(off_share(rows[: len(item)], own) for rows, item, own in zip(batch, items, alone, strict=True))
    with torch.inference_mode():
        states = teacher.vlm.states(items)
    for rows, item, own in zip(states, items, alone, strict=True):
        assert torch.equal(rows[: len(item)], own)
    student = student_batch(items, teacher.renderer)
    assert [inputs["input_ids"].shape[1] for inputs in student.student_passes] == [len(item) for item in items]
    assert student.student_inputs["input_ids"].shape == (4, max(map(len, items)))
    passes = student.to(torch.device("cpu"), torch.float32).decoded().student_passes
    for inputs, own in zip(passes, alone, strict=True):
        unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with torch.inference_mode():
            assert not off_share(teacher.vlm.hidden(unmasked)[0], own)


def test_out_of_memory_says_nothing_about_batches(teacher):
    """It is an error of its own, not a reason to run one conversation at a time."""

    def forward(inputs):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return teacher.vlm.hidden(inputs)

    with pytest.raises(ModelError, match="out of memory while four short conversations were tried"):
        why_alone(teacher.vlm.text_config, teacher.renderer, forward)


def test_other_faults_of_batches_are_found(teacher, monkeypatch):
    """States that depend on the batch, on padding on the left alone, or that are wrong with no batch at all."""
    renderer, config = teacher.renderer, teacher.vlm.text_config
    assert why_alone(config, renderer, teacher.vlm.hidden) == ("", "")

    def shifted(inputs):
        states = teacher.vlm.hidden(inputs)
        return states.roll(1, 0) if len(states) > 1 else states

    assert all("a batch changes" in reason for reason in why_alone(config, renderer, shifted))

    def left(inputs):
        states, mask = teacher.vlm.hidden(inputs), inputs.get("attention_mask")
        return states * 2 if mask is not None and not mask[:, 0].all() else states

    reasons = why_alone(config, renderer, left)
    assert reasons[0] == "" and "a batch changes" in reasons[1]

    own = renderer.own_inputs

    def others(*args, **kw):
        inputs = own(*args, **kw)
        return inputs | {name: -value for name, value in inputs.items() if name == "pixel_values"}

    monkeypatch.setattr(renderer, "own_inputs", others)
    with pytest.raises(ModelError, match="are not those that the model's own apply_chat_template leads to"):
        why_alone(config, renderer, teacher.vlm.hidden)


def test_rounding_is_no_fault():
    states = torch.randn(100, 8)
    assert off_share(states * (1 + 1e-3), states) == 0.0
    assert off_share(states * 1.02, states) == 1.0
    nan = states.clone()
    nan[3] = torch.nan
    assert off_share(nan, states) == pytest.approx(0.01)
    half = states.bfloat16()
    few = half.clone()
    few[:2] *= 2  # a router may turn for a token now and then
    assert off_share(few, half) == 0.0
    few[:5] *= 2
    assert off_share(few, half) == pytest.approx(0.05)


def test_the_first_samples_of_the_data_are_tried_too(teacher, monkeypatch, capsys):
    items = [teacher.encode(sample) for sample in mixed_samples(6)]
    assert prove_batch(teacher, items, 10_000) and not teacher.renderer.alone
    assert not prove_batch(teacher, items, 3)  # no batch of several fits
    hidden = teacher.vlm.states
    monkeypatch.setattr(type(teacher.vlm), "states", lambda self, batch: hidden(batch).roll(len(batch) - 1, 0))
    try:
        assert prove_batch(teacher, items, 10_000)
        assert "runs alone" in capsys.readouterr().err and teacher.renderer.alone
        teacher.renderer.alone = teacher.renderer.writes_alone = ""
        monkeypatch.setattr(type(teacher), "backend", "vllm")
        with pytest.raises(ModelError, match="a batch changes .* use --backend hf"):
            prove_batch(teacher, items, 10_000)
    finally:
        teacher.renderer.alone = teacher.renderer.writes_alone = ""


def test_a_first_token_that_also_closes_turns(tiny):
    """Molmo 2's BOS is the token that closes a turn."""
    processor = load_processor(tiny("qwen2_vl"))
    closing = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", closing)]
    )
    messages = [Message(role=role, parts=(text,)) for role, text in
                (("user", "What?"), ("assistant", "one"), ("user", "And?"), ("assistant", "two"))]  # fmt: skip
    encoded = Renderer(processor).encode_messages(messages, [])
    text = processor.tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|im_end|><|im_start|>")
    assert "<|im_start|>assistant\none<|im_end|>" in text and text.endswith("<|im_start|>assistant\ntwo<|im_end|>")


@pytest.mark.skipif(is_torchvision_available(), reason="needs an environment without torchvision")
@pytest.mark.parametrize("family", ["molmo2", "minicpmv4_7", "kimi_k25", "gemma4_moe"])
def test_a_missing_torchvision_is_named(family, tmp_path):
    with pytest.raises(ModelError, match="its processor needs torchvision"):
        load_renderer(write_files(family, tmp_path))


@pytest.mark.parametrize("family", ["glm4v", "mistral3", "qwen3_5", "cohere2_vision"])
def test_templates_of_todays_families(family, tmp_path):
    """Contents as lists and as strings, a last answer closed by nothing, thinking: the ids are the model's own."""
    if not can_run(family):
        pytest.skip("needs torchvision")
    assert load_vlm(make_family(family, tmp_path)).renderer.marks.end_of_turn
