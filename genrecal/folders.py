"""Checks of output folders: one process at a time writes to one, and it holds nothing but what it is for."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from genrecal.errors import UsageError
from genrecal.files import machine_name, process_runs

KINDS = {"cache.json": "a cache", "run.json": "a run", "compare.json": "a comparison", "config.json": "a model"}


def refuse_other_content(folder: Path, kind: str, *, ours: Sequence[str] = ()) -> None:
    """Raise UsageError if `folder` cannot be written or holds something else than `kind`. Hidden files do not count.

    Args:
        kind: what the folder is for, such as "a run". ours: names that may be there before it is begun.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--out {folder}: expected a folder, but {there} is a file; choose another --out")
    if not os.access(there, os.W_OK):
        raise UsageError(f"--out {folder}: {there} cannot be written; choose another --out")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names := [name for name in names if not name.startswith(".") and name not in (*ours, "lost+found")]:
        found = next((KINDS[name] for name in names if name in KINDS), "other files")
        raise UsageError(
            f"--out {folder}: expected {kind} or an empty folder, found {found} ({names[0]}); choose another --out"
        )


class FolderLock:
    """A file that names the process that works in a folder, until `with` ends.

    A lock that a dead process of this machine left behind is taken over, and so is that of an earlier start of the same Slurm
    job. Raises UsageError if another process holds it. Whether a process of another machine still runs cannot be known: the
    message says what to delete if it does not.
    """

    def __init__(self, path: Path, doing: str):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.owner = {
            "host": socket.gethostname(),
            "machine": machine_name(),
            "pid": os.getpid(),
            "process": process_identity(os.getpid()),
            "job": slurm_start(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with _alone(path.parent):
            if path.exists():
                self._take_over(doing)
            with path.open("x") as file:  # fails if a machine that `_alone` does not reach came first
                file.write(json.dumps(self.owner, indent=2) + "\n")

    def _take_over(self, doing: str) -> None:
        try:
            left = dict(json.loads(self.path.read_text()))
            who = f"process {left['pid']} on {left['host']}, since {left['since']}"
            ended = _why_ended(left)
        except (ValueError, TypeError, KeyError):
            who, ended = "an unnamed process", None
        if ended is None:
            raise UsageError(
                f"{self.path}: {who}, is {doing} this folder; wait until it ends, or choose another --out. If it was killed, "
                f"delete {self.path} and run the same command again"
            )
        sys.stderr.write(f"genrecal: {self.path}: taken over from {who}: {ended}\n")
        self.path.unlink()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.path.read_text()) == self.owner:
                self.path.unlink()


def _why_ended(owner: dict[str, Any]) -> str | None:
    """Why the owner of a lock no longer works; None if it may."""
    if owner["machine"] == machine_name():
        running = process_runs(owner["pid"]) and process_identity(owner["pid"]) == owner["process"]
        return None if running else "it no longer runs"
    job = slurm_start()
    restarted = job and owner["job"] and job[0] == owner["job"][0] and job != owner["job"]
    return "an earlier start of this Slurm job" if restarted else None


def slurm_start() -> list[str] | None:
    """The Slurm job that this process belongs to, and how often it was restarted."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def process_identity(pid: int) -> str | None:
    """Tells a process from a later one with the same number, after a restart of the machine too; None if it ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if state == "Z" else f"{boot} {fields[18]}"  # field 22 of stat: its start, in ticks since the boot


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out, as far as the file system can lock."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
