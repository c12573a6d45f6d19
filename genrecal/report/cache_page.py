"""`genrecal inspect --html`: a page of a cache, with some of its records to look at."""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrecal.errors import DamageError, SampleError, UsageError
from genrecal.inspect.record import (
    Alternative,
    AnswerToken,
    ImageDescription,
    RecordDescription,
    describe_record,
    image_members,
)
from genrecal.inspect.summary import Histogram, Summary, histogram, summarize
from genrecal.inspect.text import quoted, size
from genrecal.report.page import write_page
from genrecal.report.run_figures import percent
from genrecal.samples import decode_image
from genrecal.shards.reader import Cache, CachedRecord

RECORDS = 8  # that are shown, evenly spread over the cache
IMAGES = 4  # shown of a record
TOKENS = 400  # shown of a record
NAMES = 30  # categories, sources, reasons
# A picture stands in the page as its original bytes; one of more, or of a format that not every browser shows, made small.
ORIGINAL_BYTES, ORIGINAL_PIXELS, SMALL_SIDE = 2**20, 2**24, 1024
PAGE_BYTES = 2**24  # of all pictures together
BROWSER_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}

Bar = tuple[str, str, float]  # a name, a number in words, and its share of the longest bar


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in the page: its data URI, or None and why it is not shown."""

    caption: str
    alt: str
    uri: str | None


@dataclass(frozen=True, kw_only=True)
class Token:
    """An answer token in the page. `doubt`: 1 - probability, how strongly it is marked."""

    text: str
    doubt: float
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message: its text; of an answer also its tokens, and how many more there are."""

    role: str
    text: str
    tokens: tuple[Token, ...] = ()
    more: int = 0


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A record in the page; or `problem`, why it cannot be read."""

    key: str
    facts: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()
    turns: tuple[Turn, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""


def write_cache_page(cache: Cache, out: Path, records: Sequence[CachedRecord] | None = None) -> None:
    """Write one HTML file of a cache.

    Args:
        records: those to look at; None takes some, evenly spread.

    Raises UsageError for a file that cannot be written; DamageError as `summarize` does.
    """
    if records is None:
        places = np.unique(np.linspace(0, len(cache) - 1, min(RECORDS, len(cache))).round().astype(int))
        records = [cache[int(place)] for place in places]
    summary = summarize(cache)
    room = PAGE_BYTES
    shown = []
    for record in records:
        one = _shown(record, room)
        room -= sum(len(picture.uri or "") for picture in one.pictures)
        shown.append(one)
    try:
        write_page(
            out,
            "cache.html",
            title=f"Cache {summary.path}",
            summary=summary,
            facts=_facts(summary),
            composition=[
                ("Categories", _counts(summary.categories, "(no category)")),
                ("Sources", _counts(summary.sources, "(no source)")),
            ],
            lengths=[
                ("Question tokens of a sample", _bars(histogram(cache.column("question_tokens")), digits=0)),
                ("Answer tokens of a sample", _bars(histogram(cache.column("answer_tokens")), digits=0)),
            ],
            quantiles=_quantiles(summary),
            teacher=[
                ("Entropy of the teacher's prediction, mean of a sample, nats", _bars(summary.entropy_histogram)),
                ("Log-probability of the given answer, mean of a sample, nats a token", _bars(summary.log_prob_histogram)),
            ],
            bytes=_sizes(summary.bytes),
            columns=[(kind, _columns(measured)) for kind, measured in summary.columns.items()],
            fidelity=[
                [tier, summary.codecs[tier], str(cost.rows), f"{cost.kl_mean:.2g}", f"{cost.kl_p99:.2g}",
                 percent(cost.top1_agreement, 1)]
                for tier, cost in summary.fidelity.items()
            ],
            skipped=_skipped(summary),
            records=shown,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--html {out}: cannot be written: {error.strerror or error}") from None


# --------------------------------------------------------------------------------------------------------------- summary


def _facts(summary: Summary) -> list[tuple[str, str]]:
    finished, planned = summary.shards
    teacher = summary.teacher
    draws = f", {summary.sampled_targets} draws a row" if summary.sampled_targets else ""
    return [
        ("teacher", f"{teacher['name']}, {teacher['dtype']}, D {summary.hidden_size}, V {summary.head_rows}"),
        ("answers", str(summary.answers)),
        ("shards", f"{finished} of {planned}" + ("" if finished == planned else ", unfinished")),
        ("samples", f"{summary.cached:,} cached, {summary.skipped:,} skipped"),
        ("turns", f"{summary.turns:,}"),
        ("images", f"{summary.images:,}, in {summary.with_images:,} samples"),
        ("tokens", f"{summary.question_tokens:,} question, {summary.answer_tokens:,} answer"),
        ("states", f"answers {summary.codecs['answer']}, questions {summary.codecs['question']} ({summary.with_question:,} of "
                   f"{summary.cached:,} samples), top-{summary.top_k} logits{draws}"),
        ("teacher on these answers", f"log-probability {summary.log_prob:.3f} nats a token, entropy {summary.entropy:.3f}, "
                                     f"top-1 agreement {percent(summary.top1_agreement, 1)}"),
    ]  # fmt: skip


def _counts(counts: Mapping[str, int], unnamed: str) -> list[Bar]:
    most = max(counts.values(), default=1)
    bars = [(name or unnamed, f"{count:,}", count / most) for name, count in itertools.islice(counts.items(), NAMES)]
    if rest := list(counts.values())[NAMES:]:
        bars.append((f"{len(rest)} others", f"{sum(rest):,}", 0.0))
    return bars


def _bars(found: Histogram, digits: int = 3) -> list[Bar]:
    most = max(found.counts, default=1)
    edges = [f"{edge:.{digits}f}" for edge in found.edges]
    bars = [
        (f"{low} to {high}", f"{count:,}", count / most)
        for low, high, count in zip(edges, edges[1:], found.counts, strict=False)
    ]
    return bars + ([("NaN or infinite", f"{found.not_finite:,}", 0.0)] if found.not_finite else [])


def _sizes(sizes: Mapping[str, int]) -> list[Bar]:
    most = max(sizes.values(), default=1) or 1
    return [(name, size(count), count / most) for name, count in sizes.items()]


def _columns(measured: Any) -> list[Bar]:
    total = sum(column.bytes for column in measured.columns) or 1
    return [
        (column.name, f"{size(column.bytes)}, {column.bytes / total:.1%}", column.bytes / total)
        for column in measured.columns
    ]


def _quantiles(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of lengths."""
    names = next((list(values) for values in summary.token_quantiles.values() if values), [])
    rows = [
        [name.replace("_tokens", " tokens"), *(f"{value:,}" for value in values.values())]
        for name, values in summary.token_quantiles.items()
        if values
    ]
    return ["", *names], rows


