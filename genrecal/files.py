"""Files put in place whole: a temporary name, flushed to disk, then renamed."""

import contextlib
import errno
import functools
import os
import socket
import time
from pathlib import Path
from typing import Any

from genrecal.errors import StorageError, UsageError

UNTOUCHED_SECONDS = 24 * 3600.0  # after which a temporary file of another machine is taken for left behind
PACKAGES = {  # that fsspec needs for a protocol
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is whole: hidden, and named after this process, so that two never share one."""
    return path.with_name(f".{path.name}.{machine_name()}.{os.getpid()}.tmp")


@functools.cache
def machine_name() -> str:
    """This machine as processes see it: containers of one host name count their processes apart."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def put_in_place(temporary: Path, path: Path) -> None:
    """Make a finished temporary file the real one: flushed to disk, then renamed, then the rename flushed."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is either the old one or the new one, never a part. A failure leaves no trace."""
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.unlink(missing_ok=True)  # a link that someone put there is not followed
        with temporary.open("xb") as file:
            file.write(data)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_regular(path: Path) -> None:
    """Raises OSError for a folder, a path below a file, or a device: a file in place of /dev/null would break the machine."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if above := next((parent for parent in path.parents if parent.is_file()), None):
        raise NotADirectoryError(errno.ENOTDIR, f"{above} is a file", str(path))
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "expected a regular file", str(path))


def check_writable(path: Path) -> None:
    """Raises OSError if `write_whole` cannot write `path` now: a folder or a device, no permission, or a full disk."""
    check_regular(path)
    probe = path.with_name(f"{path.name}.probe-{os.getpid()}")
    write_whole(probe, bytes(4096))
    probe.unlink()


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
    """Delete what processes that no longer run left behind.

    Another machine's processes cannot be asked: their files count as left behind when nothing wrote to them for a day.
    """
    removed = []
    mine = f".{machine_name()}."
    for path in [*cache.glob(".*.tmp"), *cache.glob("*/.*.tmp")]:
        if path.parent != cache and path.parent.is_symlink():
            continue  # not ours, wherever it leads
        with contextlib.suppress(FileNotFoundError):  # another worker clears away too
            pid = path.name.split(".")[-2]
            old = time.time() - path.lstat().st_mtime > UNTOUCHED_SECONDS
            dead = mine in path.name and pid.isdigit() and (int(pid) == os.getpid() or not process_runs(int(pid)))
            if old or dead:
                path.unlink()
                removed.append(path)
    return removed


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Listings are not kept: other processes write too.

    Raises UsageError for a protocol that is not known, or whose package is not installed.
    """
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(protocol, f"the fsspec package for {protocol}")
        raise UsageError(f"{url}: {protocol}:// needs {package}, which is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{url}: not a URL that fsspec knows: {error}") from None
    return fs, path


def read_url(url: str) -> bytes:
    """The bytes behind a URL. Raises FileNotFoundError, and StorageError for any other failure."""
    fs, path = file_system(url)
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise StorageError(
            f"{url}: cannot be read: {type(error).__name__}: {words}; run the same command again"
        ) from None
