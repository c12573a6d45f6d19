"""Where a cache is stored: a local directory, or any fsspec URL (`s3://`, `gs://`, `hf://`, `memory://`).

Names are relative to the cache, with slashes: `samples/00000.tar`. Local files are flushed to disk before they take their
name. An object store shows an upload when it is complete and never before, so a kill leaves nothing that looks whole.
"""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from genrecal.errors import StorageError, UsageError
from genrecal.files import (
    file_system,
    flush,
    machine_name,
    process_runs,
    put_in_place,
    remove_stale_temporaries,
    temporary_path,
    write_whole,
)

ATTEMPTS = 4  # of one remote operation, on top of what the file system itself retries
LONGEST_PAUSE = 8.0  # seconds between two of them
DOWNLOADS_KEPT_SECONDS = 24 * 3600.0
FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, NotImplementedError,
)  # fmt: skip


def open_store(location: "str | os.PathLike[str] | Store") -> "Store":
    """The store at a path or URL; nothing is read yet.

    Raises UsageError for a protocol that is not known, or whose package is not installed.
    """
    if isinstance(location, Store):
        return location
    text = os.fspath(location)
    if "://" not in text:
        return LocalStore(Path(text), text)
    from fsspec.implementations.local import LocalFileSystem

    fs, path = file_system(text)
    return LocalStore(Path(path), text) if isinstance(fs, LocalFileSystem) else Store(text)


