"""The cache job on a Ray cluster: plain Ray tasks over the shards that are not finished.

Each task loads the teacher and makes its shards as one process would. Ray places the tasks and runs those of a lost node or
process again; what is done is known from the cache alone, so a task that runs again makes only what is missing.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import genrecal.errors
from genrecal.cache.job import CACHE, CacheReport, Step, check_status_file, prepare_directory, run_job, run_shards
from genrecal.cache.options import CacheOptions, RayOptions, WorkOptions
from genrecal.cache.shard import Facts
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch
from genrecal.cache.windows import plain_reason
from genrecal.errors import GenrecalError, ModelError, UsageError
from genrecal.progress import counted
from genrecal.samples import SampleSet
from genrecal.shards.storage import Store, open_store

TASKS_PER_TEACHER = 4  # so that a slow machine does not keep the others waiting for long
MAX_RETRIES = 3  # of a task whose node or process is lost
LOOK_EVERY_SECONDS = 10.0  # into the cache, for what is finished
CONNECT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a task needs to know.

    Args:
        folder: where relative paths start; the task works there if its node has this folder.
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
        load_teacher, load_samples: called in every task, so they are pickled.
        cache: on storage that all nodes share.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        GenrecalError: an error of a task: a user's mistake at once, anything else when no shard can be finished any more.
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
                dataclasses.replace(job, step=step), shards, store, cluster, watch
            ),
            samples,
            store,
            options,
            work,
        )


def _make_shards(job: Job, shards: list[int], store: Store, cluster: RayOptions, watch: Watch) -> dict[int, Facts]:
    """Do the job's step for these shards, in passes over those that are missing, as long as a pass finishes any; their facts.

    Without any shards, one task still checks that the cache is of this job.
    """
    import ray

    gpus, teachers = _resources(cluster)
    # Ray gives each task with a GPU a process of its own, so a broken GPU context ends with its task.
    task: Any = ray.remote(num_gpus=gpus, num_cpus=job.work.threads or 1, max_retries=MAX_RETRIES)(make)
    done: dict[int, Facts] = {}
    while True:
        before, failure = len(done), ""
        missing = [shard for shard in shards if shard not in done]
        count = max(1, min(len(missing), TASKS_PER_TEACHER * teachers))
        waiting, running = [missing[number::count] for number in range(count)], list[Any]()
        try:
            while waiting or running:
                while waiting and len(running) < teachers:
                    running.append(task.remote(job, waiting.pop(0)))
                ready, running = ray.wait(running, timeout=LOOK_EVERY_SECONDS)
                for answer in ready:
                    failure = _take(answer, watch) or failure
                new = job.step.finished(store, [shard for shard in missing if shard not in done])
                done |= new
                rows = sum(facts["rows"] for facts in new.values())
                watch.count(records=rows, through=rows, skipped=sum(facts["skipped"] for facts in new.values()))
        except BaseException:
            for lost in running:
                ray.cancel(lost, force=True)
            raise
        if len(done) == len(shards):
            return done
        if len(done) == before:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ModelError(
                f"{store.url}: {counted(len(missing), 'shard')} ({named}) cannot be made: "
                f"{failure or 'they are not in the cache'}; "
                "finished shards are whole: fix the cause and run the same command again"
            )


def _take(answer: Any, watch: Watch) -> str:
    """Count what a task did; why it failed, if it did. Raises an error that trying again does not fix."""
    import ray

    try:
        found = ray.get(answer)
    except ray.exceptions.RayError as error:
        return f"its process or node was lost {MAX_RETRIES + 1} times ({type(error).__name__}; out of memory?), see Ray's logs"
    if "error" not in found:
        watch.add(**found)
    elif found["kind"]:
        raise getattr(genrecal.errors, found["kind"])(found["error"])
    return str(found.get("error", ""))


def make(job: Job, shards: list[int]) -> dict[str, Any]:
    """The task: make those of these shards that are missing. Returns what was counted, or the error.

    `kind` is the class of an error that trying again does not fix.
    """
    try:
        if os.path.isdir(job.folder):
            os.chdir(job.folder)
        samples, teacher, store = job.load_samples(), job.load_teacher(), open_store(job.url)
        records = sum(len(job.options.records(shard, len(samples))) for shard in shards)
        watch = Watch(records, num_samples=len(samples), max_skip=job.options.max_skip)
        with contextlib.ExitStack() as until_done:
            until_done.callback(getattr(teacher, "close", lambda: None))  # vLLM's engine, which has its own processes
            prepare_directory(teacher, samples, store, job.options)
            until_done.enter_context(watch)
            run_shards(job.step, teacher, samples, store, shards, job.options, job.work, watch)
        counts = {name: watch.counts[name] for name in watch.counts.keys() - {"records", "through", "skipped"}}
        return {
            "counts": counts, "reasons": dict(watch.reasons), "seconds": watch.seconds, "warnings": watch.warnings[:1],
        }  # fmt: skip
    except GenrecalError as error:
        return {"error": f"{error} (on node {socket.gethostname()})", "kind": type(error).__name__}
    except Exception as error:
        reason = f"{type(error).__name__}: {plain_reason(error)} (on node {socket.gethostname()})"
        return {"error": reason, "kind": ""}


# ------------------------------------------------------------------------------------------------------------ the cluster


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError(f'--ray needs Ray ({error}): pip install "genrecal[ray]"') from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to the cluster, unless this program is connected to one already."""
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
    """GPUs of one teacher, and the number of teachers that work side by side."""
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
