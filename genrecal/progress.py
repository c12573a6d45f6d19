"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_EVERY_SECONDS = 10.0


class _NotedProgress(RichProgress):
    """A bar with its note on a line below it, which would push the bar aside."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Progress:
    """Counts towards a total on standard error.

    Args:
        title: what is being done.
        total: how many there are.
        unit: what is counted, in the plural.
        done: how many were done before, by an earlier run.
        shown: whether it is printed at all; of several processes, one prints.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, shown: bool = True):
        self.title, self.total, self.unit, self.done, self.shown = title, total, unit, done, shown
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        self._bar: RichProgress | None = None
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = _NotedProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=done, rate="", note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on, with a few words on how it goes."""
        self.done += count
        seconds = time.monotonic() - self._start
        rate = (self.done - self._first) / max(seconds, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{rate:.1f} {self.unit}/s", note=note)
        elif self.shown and (time.monotonic() - self._last_line >= LINE_EVERY_SECONDS or self.done >= self.total):
            self._last_line = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            text = f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left"
            sys.stderr.write(f"{text}{', ' + note if note else ''}\n")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, style="yellow", markup=False, highlight=False)
        elif self.shown:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def human_bytes(count: int) -> str:
    """A size in decimal units, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 1000 else f"{size / 1000:.3g} PB"
