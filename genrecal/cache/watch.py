"""Counts, rates, time by part, progress and the status file of a run of the cache job."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from genrecal.errors import StoppedError, UsageError
from genrecal.files import write_whole
from genrecal.inspect.summary import blind_teacher
from genrecal.progress import Progress
from genrecal.samples.survey import Reasons, too_many_bad
from genrecal.shards.manifest import CACHED, ManifestRow

STATUS_EVERY_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PARTS = ("rendering", "teacher", "coding", "writing")


class Watch:
    """Counts what one run of the job does. Several threads may call its methods. Use as a context manager.

    Args:
        total: input records of this run's shards.
        done: records that were finished before; `skipped` of them were skipped.
        num_samples: input records of the whole job.
        max_skip: share of those that may be skipped; one more raises DataError.
        status_file: where a thread writes what `status` gives, every few seconds and at the end; None for nowhere.
        facts: further fields of the status.
        title: what is done, for people and programs: `cache`, or `answers` while the teacher writes them.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        skipped: int = 0,
        num_samples: int,
        max_skip: float = 1.0,
        status_file: Path | None = None,
        facts: dict[str, Any] | None = None,
        title: str = "cache",
    ):
        self.total, self.num_samples, self.max_skip = total, num_samples, max_skip
        self.status_file, self.facts = status_file, facts or {}
        self.counts: Counter[str] = Counter(records=done, through=done, skipped=skipped)  # see `count`
        self.reasons: Counter[str] = Counter()  # why this run skipped records
        self.seconds = dict.fromkeys(PARTS, 0.0)  # of each of PARTS, over all threads
        self.warnings: list[str] = []
        self.state = "running"
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, name="status", daemon=True)
        self.title = title
        self._progress = Progress(title, total, "samples", done=done)

    def count(self, **more: float) -> None:
        """Add to the counts.

        `records`: input records that are finished or skipped. `through`: those that the teacher has run over, or will not;
        progress and time left go by it. `samples`, `tokens`: that the teacher ran over, without padding. `answers`: that it
        wrote. `bytes`: of finished shards. `context_answers`, `unread_reasoning`: see `Renderer.settle`.
        """
        with self._lock:
            self.counts.update(more)  # type: ignore[arg-type]
            if more.get("through"):
                self._progress.advance(more["through"], self._note())

    def skip(self, reason: str) -> None:
        """Count a skipped record. Raises DataError when there are too many."""
        self.add({"skipped": 1}, {reason: 1})

    def add(
        self,
        counts: dict[str, float],
        reasons: dict[str, int],
        seconds: dict[str, float] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Add what a watch in another process counted. Raises DataError when too many records are skipped."""
        self.warn(warnings)
        self.count(**counts)
        with self._lock:
            self.reasons.update(reasons)
            for part, more in (seconds or {}).items():
                self.seconds[part] += more
            check_skipped(self.counts["skipped"], self.num_samples, self.max_skip, self.reasons)

    def finished(self, rows: Sequence[ManifestRow], size: int, head_rows: int) -> None:
        """Count a shard of `size` bytes, and warn if the teacher does no better than chance on its answers."""
        self.count(bytes=size)
        cached = [row for row in rows if row.status == CACHED and row.answer_tokens]
        if tokens := sum(row.answer_tokens or 0 for row in cached):
            agreement, log_prob = (
                sum((row.answer_tokens or 0) * getattr(row, name) for row in cached) / tokens
                for name in ("top1_agreement", "log_prob")
            )
            self.warn(blind_teacher(agreement, log_prob, head_rows))

    def warn(self, warnings: Iterable[str]) -> None:
        """Print the first warning of the run at once: it is seldom true of one shard alone."""
        for warning in warnings:
            with self._lock:
                self.warnings.append(warning)
                if len(self.warnings) == 1:
                    self._progress.say(f"warning: {warning}; `genrecal inspect` reads the finished shards")

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to that of a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[part] += time.perf_counter() - start

    def status(self) -> dict[str, Any]:
        """The content of the status file; docs/cache.md lists every field."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = self._progress.seconds_left()
        return self.facts | {
            "state": self.state,
            "doing": self.title,
            "records": self.counts["records"],
            "records_total": self.total,
            "skipped": self.counts["skipped"],
            "samples": self.counts["samples"],
            "tokens": self.counts["tokens"],
            "answers": self.counts["answers"],
            "bytes": self.counts["bytes"],
            "warnings": self.warnings[:1],
            "seconds": round(seconds, 1),
            "samples_per_second": round(self.counts["samples"] / seconds, 3),
            "tokens_per_second": round(self.counts["tokens"] / seconds, 1),
            "megabytes_per_second": round(self.counts["bytes"] / 1e6 / seconds, 3),
            "seconds_left": None if left is None else round(left, 1),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _note(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = {name: self.counts[name] / seconds for name in ("answers", "samples", "tokens", "bytes")}
        shown = [f"{rate['answers']:.1f} answers/s"] if self.title == "answers" else []
        if rate["tokens"]:
            # Bytes are counted when a shard is finished.
            size = f"{rate['bytes'] / 1e6:.1f} MB/s" if rate["bytes"] else f"{rate['samples']:.3g} samples/s"
            shown = [f"{rate['tokens']:.0f} tokens/s", size]
        return ", ".join([*shown, f"{self.counts['skipped']} skipped"])

    def _write_status(self) -> None:
        """Raises OSError."""
        if self.status_file is not None:
            with self._lock:
                status = self.status()
            write_whole(self.status_file, (json.dumps(status, indent=2) + "\n").encode())

    def _keep_writing(self) -> None:
        while not self._ended.wait(STATUS_EVERY_SECONDS):
            with contextlib.suppress(OSError):  # a full disk may have room later
                self._write_status()

    def end(self, error: BaseException | None) -> None:
        """Write the last status, unless it is written. The job calls this before it waits for its threads."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._writer.is_alive():
            self._writer.join()
        if error is not None:
            self.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.facts = self.facts | {"error": " ".join(str(error).split()) or type(error).__name__}
        with contextlib.suppress(OSError):
            self._write_status()

    def __enter__(self) -> "Watch":
        try:
            self._write_status()
        except OSError as error:
            raise UsageError(f"--status-file {self.status_file}: {error.strerror or error}") from None
        if self.status_file is not None:
            self._writer.start()
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self.end(error)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """In this block, the signals that schedulers send before they take a machine away interrupt as Ctrl-C does.

    Raises StoppedError then. Only the main thread receives signals; in another one nothing changes.
    """

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # `nohup` ignores SIGHUP, which stays so.
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    except KeyboardInterrupt as error:
        if not str(error):  # Ctrl-C
            raise
        raise StoppedError(
            f"stopped by {error}; finished shards are kept, run the same command again to resume"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check_skipped(skipped: int, num_samples: int, max_skip: float, reasons: Counter[str]) -> None:
    """Raises DataError with the most frequent reasons of this run if more than this share of the input is skipped."""
    if skipped > max_skip * num_samples:
        raise too_many_bad(skipped, num_samples, max_skip, Reasons.of(reasons))
