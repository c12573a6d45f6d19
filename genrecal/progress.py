"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere; numbers in words."""

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
    """A bar with its note on the line below, so that a long note does not shrink the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Progress:
    """Counts towards a total on standard error.

    Args:
        title: the kind of work.
        total: number of units.
        unit: name of a unit, in the plural.
        done: units that an earlier run finished.
        shown: whether to print; of several processes, one prints.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, shown: bool = True):
        self.title, self.total, self.unit, self.shown = title, total, unit, shown
        self.done: float = done
        # Time and count of the first advance (it ends the start-up) and of the last one.
        self._first: tuple[float, float] | None = None
        self._last = (0.0, float(done))
        self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = _NotedProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=done, rate="", note="")

    def advance(self, count: float = 1, note: str = "") -> None:
        """Add to the count (fractions are allowed) and show a short note."""
        self.done += count
        self._last = (time.monotonic(), self.done)
        self._first = self._first or self._last
        pace = self._pace()
        if self._bar is not None:
            rate = "" if pace is None else f"{1 / pace:.3g} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, note=note)
        elif self.shown and (self._last[0] - self._last_line >= LINE_EVERY_SECONDS or self.done >= self.total):
            self._last_line = self._last[0]
            how = [] if pace is None else [f"{1 / pace:.3g}/s", f"{self.seconds_left():.0f} s left"]
            text = ", ".join(
                [f"{self.title}: {self.done:.0f}/{self.total} {self.unit}", *how, *([note] if note else [])]
            )
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def seconds_left(self) -> float | None:
        """Seconds left at the pace from the first advance to the last; None before the second advance."""
        if self.done >= self.total:
            return 0.0
        pace = self._pace()
        return None if pace is None else max(0.0, (self.total - self.done) * pace - (time.monotonic() - self._last[0]))

    def _pace(self) -> float | None:
        """Seconds per unit; None before two advances at different times."""
        if self._first is None or self._last[0] <= self._first[0] or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
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
    """Bytes in decimal units with three digits, such as `1.44 TB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 1000 else f"{size / 1000:.3g} PB"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 shard`, `2 shards`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
