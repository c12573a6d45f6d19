"""One record of a cache, readable: its images, its conversation, and what the teacher thinks of each answer token."""

import difflib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecal.errors import DamageError, UsageError
from genrecal.samples import open_image
from genrecal.shards.reader import Cache, CachedRecord
from genrecal.shards.record import AnswerRows, row_entropy
from genrecal.shards.vocabulary import Vocabulary, load_vocabulary

ALTERNATIVES = 5
NEAREST_KEYS = 3  # suggested for one that does not exist
COMPARED_KEYS = 40_000  # keys and ids that a wrong key is compared with, letter by letter
STATES = (".json", ".answer.arrow", ".question.arrow")  # members that are not images


@dataclass(frozen=True, kw_only=True)
class ImageDescription:
    """An image as it is stored: its member's name, bytes, format and pixels; or why it cannot be read."""

    index: int
    member: str
    bytes: int
    format: str | None = None
    width: int | None = None
    height: int | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token that the teacher gives probability to; `text` is None if the vocabulary is not there or lacks it."""

    id: int
    text: str | None
    probability: float


@dataclass(frozen=True, kw_only=True)
class AnswerToken:
    """One given answer token and the teacher's prediction of it.

    Args:
        turn: from 0.
        position: the token's place in the teacher's sequence; the row that predicts it is the one before.
        text: the bytes `start` to `end` of the turn's answer; a byte that is no whole character stands as `\\xNN`.
        vocabulary_text: the token as the teacher's vocabulary has it, if that is there.
        end_of_turn: it closes the turn and has no bytes of the answer.
        probability, log_prob: the teacher's, of this token; exact also outside the top k.
        rank: from 1, if among the top k.
        entropy: of the whole prediction, nats; the mass outside the k counts as one token.
        tail: that mass.
        alternatives: the most probable other tokens, most probable first.
    """

    turn: int
    position: int
    id: int
    start: int
    end: int
    text: str
    vocabulary_text: str | None
    end_of_turn: bool
    probability: float
    log_prob: float
    rank: int | None
    entropy: float
    tail: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, kw_only=True)
class RecordDescription:
    """A record in plain values. `messages` and `given_answers` are as in `KEY.json`, the second empty where the first hold
    them; `notes` say what could not be shown, and why."""

    key: str
    sample_id: str
    shard: int
    category: str
    source: str
    question_tokens: int
    answer_tokens: int
    has_question: bool
    top_k: int
    entropy: float
    log_prob: float
    top1_agreement: float
    images: tuple[ImageDescription, ...]
    messages: tuple[dict[str, Any], ...]
    given_answers: tuple[str, ...]
    tokens: tuple[AnswerToken, ...]
    notes: tuple[str, ...] = ()


def describe_record(record: CachedRecord, *, alternatives: int = ALTERNATIVES) -> RecordDescription:
    """Describe a record's images, conversation and answer tokens; the question states are not read.

    Raises DamageError or FormatError as reading the record does.
    """
    sample, rows = record.sample, record.answer_rows()
    vocabulary, note = load_vocabulary(record.cache.store)
    return RecordDescription(
        **{name: record.row[name] for name in (
            "key", "sample_id", "shard", "category", "source", "question_tokens", "answer_tokens", "has_question",
            "entropy", "log_prob", "top1_agreement",
        )},
        top_k=rows.topk_ids.shape[1],
        images=tuple(_describe_image(record, index) for index in range(len(image_members(record)))),
        messages=tuple(sample.to_json()["messages"]),
        given_answers=sample.given_answers,
        tokens=_answer_tokens(rows, sample.answers, vocabulary, alternatives),
        notes=(note,) if note else (),
    )  # fmt: skip


def find_record(cache: Cache, name: str) -> CachedRecord:
    """The record of that key, or of that sample id if only one sample has it.

    Raises UsageError, with the nearest keys, if there is none; FormatError with the reason if it was skipped.
    """
    if cache.row_of(name) is not None:
        return cache.by_key(name)
    same: list[str] = []  # keys of samples of this id
    near: list[str] = []  # keys that hold the name, or whose ids do
    words: dict[str, str] = {}  # keys, by themselves and by their sample ids, that begin like the name
    others: dict[str, str] = {}  # the same of the first shard
    for manifest in cache.manifests() if name else ():
        table = manifest.table.select(["key", "sample_id"])
        keys, ids = table.columns
        same += keys.filter(pc.equal(ids, name)).to_pylist()
        near += keys.filter(pc.or_(pc.match_substring(keys, name), pc.match_substring(ids, name))).to_pylist()[
            :NEAREST_KEYS
        ]
        half = name[: (len(name) + 1) // 2]
        if len(words) < COMPARED_KEYS:
            words |= _words(table.filter(pc.or_(pc.starts_with(keys, half), pc.starts_with(ids, half))))
        others = others or _words(table)
    if len(same) == 1:
        return cache.by_key(same[0])
    if len(same) > 1:
        shown = ", ".join(same[:NEAREST_KEYS]) + (", ..." if len(same) > NEAREST_KEYS else "")
        raise UsageError(f"{cache.path}: {len(same)} samples have the id {name!r}; give the key of one: {shown}")
    if not near:
        words = words or others
        near = [words[word] for word in difflib.get_close_matches(name, list(words), n=2 * NEAREST_KEYS, cutoff=0.0)]
    hint = f"the nearest are {', '.join(list(dict.fromkeys(near))[:NEAREST_KEYS])}"
    if not near:
        hint = "give one" if len(cache) else "the cache has no finished samples"
    raise UsageError(f"{cache.path}: no sample has the key or id {name!r}; {hint}")


def _words(table: pa.Table) -> dict[str, str]:
    """Keys by their sample ids and by themselves."""
    keys, ids = (column.to_pylist() for column in table.columns)
    return dict(zip(ids, keys, strict=True)) | dict(zip(keys, keys, strict=True))


# ---------------------------------------------------------------------------------------------------------------- images


def image_members(record: CachedRecord) -> list[dict[str, Any]]:
    """The images' members in the manifest, in order."""
    return [member for member in record.row["members"] if not member["name"].endswith(STATES)]


