"""Verify a cache: every byte, count and column; with `deep` also that states give logits and tokens spell answers.

A chain of digests covers every byte: `cache.json` holds its own digest and those of the head, the teacher's files and the
index; the index holds one of each manifest; a manifest holds one of each tar and of each member. Damage is returned as
findings, so that one damaged shard does not hide another. Nothing is unpickled or extracted to disk.
"""

import functools
import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import xxhash

from genrecal.errors import DamageError, FormatError, GenrecalError
from genrecal.progress import Progress, counted
from genrecal.samples import Sample
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.head import HEAD_FILE, FrozenHead
from genrecal.shards.index import INDEX_FILE, index_digests, read_shard_manifest
from genrecal.shards.layout import (
    CACHE_FILE,
    DEFAULTS,
    DIGEST,
    TEACHER_FOLDER,
    TIERS,
    manifest_name,
    read_raw_cache_json,
    sealed,
    shard_name,
    tar_name,
    wrong_settings,
)
from genrecal.shards.manifest import CACHED, SKIPPED, content_digest
from genrecal.shards.reader import MAX_CONVERSATION_BYTES, MAX_SAMPLE_BYTES
from genrecal.shards.record import AnswerRows, QuestionRows, answer_rows, question_rows, read_table
from genrecal.shards.storage import Store, files_in, open_store
from genrecal.shards.strict_json import strict_json
from genrecal.shards.vocabulary import Vocabulary, load_vocabulary

QUARANTINE = "quarantine"
MEMBER_NAME = r"\.(json|[0-9]{1,6}\.[A-Za-z0-9]{1,16}|answer\.arrow|question\.arrow)"
MAX_KL = 0.1  # nats, mean over a shard
LOGIT_BUDGET = 2**25  # float32 logits that exist at once
BUFFER = 2**23  # bytes of a file that are read at a time
TOTALS = ("cached", "skipped", "turns", "images", "question_tokens", "answer_tokens")
CONTENT_ERRORS = (  # of content whose checksum is right, if its writer was wrong
    GenrecalError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError,
    pa.ArrowException,
)  # fmt: skip
AGAIN = "delete cache.json and run `genrecal cache` again with the same options: finished shards are kept"
Add = Callable[..., None]  # `Findings.add` of one sample
Difference = tuple[str, object, object]  # what, expected, got


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
    """KL(stored top k and the rest || head(decoded state)) in nats, and top-1 agreement, over one shard's target rows."""

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
            f"{finished} of {counted(planned, 'shard')}, {counted(self.cached, 'sample')} cached, {self.skipped} skipped, "
            f"{self.bytes / 1e6:.2f} MB read"
        )
        if self.whole:
            return f"whole: {counts}"
        damaged = counted(len(self.damaged_shards), "damaged shard")
        return f"damaged: {counted(len(self.findings), 'finding')}, {damaged}; {counts}"


