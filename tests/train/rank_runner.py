"""Runs `genrecal train` in forked ranks, without the seconds that a launcher's processes take to import everything.

A request on a line of standard input starts so many ranks side by side, with the environment that torchrun gives them; the
answer is a line that says how they ended and what they wrote to standard error. Started by tests, never imported.

Ranks may be killed all at once: after a number of metrics are written and so many micro-steps more, or in the middle of
writing a checkpoint (at the given call of fsync). A single rank may be sent a signal after a number of metrics, while rank 0
stands still, or find that a loss is not a number. Nothing depends on how fast the machine is.
"""

import json
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import torch

import genrecal.train.loop  # noqa: F401
from genrecal.cli import main
from genrecal.train.logs import RunLog
from genrecal.train.stages import Distiller


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def kill_at_fsync(at):
    """The process's whole group is killed at its call number `at` of fsync."""
    plain, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            os.killpg(0, signal.SIGKILL)
        plain(descriptor)

    os.fsync = fsync


def spoil_loss(at):
    """The loss of the rank's micro-step number `at` is not a number."""
    plain, calls = Distiller.forward, []

    def forward(self, *words):
        calls.append(words)
        output = plain(self, *words)
        return output._replace(loss=output.loss * float("nan")) if len(calls) == at else output

    Distiller.forward = forward


def after_lines(request):
    """Rank 0's part: at that many metrics the group is killed, after some forward passes more, or rank 0 stops itself."""
    plain, forward, left = RunLog.write, Distiller.forward, []

    def write(self, *words):
        plain(self, *words)
        if lines_of(request["out"]) < request["at_lines"] or left:
            return
        if "signal" in request:
            left.append(None)
            os.kill(os.getpid(), signal.SIGSTOP)  # until the runner has sent the signal
        elif request.get("forwards"):
            left.extend(range(request["forwards"]))
        else:
            os.killpg(0, signal.SIGKILL)

    def count(self, *words):
        if left and left.pop() == 0:
            os.killpg(0, signal.SIGKILL)
        return forward(self, *words)

    RunLog.write, Distiller.forward = write, count


def run_rank(rank, request, environment, output):
    """One rank, in a child; it never returns."""
    torch.set_num_threads(1)
    if environment:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for number in (1, 2):
        os.dup2(output, number)
    if rank == 0 and request.get("fsync"):
        kill_at_fsync(request["fsync"])
    if rank == 0 and "at_lines" in request:
        after_lines(request)
    if rank == request.get("spoilt_rank"):
        spoil_loss(request["spoilt_at"])
    status = 99
    try:
        main(["train", *request["args"]])
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def lines_of(out):
    path = pathlib.Path(out) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(request):
    """Fork the ranks, do to them what is asked for, and say what became of them."""
    size = request["ranks"]
    environment = {}
    if size > 1:
        environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile() as output:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                os.setpgid(0, children[0] if children else 0)
                run_rank(rank, request, environment, output.fileno())
            os.setpgid(child, children[0] if children else child)
            children.append(child)
        started = time.monotonic()
        left, statuses = dict(enumerate(children)), {}
        while left:
            time.sleep(0.002)
            for rank, child in list(left.items()):
                changed, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
                if changed and os.WIFSTOPPED(status):
                    os.kill(children[request["to_rank"]], getattr(signal, request["signal"]))
                    os.kill(child, signal.SIGCONT)
                elif changed:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                    del left[rank]
            if left and time.monotonic() - started > request.get("limit", 1200):
                os.killpg(children[0], signal.SIGKILL)
        output.seek(0)
        return {
            "statuses": [statuses[rank] for rank in range(size)],
            "output": output.read().decode(),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
