"""From a process that loads to the one that trains: all tensors of an object in one buffer.

torch shares every tensor's memory by itself, with a file descriptor that is asked for over a socket; of a micro-batch's two
dozen tensors that takes longer than their bytes. `unpack(pack(x))` is x, its tensors views of one buffer. Like torch's own
way it pickles, between processes of one run: nothing that was read from a file or a cache is ever unpickled.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 64  # bytes: no tensor begins in the middle of a cache line


@dataclass(frozen=True, kw_only=True)
class Packed:
    """content: the object, pickled, with places in `buffer` for its tensors; buffer: uint8."""

    content: bytes
    buffer: torch.Tensor


def pack(value: Any) -> Packed:
    """An object with tensors on the CPU -> one that crosses to another process with one buffer."""
    tensors: list[torch.Tensor] = []
    starts: list[int] = []
    end = 0

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            nonlocal end
            if not isinstance(found, torch.Tensor):
                return None
            starts.append(end)
            tensors.append(found)
            end += -(-found.nbytes // ALIGNMENT) * ALIGNMENT
            return starts[-1], found.dtype, tuple(found.shape)

    content = io.BytesIO()
    Pickler(content).dump(value)
    buffer = torch.empty(end, dtype=torch.uint8)
    for start, tensor in zip(starts, tensors, strict=True):
        _view(buffer, start, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return Packed(content=content.getvalue(), buffer=buffer)


def unpack(packed: Packed) -> Any:
    """The object that was packed."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: Any) -> torch.Tensor:
            return _view(packed.buffer, *place)

    return Unpickler(io.BytesIO(packed.content)).load()


def _view(buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(shape)
