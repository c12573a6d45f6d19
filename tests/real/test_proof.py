"""The teacher's proof on real states, which have outliers: whole ones pass in every check, broken ones in none."""

import dataclasses

import pytest
import torch
from conftest import conversation

from genrecal.cache.proof import compare_backends, logits_agree, prove
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import ModelError
from genrecal.vlm.checkpoint import Checkpoint

pytestmark = pytest.mark.real

SAMPLES = [
    conversation(("What is the capital of France?", "The capital of France is Paris. It lies on the Seine."), key="0"),
    conversation(("Name three fruits.", "Apples, pears and plums."), ("And a vegetable?", "Carrots."), key="1"),
    conversation(("Repeat: A A A A A A A A", "A A A A A A A A A A A A"), key="2"),
]


@pytest.fixture(scope="module")
def load(real):
    made = {}
    return lambda dtype: made.setdefault(dtype, HFTeacher.load(real / "gemma3-270m", dtype=dtype))


@pytest.fixture
def evidence(load, monkeypatch):
    """Evidence of a sample's bfloat16 states that must hold without the logits' help, as for the vllm backend."""
    teacher = load(torch.bfloat16)
    norm, whole = Checkpoint(teacher.path).final_norm(), teacher.evidence

    def change(sample, **changes):
        encoded = teacher.encode(sample)
        found = dataclasses.replace(whole(encoded), norm=norm, **changes)
        monkeypatch.setattr(teacher, "evidence", lambda _: found)
        return teacher, sample, encoded

    return change


def last_states(teacher, sample, layer):
    """What a layer leaves, `[L, D]`: -1 is the last."""
    left = []
    hooks = [block.register_forward_hook(lambda _, __, out: left.append(out)) for block in teacher.vlm.body.layers]
    with torch.inference_mode():
        teacher.vlm.hidden(teacher.renderer.collate([teacher.encode(sample)]))
    for hook in hooks:
        hook.remove()
    states = left[layer]
    return (states[0] if isinstance(states, tuple) else states).reshape(-1, states[0].shape[-1])


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.key)
def test_real_states_pass(load, evidence, sample):
    scale = 1 + Checkpoint(load(torch.bfloat16).path).final_norm().weight.float()
    assert scale.abs().max() > 1000 * scale.abs().min()  # a heavy tail
    assert prove(*evidence(sample))
    encoded = load(torch.float32).encode(sample)
    assert prove(load(torch.float32), sample, encoded)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.key)
def test_states_before_the_norm_are_refused(load, evidence, sample):
    with pytest.raises(ModelError, match="not what its final norm leaves"):
        prove(*evidence(sample, hidden=last_states(load(torch.bfloat16), sample, -1)))


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.key)
def test_rows_shifted_by_one_are_refused(load, evidence, sample, shift):
    """Also where a token is repeated, so that neighbours have almost the same state."""
    teacher = load(torch.bfloat16)
    hidden = teacher.evidence(teacher.encode(sample)).hidden
    with pytest.raises(ModelError, match="is not that position's state"):
        prove(*evidence(sample, hidden=hidden.roll(shift, 0)))


def test_a_softcap_left_out_is_found(load):
    """Logits of one row in bfloat16, as vLLM may give them, against ours with a cap."""
    teacher = load(torch.bfloat16)
    evidence = teacher.evidence(teacher.encode(SAMPLES[0]))
    rounded = evidence.logits.float()
    positions = teacher.states([teacher.encode(SAMPLES[0])], questions=[False], top_k=1)[0].answer.position
    ours = teacher.head.logits(evidence.hidden[torch.from_numpy(positions).long()])
    assert logits_agree(ours, rounded, torch.bfloat16)
    assert not logits_agree(50 * (ours / 50).tanh(), rounded, torch.bfloat16)


def test_backends_that_differ_by_rounding_agree_and_another_layers_states_do_not(load, monkeypatch):
    teacher, reference = load(torch.bfloat16), load(torch.float32)
    assert 0 < compare_backends(teacher, reference, SAMPLES, 3).hidden < 0.05
    body = teacher.vlm.body
    monkeypatch.setattr(body, "layers", body.layers[:-1])
    with pytest.raises(ModelError, match="does not give the states of hf"):
        compare_backends(teacher, reference, SAMPLES, 3)
