"""`genrecal train --profile N`: the first N steps of each stage, with time and peak memory measured by part."""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genrecal.errors import UsageError
from genrecal.folders import FolderLock
from genrecal.run_folder import LOCK_FILE

if TYPE_CHECKING:
    from genrecal.train.run import Run

PARTS = ("forward", "backward", "optimizer")
MARK = ".profile"  # a file in the folder of a profile, which may be deleted


class Clock:
    """Seconds, and on CUDA peak bytes, by part of a step. `off` (the default) measures nothing and waits for nothing."""

    def __init__(self, device: torch.device | None = None):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.device is None:
            yield
            return
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """What was measured since the last call, for the step's line of metrics."""
        values: dict[str, float] = {f"{name}_seconds": value for name, value in self.seconds.items()}
        values |= {f"{name}_gb": peak / 1e9 for name, peak in self.peaks.items()}
        self.seconds, self.peaks = {}, {}
        return values


def profiled_run(run: "Run", steps: int) -> "Run":
    """The same run cut to its first steps, without checkpoints and evaluation, in a folder beside the run's own."""
    stages = {
        name: dataclasses.replace(getattr(run.config, name), max_steps=steps, checkpoint_every=0)
        for name in ("stage1", "stage2", "stage3")
    }
    config = dataclasses.replace(
        run.config,
        **stages,
        wandb="",
        evaluate=dataclasses.replace(run.config.evaluate, data=()),
        measure=dataclasses.replace(run.config.measure, samples=0),
    )
    return dataclasses.replace(run, path=run.path.with_name(f"{run.path.name}.profile"), config=config)


@contextmanager
def scratch(path: Path, *, first: bool) -> Iterator[None]:
    """A folder that is empty before and gone afterwards; rank 0 sees to it.

    Raises UsageError if something other than a profile, which a kill left behind, is there.
    """
    if first:
        if path.exists():
            if not (path / MARK).exists():
                raise UsageError(
                    f"{path}: --profile writes there and deletes it; move it away, or choose another --out"
                )
            with FolderLock(path / LOCK_FILE, "profiling in"):  # raises if another profile is running
                shutil.rmtree(path)
        path.mkdir(parents=True)
        (path / MARK).touch()
    try:
        yield
    finally:
        if first:
            shutil.rmtree(path, ignore_errors=True)


def profile_text(lines: Sequence[dict[str, Any]]) -> str:
    """Measured steps as text: of each stage the last step, which no first use of a kernel slows down."""
    shown = []
    for stage in sorted({line["stage"] for line in lines}):
        last = [line for line in lines if line["stage"] == stage and "seconds" in line][-1]
        shown.append(
            f"stage {stage}   {last['samples']} samples, {last['student_tokens']} student tokens in {last['seconds']:.3g} s; "
            f"peak memory {last['memory_gb']:.3g} GB"
        )
        waited = last["data_wait"] * last["seconds"]
        for name, seconds in (("data", waited), *((part, last.get(f"{part}_seconds", 0.0)) for part in PARTS)):
            peak = f", peak {last[f'{name}_gb']:.3g} GB" if f"{name}_gb" in last else ""
            shown.append(f"  {name:<10}{seconds:8.3f} s{peak}")
    return "\n".join(shown)