def verify_cache(
    path: "str | os.PathLike[str] | Store", *, deep: bool = False, max_kl: float = MAX_KL, device: str = "cpu"
) -> Verification:
    """Read every byte of a cache's finished shards once, and check it.

    Nothing else is checked where `cache.json` is damaged: the rest is judged by it. Raises FormatError for a folder that
    is no cache.

    Args:
        deep: also recompute the logits of every row that has a target from its stored state, and spell every answer from
            its tokens.
        max_kl: mean KL in nats above which a shard is damaged; `deep` only.
        device: where the head is computed; `deep` only.
    """
    store, outside, notes = open_store(path), Findings(), []
    settings = _check_settings(store, outside)
    if outside.findings:
        notes.append("nothing else was checked: the rest of a cache is judged by its cache.json")
        return Verification(path=store.url, shards=(0, 0), findings=tuple(outside.findings), notes=tuple(notes))
    _check_files(store, settings, outside)
    damaged = {finding.file for finding in outside.findings}
    head, vocabulary = _for_deep(store, settings, outside, notes, device) if deep else (None, None)
    planned, complete = settings["num_shards"], "totals" in settings
    numbers = [shard for shard, _ in files_in(store, "manifest", ".parquet")]
    if not complete and len(numbers) < planned:
        notes.append(f"unfinished: {len(numbers)} of {counted(planned, 'shard')}; run `genrecal cache` again to resume")
    elif not complete:
        notes.append(f"every shard is there, but {CACHE_FILE} has no totals yet; run `genrecal cache` again")
    has_index = complete and store.present(INDEX_FILE)
    if complete and not has_index:
        notes.append(f"no {INDEX_FILE}: opening reads every manifest; `genrecal cache` again writes it")
    digests = index_digests(store) if has_index and INDEX_FILE not in damaged else {}
    tiers: tuple[str, ...] = TIERS
    if settings["question_codec"] != "none" and numbers and not store.names("questions"):
        notes.append("the questions tier was deleted: stage 1 can train without its regularisation only")
        tiers = ("samples",)
    results, damaged_shards = [], 0
    expected = sorted({*numbers, *(range(planned) if complete else ())})
    with Progress("verify", len(expected), "shards") as progress:
        for shard in expected:
            content = _Content(settings, head, vocabulary)
            results.append(check_shard(store, shard, settings, digests.get(shard), tiers, content))
            damaged_shards += bool(results[-1].findings)
            progress.advance(1, f"{damaged_shards} damaged")
    for result in results:
        if result.deep is not None and not result.deep.kl_mean <= max_kl:
            what = (
                "its states do not give its logits (if most shards say so: a wrong head, layer or norm, or a codec too "
                "coarse for --max-kl); mean KL in nats"
            )
            file = tar_name("samples", result.deep.shard)
            result.add(file, what, f"at most {max_kl:g}", f"{result.deep.kl_mean:.4g}")
    sums: Counter[str] = Counter()
    for result in results:
        sums.update(result.sums)
    if complete and not any(result.findings for result in results):
        for name, said in (settings["totals"] | {"rows": settings["num_samples"]}).items():
            if said != sums[name]:
                outside.add(CACHE_FILE, f"totals: {name}: not the manifests' sum; {AGAIN}", sums[name], said)
    return Verification(
        path=store.url,
        shards=(len(numbers), planned),
        cached=sums[CACHED],
        skipped=sums[SKIPPED],
        bytes=sums["bytes"],
        findings=tuple(finding for result in (outside, *results) for finding in result.findings),
        notes=tuple(notes),
        deep=tuple(result.deep for result in results if result.deep is not None),
    )


def quarantine(verification: Verification) -> list[str]:
    """Move the damaged shards aside, so that `genrecal cache` makes exactly those again; returns the folders they are in.

    A shard's files go to `quarantine/SHARD.N/`, N being the first number that is free. Nothing is deleted or overwritten.
    The manifest goes first: without it the shard counts as unfinished, wherever this is stopped.

    Raises:
        DamageError: cache.json is damaged, so no shard was checked; nothing was moved.
    """
    store = open_store(verification.path)
    if any(finding.file == CACHE_FILE for finding in verification.findings):
        raise DamageError(f"{store.where(CACHE_FILE)}: damaged, so nothing was moved; {AGAIN}, then verify again")
    folders = []
    for shard in verification.damaged_shards:
        moves = {manifest_name(shard): "manifest.parquet"} | {tar_name(tier, shard): f"{tier}.tar" for tier in TIERS}
        there = {name: new for name, new in moves.items() if store.present(name)}
        names = (f"{QUARANTINE}/{shard_name(shard)}.{number}" for number in itertools.count())
        folder = next(name for name in names if not store.present(name))
        for name, new in there.items():
            store.move(name, f"{folder}/{new}")
        folders += [store.where(folder)] if there else []
    return folders


# ------------------------------------------------------------------------------------------------------ outside the shards


@dataclass
class Findings:
    """What was found in one shard, or outside the shards.

    `sums` has `bytes` and, where the manifest can be read, `rows` and TOTALS.
    """

    shard: int | None = None
    findings: list[Finding] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)
    deep: DeepFigures | None = None

    def add(self, file: str, what: str, expected: object = "", got: object = "", *, key: str | None = None) -> None:
        finding = Finding(shard=self.shard, file=file, key=key, what=what, expected=str(expected), got=str(got))
        self.findings.append(finding)


