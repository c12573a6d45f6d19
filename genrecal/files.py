"""Files put in place whole: a temporary name, flushed to disk, then renamed."""

import os
import socket
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is whole: hidden, and named after this process, so that two never share one."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def put_in_place(temporary: Path, path: Path) -> None:
    """Make a finished temporary file the real one: flushed to disk, then renamed, then the rename flushed."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is either the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # a link that someone put there is not followed
    with temporary.open("xb") as file:
        file.write(data)
    put_in_place(temporary, path)


def process_runs(pid: int) -> bool:
    """Whether a process of this machine runs; one of another user counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove_stale_temporaries(cache: Path) -> list[Path]:
    """Delete what processes of this machine that no longer run left behind; other machines clean up after themselves."""
    removed = []
    for path in [*cache.glob(f".*.{socket.gethostname()}.*.tmp"), *cache.glob(f"*/.*.{socket.gethostname()}.*.tmp")]:
        if path.parent != cache and path.parent.is_symlink():
            continue  # not ours, wherever it leads
        pid = path.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not process_runs(int(pid)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
