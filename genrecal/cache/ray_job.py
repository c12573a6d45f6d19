"""The cache job on a Ray cluster: a Ray Data pool of actors, each with a teacher that makes shards.

Ray places the actors, starts lost ones anew and adds nodes. What is done is known from the cache alone: shards that a
lost node or process took with it are missing in it, and the next round of calls makes them.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import genrecal.errors
from genrecal.cache.job import (
    CACHE,
    CacheReport,
    Facts,
    Step,
    check_status_file,
    prepare_directory,
    run_job,
    run_shards,
)
from genrecal.cache.options import CacheOptions, RayOptions, WorkOptions
from genrecal.cache.proof import Proof
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch
from genrecal.cache.windows import plain_reason
from genrecal.errors import GenrecalError, ModelError, StorageError, UsageError
from genrecal.samples import SampleSet
from genrecal.shards.storage import Store, open_store

SHARDS_A_CALL = 8  # at most; the shards of a call overlap as those of a process do, and go on in one place
CALLS_AN_ACTOR = 4  # at least, where there are shards enough: so that no actor waits long for the last one
CONNECT_SECONDS = 10
ROUNDS = 3  # in a row that finish no shard, before the job fails


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an actor needs to know.

    Args:
        folder: where relative paths start; the actor works there if it has it.
    """

    load_teacher: Callable[[], Teacher]
    load_samples: Callable[[], SampleSet]
    url: str
    options: CacheOptions
    work: WorkOptions
    folder: str
    step: Step = CACHE


def run_ray_job(
    load_teacher: Callable[[], Teacher],
    load_samples: Callable[[], SampleSet],
    cache: "str | os.PathLike[str] | Store",
    options: CacheOptions,
    work: WorkOptions,
    cluster: RayOptions,
) -> CacheReport:
    """`genrecal.cache.job.run_cache_job` on a Ray cluster, with the same bytes. This process loads no teacher.

    Args:
        load_teacher, load_samples: called in every actor, so they are pickled.
        cache: on storage that all nodes share.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        GenrecalError: what went wrong in an actor: a user's mistake at once, anything else after ROUNDS.
    """
    if work.workers != 1:
        raise UsageError(
            f"--workers {work.workers} with --ray: expected one of the two; Ray shares out the shards itself"
        )
    ray, store, samples = _ray(), open_store(cache), load_samples()
    check_status_file(work, store)
    job = Job(
        load_teacher=load_teacher,
        load_samples=load_samples,
        url=store.url,
        options=options,
        work=WorkOptions(threads=work.threads),
        folder=os.getcwd(),
    )
    with _connected(ray, cluster.address):
        return run_job(
            lambda step, shards, watch: _make_shards(
                dataclasses.replace(job, step=step), shards, store, len(samples), cluster, watch
            ),
            samples,
            store,
            options,
            work,
        )


def _make_shards(
    job: Job, shards: list[int], store: Store, num_samples: int, cluster: RayOptions, watch: Watch
) -> dict[int, Facts]:
    """Do the job's step for these shards in rounds; their facts.

    Without any, one teacher is still asked whether the cache is its own.
    """
    gpus, actors = _resources(cluster)
    before, done, idle, failure = watch.counts["records"], dict[int, Facts](), 0, None
    failed: set[int] = set()  # they come last: a call that fails takes the next one of its actor with it
    while True:
        missing = sorted((shard for shard in shards if shard not in done), key=lambda shard: (shard in failed, shard))
        for answer in _answers(job, missing, gpus, actors):
            if "error" not in answer:
                watch.add(**answer)
            elif answer["kind"]:  # of a user's mistake or a full disk, which comes back however often it is tried
                raise getattr(genrecal.errors, answer["kind"])(answer["error"])
            else:
                failure = answer["error"]
                failed.update(answer["shards"])
        new = job.step.finished(store, missing)
        done |= new
        records = sum(len(job.options.records(shard, num_samples)) for shard in done)
        if lost := before + records - watch.counts["records"]:  # answers of shards that are there
            watch.count(records=lost, through=before + records - watch.counts["through"])
        if len(done) == len(shards):
            return done
        idle = 0 if new else idle + 1
        if idle == ROUNDS:
            left = [shard for shard in missing if shard not in new]
            named = ", ".join(map(str, left[:5])) + (", ..." if len(left) > 5 else "")
            raise (ModelError if failure else StorageError)(
                f"{store.url}: {len(left)} shards ({named}) were not made in {ROUNDS} rounds: "
                + (failure or "the process or the node was lost each time (out of memory?); see Ray's logs")
                + "; finished shards are whole: run the same command again once this is mended"
            )