class Store:
    """The files of one cache, at a URL that fsspec knows.

    Methods raise FileNotFoundError for a name that is not there. An operation that fails is tried again after a pause;
    they raise StorageError when it keeps failing, and PermissionError where access is refused.
    """

    def __init__(self, url: str):
        self.url = url  # as the user wrote it, for messages and for opening it again

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def where(self, name: str) -> str:
        """A file's full name, for messages."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    @property
    def absolute(self) -> str:
        """The URL, not depending on the working directory."""
        return self.url

    @property
    def _fs(self) -> Any:
        return _file_system(self.url, os.getpid())[0]

    def _path(self, name: str) -> str:
        root: str = _file_system(self.url, os.getpid())[1]
        return f"{root.rstrip('/')}/{name}" if name else root

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes [offset, offset + size) of a file, fewer where it ends before; all that follow if `size` is None."""
        if size == 0:
            return b""
        end = None if size is None else offset + size
        return self._retry("read", name, lambda: _range(self._fs, self._path(name), offset, end))

    def open(self, name: str, *, ahead: int = 0) -> BinaryIO:
        """A file to read, seekable. A remote one is read in pieces of `ahead` bytes, or of just what is asked for if 0."""
        from fsspec.spec import AbstractBufferedFile

        class RangeFile(AbstractBufferedFile):
            """Every read is a byte range of its own, tried again if it fails."""

            def _fetch_range(file, start: int, end: int) -> bytes:
                return self.read(name, start, end - start)

        cache = {"block_size": ahead, "cache_type": "readahead"} if ahead else {"cache_type": "none"}
        return cast(BinaryIO, RangeFile(self._fs, self._path(name), size=self.size(name), **cache))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self._retry("look up", name, lambda: self._fs.info(self._path(name)))["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file in a folder, by its name without the folder's; none if the folder does not exist."""
        try:
            entries = self._retry("list", folder, lambda: self._fs.ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted."""
        return sorted(self.sizes(folder))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def present(self, name: str) -> bool:
        """Whether anything stands under this name, be it a folder or a link that leads nowhere."""
        return bool(self._retry("look up", name, lambda: self._fs.exists(self._path(name))))

    def folders_with(self, name: str) -> list[str]:
        """Folders of a local directory that hold a file of this name, each in full."""
        return []

    def write(self, name: str, data: bytes) -> None:
        """Write a small file: it is the old one or the new one, never a part."""
        self._upload("write", name, len(data), lambda path: self._fs.pipe_file(path, data))

    def temporary(self, name: str) -> Path:
        """A local path to write a large file to, before `place` makes it the real one. Another process gets another."""
        return Path(tempfile.mkdtemp(dir=_scratch(os.getpid()))) / Path(name).name

    def place(self, temporary: Path, name: str) -> None:
        """Make a finished temporary file the real one. The temporary file is gone afterwards."""
        self._upload("upload", name, temporary.stat().st_size, lambda path: self._fs.put_file(str(temporary), path))
        temporary.unlink()

    def move(self, name: str, new_name: str) -> None:
        """Rename a file inside the cache; `new_name` must be free."""
        if self.exists(new_name):
            raise FileExistsError(self.where(new_name))

        def move() -> None:
            """Copy, then delete. An attempt that failed in between has left the copy, or nothing of the old file."""
            try:
                size = int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                if not self._fs.exists(self._path(new_name)):
                    raise
                return
            self._upload("move", new_name, size, lambda path: self._fs.cp_file(self._path(name), path))
            self._fs.rm_file(self._path(name))

        self._retry("move", name, move)

    def local_copy(self, name: str, sha256: str) -> Path:
        """A local file with the content of this one, to be read only: the file itself where the cache is local.

        A remote file of this digest is downloaded once for all processes of a user on this machine.
        """
        shared = _downloads() / f"{sha256}.{Path(name).name}"
        with shared.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not shared.exists():
                path = temporary_path(shared)
                self._retry("download", name, lambda: self._fs.get_file(self._path(name), str(path)))
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        return path  # the caller says so
                put_in_place(path, shared)
            os.utime(shared)
            return shared

    def discard_temporaries(self, folder: str) -> None:
        """Delete every unfinished file of a folder, whoever writes it: nobody needs it any more."""

    def prepare(self) -> None:
        """Make the directory ready to be written, and delete what killed processes of this machine left unfinished.

        Raises OSError where that is not possible.
        """

    def _upload(self, doing: str, name: str, size: int, upload: Callable[[str], None]) -> None:
        def attempt() -> None:
            if "/" in name:  # folders are real on SFTP, HDFS and in memory; object stores have none
                with contextlib.suppress(FileExistsError, PermissionError, NotImplementedError):
                    self._fs.makedirs(self._path(name.rsplit("/", 1)[0]), exist_ok=True)
            upload(self._path(name))
            got = int(self._fs.info(self._path(name))["size"])
            if got != size:
                raise OSError(f"expected {size} bytes to be there after the upload, got {got}")

        self._retry(doing, name, attempt)

    def _retry(self, doing: str, name: str, operation: Callable[[], Any]) -> Any:
        import tenacity

        # Which exception means that trying again may help differs with every package; few say that it cannot.
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, Exception) and not isinstance(e, (*FINAL, StorageError))
            ),
            reraise=True,
        )
        try:
            return retrying(operation)
        except (*FINAL, StorageError):
            raise
        except Exception as error:
            raise StorageError(
                f"{self.where(name)}: cannot {doing} it, after {ATTEMPTS} attempts: {type(error).__name__}: {error}"
            ) from error


class LocalStore(Store):
    """A directory of this machine, or of a file system that is mounted on it."""

    def __init__(self, root: Path, url: str | None = None):
        super().__init__(url or str(root))
        self.root = root

    @property
    def absolute(self) -> str:
        return str(self.root.resolve())

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        path, status = self._file(name)
        left = max(0, status.st_size - offset)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(left if size is None else min(size, left))

    def open(self, name: str, *, ahead: int = 0) -> BinaryIO:
        return open(self._file(name)[0], "rb")

    def size(self, name: str) -> int:
        return self._file(name)[1].st_size

    def _file(self, name: str) -> tuple[str, os.stat_result]:
        """A file to read. Links are followed, but only to files: a pipe or a device would never end."""
        path = f"{self.root}/{name}"
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"expected a file, got {stat.filemode(status.st_mode)}")
        return path, status

    def _to_write(self, name: str) -> Path:
        """A place to write at. Raises UsageError where a link in the cache leads out of it."""
        path = self.root / name
        folder = Path(os.path.realpath(path.parent))
        if not folder.is_relative_to(os.path.realpath(self.root)):
            raise UsageError(
                f"{path}: a link leads from the cache to {folder}, where nothing is written; put a folder in its place"
            )
        return path

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # a link that leads round in a circle is no file
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def present(self, name: str) -> bool:
        return os.path.lexists(self.root / name)

    def folders_with(self, name: str) -> list[str]:
        return [self.where(path.parent.name) for path in sorted(self.root.glob(f"*/{name}"))]

    def write(self, name: str, data: bytes) -> None:
        write_whole(self._to_write(name), data)

    def temporary(self, name: str) -> Path:
        path = temporary_path(self._to_write(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link that someone put there is not followed
        return path

    def place(self, temporary: Path, name: str) -> None:
        put_in_place(temporary, self._to_write(name))

    def move(self, name: str, new_name: str) -> None:
        old, new = self._to_write(name), self._to_write(new_name)
        new.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(new):
            raise FileExistsError(str(new))
        os.rename(old, new)
        for folder in (new.parent.parent, new.parent, old.parent):
            flush(folder)

    def local_copy(self, name: str, sha256: str) -> Path:
        return Path(self._file(name)[0])

    def discard_temporaries(self, folder: str) -> None:
        if not (self.root / folder).is_symlink():  # not ours, wherever it leads
            for path in (self.root / folder).glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.root)


@functools.lru_cache(maxsize=16)
def _file_system(url: str, process: int) -> tuple[Any, str]:
    """The file system and the path in it; one per process, since its connections do not survive a fork."""
    return file_system(url)


def _range(fs: Any, path: str, start: int, end: int | None) -> bytes:
    try:
        return bytes(fs.cat_file(path, start=start, end=end))
    except OSError as error:
        # A file shorter than the manifest says: the reader names it, and trying again does not help.
        if "InvalidRange" in str(error) or "range" in str(error).lower() and "satisf" in str(error).lower():
            return b""
        raise


@functools.lru_cache(maxsize=1)
def _scratch(process: int) -> Path:
    """A local folder of this process for files on their way to a remote store; removed when it ends.

    Those of this user's killed processes are removed too, if they ran where process numbers mean the same: not in another
    container that shares the temporary folder.
    """
    prefix = f"genrecal-{machine_name()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and not process_runs(int(pid)) and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{process}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _downloads() -> Path:
    """This user's folder of downloaded files on this machine; those that nobody asked for in a day are removed."""
    folder = Path(tempfile.gettempdir()) / f"genrecal-downloads-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UsageError(f"{folder}: expected a folder of this user; remove it, or set TMPDIR to another folder")
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > DOWNLOADS_KEPT_SECONDS:
                path.unlink()
    return folder


def files_in(store: Store, folder: str, suffix: str) -> Iterator[tuple[int, str]]:
    """Numbers and names of the files `folder/NUMBER.suffix`, by number."""
    for name in store.names(folder):
        stem = name.removesuffix(suffix)
        if stem != name and stem.isdecimal() and stem.isascii():
            yield int(stem), f"{folder}/{name}"


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """A full disk, a quota, a folder that became read-only: one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{what} cannot be written: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}; "
            "finished shards are whole: make room (or let it be written) and run the same command again"
        ) from error
