"""An object's tensors cross to another process in one buffer, and are the same behind it."""

import dataclasses
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from genrecal.errors import DamageError
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
