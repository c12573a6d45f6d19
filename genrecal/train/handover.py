"""From a process that loads to the one that trains: all tensors of an object in one buffer.

torch shares every tensor's memory by itself, with a file descriptor that is asked for over a socket; of a micro-batch's two
dozen tensors that takes longer than their bytes. `unpack(pack(x))` is x, its tensors views of one buffer. Like torch's own
way it pickles, between processes of one run: nothing that was read from a file or a cache is ever unpickled.
"""

import io
import pickle
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genrecal.train.advice import LoaderError

SHARED_MEMORY = Path("/dev/shm")
OTHER_FILES = 256  # that a process has open besides
ALIGNMENT = 64  # bytes: no tensor begins in the middle of a cache line


@dataclass(frozen=True, kw_only=True)
class Packed:
    """content: the object, pickled, with places in `buffer` for its tensors; buffer: uint8, in shared memory."""

    content: bytes
    buffer: torch.Tensor


def pack(value: Any) -> Packed:
    """An object with tensors on the CPU -> one that crosses to another process with one buffer.

    Raises:
        LoaderError: the shared memory is full. torch itself would find that out in a thread of its own, on the way to the
            other process, which would then wait for ever.
    """
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
    try:
        buffer = torch.empty(end, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise LoaderError(_full(end, error)) from None
    for start, tensor in zip(starts, tensors, strict=True):
        _view(buffer, start, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return Packed(content=content.getvalue(), buffer=buffer)


def allow_open_files(buffers: int) -> None:
    """Let this process hold so many buffers at once: each is an open file, and many systems begin with 1,024.

    Raises:
        LoaderError: the system's hard limit is lower.
    """
    needed = buffers + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoaderError(
            f"two steps of {buffers // 2} micro-batches need {needed:,} open files, and this system allows {hard:,} "
            "(ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _full(size: int, error: RuntimeError) -> str:
    free = f", which has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:,.0f} MB left" if SHARED_MEMORY.is_dir() else ""
    return (
        f"{size / 1e6:,.1f} MB do not fit into shared memory ({SHARED_MEMORY}{free}), through which the processes that read "
        f"hand over their samples: {str(error).splitlines()[0]}; give the container more (docker run --shm-size=16g, or "
        "--ipc=host)"
    )


def unpack(packed: Packed) -> Any:
    """The object that was packed."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: Any) -> torch.Tensor:
            return _view(packed.buffer, *place)

    return Unpickler(io.BytesIO(packed.content)).load()


def _view(buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(shape)
