"""Engines over a small module: the same numbers from each, resumed or not, and DeepSpeed's internals by name."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import genrecal.train.engine
from genrecal.train import deepspeed_private
from genrecal.train.config import load_config
from genrecal.train.engine import import_deepspeed, start_engine
from genrecal.train.ranks import Ranks, joined
from genrecal.train.stages import StepOutput

CPU = torch.device("cpu")


class Small(nn.Module):
    """Stands where a stage's Distiller stands; 7 x 5 is odd, so that partitions are padded."""

    stage = 2

    def __init__(self, weights):
        super().__init__()
        self.body, self.head = nn.Linear(7, 5), nn.Linear(5, 3)
        self.load_state_dict(weights)
        self.student = SimpleNamespace(head=self.head)

    def forward(self, batch, tokens):
        return StepOutput(loss=self.head(self.body(batch.inputs)).square().sum() / tokens, sums={}, counts={})


class Inputs:
    def __init__(self, number):
        self.inputs = torch.sin(torch.arange(21.0).reshape(3, 7) + number)

    def to(self, device, dtype):
        return self


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {f"{name}.{key}": value.clone() for name, module in (("body", nn.Linear(7, 5)), ("head", nn.Linear(5, 3)))
            for key, value in module.state_dict().items()}  # fmt: skip


def start(name, weights, ranks):
    config, settings = load_config(None, [f"engine={name}"]), load_config(None, ["stage1.weight_decay=0.1"]).stage1
    module = Small(weights)
    return start_engine(config, settings, module, ranks, device=CPU, compute_dtype=torch.float32, micro_steps=2)


def train_on(engine, steps):
    for number in steps:
        for part in (0, 1):
            engine.micro_step(Inputs(2 * number + part), 6, last=part == 1)
        assert engine.step(1e-2) > 0
    return engine.state()


@pytest.fixture(scope="module")
def ranks():
    """One process in a group of its own, which DeepSpeed remembers."""
    with pytest.MonkeyPatch.context() as patch, joined("cpu", launched=False) as ranks:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield ranks


@pytest.fixture(scope="module")
def expected(weights):
    return train_on(start("none", weights, Ranks()), range(6))


def assert_same(state, expected, *, within=0.0):
    for ours, theirs in ((state.weights, expected.weights), (state.moments, expected.moments)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=within, atol=within)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_resumes_from_a_state_fused_or_not(weights, expected, monkeypatch, fused):
    """No GPU is needed for it: torch has the fused update for CPUs too."""
    assert genrecal.train.engine.fuses(torch.device("cuda")) and not genrecal.train.engine.fuses(CPU)
    monkeypatch.setattr(genrecal.train.engine, "fuses", lambda device: fused)
    whole = train_on(start("none", weights, Ranks()), range(6))
    assert_same(whole, expected, within=1e-6)
    state = train_on(start("none", weights, Ranks()), range(3))
    engine = start("none", state.weights, Ranks())
    assert engine.optimizer.param_groups[0]["fused"] is (fused or None)
    engine.load_moments(state, where="a test")
    assert_same(train_on(engine, range(3, 6)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_what_is_used_of_deepspeeds_internals(weights, expected, monkeypatch, ranks, name):
    """`deepspeed_private`, function by function, with the installed release: the numbers of torch alone, before and after a
    resume; ZeRO-3's weights are partitioned but for the head; and a closed engine keeps no module."""
    called = dict.fromkeys(("use_no_own_operators", "start_moments", "forget_modules"), 0)
    called |= {"keep_whole": 0, "own_part": 0} if name == "zero3" else {}
    for function in called:
        plain = getattr(deepspeed_private, function)

        def counted(*words, function=function, plain=plain):
            called[function] += 1
            return plain(*words)

        monkeypatch.setattr(deepspeed_private, function, counted)
    first = start(name, weights, ranks)
    state = train_on(first, range(3))
    if name == "zero3":
        held = {key: parameter.numel() for key, parameter in first.engine.module.named_parameters()}
        assert held == {"body.weight": 0, "body.bias": 0, "head.weight": 15, "head.bias": 3}
    kept = weakref.ref(first.engine.module)
    first.close()
    del first
    gc.collect()
    assert kept() is None
    engine = start(name, state.weights, ranks)
    engine.load_moments(state, where="a test")
    assert_same(train_on(engine, range(3, 6)), expected, within=1e-6)
    engine.close()
    assert all(called.values()), called
    assert import_deepspeed(CPU).ops.__compatible_ops__ == {}