def _answers(job: Job, shards: list[int], gpus: float, actors: int) -> Iterator[dict[str, Any]]:
    """One round: what the calls of the actors answer, in any order. Calls whose actor or node is lost answer nothing."""
    import ray

    size = max(1, min(SHARDS_A_CALL, len(shards) // (CALLS_AN_ACTOR * actors)))
    calls = [{"shards": shards[start : start + size]} for start in range(0, max(len(shards), 1), size)]
    with warnings.catch_warnings(action="ignore"):  # the last two have no names of their own any more
        answers = ray.data.from_items(calls, override_num_blocks=len(calls)).map_batches(
            ShardMaker,
            fn_constructor_args=(job,),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(calls)), max_tasks_in_flight_per_actor=1),
            num_gpus=gpus or None,
            num_cpus=job.work.threads or 1,
            max_restarts=-1,  # wherever there is room
            max_task_retries=0,  # a call would wait for its own actor, forever if no node can take it
        )
    try:
        for row in answers.iter_rows():
            yield json.loads(row["answer"])
    except ray.exceptions.RayError:  # an answer was lost with its node
        pass


class ShardMaker:
    """An actor: loads the teacher once, at its first call, and makes shards."""

    def __init__(self, job: Job):
        self.job, self.failed = job, False
        self.loaded: tuple[Teacher, SampleSet, Store] | None = None
        self.proof = Proof()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        if self.failed:
            os._exit(1)  # a broken GPU context, say, stays with the process; Ray starts another
        return {"answer": [json.dumps(self._answer([int(shard) for call in batch["shards"] for shard in call]))]}

    def _answer(self, shards: list[int]) -> dict[str, Any]:
        """What was counted, or the error. `kind` is the class of an error that trying again does not mend."""
        try:
            return self._make(shards)
        except GenrecalError as error:
            return {"error": f"{error} (on node {socket.gethostname()})", "kind": type(error).__name__}
        except Exception as error:
            self.failed = True
            reason = f"{type(error).__name__}: {plain_reason(error)} (on node {socket.gethostname()})"
            return {"error": reason, "kind": "", "shards": shards}

    def _make(self, shards: list[int]) -> dict[str, Any]:
        job = self.job
        if self.loaded is None:
            if os.path.isdir(job.folder):
                os.chdir(job.folder)
            samples, teacher, store = job.load_samples(), job.load_teacher(), open_store(job.url)
            prepare_directory(teacher, samples, store, job.options)
            self.loaded = teacher, samples, store
        teacher, samples, store = self.loaded
        records = sum(len(job.options.records(shard, len(samples))) for shard in shards)
        with Watch(records, num_samples=len(samples), max_skip=job.options.max_skip, proof=self.proof) as watch:
            run_shards(job.step, teacher, samples, store, shards, job.options, job.work, watch)
        warnings = watch.warnings[:1]
        return {
            "counts": dict(watch.counts), "reasons": dict(watch.reasons), "seconds": watch.seconds, "warnings": warnings,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the cluster


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f'--ray needs Ray ({error}): pip install "genrecal[ray]"') from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """In a program that is connected to a cluster already, that one is used."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # calls that were lost; `_make_shards` makes what they were to make
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # Ray's own log files hold everything
            handler.setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    try:
        if address not in ("auto", "local"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself would try for minutes
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--ray {address}: no Ray cluster can be reached there ({reason}); expected auto, local or host:port; "
            "start one with `ray start --head`, or use --ray local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _resources(cluster: RayOptions) -> tuple[float, int]:
    """GPUs of an actor, and the number of actors."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max(node.get("GPU", 0) for node in nodes)
    gpus = cluster.gpus if cluster.gpus is not None else min(most, 1)
    if gpus > most:
        sys.stderr.write(
            f"genrecal: no node of the cluster has {gpus:g} GPUs now (at most {most:g}); waiting for one\n"
        )
    fitting = sum(int(node.get("GPU", 0) / gpus) if gpus else 1 for node in nodes)
    return gpus, cluster.actors or max(1, fitting)
