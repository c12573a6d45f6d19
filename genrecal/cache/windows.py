"""Records rendered by a pool of threads, one window ahead of the teacher, in bounded memory."""

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from genrecal.cache.options import CacheOptions
from genrecal.cache.proof import Proof
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch
from genrecal.errors import SampleError, StorageError
from genrecal.samples import BadRecord, ImageSource, Sample
from genrecal.shards.storage import Store
from genrecal.shards.writer import CodedRecord
from genrecal.vlm.rendering import Encoded

WINDOW_SAMPLES = 256  # records of a shard that are rendered before their batches are formed
WINDOW_BYTES = 2**31  # of rendered tensors and images, after which a window closes with fewer records
CODERS = 2  # threads that code records
ReadRecord = Callable[[int], Sample | BadRecord]
T = TypeVar("T")


@dataclass
class Item:
    """One input record in the pipeline.

    Args:
        index: its number in the input.
        encoded: its rendering, until the teacher has run.
        problem: why it has no rendering or no states.
        coded: the record that is being coded, after the teacher has run.
        notes: counts of answers that are context only, and of fields that the template does not write.
    """

    index: int
    sample: Sample | BadRecord
    encoded: Encoded | None = None
    problem: SampleError | None = None
    coded: "Future[CodedRecord] | None" = None
    notes: Counter[str] = field(default_factory=Counter)


class Run:
    """What the shards of one run are made with: the teacher, the data, and threads that work beside the teacher.

    Use as a context manager, in the thread that runs the teacher.

    Args:
        threads: threads that read, decode and preprocess samples.
    """

    def __init__(
        self,
        teacher: Teacher,
        samples: Sequence[Sample | BadRecord],
        store: Store,
        options: CacheOptions,
        threads: int,
        watch: Watch,
    ):
        self.teacher, self.samples, self.store, self.options, self.watch = teacher, samples, store, options, watch
        self.threads = threads
        self.render, self.prefetch = ThreadPoolExecutor(threads, "render"), ThreadPoolExecutor(1, "prefetch")
        self.code, self.write = ThreadPoolExecutor(CODERS, "code"), ThreadPoolExecutor(1, "write")
        self._proof = Proof()
        self._written: Future[Any] = Future()
        self._written.set_result(None)

    def records(self, shard: int) -> range:
        """The input records of a shard."""
        return self.options.records(shard, len(self.samples))

    def prove(self, window: list[Item], *, batch_tokens: int = 0) -> None:
        """Have the teacher prove itself on some of these conversations, if it has not yet. Raises ModelError."""
        ready = [(item.sample, item.encoded) for item in window if isinstance(item.sample, Sample) and item.encoded]
        with self.watch.timed("teacher"):
            self._proof.check(self.teacher, ready, batch_tokens=batch_tokens)

    def windows(self, records: Sequence[int], read: ReadRecord) -> Iterator[list[Item]]:
        """Render these records, in windows that follow from their order and size alone.

        A window has at most WINDOW_SAMPLES records, and its tensors at most WINDOW_BYTES plus those of one record. Beside
        it, 2 x `threads` records are rendered ahead.

        Args:
            read: gives a record by its number, in any thread.
        """

        def rendered(index: int) -> Item:
            with self.watch.timed("rendering"):
                return render_record(self.teacher, index, read(index), self.options)

        waiting: deque[Future[Item]] = deque()
        window, held = [], 0
        for index in records:
            waiting.append(self.render.submit(rendered, index))
            while waiting and (index == records[-1] or len(waiting) > 2 * self.threads):
                item = waiting.popleft().result()
                window.append(item)
                held += item.encoded.num_bytes if item.encoded is not None else 0
                if len(window) == WINDOW_SAMPLES or held >= WINDOW_BYTES:
                    yield window
                    window, held = [], 0
        if window:
            yield window

    def ahead(self, items: Iterator[T]) -> Iterator[T]:
        """The same items. Another thread makes the next one while one is used."""
        coming = self.prefetch.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = self.prefetch.submit(next, items, None)
            yield item

    def write_later(self, call: Callable[..., T], *args: Any) -> "Future[T]":
        """Have the writing thread do this, after what it was given before. Raises the error of that.

        At most one call is pending, so the memory of what waits to be written is bounded.
        """
        self._written.result()
        future = self.write.submit(call, *args)
        self._written = future
        return future

    def wait_for_writing(self) -> None:
        """Return when the writing thread has nothing to do."""
        self._written.exception()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self.render, self.prefetch, self.code, self.write):
            pool.shutdown(wait=True, cancel_futures=True)


def render_record(teacher: Teacher, index: int, sample: Sample | BadRecord, options: CacheOptions) -> Item:
    """Read the sample's images, once, and render it."""
    if isinstance(sample, BadRecord):
        return Item(index, sample, problem=SampleError(sample.reason))
    try:
        images = tuple(ImageSource(data=image.read(), suffix=image.suffix) for image in sample.images)
        given = dataclasses.replace(sample, images=images)
        sample = teacher.renderer.settle(given)
        notes = Counter(context_answers=len(given.answers) - len(sample.answers))
        if any(m.reasoning for m in given.messages) and not teacher.renderer.marks.writes_reasoning:
            notes["unread_reasoning"] = 1
        return Item(index, sample, teacher.encode(sample, max_tokens=options.max_tokens or None), notes=notes)
    except SampleError as error:
        return Item(index, sample, problem=error)
    except StorageError:
        raise
    except Exception as error:  # of a processor or tokenizer; one sample must not end the job
        reason = f"cannot be rendered: {type(error).__name__}: {plain_reason(error)}"
        return Item(index, sample, problem=SampleError(reason))


def plain_reason(error: Exception) -> str:
    """An error's words without the addresses that differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))
