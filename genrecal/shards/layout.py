"""Names of the files of a cache directory, and its `cache.json`."""

import json
from typing import Any

from genrecal.errors import FormatError
from genrecal.shards.codecs import codec_named
from genrecal.shards.storage import Store

FORMAT_VERSION = 1
CACHE_FILE = "cache.json"
TEACHER_FOLDER = "teacher"
TIERS = ("samples", "questions")


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def tar_name(tier: str, shard: int) -> str:
    return f"{tier}/{shard_name(shard)}.tar"


def manifest_name(shard: int) -> str:
    return f"manifest/{shard_name(shard)}.parquet"


def write_cache_json(store: Store, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store.write(CACHE_FILE, text.encode())


def read_cache_json(store: Store) -> dict[str, Any]:
    """What a cache says of itself. Raises FormatError for no cache, an unknown version or an unknown codec.

    A cache from before there were sampled targets says nothing of them, so it has none.
    """
    path = store.where(CACHE_FILE)
    try:
        content = json.loads(store.read(CACHE_FILE))
    except FileNotFoundError:
        raise FormatError(f"{store.url}: not a cache: it has no {CACHE_FILE}; `genrecal cache` makes one") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {version!r}; this genrecal reads version {FORMAT_VERSION}")
    for name in ("answer_codec", "question_codec"):
        if content.get(name) != "none":
            codec_named(content.get(name, ""), where=f"{path}: {name}")
    return {"sampled_targets": 0} | content
