"""The teacher's proof on real states, which have outliers: whole ones pass in every check, broken ones in none."""

import dataclasses
import functools

import pytest
import torch
from conftest import conversation

from genrecal.cache.proof import compare_backends, logits_agree, prove
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import ModelError
from genrecal.vlm.checkpoint import Checkpoint

pytestmark = pytest.mark.real

SAMPLES = [
    conversation(("What is the capital of France?", "Paris, on the Seine."), ("And of Italy?", "Rome."), key="turns"),
    conversation(("Repeat: A A A A", "A A A A A A A A"), key="repeats"),  # neighbours have almost the same state
]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.key)


class Proved:
    """A teacher whose evidence is taken once a sample, and may be changed."""

    def __init__(self, teacher):
        self.teacher, self.encode = teacher, functools.cache(lambda sample: teacher.encode(sample))
        self.whole = functools.cache(lambda sample: teacher.evidence(self.encode(sample)))
        self.norm = Checkpoint(teacher.path).final_norm()

    def prove(self, sample, monkeypatch, **changes):
        """Without the help of the logits' equality, bit for bit: as for the vllm backend."""
        found = dataclasses.replace(self.whole(sample), norm=self.norm, **changes)
        monkeypatch.setattr(self.teacher, "evidence", lambda _: found)
        return prove(self.teacher, sample, self.encode(sample))


@pytest.fixture(scope="module")
def load(real):
    return functools.cache(lambda dtype: Proved(HFTeacher.load(real / "gemma3-270m", dtype=dtype)))


def states_of_layer(teacher, encoded, layer):
    """What a layer leaves, `[L, D]`: -1 is the last."""
    left = []
    hooks = [block.register_forward_hook(lambda _, __, out: left.append(out)) for block in teacher.vlm.body.layers]
    with torch.inference_mode():
        teacher.vlm.hidden(teacher.renderer.collate([encoded]))
    for hook in hooks:
        hook.remove()
    return left[layer].reshape(-1, left[layer].shape[-1])


@samples
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_real_states_pass(load, monkeypatch, dtype, sample):
    proved = load(dtype)
    scale = 1 + proved.norm.weight.float()
    assert scale.abs().max() > 1000 * scale.abs().min()  # a heavy tail
    assert proved.prove(sample, monkeypatch)


@samples
def test_states_before_the_norm_are_refused(load, monkeypatch, sample):
    proved = load(torch.bfloat16)
    before = states_of_layer(proved.teacher, proved.encode(sample), -1)
    with pytest.raises(ModelError, match="not what its final norm leaves"):
        proved.prove(sample, monkeypatch, hidden=before)


@pytest.mark.parametrize("shift", [-1, 1])
@samples
def test_rows_shifted_by_one_are_refused(load, monkeypatch, sample, shift):
    proved = load(torch.bfloat16)
    with pytest.raises(ModelError, match="is not that position's state"):
        proved.prove(sample, monkeypatch, hidden=proved.whole(sample).hidden.roll(shift, 0))


def test_a_softcap_left_out_is_found(load):
    """In logits from the same states, one side in bfloat16, as vLLM may give them."""
    proved = load(torch.bfloat16)
    evidence = proved.whole(SAMPLES[0])
    (states,) = proved.teacher.states([proved.encode(SAMPLES[0])], questions=[False], top_k=1)
    ours = proved.teacher.head.logits(evidence.hidden[torch.from_numpy(states.answer.position).long()])
    assert logits_agree(ours, evidence.logits, torch.bfloat16)
    assert not logits_agree(50 * (ours / 50).tanh(), evidence.logits, torch.bfloat16)


def test_backends_that_differ_by_rounding_agree_and_a_layer_less_does_not(load, monkeypatch):
    teacher, reference = load(torch.bfloat16).teacher, load(torch.float32).teacher
    assert 0 < compare_backends(teacher, reference, SAMPLES, 2).hidden < 0.05
    monkeypatch.setattr(teacher.vlm.body, "layers", teacher.vlm.body.layers[:-1])
    with pytest.raises(ModelError, match="does not give the states of hf"):
        compare_backends(teacher, reference, SAMPLES, 2)
