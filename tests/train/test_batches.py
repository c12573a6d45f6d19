"""Micro-batches as they stream out of loading processes: in order, a few ahead, and errors as values."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from genrecal.errors import TrainingError
from genrecal.objectives.base import Batch
from genrecal.shards.order import MixedOrder, SampleOrder
from genrecal.train.batches import PREFETCH, Loaded, StageData, micro_batch_stream


def batch_of(indices):
    ids = torch.as_tensor(np.asarray(indices))
    return Batch(
        keys=[str(index) for index in indices],
        student_inputs={"input_ids": ids},
        student_rows=ids,
        student_ids=ids,
        student_first=ids == 0,
    )


class Noted(Dataset):
    """Micro-batches of indices; each leaves a file that says that it was made."""

    def __init__(self, folder, last=10**9):
        self.folder, self.last = folder, last

    def __getitem__(self, indices):
        if max(indices) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / str(indices[0])).touch()
        return Loaded(batch=batch_of(indices))


class AsTheyCome:
    def slice(self, start, end):
        return np.arange(start, end)


def data_of(steps, **changes):
    """Steps of eight micro-batches of two samples; sample i has i answer tokens."""
    facts = dict(
        order=AsTheyCome(), lengths=np.zeros(16 * steps), tokens=np.arange(16 * steps), global_batch=16,
        last_sample=16 * steps, batch_size=2,
    )  # fmt: skip
    return StageData(**facts | changes)


@pytest.mark.parametrize("workers", [0, 3])
def test_every_micro_batch_comes_in_order(tmp_path, workers):
    loaded = list(micro_batch_stream(Noted(tmp_path), data_of(3), range(1, 3), workers=workers))
    assert [item.batch.keys for item in loaded] == [[str(i), str(i + 1)] for i in range(16, 48, 2)]
    assert all(item.batch.student_ids.tolist() == [int(key) for key in item.batch.keys] for item in loaded)
    assert all(item.batch.student_inputs["input_ids"].is_shared() for item in loaded) == bool(workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_few_micro_batches_are_read_ahead_however_many_a_step_has(tmp_path, workers):
    stream = micro_batch_stream(
        Noted(tmp_path),
        data_of(1, global_batch=2000, last_sample=2000, lengths=np.zeros(2000)),
        range(1),
        workers=workers,
    )
    for taken in range(1, 4):
        next(stream)
        end = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < taken + PREFETCH * workers and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) == taken + PREFETCH * workers
    stream.close()


def test_a_loading_process_that_is_killed_is_told(tmp_path):
    loaded = list(micro_batch_stream(Noted(tmp_path, last=40), data_of(5), range(5), workers=1))
    error = loaded[-1].error
    assert isinstance(error, TrainingError) and [item.error for item in loaded[:-1]] == [None] * (len(loaded) - 1)
    assert "a loader process died (" in str(error)


def test_full_shared_memory_is_told(tmp_path, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    (loaded,) = micro_batch_stream(Noted(tmp_path), data_of(1), range(1), workers=1)
    assert "does not fit into shared memory" in str(loaded.error) and "--shm-size=16g" in str(loaded.error)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_divides_the_loss_is_known_before_and_the_same_on_every_rank(size):
    order = MixedOrder([SampleOrder(np.arange(24) // 8, seed=3)], np.array([24]))
    tokens = np.random.default_rng(0).integers(1, 50, 24)
    for rank in range(size):
        data = data_of(
            1, order=order, tokens=tokens, lengths=tokens, global_batch=10, last_sample=34, rank=rank, world_size=size
        )
        steps = [data.step(number) for number in range(4)]
        assert [len(step) for step in steps] == [10, 10, 10, 4]
        assert [data.answer_tokens(number) for number in range(4)] == [tokens[step].sum() for step in steps]
        assert len(list(data.micro_batches(range(4)))) == sum(data.micro_steps(number) for number in range(4))
