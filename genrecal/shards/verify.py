"""Prove that a cache is whole: every byte, count, key and column; deep, also that states give logits and tokens answers.

Damage is returned as findings, never raised, so that one bad shard does not hide another. Nothing is unpickled, and
nothing is extracted to disk.
"""

import functools
import hashlib
import io
import itertools
import os
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import xxhash

from genrecal.errors import DamageError, FormatError, GenrecalError
from genrecal.progress import Progress
from genrecal.samples import Sample
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.arrow_file import MOST_SCHEMA_BYTES, MOST_WIDTH
from genrecal.shards.codecs import codec_named
from genrecal.shards.head import HEAD_FILE, FrozenHead, check_header, head_facts
from genrecal.shards.index import AGAIN as INDEX_AGAIN
from genrecal.shards.index import INDEX_FILE, Scan, index_columns, index_difference
from genrecal.shards.layout import (
    CACHE_FILE,
    FORMAT_VERSION,
    TEACHER_FOLDER,
    TIERS,
    manifest_name,
    read_cache_json,
    shard_name,
    tar_name,
    wrong_settings,
)
from genrecal.shards.manifest import CACHED, DIGEST, MOST_FILE_BYTES, SKIPPED, content_digest, read_manifest
from genrecal.shards.reader import MOST_CONVERSATION_BYTES, MOST_SAMPLE_BYTES
from genrecal.shards.record import METADATA_KEY, AnswerRows, answer_rows, read_table, row_entropy
from genrecal.shards.storage import Store, files_in, open_store
from genrecal.shards.strict_json import strict_json
from genrecal.shards.vocabulary import Vocabulary, load_vocabulary

