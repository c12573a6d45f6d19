"""How a run of the cache job goes: counts, rates, time by part, the progress shown, and the status file for schedulers."""

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

from genrecal.cache.proof import Proof
from genrecal.cache.teacher import Teacher
from genrecal.errors import StoppedError, UsageError
from genrecal.files import write_whole
from genrecal.inspect.summary import blind_teacher
from genrecal.progress import Progress
from genrecal.samples import Sample
from genrecal.samples.survey import Reasons, too_many_bad
from genrecal.shards.manifest import CACHED, ManifestRow
from genrecal.vlm.rendering import Encoded

STATUS_EVERY_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PARTS = ("rendering", "teacher", "coding", "writing")


class Watch:
    """Counts what one run of the job does; its methods may be called by several threads. Use as a context manager.

    Args:
        total: input records of this run's shards.
        done: how many of them were finished before, and `skipped` of those skipped.
        num_samples: input records of the whole job.
        max_skip: share of those that may be skipped; one more raises DataError.
        status_file: where a thread writes what `status` gives, every few seconds and at the end; None for nowhere.
        facts: what else the status says.
        proof: what the teacher has proved already; None for nothing.
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
        proof: Proof | None = None,
        title: str = "cache",
    ):
        self.total, self.num_samples, self.max_skip = total, num_samples, max_skip
        self.status_file, self.facts = status_file, facts or {}
        self.counts: Counter[str] = Counter(records=done, through=done, skipped=skipped)  # see `count`
        self.reasons: Counter[str] = Counter()  # why this run skipped records
        self.seconds = dict.fromkeys(PARTS, 0.0)  # of each of PARTS, over all threads
        self.warnings: list[str] = []
        self.state = "running"
        self._proof = proof or Proof()
        self._lock, self._proving = threading.Lock(), threading.Lock()
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, name="status", daemon=True)
        self.title = title
        self._progress = Progress(title, total, "samples", done=done)

    def count(self, **more: float) -> None:
        """Count on: `records` of the input that are done with, `samples` and `tokens` that the teacher ran over (no
        padding), `answers` that it wrote, `bytes` of finished shards, and of what was cached `context_answers` and
        `unread_reasoning` (see `genrecal.vlm.rendering.Renderer.settle`).

        `through` counts the records that the teacher is done with, or has no work with: progress and the time left go by it,
        since records are done with many at a time.
        """
        with self._lock:
            self.counts.update(more)  # type: ignore[arg-type]  # a part of one is as good
            if more.get("through"):
                self._progress.advance(more["through"], self._note())

    def skip(self, reason: str) -> None:
        """Count a skipped record. Raises DataError when there are too many."""
        with self._lock:
            self.counts["skipped"] += 1
            self.reasons[reason] += 1
            check_skipped(self.counts["skipped"], self.num_samples, self.max_skip, self.reasons)

    def finished(self, rows: Sequence[ManifestRow], size: int, head_rows: int) -> None:
        """Count a shard of `size` bytes, and warn if the teacher does no better than chance on its answers."""
        self.count(bytes=size)
        rows = [row for row in rows if row.status == CACHED]
        tokens = sum(row.answer_tokens or 0 for row in rows)
        if tokens:
            agreement, log_prob = (
                sum(row.answer_tokens * getattr(row, name) for row in rows) / tokens
                for name in ("top1_agreement", "log_prob")
            )
            self.warn(blind_teacher(agreement, log_prob, head_rows))

    def warn(self, warnings: Iterable[str]) -> None:
        """Say the first warning of the run at once: it is seldom true of one shard alone."""
        for warning in warnings:
            with self._lock:
                first = not self.warnings
                self.warnings.append(warning)
            if first:
                self._progress.say(f"warning: {warning}; `genrecal inspect` reads the shards that are there")

    def add(
        self, counts: dict[str, int], reasons: dict[str, int], seconds: dict[str, float], warnings: Sequence[str]
    ) -> None:
        """Count what a watch in another process counted. Raises DataError when there are too many skipped records."""
        self.warn(warnings)
        with self._lock:
            self.reasons.update(reasons)
            for part in PARTS:
                self.seconds[part] += seconds[part]
        self.count(**counts)
        check_skipped(self.counts["skipped"], self.num_samples, self.max_skip, self.reasons)

    def prove(self, teacher: Teacher, items: Sequence[tuple[Sample, Encoded]], *, batch_tokens: int = 0) -> None:
        """Have the teacher prove itself on some of these conversations, if it has not yet. Raises ModelError."""
        with self._proving:
            self._proof.check(teacher, items, batch_tokens=batch_tokens)

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
        """What the status file says; docs/cache.md lists every field."""
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
        tokens, megabytes = self.counts["tokens"] / seconds, self.counts["bytes"] / 1e6 / seconds
        if self.title == "answers":
            return f"{self.counts['answers'] / seconds:.1f} answers/s, {self.counts['skipped']} skipped"
        return f"{tokens:.0f} tokens/s, {megabytes:.1f} MB/s, {self.counts['skipped']} skipped"

    def _write_status(self) -> None:
        """Raises OSError."""
        if self.status_file is not None:
            with self._lock:
                status = self.status()
            write_whole(self.status_file, (json.dumps(status, indent=2) + "\n").encode())

    def _keep_writing(self) -> None:
        while not self._ended.wait(STATUS_EVERY_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is full now may have room later
                self._write_status()

    def end(self, error: BaseException | None) -> None:
        """Write the last status, unless that is done. The job says so at once, before it waits for what is under way."""
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
    """While it is open, the signals with which machines are taken back interrupt the block as Ctrl-C does.

    Raises StoppedError then. Only the main thread takes signals; in another one nothing changes.
    """

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [
            number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        ]  # nohup ignores one
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
    """Raises DataError if more than this share of the input is skipped, with the commonest reasons of this run."""
    if skipped > max_skip * num_samples:
        raise too_many_bad(skipped, num_samples, max_skip, Reasons.of(reasons))
