"""What a run writes down: one line of JSON a step, and the same to TensorBoard."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from genrecal.files import write_whole
from genrecal.train.stages import StepOutput

METRICS_FILE = "metrics.jsonl"


TermSums = dict[str, tuple[float, int]]  # of each term: its sum over rows, and their number


def term_sums(outputs: Iterable[StepOutput]) -> TermSums:
    """Sums of every term over one rank's micro-steps."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for output in outputs:
        for name, value in output.sums.items():
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + output.counts[name]
    return {name: (sums[name].item(), counts[name]) for name in sums}


def term_means(ranks: Sequence[TermSums]) -> dict[str, float]:
    """Means of every term over the rows of a whole global batch, from the sums of each rank."""
    names = dict.fromkeys(name for sums in ranks for name in sums)
    total = {
        name: [sum(column) for column in zip(*(s[name] for s in ranks if name in s), strict=True)] for name in names
    }
    return {name: value / count for name, (value, count) in total.items() if count}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, oldest first; a last line that a kill cut short is left out."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class RunLog:
    """Appends metrics of one stage. Steps that a resumed run does again are taken out first.

    Args:
        writes: False keeps it silent: of several processes, one writes.
    """

    def __init__(self, run: Path, stage: int, *, first_step: int, writes: bool = True):
        self.stage, self.writes = stage, writes
        self.left_out = {"skipped": 0, "damaged": 0}
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [
            line
            for line in read_metrics(run)
            if line["stage"] < stage or (line["stage"] == stage and line["step"] < first_step)
        ]
        write_whole(run / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.left_out = {
            name: sum(len(line.get(name, ())) for line in kept if line["stage"] == stage)
            for name in ("skipped", "damaged")
        }
        self._file = (run / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(run / "tensorboard" / f"stage{stage}"), purge_step=first_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        self._file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, len(value) if isinstance(value, list) else value, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self._file.close()
            self._board.close()