QUARANTINE = "quarantine"
MAX_KL = 0.1  # nats, mean over a shard
LOGIT_BUDGET = 2**25  # float32 logits that exist at once
AHEAD = 2**23  # bytes of a remote file that one request brings
BUFFER = 2**20  # bytes of a tar read at a time
MOST_TAR_HEADER_BYTES = 2**16  # of a long name or of pax records
TOTALS = ("cached", "skipped", "turns", "images", "question_tokens", "answer_tokens")
MEASURED = (
    "turns",
    "images",
    "question_tokens",
    "answer_tokens",
    "entropy",
    "log_prob",
    "top1_agreement",
    "has_question",
)
PLACES = {name: pa.int32() for name in ("turn", "position", "token_id")}
TARGETS = {"target_id": pa.int32(), "target_start": pa.int32(), "target_end": pa.int32(), "target_logit": pa.float32()}
ENTROPY_SLACK = 0.01  # nats: what float32's rounding of the stored logits can do to the bounds of an entropy
# What content that passed its checksum can still raise, if whoever wrote it was wrong.
CONTENT_ERRORS = (
    GenrecalError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError,
    pa.ArrowException,
)  # fmt: skip
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)
AGAIN = "delete cache.json and run `genrecal cache` again with the same options: finished shards are kept"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Args:
        shard: its number, or None for what is outside the shards.
        file: inside the cache directory.
        key: the sample, if it concerns one.
        what: what is wrong.
        expected, got: values, empty where there are none.
    """

    shard: int | None
    file: str
    key: str | None = None
    what: str
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        sample = f" sample {self.key}:" if self.key else ""
        values = f": expected {self.expected}, got {self.got}" if self.expected or self.got else ""
        return f"{self.file}:{sample} {self.what}{values}"


@dataclass(frozen=True, kw_only=True)
class DeepFigures:
    """Of one shard's rows with a target: KL(stored top k and the rest || head(decoded state)) in nats, and top-1 agreement."""

    shard: int
    rows: int
    kl_mean: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_cache` found. `notes` are worth knowing and no damage; `bytes` is what was read."""

    path: str
    shards: tuple[int, int]  # finished, planned
    cached: int = 0
    skipped: int = 0
    bytes: int = 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    deep: tuple[DeepFigures, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.findings

    @property
    def damaged_shards(self) -> list[int]:
        return sorted({finding.shard for finding in self.findings if finding.shard is not None})

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        finished, planned = self.shards
        counts = (
            f"{finished} of {planned} shards, {self.cached} samples cached, {self.skipped} skipped, "
            f"{self.bytes / 1e6:.2f} MB read"
        )
        if self.whole:
            return f"whole: {counts}"
        outside = sum(finding.shard is None for finding in self.findings)
        return (
            f"damaged: {len(self.findings)} findings, {outside} of them outside the shards; "
            f"{len(self.damaged_shards)} damaged shards of {counts}"
        )


def verify_cache(
    path: "str | os.PathLike[str] | Store", *, deep: bool = False, max_kl: float = MAX_KL, device: str = "cpu"
) -> Verification:
    """Read every byte of a cache's finished shards once, and check it.

    Raises FormatError for a folder that is no cache.

    Args:
        deep: also recompute the logits of every row that has a target from its stored state, and spell every answer from
            its tokens.
        max_kl: mean KL in nats over which a shard is damaged; `deep` only.
        device: where the head is computed; `deep` only.
    """
    store = open_store(path)
    try:
        description = read_cache_json(store)
    except FormatError as error:
        what = f"{_unplaced(error, store.where(CACHE_FILE))}; {AGAIN}"
        if not store.present(CACHE_FILE):
            if not store.names("manifest"):
                raise
            what = "missing; run `genrecal cache` again with the same options: finished shards are kept"
        finding = Finding(shard=None, file=CACHE_FILE, what=what)
        return Verification(path=store.url, shards=(0, 0), findings=(finding,))
    outside = [*_check_description(description), *_check_head(store, description), *_check_teacher(store, description)]
    # What cache.json does not say rightly cannot be held against the shards.
    settings = {name: value for name, value in description.items() if name not in wrong_settings(description)}
    head = None
    if deep and not any(finding.file == HEAD_FILE for finding in outside):
        head = FrozenHead.load(store.local_copy(HEAD_FILE, str(_teacher(description, "head_sha256"))), device)
    vocabulary, unreadable = load_vocabulary(store) if deep else (None, "")
    if vocabulary is not None and not vocabulary.is_exact:
        vocabulary, unreadable = None, f"{TEACHER_FOLDER}/tokenizer.json: a decoder of an unknown kind"
    planned = settings.get("num_shards", 0)
    numbers = sorted(shard for shard, _ in files_in(store, "manifest", ".parquet"))
    complete = "totals" in description
    expected = sorted({*numbers, *range(planned)}) if complete else numbers
    results, scanned = [], Scan()
    with Progress("verify", len(expected), "shards") as progress:
        for shard in expected:
            result = check_shard(store, shard, settings, head, vocabulary)
            if result.scanned is not None and result.sums is not None:
                scanned.add(*result.scanned)
            result.scanned = None  # of nine million samples they do not fit into memory one by one
            results.append(result)
            progress.advance(1, f"{sum(bool(result.findings) for result in results)} damaged")
    findings, notes = outside, []
    if deep and head is None:
        notes.append(f"not compared with the stored logits: {HEAD_FILE} is damaged")
    if deep and vocabulary is None and any("token" in name for name in _teacher(description, "files_sha256") or ()):
        notes.append(f"answers are not compared with their tokens: {unreadable}")
    if not complete and len(numbers) < planned:
        notes.append(f"unfinished: {len(numbers)} of {planned} shards; `genrecal cache` goes on with the others")
    elif not complete:
        notes.append(f"every shard is there, but {CACHE_FILE} has no totals yet; run `genrecal cache` again")
    findings += _merge(results, notes)
    findings += _over_limit(results, max_kl)
    if complete:
        findings += _check_index(store, scanned if len(scanned.digests) == len(results) else None, notes)
    if complete and all(result.sums is not None for result in results):
        findings += _check_totals(description["totals"], results, settings.get("num_samples"))
    return Verification(
        path=store.url,
        shards=(len(numbers), planned),
        cached=sum(result.sums["cached"] for result in results if result.sums),
        skipped=sum(result.sums["skipped"] for result in results if result.sums),
        bytes=sum(result.bytes for result in results),
        findings=tuple(findings),
        notes=tuple(notes),
        deep=tuple(result.deep for result in results if result.deep is not None),
    )


def quarantine(verification: Verification) -> list[str]:
    """Set the damaged shards aside, so that `genrecal cache` redoes exactly those; returns the folders they are in.

    A shard's files go to `quarantine/SHARD.N/`, N being the first number that is free. Nothing is deleted or overwritten.
    The manifest goes first: without it the shard counts as unfinished, wherever this is stopped.

    Raises:
        DamageError: cache.json is damaged, so whether a shard is cannot be told by it; nothing was moved.
    """
    store = open_store(verification.path)
    if any(finding.file == CACHE_FILE for finding in verification.findings):
        raise DamageError(f"{store.where(CACHE_FILE)}: damaged, so nothing was moved; {AGAIN}, then verify again")
    folders = []
    for shard in verification.damaged_shards:
        moves = {manifest_name(shard): "manifest.parquet"} | {tar_name(tier, shard): f"{tier}.tar" for tier in TIERS}
        there = {name: new for name, new in moves.items() if store.present(name)}
        if not there:
            continue
        folder = next(
            name
            for name in (f"{QUARANTINE}/{shard_name(shard)}.{number}" for number in itertools.count())
            if not store.present(name)
        )
        for name, new in there.items():
            store.move(name, f"{folder}/{new}")
        folders.append(store.where(folder))
    return folders


def _unplaced(error: Exception, path: str) -> str:
    """An error's message without the path that it begins with, which a finding names itself."""
    return str(error).removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------ outside the shards


def _check_description(description: dict[str, Any]) -> Iterator[Finding]:
    for name, expected in wrong_settings(description).items():
        yield Finding(shard=None, file=CACHE_FILE, what=name, expected=expected, got=repr(description.get(name)))


def _teacher(description: dict[str, Any], name: str) -> Any:
    teacher = description.get("teacher")
    return teacher.get(name) if isinstance(teacher, dict) else None


def _check_head(store: Store, description: dict[str, Any]) -> Iterator[Finding]:
    expected, got = _teacher(description, "head_sha256"), _sha256(store, HEAD_FILE)
    if got != expected:
        what = f"sha256; delete it as well as {CACHE_FILE} and run `genrecal cache` again: finished shards are kept"
        yield Finding(shard=None, file=HEAD_FILE, what=what, expected=str(expected), got=got)
        return
    from safetensors import SafetensorError, safe_open

    try:
        path = store.local_copy(HEAD_FILE, str(expected))
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            vocab_size = head_facts(file)["vocab_size"]
            weight = file.get_slice("weight")
            shape, dtype = weight.get_shape(), weight.get_dtype()
    except (SafetensorError, OSError, *CONTENT_ERRORS) as error:
        yield Finding(shard=None, file=HEAD_FILE, what=f"not a head written by genrecal: {error!r}")
        return
    dtypes = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    for name, said, found in (
        ("hidden_size", description.get("hidden_size"), shape[-1]),
        ("head_rows", description.get("head_rows"), shape[0]),
        ("vocab_size", description.get("vocab_size"), vocab_size),
        ("teacher.dtype", dtypes.get(str(_teacher(description, "dtype"))), dtype),
    ):
        if said != found:
            what = f"{name}: not that of {HEAD_FILE}"
            yield Finding(shard=None, file=CACHE_FILE, what=what, expected=str(found), got=str(said))


def _check_teacher(store: Store, description: dict[str, Any]) -> Iterator[Finding]:
    listed = _teacher(description, "files_sha256")
    if not isinstance(listed, dict):
        yield Finding(shard=None, file=CACHE_FILE, what="teacher.files_sha256", expected="an object", got=repr(listed))
        return
    for name, expected in sorted(listed.items()):
        if "/" in name or name in ("", ".", ".."):
            yield Finding(
                shard=None, file=CACHE_FILE, what="teacher.files_sha256", expected="file names", got=repr(name)
            )
            continue
        got = _sha256(store, f"{TEACHER_FOLDER}/{name}")
        if got != expected:
            what = f"sha256; {AGAIN}"
            yield Finding(shard=None, file=f"{TEACHER_FOLDER}/{name}", what=what, expected=str(expected), got=got)
    there = store.names(TEACHER_FOLDER)
    for name in (name for name in there if name not in listed and not name.startswith(".")):
        what = f"not listed in {CACHE_FILE}, but a processor may read it; move it elsewhere"
        yield Finding(shard=None, file=f"{TEACHER_FOLDER}/{name}", what=what)


def _sha256(store: Store, name: str) -> str:
    """A file's sha256, or why there is none."""
    try:
        with store.open(name, ahead=AHEAD) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return getattr(error, "strerror", None) or str(error)


def _check_index(store: Store, scanned: Scan | None, notes: list[str]) -> Iterator[Finding]:
    """The index against the manifests; None if some of them cannot be read."""
    if not store.present(INDEX_FILE):
        notes.append(f"no {INDEX_FILE}: opening reads every manifest; `genrecal cache` again writes it")
        return
    difference = index_difference(store, scanned)
    if difference:
        yield Finding(shard=None, file=INDEX_FILE, what=f"{difference}; {INDEX_AGAIN}")


def _check_totals(totals: Any, results: "list[ShardResult]", num_samples: Any) -> Iterator[Finding]:
    if not isinstance(totals, dict):
        return
    for name in TOTALS:
        total = sum(result.sums[name] for result in results if result.sums)
        if totals.get(name) != total:
            what = f"totals.{name}: not the manifests' sum; {AGAIN}"
            yield Finding(shard=None, file=CACHE_FILE, what=what, expected=str(total), got=str(totals.get(name)))
    rows = sum(result.sums[name] for result in results if result.sums for name in ("cached", "skipped"))
    if num_samples is not None and rows != num_samples:
        yield Finding(
            shard=None,
            file=CACHE_FILE,
            what="num_samples: not the manifests' rows",
            expected=str(rows),
            got=str(num_samples),
        )


# ------------------------------------------------------------------------------------------------------------- one shard


@dataclass
class ShardResult:
    """What one shard's files say. Disagreements with a setting of cache.json stand apart: either may be the wrong one."""

    shard: int
    findings: list[Finding] = field(default_factory=list)
    disagreements: dict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[str, int] | None = None  # of a manifest that is whole
    scanned: tuple[pa.Table, dict[str, Any]] | None = None  # what the index takes of it
    bytes: int = 0
    tiers: dict[str, bool] = field(
        default_factory=dict
    )  # of the tars that the manifest lists: whether the file is there
    deep: DeepFigures | None = None

    def add(
        self,
        file: str,
        what: str,
        expected: object = "",
        got: object = "",
        *,
        key: str | None = None,
        setting: str | None = None,
    ) -> None:
        """Note a finding; with a `setting`, one that cache.json and this shard do not agree on."""
        found = Finding(shard=self.shard, file=file, key=key, what=what, expected=str(expected), got=str(got))
        (self.disagreements[setting] if setting else self.findings).append(found)


def check_shard(
    store: Store, shard: int, settings: dict[str, Any], head: FrozenHead | None, vocabulary: Vocabulary | None
) -> ShardResult:
    """Everything that can be said of one shard by its own files and cache.json's settings.

    Args:
        head: to recompute the logits with, or None. vocabulary: to spell the answers with, or None.
    """
    result = ShardResult(shard)
    file = manifest_name(shard)
    planned = settings.get("num_shards")
    if planned is not None and shard >= planned:
        result.add(file, "a shard beyond the plan", f"numbers below {planned}", shard)
        return result
    try:
        data = store.read(file, 0, MOST_FILE_BYTES + 1)
        table, facts = read_manifest(data, where=file)
    except FileNotFoundError:
        result.add(file, "missing, of a cache that says it is complete")
        return result
    except OSError as error:
        result.add(file, error.strerror or str(error))
        return result
    except DamageError as error:
        result.add(file, _unplaced(error, file).split("; delete it")[0])
        return result
    result.bytes += len(data)
    if facts["format_version"] != FORMAT_VERSION:
        result.add(file, "format version", FORMAT_VERSION, facts["format_version"])
        return result
    if facts["shard"] != shard:
        result.add(file, "it is another shard's", shard, facts["shard"])
        return result
    result.scanned = (index_columns(table), facts)
    digest = content_digest(table, facts)
    if facts.get(DIGEST) != digest:
        result.add(file, f"{DIGEST} of its rows and facts", facts.get(DIGEST), digest)
    rows = table.to_pylist()
    _check_rows(result, file, rows, facts, settings)
    if not result.findings:
        result.sums = {name: facts[name] if name in facts else sum(row[name] or 0 for row in rows) for name in TOTALS}
    deep = _Deep(head) if head is not None else None
    for tier in TIERS:
        _check_tar(store, result, tier, rows, facts, settings, deep, Spelling(vocabulary) if vocabulary else None)
    if deep is not None:
        result.deep = deep.figures(shard)
    return result


def _check_rows(
    result: ShardResult, file: str, rows: list[dict[str, Any]], facts: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Rows and facts of a manifest against each other and against the plan."""
    size, samples = settings.get("samples_per_shard"), settings.get("num_samples")
    if size and samples is not None:
        planned = max(0, min(size, samples - result.shard * size))
        if len(rows) != planned:
            last = (result.shard + 1) * size >= samples and len(rows) <= size
            setting = "num_samples" if last else "samples_per_shard"
            result.add(file, "rows, by the plan", planned, len(rows), setting=setting)
    counts = Counter(row["status"] for row in rows)
    for status in (CACHED, SKIPPED):
        if counts[status] != facts[status]:
            result.add(file, f"rows that are {status}", facts[status], counts[status])
    if extra := sorted(counts.keys() - {CACHED, SKIPPED}):
        result.add(file, "status", f"{CACHED} or {SKIPPED}", repr(extra[0]))
    codecs = {tier: settings.get(f"{tier}_codec") for tier in ("answer", "question")}
    said = {name: codec for name, codec in codecs.items() if codec != "none"}
    for name in sorted(said.keys() | facts["codecs"].keys()):
        if facts["codecs"].get(name) != said.get(name):
            setting = f"{name}_codec"
            result.add(file, setting, codecs.get(name), facts["codecs"].get(name, "none"), setting=setting)
    tiers = {"samples", *(["questions"] if "question" in facts["codecs"] else [])}
    if set(facts["sha256"]) != tiers:
        result.add(file, "tars with a sha256", sorted(tiers), sorted(facts["sha256"]))
    selected, least = settings.get("selection") is not None, result.shard * (size or 0)
    for number, row in enumerate(rows):
        if size:
            # A key begins with its record's number in the input: of a selection, none before the row's own place.
            key, right = row["key"], f"{least:08d}{' or later' if selected else ''} first"
            begins = re.fullmatch(r"(\d{8,})(-[A-Za-z0-9_-]+)?", key)
            place = int(begins[1]) if begins and begins[1] == f"{int(begins[1]):08d}" else -1
            if place != least and not (selected and place > least):
                result.add(file, f"key of row {number}", right, repr(key), key=key, setting="samples_per_shard")
            least = max(least, place) + 1 if selected else least + 1
        _check_row(result, file, row, settings)
    for key, count in Counter(row["key"] for row in rows).items():
        if count > 1:
            result.add(file, "key", "one row", f"{count} rows", key=key)


def _check_row(result: ShardResult, file: str, row: dict[str, Any], settings: dict[str, Any]) -> None:
    key, add = row["key"], functools.partial(result.add, file, key=row["key"])
    names = [member["name"] for member in row["members"]]
    if row["status"] != CACHED:
        if names or row["reason"] is None or any(row[name] is not None for name in MEASURED):
            add("a skipped row", "a reason, and no members or measurements", f"{row['reason']!r}, {len(names)} members")
        return
    if nulls := [name for name in (*MEASURED, "sample_id", "category", "source") if row[name] is None]:
        add(f"columns {', '.join(nulls)}", "values", "null")
        return
    if {"question_codec", "question_fraction", "question_seed"} <= settings.keys():
        place = xxhash.xxh3_64_intdigest(f"{settings['question_seed']}:{key}".encode()) / 2**64
        kept = settings["question_codec"] != "none" and place < settings["question_fraction"]
        if row["has_question"] != kept:
            add("has_question", kept, row["has_question"], setting="question_fraction")
    others = 3 if row["has_question"] else 2
    if row["images"] != len(names) - others:
        add("members", f"{others} and {row['images']} images", ", ".join(names))
        return
    pictures = [f"{key}.{number}." for number in range(row["images"])]
    question = [f"{key}.question.arrow"] if row["has_question"] else []
    wanted = [f"{key}.json", *pictures, f"{key}.answer.arrow", *question]
    if not all(
        name == want or (want.endswith(".") and re.fullmatch(re.escape(want) + r"[A-Za-z0-9]+", name))
        for name, want in zip(names, wanted, strict=True)
    ):
        add("members", ", ".join(wanted), ", ".join(names))
    tiers = ["samples"] * (len(wanted) - len(question)) + ["questions"] * len(question)
    if [member["tier"] for member in row["members"]] != tiers:
        add("tiers of the members", ", ".join(tiers), ", ".join(member["tier"] for member in row["members"]))


# --------------------------------------------------------------------------------------------------------------- its tars


class _Hashing(io.RawIOBase):
    """A file read from begin to end, with the sha256 of what was read."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.count += len(data)
        return data


def _check_tar(
    store: Store,
    result: ShardResult,
    tier: str,
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    settings: dict[str, Any],
    deep: "_Deep | None",
    spelling: "Spelling | None",
) -> None:
    """One pass over a tar: its sha256, and each member's header, checksum and content."""
    file = tar_name(tier, result.shard)
    listed = [(member, row) for row in rows for member in row["members"] if member["tier"] == tier]
    if tier not in facts["sha256"] and not listed:
        return
    try:
        opened, size = store.open(file, ahead=AHEAD), store.size(file)
    except OSError as error:
        result.tiers[tier] = False
        if tier == "samples" or not isinstance(error, FileNotFoundError):
            result.add(file, error.strerror or str(error))
        return
    result.tiers[tier] = True
    with opened:
        source = _Hashing(opened)
        walked = 0
        try:
            for place, (member, data) in enumerate(_walk(source, size)):
                if place >= len(listed):
                    result.add(file, f"member {member.name!r} is not in the manifest")
                    break
                _check_member(result, file, member, data, *listed[place], settings, deep, spelling)
                walked += 1
        except TAR_ERRORS as error:
            result.add(file, f"the tar cannot be read after {walked} members: {error}")
        try:
            while source.read(BUFFER):
                pass
        except OSError as error:
            result.add(file, error.strerror or str(error))
    result.bytes += source.count
    if walked < len(listed):
        first = listed[walked][0]["name"]
        result.add(file, f"members; the first that is missing is {first}", len(listed), walked)
    if source.sha256.hexdigest() != facts["sha256"].get(tier):
        result.add(file, "sha256", facts["sha256"].get(tier), source.sha256.hexdigest())


class _PlainMember(tarfile.TarInfo):
    """A member whose headers are of a bounded size: tarfile reads long names and pax records whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type != tarfile.REGTYPE and self.size > MOST_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes; the limit is {MOST_TAR_HEADER_BYTES}")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]


def _walk(source: _Hashing, size: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members and their bytes, in order. Raises tarfile.TarError for what is no plain file, or does not fit into `size`."""
    # A stream cannot go back, so no header can make it read a byte twice.
    with tarfile.open(fileobj=source, mode="r|", bufsize=BUFFER, tarinfo=_PlainMember) as tar:  # type: ignore[call-overload]
        for member in tar:
            if member.type != tarfile.REGTYPE or member.sparse is not None:
                raise tarfile.TarError(f"member {member.name!r} is not a plain file")
            if member.offset_data + member.size > size or member.size > MOST_SAMPLE_BYTES:
                raise tarfile.TarError(f"member {member.name!r} of {member.size} bytes does not fit")
            content = tar.extractfile(member)
            assert content is not None
            yield member, content.read()


def _check_member(
    result: ShardResult,
    file: str,
    member: tarfile.TarInfo,
    data: bytes,
    listed: dict[str, Any],
    row: dict[str, Any],
    settings: dict[str, Any],
    deep: "_Deep | None",
    spelling: "Spelling | None",
) -> None:
    name, key = listed["name"], row["key"]
    for what, expected, got in (
        ("name", name, member.name), ("offset", listed["offset"], member.offset_data), ("size", listed["size"], member.size)
    ):  # fmt: skip
        if expected != got:
            result.add(file, f"member {name}: {what}", expected, got, key=key)
    digest = xxhash.xxh3_64_intdigest(data)
    if digest != listed["xxh3"]:
        result.add(file, f"member {name}: xxh3", f"{listed['xxh3']:016x}", f"{digest:016x}", key=key)
        return
    if row["status"] != CACHED or any(row[column] is None for column in MEASURED):
        return  # said already
    add = functools.partial(result.add, file, key=key)
    try:
        if name == f"{key}.json":
            sample = _check_conversation(add, data, row, settings)
            if spelling is not None:
                spelling.expect(key, sample.answers)
        elif name == f"{key}.answer.arrow":
            table = read_table(data, where=name)
            _check_answer(add, table, row, settings)
            if deep is not None or spelling is not None:
                rows = answer_rows(table, where=name)
                if spelling is not None:
                    spelling.check(add, key, rows)
                if deep is not None:
                    deep.add(rows)
        elif name == f"{key}.question.arrow":
            table = read_table(data, where=name)
            _check_columns(add, table, PLACES, {}, settings, "question_codec")
            if table.num_rows != row["question_tokens"]:
                add("rows of the questions = question_tokens", row["question_tokens"], table.num_rows)
            _check_positions(add, table, row)
    except CONTENT_ERRORS as error:
        add(f"member {name} cannot be read: {error!r}")


def _check_conversation(add: Callable[..., None], data: bytes, row: dict[str, Any], settings: dict[str, Any]) -> Sample:
    sample = Sample.from_json(row["key"], strict_json(data, MOST_CONVERSATION_BYTES), [])
    for name in ("sample_id", "category", "source"):
        if getattr(sample, name) != row[name]:
            add(f"{name} of the conversation", row[name], getattr(sample, name))
    if len(sample.answers) != row["turns"]:
        add("turns of the conversation", row["turns"], len(sample.answers))
    if "answers" in settings:
        given = row["turns"] if AnswerSource.from_json(settings["answers"]).written_by_teacher else 0
        if len(sample.given_answers) != given:
            add("given answers beside the conversation", given, len(sample.given_answers), setting="answers")
    places = sample.image_indices
    if len(places) != row["images"] or sorted(places) != list(range(len(places))):
        add("images that the conversation names", f"0 to {row['images'] - 1}", places)
    return sample


def _check_answer(add: Callable[..., None], table: pa.Table, row: dict[str, Any], settings: dict[str, Any]) -> None:
    tensors = {"topk_ids": (pa.int32(), "top_k"), "topk_logits": (pa.float32(), "top_k")}
    plain = PLACES | TARGETS | {"logsumexp": pa.float32()}
    has_draws = "sample_ids" in table.column_names
    if not has_draws and settings.get("sampled_targets"):
        add("column sample_ids: values a row", settings["sampled_targets"], "no such column", setting="sampled_targets")
    if has_draws:
        tensors |= {"sample_ids": (pa.int32(), "sampled_targets"), "sample_counts": (pa.uint16(), "sampled_targets")}
        plain |= {"entropy": pa.float32()}
    if not _check_columns(add, table, plain, tensors, settings, "answer_codec"):
        return
    tokens, turns = row["answer_tokens"], row["turns"]
    if table.num_rows != tokens + turns:
        add("rows of the answers = answer_tokens + turns", tokens + turns, table.num_rows)
        return
    _check_positions(add, table, row)
    turn = table.column("turn").to_numpy()
    last = np.append(turn[1:] != turn[:-1], True)
    for name in TARGETS:
        nulls = np.asarray(table.column(name).is_null())
        if not np.array_equal(nulls, last):
            add(f"{name}: null", "on each turn's last row, and there only", f"{int(nulls.sum())} nulls")
            return
    targets = table.column("target_id").drop_null().to_numpy()
    ids = np.concatenate([table.column("topk_ids").combine_chunks().to_numpy_ndarray().ravel(), targets])
    head_rows = settings.get("head_rows")
    if head_rows is not None and len(ids) and not 0 <= ids.min() <= ids.max() < head_rows:
        add("ids of logits", f"0 to {head_rows - 1}", f"{ids.min()} to {ids.max()}", setting="head_rows")
    logits = table.column("topk_logits").combine_chunks().to_numpy_ndarray()
    logsumexp = table.column("logsumexp").to_numpy()
    if not (np.isfinite(logits).all() and np.isfinite(logsumexp).all()):
        add("stored logits", "finite", "NaN or Inf")
    elif (np.diff(logits, axis=1) > 0).any():
        add("stored logits", "the largest first", "another order")
    elif has_draws:
        _check_draws(add, table, settings.get("head_rows"), logits.astype(np.float64) - logsumexp[:, None])


def _check_draws(add: Callable[..., None], table: pa.Table, head_rows: int | None, log_probs: np.ndarray) -> None:
    """The sampled targets of an answer file; `log_probs`: float64 `[R, k]`, of the stored top k."""
    ids = table.column("sample_ids").combine_chunks().to_numpy_ndarray()
    counts = table.column("sample_counts").combine_chunks().to_numpy_ndarray()
    totals = counts.sum(1, dtype=np.int64)
    if (totals != ids.shape[1]).any():
        add("sample_counts, their sum in a row", ids.shape[1], totals[totals != ids.shape[1]][0])
    drawn = counts > 0
    if (drawn[:, 1:] > drawn[:, :-1]).any() or (ids[~drawn] != 0).any():
        add("sample_ids", "the drawn ids, then zeros with count 0", "another order")
    elif (np.diff(ids, axis=1)[drawn[:, 1:]] <= 0).any():
        add("sample_ids", "each drawn id once, rising", "another order")
    if head_rows is not None and len(ids) and not 0 <= ids.min() <= ids.max() < head_rows:
        add("ids of draws", f"0 to {head_rows - 1}", f"{ids.min()} to {ids.max()}", setting="head_rows")
    entropy = table.column("entropy").to_numpy()
    if not (np.isfinite(entropy).all() and (entropy >= 0).all()):
        add("column entropy", "finite, 0 or more", entropy[~(np.isfinite(entropy) & (entropy >= 0))][0])
        return
    # The rest of the distribution adds least as one token, and most when spread evenly over all other ids.
    least, tail = row_entropy(log_probs)
    others = max(1, (head_rows or MOST_WIDTH) - log_probs.shape[1])
    most = least + tail * np.log(others)
    outside = (entropy < least - ENTROPY_SLACK) | (entropy > most + ENTROPY_SLACK)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        add(f"entropy of row {row}, by its top k", f"{least[row]:.4g} to {most[row]:.4g}", f"{entropy[row]:.4g}")


def _check_positions(add: Callable[..., None], table: pa.Table, row: dict[str, Any]) -> None:
    position, turn = table.column("position").to_numpy(), table.column("turn").to_numpy()
    if (np.diff(position) <= 0).any() or (len(position) and position[0] < 0):
        add("positions", "rising from 0 or more", "others")
    turns = np.unique(turn)
    if len(turns) != row["turns"] or (turns != np.arange(len(turns))).any() or (np.diff(turn) < 0).any():
        add("column turn", f"rising from 0 to {row['turns'] - 1}", turns.tolist())


def _check_columns(
    add: Callable[..., None],
    table: pa.Table,
    plain: dict[str, pa.DataType],
    tensors: dict[str, tuple[pa.DataType, str]],
    settings: dict[str, Any],
    codec_setting: str,
) -> bool:
    """Whether an Arrow file has the columns that the format gives it."""
    facts = strict_json((table.schema.metadata or {})[METADATA_KEY], MOST_SCHEMA_BYTES)
    for setting, name in ((codec_setting, "codec"), ("hidden_size", "hidden_size")):
        if setting in settings and facts[name] != settings[setting]:
            add(f"{name} in the Arrow metadata", settings[setting], facts[name], setting=setting)
    expected = dict(plain)
    for name, (kind, setting) in tensors.items():
        width = settings.get(setting)
        column = table.column(name) if name in table.column_names else None
        if width is not None and column is not None and isinstance(column.type, pa.FixedShapeTensorType):
            if list(column.type.shape) != [width]:
                add(f"column {name}: values a row", width, column.type.shape, setting=setting)
                width = column.type.shape[0] if len(column.type.shape) == 1 else width
        if width is not None:
            expected[name] = pa.fixed_shape_tensor(kind, [width])
    if type(facts["hidden_size"]) is not int or not 0 < facts["hidden_size"] <= MOST_WIDTH:
        raise ValueError(f"hidden_size {facts['hidden_size']!r} in the Arrow metadata")
    expected |= _codec_types(facts["codec"], facts["hidden_size"])
    right = True
    for name, kind in expected.items():
        found = table.schema.field(name).type if name in table.column_names else None
        if found != kind:
            add(f"column {name}", kind, found or "no such column")
            right = False
        elif name not in TARGETS and table.column(name).null_count:
            add(f"column {name}", "no nulls", table.column(name).null_count)
            right = False
    return right


@functools.lru_cache(maxsize=64)
def _codec_types(name: str, hidden_size: int) -> dict[str, pa.DataType]:
    """The columns of a codec, as it would write them for that width."""
    codec = codec_named(name)
    columns = codec.encode(np.zeros((1, hidden_size), np.float32), codec.facts(hidden_size))
    return {
        column: pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), [values.shape[1]])
        for column, values in columns.items()
    }


# -------------------------------------------------------------------------------------------------------- all shards at once


def _merge(results: list[ShardResult], notes: list[str]) -> Iterator[Finding]:
    """The shards' findings. What more than half of them say against a setting of cache.json is held against cache.json."""
    read = [result for result in results if result.tiers]
    settings = {name for result in read for name, found in result.disagreements.items() if found}
    blamed = set()
    for name in sorted(settings):
        against = [result.disagreements[name][0] for result in read if result.disagreements.get(name)]
        if 2 * len(against) > len(read) or name == "num_samples":
            blamed.add(name)
            yield Finding(
                shard=None,
                file=CACHE_FILE,
                what=f"{name}: {len(against)} of {len(read)} shards disagree, such as {against[0].file}: {against[0].what}; "
                f"put the right value back, or {AGAIN}",
                expected=against[0].got,
                got=against[0].expected,
            )
    with_questions = [result for result in results if "questions" in result.tiers]
    missing = [result for result in with_questions if not result.tiers["questions"]]
    if missing and len(missing) == len(with_questions):
        notes.append("the questions tier was deleted: stage 1 can train without its regularisation only")
    for result in results:
        yield from result.findings
        for name, found in result.disagreements.items():
            if name not in blamed:
                yield from found
        if result in missing and len(missing) < len(with_questions):
            yield Finding(
                shard=result.shard,
                file=f"questions/{shard_name(result.shard)}.tar",
                what=f"missing, while {len(with_questions) - len(missing)} of {len(with_questions)} shards have theirs; "
                "if the tier was deleted, delete the others' too",
            )


def _over_limit(results: Iterable[ShardResult], max_kl: float) -> Iterator[Finding]:
    """Shards whose states do not give their logits; if most do not, it is not the shards that are wrong."""
    measured = [result.deep for result in results if result.deep is not None and result.deep.rows]
    over = [figures for figures in measured if not figures.kl_mean <= max_kl]
    if over and 2 * len(over) > len(measured):
        worst = max(over, key=lambda figures: figures.kl_mean)
        yield Finding(
            shard=None,
            file=HEAD_FILE,
            what=f"it does not give the stored logits of {len(over)} of {len(measured)} shards (mean KL of shard "
            f"{worst.shard} in nats): a head, a layer, a norm or a position is wrong, or the codec too coarse for the limit",
            expected=f"at most {max_kl:g}",
            got=f"{worst.kl_mean:.4g}",
        )
        return
    for figures in over:
        yield Finding(
            shard=figures.shard,
            file=f"samples/{shard_name(figures.shard)}.tar",
            what="its states do not give its logits; mean KL in nats",
            expected=f"at most {max_kl:g}",
            got=f"{figures.kl_mean:.4g}",
        )


# ------------------------------------------------------------------------------------------------------------------- deep


class Spelling:
    """Compares the answers of a shard's conversations with what their tokens stand for."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._key = ""
        self._answers: tuple[str, ...] = ()

    def expect(self, key: str, answers: tuple[str, ...]) -> None:
        """The answers of the conversation whose tokens come next."""
        self._key, self._answers = key, answers

    def check(self, add: Callable[..., None], key: str, rows: AnswerRows) -> None:
        """Tokens before the answer's first byte are the template's; it may trim an answer, and a tokenizer compose letters."""
        if key != self._key or not rows.predicts.any():
            return  # the conversation could not be read, and that was said
        for turn, answer in enumerate(self._answers):
            places = np.flatnonzero(rows.predicts & (rows.turn == turn))[:-1]  # the last one closes the turn
            ids = rows.target_id[places][rows.target_end[places] > 0].tolist()
            pieces = [self.vocabulary.bytes(token_id) for token_id in ids]
            if None in pieces:
                what = f"answer of turn {turn + 1}: a token that the teacher's tokenizer.json lacks"
                add(what, got=ids[pieces.index(None)])
                continue
            text = b"".join(piece for piece in pieces if piece is not None).decode(errors="backslashreplace")
            spelled, wanted = (unicodedata.normalize("NFC", words).strip() for words in (text, answer))
            if spelled != wanted:
                place = len(os.path.commonprefix([spelled, wanted]))
                near = slice(max(0, place - 20), place + 20)
                what = f"answer of turn {turn + 1}: not what its tokens stand for, near character {place}"
                add(what, repr(spelled[near]), repr(wanted[near]))


class _Deep:
    """Compares stored logits with recomputed ones, a bounded number of logits at a time."""

    def __init__(self, head: FrozenHead):
        self.head = head
        self.chunk = max(1, LOGIT_BUDGET // head.weight.shape[0])
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._count = 0
        self._kl: list[np.ndarray] = []
        self._agree = 0

    def add(self, rows: AnswerRows) -> None:
        """Take one sample's rows; those of several samples go through the head together.

        Raises ValueError for rows that do not fit the head.
        """
        num_rows, width = self.head.weight.shape
        if rows.hidden.shape[1] != width or not ((rows.topk_ids >= 0) & (rows.topk_ids < num_rows)).all():
            raise ValueError(f"its states or ids do not fit the head of {num_rows} rows and {width} columns")
        keep = rows.predicts
        self._waiting.append((rows.hidden[keep], rows.topk_ids[keep], rows.topk_logits[keep], rows.logsumexp[keep]))
        self._count += int(keep.sum())
        if self._count >= self.chunk:
            self._flush()

    def _flush(self) -> None:
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)] if self._waiting else []
        for start in range(0, self._count, self.chunk):
            self._compare(*(column[start : start + self.chunk] for column in columns))
        self._waiting, self._count = [], 0

    def _compare(self, hidden: np.ndarray, ids: np.ndarray, logits: np.ndarray, logsumexp: np.ndarray) -> None:
        import torch

        with torch.no_grad():
            device = self.head.weight.device
            top = torch.from_numpy(ids.astype(np.int64)).to(device)
            log_p = torch.from_numpy(logits - logsumexp[:, None]).to(device).double()  # [r, k]
            again = self.head.logits(torch.from_numpy(np.ascontiguousarray(hidden)).to(device))  # [r, V]
            self._agree += int((again.argmax(-1) == top[:, 0]).sum())
            total = again.logsumexp(-1, keepdim=True)
            log_q = (again.gather(1, top) - total).double()
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            if top.shape[1] < again.shape[1]:
                tail_p = (1 - log_p.exp().sum(-1)).clamp_min(0)
                tail_q = (again.scatter(1, top, -torch.inf).logsumexp(-1) - total[:, 0]).double()
                kl += torch.where(tail_p > 0, tail_p * (tail_p.clamp_min(1e-300).log() - tail_q), 0)
            # Within float32's rounding of the stored logits it may come out a little below zero.
            self._kl.append(kl.clamp_min(0).cpu().numpy())

    def figures(self, shard: int) -> DeepFigures:
        """Over all rows that were added."""
        self._flush()
        kl = np.concatenate(self._kl) if self._kl else np.zeros(0)
        if not len(kl):
            return DeepFigures(shard=shard, rows=0, kl_mean=0.0, kl_max=0.0, top1_agreement=1.0)
        return DeepFigures(
            shard=shard,
            rows=len(kl),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1_agreement=self._agree / len(kl),
        )