def _check_settings(store: Store, found: Findings) -> dict[str, Any]:
    """The content of cache.json, if nothing is wrong with it."""
    try:
        content = read_raw_cache_json(store)
    except FormatError as error:
        what = f"{str(error).removeprefix(f'{store.where(CACHE_FILE)}: ')}; {AGAIN}"
        if not store.present(CACHE_FILE):
            if not store.names("manifest"):
                raise
            what = "missing; run `genrecal cache` again with the same options: finished shards are kept"
        found.add(CACHE_FILE, what)
        return {}
    for name, expected in wrong_settings(content).items():
        found.add(CACHE_FILE, name, expected, repr(content.get(name)))
    digest = sealed(content)[DIGEST]
    if digest != content.get(DIGEST):
        found.add(CACHE_FILE, f"{DIGEST} of its other content; {AGAIN}", digest, content.get(DIGEST))
    return DEFAULTS | content


def _check_files(store: Store, settings: dict[str, Any], found: Findings) -> None:
    """Compare the sha256 of the head, the teacher's files and the index with what cache.json says."""
    files = settings["teacher"].get("files_sha256", {})
    expected = {HEAD_FILE: settings["teacher"].get("head_sha256")} if settings["answer_codec"] != "none" else {}
    expected |= {f"{TEACHER_FOLDER}/{name}": digest for name, digest in sorted(files.items())}
    if "totals" in settings and store.present(INDEX_FILE):
        expected[INDEX_FILE] = settings.get("index_sha256")
    to_delete = {HEAD_FILE: f"it as well as {CACHE_FILE}", INDEX_FILE: "it"}
    for file, digest in expected.items():
        try:
            with store.open(file, ahead=BUFFER) as opened:
                got = hashlib.file_digest(cast(Any, opened), "sha256").hexdigest()
        except OSError as error:
            got = error.strerror or str(error)
        if got != digest:
            found.add(file, f"sha256; {AGAIN.replace(CACHE_FILE, to_delete.get(file, CACHE_FILE))}", digest, got)
    for name in store.names(TEACHER_FOLDER):
        if name not in files and not name.startswith("."):
            what = f"not listed in {CACHE_FILE}, but a processor may read it; move it elsewhere"
            found.add(f"{TEACHER_FOLDER}/{name}", what)


def _for_deep(
    store: Store, settings: dict[str, Any], found: Findings, notes: list[str], device: str
) -> tuple[FrozenHead | None, Vocabulary | None]:
    """What `--deep` compares with: the head and the vocabulary, or None and a finding or a note."""
    teacher, head = settings["teacher"], None
    if settings["answer_codec"] == "none":
        notes.append("not compared with states: the cache holds targets only")
    elif any(finding.file == HEAD_FILE for finding in found.findings):
        notes.append(f"not compared with the stored logits: {HEAD_FILE} is damaged")
    else:
        try:
            head = FrozenHead.load(store.local_copy(HEAD_FILE, str(teacher.get("head_sha256"))), device)
            expected, got = [settings["head_rows"], settings["hidden_size"]], list(head.weight.shape)
            if expected != got:
                raise FormatError(f"{HEAD_FILE}: expected a weight of {expected} by {CACHE_FILE}, got {got}")
        except FormatError as error:
            found.add(HEAD_FILE, str(error).partition(f"{HEAD_FILE}: ")[2])
            head = None
    vocabulary, unreadable = load_vocabulary(store)
    if vocabulary is not None and not vocabulary.is_exact:
        vocabulary, unreadable = None, f"{TEACHER_FOLDER}/tokenizer.json: a decoder of an unknown kind"
    if vocabulary is None and any("token" in name for name in teacher.get("files_sha256", {})):
        notes.append(f"answers are not compared with their tokens: {unreadable}")
    return head, vocabulary


# ------------------------------------------------------------------------------------------------------------- one shard


