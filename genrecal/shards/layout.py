"""Names of the files of a cache directory, its `cache.json`, and how a file is put in place whole."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from genrecal.errors import FormatError
from genrecal.shards.codecs import codec_named

FORMAT_VERSION = 1
CACHE_FILE = "cache.json"
TEACHER_FOLDER = "teacher"
TIERS = ("samples", "questions")


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def tar_path(cache: Path, tier: str, shard: int) -> Path:
    return cache / tier / f"{shard_name(shard)}.tar"


def manifest_path(cache: Path, shard: int) -> Path:
    return cache / "manifest" / f"{shard_name(shard)}.parquet"


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
    temporary.write_bytes(data)
    put_in_place(temporary, path)


def remove_stale_temporaries(cache: Path) -> list[Path]:
    """Delete what processes of this machine that no longer run left behind; other machines clean up after themselves."""
    removed = []
    for path in [*cache.glob(f".*.{socket.gethostname()}.*.tmp"), *cache.glob(f"*/.*.{socket.gethostname()}.*.tmp")]:
        pid = path.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def write_cache_json(cache: Path, content: dict[str, Any]) -> None:
    write_whole(cache / CACHE_FILE, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_cache_json(cache: Path) -> dict[str, Any]:
    """What a cache says of itself. Raises FormatError for no cache, an unknown version or an unknown codec."""
    path = cache / CACHE_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{cache}: not a cache: it has no {CACHE_FILE}; `genrecal cache` makes one") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {version!r}; this genrecal reads version {FORMAT_VERSION}")
    for name in ("answer_codec", "question_codec"):
        if content.get(name) != "none":
            codec_named(content.get(name, ""), where=f"{path}: {name}")
    return dict(content)
