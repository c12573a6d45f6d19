"""The processes of a run: one for each device, as torchrun, deepspeed, accelerate launch or srun start them.

A launcher says who is who in the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without one a
run is a single process. What one rank alone finds (a damaged sample, a signal, a loss that is not finite) is gathered
before anything depends on it, so that all ranks continue or all stop.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from genrecal.errors import GenrecalError, OtherRankError, TrainingError, UsageError
from genrecal.vlm.loading import resolve_device

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective: a rank may wait while another reads, evaluates or saves
SEEN_SECONDS = 120.0  # network file systems remember for up to a minute that a file is not there


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run.

    Args:
        rank: 0 to size - 1; size: how many there are; local: place among those of this machine.
        control: the group that Python values are gathered in (gloo, on CPU tensors).
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank. All ranks must call it; it is also a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with peers_may_end():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank; where it raises a GenrecalError on any, all ranks stop, and one of them says why."""
        result, failure = None, None
        try:
            result = work()
        except GenrecalError as error:
            failure = error
        if failures := [found for found in self.gather(failure) if found is not None]:
            self.stop(failures[0])
        return result  # type: ignore[return-value]

    def wait_for(self, path: Path) -> None:
        """Until a file that rank 0 has written is seen by all: network file systems show it to others after a while.

        Raises TrainingError, on all ranks, where one does not see it.
        """

        def look() -> None:
            until = time.monotonic() + SEEN_SECONDS
            while path.name not in (os.listdir(path.parent) if path.parent.is_dir() else ()):
                if time.monotonic() > until:
                    raise TrainingError(
                        f"{path}: rank {self.rank} on {socket.gethostname()} does not see what rank 0 wrote; --out must "
                        "be a folder that all machines of the run share"
                    )
                time.sleep(0.2)

        self.together(look)

    def stop(self, error: GenrecalError) -> NoReturn:
        """End this rank over an error that all ranks know of; rank 0 is the one that prints it."""
        raise error if self.first else OtherRankError(str(error), error.exit_status)


def check_devices(ranks: Ranks, device: torch.device) -> None:
    """Raises UsageError, on all ranks, where two were given the same GPU: NCCL would only say that a peer is lost."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"CPU {ranks.rank}"
    owners: dict[str, int] = {}
    for rank, (host, found) in enumerate(ranks.gather((socket.gethostname(), uuid))):
        if (other := owners.setdefault(found, rank)) != rank:
            ranks.stop(
                UsageError(
                    f"ranks {other} and {rank} have the same GPU ({found} of {host}): each needs one of its own; start as "
                    "many processes on a machine as it has GPUs, or give each process another CUDA_VISIBLE_DEVICES"
                )
            )


@contextlib.contextmanager
def joined(device_type: str, *, launched: bool) -> Iterator[Ranks]:
    """The ranks of a run, connected: NCCL between CUDA devices, gloo between CPUs.

    Args:
        device_type: "cuda" or "cpu".
        launched: whether the environment is a launcher's. If not, the group is of this process alone.
    """
    if not launched:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", _free_port())):
            os.environ[name] = str(value)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        with peers_may_end():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
            control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device_type == "cuda" else None
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local=local_rank(), control=control)
        dist.destroy_process_group()
    finally:
        if not launched:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
                os.environ.pop(name, None)


def world_size() -> int:
    """Processes that a launcher started for this run, from its environment; 0 without a launcher.

    Raises UsageError for an environment that says only half.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"the environment has no {' and no '.join(missing)}: expected what torchrun sets; start this with torchrun, "
            "or unset RANK and WORLD_SIZE to train in one process"
        )
    return int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def own_device(name: str) -> torch.device:
    """The device of this process: "auto" and "cuda" are, under a launcher, the CUDA device of the local rank.

    Raises UsageError where this machine has too few, or all ranks were given the same one.
    """
    device = resolve_device(name)
    if device.type != "cuda" or world_size() < 2:
        return device
    if device.index is not None:
        raise UsageError(f"device {name!r}: {world_size()} processes cannot share it; use cuda, and each takes its own")
    count, local = torch.cuda.device_count(), local_rank()
    if count == 1:
        return torch.device("cuda", 0)  # the scheduler shows each process its own device only
    if local >= count:
        raise UsageError(
            f"local rank {local}: this machine has {count} CUDA devices; start at most {count} processes on each"
        )
    return torch.device("cuda", local)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def peers_may_end() -> Iterator[None]:
    """Turn a broken connection into one line. The rank that broke it printed the reason, unless it was killed."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(
            word in text for word in ("gloo", "Gloo", "NCCL", "Connection", "peer")
        ):
            raise
        raise TrainingError(
            "the connection to another process of this run broke: it ended, or was killed (out of memory?); what it "
            f"said stands elsewhere in the output ({text.splitlines()[0][:200]})"
        ) from None


class StopSignals:
    """While it is open, SIGTERM and SIGUSR1 (what schedulers send before they take a machine back) are noted, not obeyed."""

    SIGNALS: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None  # its name

    def __enter__(self) -> "StopSignals":
        try:
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        except ValueError:  # not in the main thread, where Python takes no handlers
            self._before = {}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
