"""An object's tensors cross to another process in one buffer, and are the same behind it."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from genrecal.errors import DamageError, TrainingError
from genrecal.train.batches import Loaded, micro_batch_stream
from genrecal.train.handover import ALIGNMENT, pack, unpack

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@dataclasses.dataclass
class Thing:
    name: str
    inside: dict[str, Any]
    error: Exception | None = None


def tensors_of(value):
    return [tensor for tensor in value.inside.values() if isinstance(tensor, torch.Tensor)]


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()), max_size=6))
def test_what_is_unpacked_is_what_was_packed(parts):
    inside: dict[str, Any] = {"slices": slice(2, 5), "none": None}
    for number, (shape, dtype, turned) in enumerate(parts):
        tensor = (torch.randn(shape) * 10).to(dtype)
        inside[str(number)] = tensor.transpose(0, -1) if turned and shape else tensor
    thing = Thing("a", inside, DamageError("a tar is cut"))
    packed = pack(thing)
    found = unpack(packed)
    assert found.name == "a" and str(found.error) == "a tar is cut" and found.inside.keys() == inside.keys()
    assert found.inside["slices"] == slice(2, 5)
    for tensor, other in zip(tensors_of(thing), tensors_of(found), strict=True):
        assert other.dtype == tensor.dtype and torch.equal(other, tensor)
        assert other.untyped_storage().data_ptr() == packed.buffer.untyped_storage().data_ptr() or not other.numel()
        assert other.storage_offset() * other.element_size() % ALIGNMENT == 0


class Things(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        return Thing(str(number), {str(n): torch.arange(n * number + 1) for n in range(30)})


def test_it_comes_out_of_a_loading_process():
    loader = DataLoader(
        Things(), batch_size=None, num_workers=1, collate_fn=pack, multiprocessing_context="fork", shuffle=False
    )
    number = -1
    for number, packed in enumerate(loader):
        assert packed.buffer.is_shared()
        expected, found = Things()[number], unpack(packed)
        assert found.name == expected.name
        for tensor, other in zip(tensors_of(expected), tensors_of(found), strict=True):
            assert torch.equal(tensor, other)
    assert number == 2


class Noted(Dataset):
    """Micro-batches of nothing; each leaves a file that says that it was made."""

    def __init__(self, folder, last=10**9):
        self.folder, self.last = folder, last

    def __getitem__(self, indices):
        if max(indices) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / str(indices[0])).touch()
        return Loaded()


class Whole(Dataset):
    def __getitem__(self, indices):
        return Loaded(batch={"indices": torch.tensor(indices)})


class AsTheyCome:
    def slice(self, start, end):
        return np.arange(start, end)


def stream_of(dataset, *, workers=2, steps=5):
    """Steps of eight micro-batches of two samples."""
    return micro_batch_stream(
        dataset, order=AsTheyCome(), lengths=np.zeros(16 * steps), steps=range(steps), global_batch=16,
        last_sample=16 * steps, batch_size=2, workers=workers,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_next_step_is_read_while_one_is_computed(tmp_path, workers):
    """All of it, and no more than a worker's share of one more."""
    stream = stream_of(Noted(tmp_path), workers=workers)
    for step in range(1, 4):
        assert len(next(stream).batches) == 8
        end = time.monotonic() + 600
        while len(list(tmp_path.iterdir())) < 8 * (step + 1) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        assert 8 * (step + 1) <= len(list(tmp_path.iterdir())) <= 8 * (step + 1) + workers


def test_as_many_micro_batches_as_a_step_has():
    """Each is an open file, of which a system allows 1,024 at first."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        stream = micro_batch_stream(
            Whole(), order=AsTheyCome(), lengths=np.zeros(1500), steps=range(3), global_batch=500, last_sample=1500,
            batch_size=1, workers=1,
        )  # fmt: skip
        assert [len(step.batches) for step in stream] == [500] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_micro_batches_than_the_system_allows():
    """A hard limit cannot be raised again, so it is lowered in a process of its own; the first step is the error."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_handover import Whole, stream_of
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 260))
(step,) = stream_of(Whole())
print(type(step.error).__name__, step.error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError two steps of 8 micro-batches need 272 open files, and this system allows 260" in done.stdout, (
        done
    )


def test_a_loading_process_that_is_killed_is_told(tmp_path):
    steps = list(stream_of(Noted(tmp_path, last=40)))
    error = steps[-1].error
    assert isinstance(error, TrainingError) and [step.error for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert "a process that reads samples ended (DataLoader worker" in str(error) and "data.workers" in str(error)