def _skipped(summary: Summary) -> list[list[str]]:
    rows = [
        [reason, str(count), summary.skip_examples[reason]]
        for reason, count in itertools.islice(summary.skip_reasons.items(), NAMES)
    ]
    if rest := list(summary.skip_reasons.values())[NAMES:]:
        rows.append([f"{len(rest)} other reasons", str(sum(rest)), ""])
    return rows


# ---------------------------------------------------------------------------------------------------------------- records


def _shown(record: CachedRecord, room: int) -> Shown:
    try:
        described = describe_record(record)
        members = image_members(record)[:IMAGES]
        pictures = []
        for image, member in zip(described.images, members, strict=False):
            pictures.append(_picture(image, record.read(member), room))
            room -= len(pictures[-1].uri or "")
    except DamageError as error:
        return Shown(key=record.key, problem=str(error))
    left_out = len(described.images) - len(pictures)
    return Shown(
        key=described.key,
        facts=_record_facts(described),
        pictures=tuple(pictures),
        turns=tuple(_turns(described)),
        notes=described.notes + ((f"{left_out} more pictures are not shown",) if left_out else ()),
    )


def _record_facts(record: RecordDescription) -> tuple[tuple[str, str], ...]:
    return (
        ("key", record.key),
        ("sample id", record.sample_id),
        ("category", record.category or "(no category)"),
        ("source", record.source or "(no source)"),
        ("tokens", f"{record.question_tokens:,} question{'' if record.has_question else ' (states not cached)'}, "
                   f"{record.answer_tokens:,} answer"),
        ("teacher on the answers", f"log-probability {record.log_prob:.3f} nats a token, entropy {record.entropy:.3f}, "
                                   f"top-1 agreement {percent(record.top1_agreement, 1)}"),
    )  # fmt: skip


def _picture(image: ImageDescription, data: bytes, room: int) -> Picture:
    """As it is stored if it is small and a browser knows it; else made small; else words. `room`: characters left."""
    about = f"picture {image.index}: {image.member}, {size(image.bytes)}"
    if image.problem:
        return Picture(caption=f"{about}, cannot be read: {image.problem}", alt="", uri=None)
    about += f", {image.format}, {image.width} x {image.height} pixels"
    kind = BROWSER_FORMATS.get(image.format or "")
    pixels = (image.width or 0) * (image.height or 0)
    if kind is None or len(data) > ORIGINAL_BYTES or pixels > ORIGINAL_PIXELS:
        try:
            picture = decode_image(data)
        except SampleError as error:
            return Picture(caption=f"{about}; {error}", alt="", uri=None)
        picture.thumbnail((SMALL_SIDE, SMALL_SIDE))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=85)
        data, kind, about = stream.getvalue(), "image/jpeg", f"{about}; shown smaller"
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if len(uri) > room:
        return Picture(caption=f"{about}; not shown, the page is large enough", alt="", uri=None)
    return Picture(caption=about, alt=f"picture {image.index} of the conversation", uri=uri)


def _turns(record: RecordDescription) -> Iterable[Turn]:
    turn, room = 0, TOKENS
    for message in record.messages:
        text = "".join(p["text"] if p["type"] == "text" else f"[picture {p['index']}]" for p in message["content"])
        is_context = not message.get("target", True)
        if is_context or message["role"] != "assistant":
            yield Turn(role=f"{message['role']}{' (context only)' if is_context else ''}", text=text)
            continue
        tokens = [token for token in record.tokens if token.turn == turn]
        shown = tokens[: max(room, 0)]
        turn, room = turn + 1, room - len(shown)
        yield Turn(
            role="assistant",
            text=text,
            tokens=tuple(_token(token, record.top_k) for token in shown),
            more=len(tokens) - len(shown),
        )


def _token(token: AnswerToken, top_k: int) -> Token:
    name = quoted(token.text) if not token.end_of_turn else f"end of turn {token.vocabulary_text or ''}".strip()
    others = "  ".join(f"{_word(other)} {_probability(other.probability)}" for other in token.alternatives)
    return Token(
        text="¶" if token.end_of_turn else token.text,
        doubt=round(min(max(1 - token.probability, 0.0), 1.0), 3),
        cells=(
            name, _probability(token.probability), str(token.rank or f">{top_k}"), f"{token.entropy:.3f}", others,
        ),
    )  # fmt: skip


def _word(token: Alternative) -> str:
    return f"#{token.id}" if token.text is None else quoted(token.text)


def _probability(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.0e}"
