"""Runs cache jobs in forked processes, at once and in a tenth of a second, and kills them where it is told to.

One process loads the teacher; each request on a line of standard input is a list of jobs, which run side by side in
children of it, and the answer is a line with a list of what became of them. Started by tests, never imported.

A job may be killed after so many seconds or at an exact point: its calls of write (half of the bytes are written then),
fsync, rename, unlink and mkdir are counted, and at the given one it gets SIGKILL, or the call fails with an error.
"""

import ctypes
import errno
import io
import json
import os
import pathlib
import resource
import signal
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import GenrecalError
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource

COUNTED = ("fsync", "replace", "unlink", "mkdir")


class Point:
    """Counts file-system calls and strikes at one of them."""

    def __init__(self, at, error):
        self.at, self.error, self.count = at, error, 0

    def here(self, half=lambda: None):
        self.count += 1
        if self.at is None or self.count - 1 < self.at:
            return
        if self.error is not None:  # from now on, as on a full disk
            raise OSError(self.error, os.strerror(self.error))
        half()
        os.kill(os.getpid(), signal.SIGKILL)


def watch_calls(point):
    """Have every write to a file opened by pathlib, and every COUNTED call, pass by the point."""

    class Raw(io.FileIO):
        def write(self, data):
            point.here(lambda: super(Raw, self).write(bytes(data)[: len(data) // 2]))
            return super().write(data)

    plain_open = pathlib.Path.open

    def path_open(self, mode="r", buffering=-1, **options):
        if mode != "wb":
            return plain_open(self, mode, buffering, **options)
        return io.BufferedWriter(Raw(self, "w"), buffer_size=4096)

    pathlib.Path.open = path_open
    for name in COUNTED:
        plain = getattr(os, name)

        def counted(*words, plain=plain, **options):
            point.here()
            return plain(*words, **options)

        setattr(os, name, counted)


def obey_permissions():
    """Even as root: without CAP_DAC_OVERRIDE, a folder that may not be written cannot be."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def options_of(request):
    """A request's options, with the answers that the teacher writes itself."""
    options = dict(request["options"])
    return CacheOptions(**options | {"answers": AnswerSource(**options.get("answers", {}))})


def run(teacher, data, job, answer):
    """One job, in a child; it never returns."""
    # torch makes its thread pool anew at the first use after a fork. Two threads that come first together find none
    # ("Invalid thread pool!"); so this thread uses it before there are others.
    torch.set_num_threads(1)
    point = Point(job.get("at"), getattr(errno, job["error"]) if job.get("error") else None)
    watch_calls(point)
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job.get("obey_permissions"):
        obey_permissions()
    result = {}
    try:
        work = WorkOptions(threads=2, **job.get("work", {}))
        report = run_cache_job(teacher, open_samples([data]), job["out"], options_of(job), work)
        result = {name: getattr(report, name) for name in ("shards_done", "shards_found", "shards_missing", "skipped")}
    except GenrecalError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    except BaseException as error:
        result = {"error": repr(error), "kind": type(error).__name__}
    os.write(answer, json.dumps(result | {"calls": point.count}).encode())
    os._exit(0)


def run_together(teacher, data, jobs):
    """Fork each job, kill those that are to be killed by the clock, and say what became of them."""
    children = []
    for job in jobs:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run(teacher, data, job, writing)
        os.close(writing)
        children.append((job, child, reading))
    for job, child, _ in sorted(children, key=lambda c: c[0].get("seconds", 0)):
        if "seconds" in job:
            time.sleep(job["seconds"])
            os.kill(child, signal.SIGKILL)
    results = []
    for _, child, reading in children:
        with open(reading, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        results.append(json.loads(text or b"{}") | {"killed": os.WIFSIGNALED(status)})
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model, data = sys.argv[1:]
    teacher = HFTeacher.load(model, dtype=torch.float32)
    for line in sys.stdin:
        request = json.loads(line)
        if "whole" in request:  # in this process, so that children find everything compiled and imported
            run_cache_job(teacher, open_samples([data]), request["whole"], options_of(request))
            answer = []
        else:
            answer = run_together(teacher, data, request["jobs"])
        print(json.dumps(answer), file=answers, flush=True)
