"""Names of the files of a cache directory, and its `cache.json`."""

import json
from typing import Any

import xxhash

from genrecal.errors import FormatError
from genrecal.samples.images import BACKGROUND
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.codecs import codec_named
from genrecal.shards.storage import Store
from genrecal.shards.strict_json import strict_json

FORMAT_VERSION = 1
CACHE_FILE = "cache.json"
TEACHER_FOLDER = "teacher"
TIERS = ("samples", "questions")
MAX_CACHE_FILE_BYTES = 2**23
DIGEST = "content_xxh3"  # of a manifest and of cache.json: it covers everything else in them
LATER = (DIGEST, "totals", "index_sha256")  # what cache.json has in addition when a cache is finished
NUMBERS = {  # of cache.json: the least and the largest
    "hidden_size": (1, 2**20),
    "head_rows": (1, 2**31 - 1),
    "vocab_size": (0, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "sampled_targets": (0, 2**16 - 1),
    "samples_per_shard": (1, 2**31 - 1),
    "num_samples": (0, 2**62),
    "num_shards": (0, 10**7),
}
DEFAULTS: dict[str, Any] = {
    "sampled_targets": 0,
    "answers": AnswerSource().to_json(),
    "template_args": {},
    "allowed_tokens": [],
}


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def tar_name(tier: str, shard: int) -> str:
    return f"{tier}/{shard_name(shard)}.tar"


def manifest_name(shard: int) -> str:
    return f"manifest/{shard_name(shard)}.parquet"


def answers_name(shard: int) -> str:
    return f"answers/{shard_name(shard)}.jsonl"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`cache.json` with the digest of everything else in it."""
    rest = {name: value for name, value in content.items() if name != DIGEST}
    return rest | {DIGEST: json_digest(rest)}


def json_digest(content: Any) -> str:
    """XXH3-64, in hex, of a value as JSON with sorted keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def write_cache_json(store: Store, content: dict[str, Any]) -> None:
    text = json.dumps(sealed(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store.write(CACHE_FILE, text.encode())


def read_cache_json(store: Store) -> dict[str, Any]:
    """What a cache says of itself; options that it does not name have their defaults.

    The digest is not checked: `genrecal verify` does. Raises FormatError for no cache, an unknown version or codec.
    """
    return DEFAULTS | read_raw_cache_json(store)


def read_raw_cache_json(store: Store) -> dict[str, Any]:
    """The same as it stands in the file."""
    path = store.where(CACHE_FILE)
    try:
        content = strict_json(store.read(CACHE_FILE, 0, MAX_CACHE_FILE_BYTES + 1), MAX_CACHE_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        missing = f"it has no {CACHE_FILE}" if store.present("") else "there is nothing at this path"
        inside = store.folders_with(CACHE_FILE)
        advice = f"its caches are {', '.join(inside[:5])}" if inside else "`genrecal cache` writes one"
        raise FormatError(f"{store.url}: not a cache: {missing}; {advice}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {version!r}; this genrecal reads version {FORMAT_VERSION}")
    for name in ("answer_codec", "question_codec"):
        if content.get(name) != "none":
            codec_named(str(content.get(name, "")), where=f"{path}: {name}")
    return content


def wrong_settings(description: dict[str, Any]) -> dict[str, str]:
    """Settings of cache.json that cannot be right, by name, and what they should be."""
    get: Any = description.get
    wrong: dict[str, str] = {}
    for name, (least, most) in NUMBERS.items():
        if type(get(name)) is not int or not least <= get(name) <= most:
            wrong[name] = f"a whole number from {least} to {most}"
    for name in ("vocab_size", "top_k"):
        if not wrong.keys() & {name, "head_rows"} and get(name) > get("head_rows"):
            wrong[name] = "at most head_rows"
    if get("answer_codec") == "none" != get("question_codec"):
        wrong["question_codec"] = "none, as the answer states'"
    sizes = ("num_samples", "samples_per_shard", "num_shards")
    if not wrong.keys() & set(sizes) and get("num_shards") != -(-get("num_samples") // get("samples_per_shard")):
        wrong |= dict.fromkeys(sizes, "numbers that fit each other")
    fraction, teacher, tokens = get("question_fraction"), get("teacher"), get("allowed_tokens", [])
    try:
        AnswerSource.from_json(get("answers", DEFAULTS["answers"]))
        answers = True
    except ValueError:
        answers = False
    for name, right, expected in (
        ("question_fraction", isinstance(fraction, int | float) and 0 <= fraction <= 1, "a share from 0 to 1"),
        ("question_seed", type(get("question_seed")) is int, "a whole number"),
        ("image_backend", get("image_backend") in ("pil", "torchvision"), "pil or torchvision"),
        ("image_background", get("image_background", BACKGROUND) == BACKGROUND, BACKGROUND),
        ("teacher", _is_teacher(teacher), "an object with a name, a dtype and digests of files"),
        ("answers", answers, "an object with a kind of given, greedy or sampled, and that kind's settings"),
        ("template_args", isinstance(get("template_args", {}), dict), "an object"),
        ("allowed_tokens", isinstance(tokens, list) and all(isinstance(token, str) for token in tokens), "a list of texts"),
        ("totals", isinstance(get("totals", {}), dict), "an object"),
    ):  # fmt: skip
        if not right:
            wrong[name] = expected
    return wrong


def _is_teacher(content: Any) -> bool:
    files = content.get("files_sha256", {}) if isinstance(content, dict) else None
    if not isinstance(files, dict) or any(set("/\0") & set(name) or name in ("", ".", "..") for name in files):
        return False
    return all(isinstance(content.get(name), str) for name in ("name", "dtype"))
