"""One teacher, asked by several shards: it works in one thread, and the lowest shard that waits comes first."""

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

from genrecal.cache.teacher import Evidence, States, Teacher
from genrecal.cache.watch import Watch
from genrecal.cache.windows import Stopped
from genrecal.errors import SampleError
from genrecal.samples import Sample
from genrecal.shards.head import FrozenHead
from genrecal.vlm.rendering import Encoded

Request = tuple[int, int, Callable[[], Any] | None, "Future[Any]"]  # shard, count, what to call, for whom

LOOK_EVERY_SECONDS = 0.2  # whether somebody still serves


class Turns:
    """Calls of a teacher by other threads, run by the one that calls `serve`.

    The first shard's batches come before the second's, so that one shard ends, and is written, while the next one runs.
    `watch` is told how long the teacher works.
    """

    def __init__(self, teacher: Teacher, watch: Watch):
        self.teacher, self._watch = teacher, watch
        self.stopped = False
        self._requests: queue.PriorityQueue[Request] = queue.PriorityQueue()
        self._count = itertools.count()  # requests of like rank are served in their order, and never compared further

    def of_shard(self, shard: int) -> "TeacherInTurn":
        """The teacher, as the thread that makes this shard may use it."""
        return TeacherInTurn(self, shard)

    def ask(self, shard: int, call: Callable[[], Any]) -> Any:
        """Have `call` run by the serving thread, and wait for what it gives. Raises Stopped after `stop`."""
        future: Future[Any] = Future()
        self._requests.put((shard, next(self._count), call, future))
        while not wait([future], timeout=LOOK_EVERY_SECONDS).done:
            if self.stopped and future.cancel():
                raise Stopped
        return future.result()

    def serve(self, done: "Sequence[Future[Any]]") -> Iterator["Future[Any]"]:
        """Run requests until all of these futures are done, and give each of them when it is."""
        for finished in done:
            finished.add_done_callback(lambda future: self._requests.put((-1, next(self._count), None, future)))
        left = len(done)
        while left:
            _, _, call, future = self._requests.get()
            if call is None:
                left -= 1
                yield future
            elif future.set_running_or_notify_cancel():
                try:
                    with self._watch.timed("teacher"):
                        result = call()
                    future.set_result(result)
                except BaseException as error:
                    future.set_exception(error)
                    if not isinstance(error, Exception):
                        raise

    def stop(self) -> None:
        """Nobody serves any more: who waits, or asks, gets Stopped."""
        self.stopped = True


class TeacherInTurn:
    """One shard's view of a teacher that others use too; see `Teacher`."""

    def __init__(self, turns: Turns, shard: int):
        self._turns, self._shard = turns, shard
        self.path, self.backend = turns.teacher.path, turns.teacher.backend
        self.versions, self.renderer = turns.teacher.versions, turns.teacher.renderer

    @property
    def head(self) -> FrozenHead:
        return self._turns.teacher.head

    def encode(self, sample: Sample, *, max_tokens: int | None) -> Encoded:
        if self._turns.stopped:
            raise Stopped
        return self._turns.teacher.encode(sample, max_tokens=max_tokens)

    def states(
        self, batch: Sequence[Encoded], *, questions: Sequence[bool], top_k: int, draws: int = 0
    ) -> list[States | SampleError]:
        teacher = self._turns.teacher
        return self._turns.ask(
            self._shard, lambda: teacher.states(batch, questions=questions, top_k=top_k, draws=draws)
        )

    def write(self, batch: Sequence[Encoded], **options: Any) -> list[str | SampleError]:
        teacher = self._turns.teacher
        return self._turns.ask(self._shard, lambda: teacher.write(batch, **options))

    def evidence(self, encoded: Encoded) -> Evidence:
        evidence: Evidence = self._turns.ask(self._shard, lambda: self._turns.teacher.evidence(encoded))
        return evidence