def check_shard(
    store: Store, shard: int, settings: dict[str, Any], digest: str | None, tiers: Iterable[str], content: "_Content"
) -> Findings:
    """Everything that can be said of one shard by its own files, the settings of cache.json and the index.

    Args:
        digest: of its manifest, by the index; None where that is not known.
        tiers: those whose tars are there.
        content: checks the members.
    """
    result, file = Findings(shard), manifest_name(shard)
    if shard >= settings["num_shards"]:
        result.add(file, "a shard beyond the plan", f"numbers below {settings['num_shards']}", shard)
        return result
    try:
        table, facts = read_shard_manifest(store, shard)
        result.sums["bytes"] += store.size(file)
    except GenrecalError as error:
        words = str(error).removeprefix(f"{store.where(file)}: ").split("; ")[0]
        result.add(file, words if store.present(file) else "missing, of a cache that says it is complete")
        return result
    rows, got = table.to_pylist(), content_digest(table, facts)
    keys, counts = [row["key"] for row in rows], Counter(row["status"] for row in rows)
    codecs = {name: settings[f"{name}_codec"] for name in ("answer", "question")}
    codecs = {name: codec for name, codec in codecs.items() if codec != "none"}
    size = settings["samples_per_shard"]
    for what, expected, found in (
        (f"{DIGEST} of its rows and facts", digest or facts.get(DIGEST), got),
        (DIGEST, digest or facts.get(DIGEST), facts.get(DIGEST)),
        ("rows, by the plan", max(0, min(size, settings["num_samples"] - shard * size)), len(rows)),
        *((f"rows that are {status}", facts[status], counts[status]) for status in (CACHED, SKIPPED)),
        (f"rows that are {CACHED} or {SKIPPED}", len(rows), counts[CACHED] + counts[SKIPPED]),
        ("keys", sorted(set(keys), key=lambda key: (len(key.split("-")[0]), key)), keys),
        ("codecs", codecs, facts["codecs"]),
        ("tars with a sha256", 2 if "question" in codecs else 1, len(facts["sha256"])),
    ):
        if expected != found:
            result.add(file, what, expected, found)
    result.sums.update({name: sum(row[name] or 0 for row in rows) for name in TOTALS if name in table.column_names})
    result.sums.update({"rows": len(rows), CACHED: counts[CACHED], SKIPPED: counts[SKIPPED]})
    for tier in tiers:
        if tier in facts["sha256"]:
            _check_tar(store, result, tier, rows, facts["sha256"][tier], content)
    result.deep = content.figures(shard)
    return result


