"""Reads a hostile cache in a process of its own, and says what came of it and how much memory that took."""

import multiprocessing
import os
import resource
import time
import warnings
from dataclasses import dataclass

import genrecal.inspect.record
from genrecal.errors import GenrecalError
from genrecal.samples import decode_image
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

GIB = 2**30
MOST_MORE = 4 * GIB  # address space for the child beyond what it has: a bomb that goes off fails, and the machine lives
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hostile_child"])


@dataclass
class Outcome:
    """Lines: `error:` what reading raised, `finding:` what verify found. `peak` is the memory taken, in bytes."""

    lines: list[str]
    peak: int
    seconds: float

    @property
    def errors(self):
        return [line.removeprefix("error: ") for line in self.lines if line.startswith("error: ")]

    @property
    def findings(self):
        return [line.removeprefix("finding: ") for line in self.lines if line.startswith("finding: ")]


def run(function, *args):
    """A function of this module, in a fresh child process. Anything but genrecal's errors fails the caller."""
    ours, its = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_child, args=(its, function, args))
    process.start()
    its.close()
    try:
        result = ours.recv() if ours.poll(600) else "it did not end"
    except EOFError:
        result = "it was killed"
    process.kill()
    process.join()
    assert isinstance(result, Outcome), result
    print(f"\npeak {result.peak / 2**20:.0f} MiB, {result.seconds:.2f} s: {result.lines[:2]}")
    return result


def _child(pipe, function, args):
    resource.setrlimit(resource.RLIMIT_AS, (_pages()[0] + MOST_MORE,) * 2)
    warnings.simplefilter("error")
    before, start = _pages()[1], time.perf_counter()
    try:
        lines = list(function(*args))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(Outcome(lines, max(0, peak - before), time.perf_counter() - start))
    except BaseException as error:
        pipe.send(f"{function.__name__} raised {error!r}")


def _pages():
    """Address space and resident memory, bytes."""
    with open("/proc/self/statm") as file:
        return [int(number) * os.sysconf("SC_PAGE_SIZE") for number in file.read().split()[:2]]


def read_and_verify(path):
    """All that a reader of records asks for, then verify."""
    yield from read(path)
    yield from (f"finding: {finding}" for finding in verify_cache(path).findings)


def read(path):
    try:
        cache = open_cache(path)
        cache.manifest()
        cache.column("category")
    except GenrecalError as error:
        yield f"error: {error}"
        return
    for record in cache:
        try:
            assert record.record() and len(record.images) == record.row["images"]
            genrecal.inspect.record.describe_record(record)
        except GenrecalError as error:
            yield f"error: {error}"


def decode(data):
    try:
        yield str(decode_image(data).size)
    except GenrecalError as error:
        yield f"error: {error}"