def save_images(record: CachedRecord, folder: Path) -> tuple[Path, ...]:
    """Write the images' original bytes into `folder` under their members' names; a file that holds them is kept.

    Raises UsageError for a file of that name with other bytes, or a folder that cannot be written; DamageError for a
    member whose name is no plain file name.
    """
    paths = []
    for member in image_members(record):
        name = member["name"]
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}\.[0-9]{1,6}\.[A-Za-z0-9]{1,16}", name):
            raise DamageError(f"sample {record.key}: image member {name!r}: expected a name such as KEY.0.jpg")
        path, data = folder / name, record.read(member)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            if not path.is_file() or path.read_bytes() != data:
                raise UsageError(f"--save-images: {path} exists and is another file; give another folder") from None
        except OSError as error:
            raise UsageError(f"--save-images {folder}: cannot be written: {error.strerror or error}") from None
        paths.append(path)
    return tuple(paths)


def _describe_image(record: CachedRecord, index: int) -> ImageDescription:
    member = image_members(record)[index]
    data = record.read(member)
    facts: dict[str, Any]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images with many pixels: they are not decoded here
            image = open_image(data)
        facts = {"format": image.format, "width": image.width, "height": image.height}
    except Exception as error:  # Pillow raises many kinds for corrupt files
        facts = {"problem": re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))}
    return ImageDescription(index=index, member=member["name"], bytes=len(data), **facts)


# ---------------------------------------------------------------------------------------------------------------- tokens


def _answer_tokens(
    rows: AnswerRows, answers: tuple[str, ...], vocabulary: Vocabulary | None, alternatives: int
) -> tuple[AnswerToken, ...]:
    texts = [answer.encode() for answer in answers]
    log_probs = rows.topk_logits.astype(np.float64) - rows.logsumexp.astype(np.float64)[:, None]
    entropy, tail = row_entropy(log_probs)
    target_log_prob = rows.target_logit.astype(np.float64) - rows.logsumexp.astype(np.float64)
    predicting = np.flatnonzero(rows.predicts)
    closing = {int(rows.turn[row]): row for row in predicting}  # the last target of each turn
    word = vocabulary.text if vocabulary else lambda token_id: None
    tokens = []
    for row in predicting:
        turn, target = int(rows.turn[row]), int(rows.target_id[row])
        start, end = int(rows.target_start[row]), int(rows.target_end[row])
        if not 0 <= turn < len(texts) or not 0 <= start <= end <= len(texts[turn]):
            raise DamageError(
                f"answer row {row}: bytes {start} to {end} of turn {turn}, in a conversation of answers of "
                f"{', '.join(str(len(text)) for text in texts)} bytes; run `genrecal cache` again to redo its shard"
            )
        ids = rows.topk_ids[row].tolist()
        others = [place for place, token_id in enumerate(ids) if token_id != target][:alternatives]
        tokens.append(
            AnswerToken(
                turn=turn,
                position=int(rows.position[row]) + 1,
                id=target,
                start=start,
                end=end,
                text=texts[turn][start:end].decode("utf-8", "backslashreplace"),
                vocabulary_text=word(target),
                end_of_turn=closing[turn] == row and start == end,
                probability=float(np.exp(target_log_prob[row])),
                log_prob=float(target_log_prob[row]),
                rank=ids.index(target) + 1 if target in ids else None,
                entropy=float(entropy[row]),
                tail=float(tail[row]),
                alternatives=tuple(
                    Alternative(id=ids[i], text=word(ids[i]), probability=float(np.exp(log_probs[row, i])))
                    for i in others
                ),
            )
        )
    return tuple(tokens)
