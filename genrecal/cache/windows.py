"""Input records rendered side by side, ahead of the teacher, in windows of bounded memory."""

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch
from genrecal.errors import SampleError, StorageError
from genrecal.samples import BadRecord, ImageSource, Sample
from genrecal.vlm.rendering import Encoded

WINDOW_SAMPLES = 256  # records of a shard that are rendered before their batches are formed
WINDOW_BYTES = 2**31  # of rendered tensors and pictures, after which a window closes with fewer
CODERS = 2  # threads that code records
ReadRecord = Callable[[int], Sample | BadRecord]


class Threads:
    """The threads that work beside the teacher. One set serves all shards of a process. Use as a context manager.

    Args:
        renderers: that read, decode and preprocess samples.
    """

    def __init__(self, renderers: int):
        self.num_renderers = renderers
        self.render: Executor = ThreadPoolExecutor(renderers, "render")
        self.code: Executor = ThreadPoolExecutor(CODERS, "code")

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self.render, self.code):
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Item:
    """One input record on its way: its rendering until the teacher has run, or why it has none."""

    sample: Sample | BadRecord
    encoded: Encoded | None
    result: SampleError | None
    notes: dict[str, int] = field(default_factory=dict)  # what of it is not an answer to learn, or not read


def windows(
    teacher: Teacher, read: ReadRecord, records: Sequence[int], options: CacheOptions, threads: Threads, watch: Watch
) -> Iterator[list[Item]]:
    """These records, rendered side by side, in windows that the order and size of the records alone decide.

    At most WINDOW_SAMPLES of them are in a window, their rendered tensors at most WINDOW_BYTES and one record's; and beside
    them 2 x `threads.num_renderers` records that are rendered ahead.

    Args:
        read: gives a record by its number, in any thread.
    """

    def render(index: int) -> Item:
        with watch.timed("rendering"):
            return render_record(teacher, read(index), options)

    waiting: deque[Future[Item]] = deque()
    window, held = [], 0
    for index in records:
        waiting.append(threads.render.submit(render, index))
        last = index == records[-1]
        while waiting and (last or len(waiting) > 2 * threads.num_renderers):
            item = waiting.popleft().result()
            window.append(item)
            held += item.encoded.num_bytes if item.encoded is not None else 0
            if len(window) == WINDOW_SAMPLES or held >= WINDOW_BYTES:
                yield window
                window, held = [], 0
    if window:
        yield window


def render_record(teacher: Teacher, sample: Sample | BadRecord, options: CacheOptions) -> Item:
    """Read the sample's pictures, once, and render it."""
    if isinstance(sample, BadRecord):
        return Item(sample, None, SampleError(sample.reason))
    try:
        images = tuple(ImageSource(data=image.read(), suffix=image.suffix) for image in sample.images)
        given = dataclasses.replace(sample, images=images)
        sample = teacher.renderer.settle(given)
        notes = {"context_answers": len(given.answers) - len(sample.answers)}
        if any(m.reasoning for m in given.messages) and not teacher.renderer.marks.writes_reasoning:
            notes["unread_reasoning"] = 1
        return Item(sample, teacher.encode(sample, max_tokens=options.max_tokens or None), None, notes)
    except SampleError as error:
        return Item(sample, None, error)
    except (Stopped, StorageError, KeyboardInterrupt):
        raise
    except Exception as error:  # a processor's or tokenizer's own; one sample must not end the job
        return Item(sample, None, SampleError(f"cannot be rendered: {type(error).__name__}: {plain_reason(error)}"))


def plain_reason(error: Exception) -> str:
    """An error's words without what differs from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))


class Stopped(Exception):
    """Another shard of this process failed; the work on this one ends."""