def _check_tar(
    store: Store, result: Findings, tier: str, rows: list[dict[str, Any]], sha256: str, content: "_Content"
) -> None:
    """Read a tar once: its sha256, and each listed member's checksum and content."""
    file, digest, place = tar_name(tier, cast(int, result.shard)), hashlib.sha256(), 0
    listed = [(member, row) for row in rows for member in row["members"] if member["tier"] == tier]
    try:
        length = store.size(file)
        with store.open(file, ahead=BUFFER) as tar:
            for member, row in listed:
                add = functools.partial(result.add, file, key=row["key"])
                name, offset, size = member["name"], member["offset"], member["size"]
                if not re.fullmatch(re.escape(row["key"]) + MEMBER_NAME, name):
                    add("name of a member", "KEY.json, KEY.0.jpg, KEY.answer.arrow or KEY.question.arrow", repr(name))
                if offset < place or not 0 <= size <= MAX_SAMPLE_BYTES or offset + size > length:
                    add(
                        f"member {name}",
                        f"{size} bytes at offset {offset}",
                        f"a tar of {length} bytes, read to {place}",
                    )
                    break
                _hash(tar, offset - place, digest)
                data, place = tar.read(size), offset + size
                digest.update(data)
                checksum = xxhash.xxh3_64_intdigest(data)
                if checksum != member["xxh3"]:
                    add(f"member {name}: xxh3", f"{member['xxh3']:016x}", f"{checksum:016x}")
                    continue
                try:
                    content.check(add, name, data, row)
                except CONTENT_ERRORS as error:
                    add(f"member {name} cannot be read: {error!r}")
            _hash(tar, length, digest)
        result.sums["bytes"] += length
    except OSError as error:
        result.add(file, "missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error))
        return
    if digest.hexdigest() != sha256:
        result.add(file, "sha256", sha256, digest.hexdigest())


def _hash(file: BinaryIO, count: int, digest: Any) -> None:
    """Read at most `count` bytes into a digest."""
    while count > 0 and (data := file.read(min(count, BUFFER))):
        digest.update(data)
        count -= len(data)


# --------------------------------------------------------------------------------------------------- content of members


class _Content:
    """Checks what one shard's members say, and keeps what comparing logits gave."""

    def __init__(self, settings: dict[str, Any], head: FrozenHead | None, vocabulary: Vocabulary | None):
        self.settings, self.head, self.vocabulary = settings, head, vocabulary
        self.answers: tuple[str, ...] = ()  # of the conversation that was read last
        self.kl: list[np.ndarray] = [np.zeros(0)]
        self.agree = 0

    def check(self, add: Add, name: str, data: bytes, row: dict[str, Any]) -> None:
        """Compare a member with its manifest row and with cache.json. Raises one of CONTENT_ERRORS if it cannot be read."""
        if name.endswith(".json"):
            wrong = self._conversation(data, row)
        elif name.endswith(".question.arrow"):
            wrong = self._rows("question", question_rows(read_table(data, where=name), where=name), row)
        elif name.endswith(".answer.arrow"):
            rows = answer_rows(read_table(data, where=name), where=name)
            wrong = self._rows("answer", rows, row)
            if not wrong:
                wrong = list(self._spelling(rows))
                self._compare_logits(rows)
        else:
            return
        for what, expected, got in wrong:
            add(what, expected, got)

    def _conversation(self, data: bytes, row: dict[str, Any]) -> list[Difference]:
        self.answers = ()
        sample = Sample.from_json(row["key"], strict_json(data, MAX_CONVERSATION_BYTES), [])
        self.answers = sample.answers
        written = AnswerSource.from_json(self.settings["answers"]).written_by_teacher
        checks = [
            *((name, row[name], getattr(sample, name)) for name in ("sample_id", "category", "source")),
            ("turns", row["turns"], len(sample.answers)),
            ("given answers", row["turns"] if written else 0, len(sample.given_answers)),
            ("number of images", row["images"], len(sample.image_indices)),
        ]
        return [(f"{what} of the conversation", a, b) for what, a, b in checks if a != b]

    def _rows(self, tier: str, rows: QuestionRows, row: dict[str, Any]) -> list[Difference]:
        """The columns' types were checked as they were read."""
        rising = (np.diff(rows.turn) >= 0).all() and (np.diff(rows.position) > 0).all() and (rows.position >= 0).all()
        count = row["question_tokens"] if tier == "question" else row["answer_tokens"] + row["turns"]
        checks: list[Difference] = [
            ("codec", self.settings[f"{tier}_codec"], "none" if rows.states is None else rows.coded.facts["codec"]),
            ("rows", count, len(rows)),
            ("turns and positions", "rising", "rising" if rising else "in another order"),
        ]
        if rows.states is not None:
            checks.append(("hidden size", self.settings["hidden_size"], rows.coded.facts["hidden_size"]))
        if isinstance(rows, AnswerRows):
            last, sampled = np.append(rows.turn[1:] != rows.turn[:-1], True)[: len(rows)], rows.sampled
            ids = {"topk_ids": rows.topk_ids, "target_id": rows.target_id[rows.predicts]}
            numbers = {"topk_logits": rows.topk_logits, "logsumexp": rows.logsumexp}
            if sampled is not None:
                ids["sample_ids"], numbers["entropy"] = sampled.ids, sampled.entropy
            wrong = [name for name, v in ids.items() if ((v < 0) | (v >= self.settings["head_rows"])).any()]
            wrong += [name for name, v in numbers.items() if not np.isfinite(v).all()]
            if sampled is not None and (sampled.counts.sum(1, dtype=np.int64) != sampled.ids.shape[1]).any():
                wrong.append("sample_counts")
            checks += [
                ("turns", row["turns"], len(np.unique(rows.turn))),
                ("logits per row", self.settings["top_k"], rows.topk_ids.shape[1]),
                ("draws per row", self.settings["sampled_targets"], 0 if sampled is None else sampled.ids.shape[1]),
                ("rows without a target", int(last.sum()), int((last & ~rows.predicts).sum())),
                ("rows with a target", int((~last).sum()), int(rows.predicts.sum())),
                ("columns with values that cannot be", [], wrong),
            ]
        return [(f"{tier} file: {what}", a, b) for what, a, b in checks if a != b]

    def _spelling(self, rows: AnswerRows) -> Iterator[Difference]:
        """Compare answers with the bytes of their tokens.

        Tokens before the answer's first byte are the template's; it may trim an answer, and a tokenizer may compose letters.
        """
        for turn, answer in enumerate(self.answers if self.vocabulary is not None else ()):
            places = np.flatnonzero(rows.predicts & (rows.turn == turn))[:-1]  # the last one closes the turn
            ids = rows.target_id[places][rows.target_end[places] > 0].tolist()
            pieces = [cast(Vocabulary, self.vocabulary).bytes(token_id) for token_id in ids]
            if None in pieces:
                what = f"answer of turn {turn + 1}: a token that the teacher's tokenizer.json lacks"
                yield what, "", ids[pieces.index(None)]
                continue
            text = b"".join(piece for piece in pieces if piece is not None).decode(errors="backslashreplace")
            spelled, wanted = (unicodedata.normalize("NFC", words).strip() for words in (text, answer))
            if spelled != wanted:
                place = len(os.path.commonprefix([spelled, wanted]))
                near = slice(max(0, place - 20), place + 20)
                what = f"answer of turn {turn + 1}: not what its tokens stand for, near character {place}"
                yield what, repr(spelled[near]), repr(wanted[near])

    def _compare_logits(self, rows: AnswerRows) -> None:
        """KL(stored || recomputed) of every row that has a target; the tokens outside the top k count as one."""
        if self.head is None:
            return
        import torch

        size = max(1, LOGIT_BUDGET // self.head.weight.shape[0])
        places, hidden, device = np.flatnonzero(rows.predicts), rows.hidden, self.head.weight.device
        for part in (places[start : start + size] for start in range(0, len(places), size)):
            with torch.no_grad():
                top = torch.from_numpy(rows.topk_ids[part].astype(np.int64)).to(device)
                log_p = (
                    torch.from_numpy(rows.topk_logits[part] - rows.logsumexp[part, None]).to(device).double()
                )  # [r, k]
                logits = self.head.logits(torch.from_numpy(hidden[part]).to(device))  # [r, V]
                self.agree += int((logits.argmax(-1) == top[:, 0]).sum())
                total = logits.logsumexp(-1, keepdim=True)
                log_q = (logits.gather(1, top) - total).double()
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                if top.shape[1] < logits.shape[1]:
                    tail_p = (1 - log_p.exp().sum(-1)).clamp_min(0)
                    tail_q = (logits.scatter(1, top, -torch.inf).logsumexp(-1) - total[:, 0]).double()
                    kl += torch.where(tail_p > 0, tail_p * (tail_p.clamp_min(1e-300).log() - tail_q), 0)
                self.kl.append(kl.clamp_min(0).cpu().numpy())  # float32's rounding can take it a little below 0

    def figures(self, shard: int) -> DeepFigures | None:
        """Over all rows that were compared; None without a head."""
        if self.head is None:
            return None
        kl = np.concatenate(self.kl)
        mean, most = (float(kl.mean()), float(kl.max())) if len(kl) else (0.0, 0.0)
        agreement = self.agree / len(kl) if len(kl) else 1.0
        return DeepFigures(shard=shard, rows=len(kl), kl_mean=mean, kl_max=most, top1_agreement=agreement)
