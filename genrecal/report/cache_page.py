"""`genrecal inspect --html`: a page of a cache. It begins with records, those first whose answers the teacher finds worst."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genrecal.errors import DamageError, SampleError
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
from genrecal.report.page import image_uri, write_page
from genrecal.report.run_figures import percent
from genrecal.shards.reader import Cache, CachedRecord

RECORDS = 8  # that are shown
IMAGES = 4  # shown of a record
TOKENS = 400  # shown of a record
NAMES = 30  # categories, sources, reasons
PAGE_BYTES = 2**24  # of all images together

Bar = tuple[str, str, float]  # a name, a number in words, and its share of the longest bar


def write_cache_page(cache: Cache, out: Path, records: Sequence[CachedRecord] | None = None) -> None:
    """Write one HTML file of a cache.

    Args:
        records: those to show; None takes the ones with the lowest log-probability per answer token.

    Raises UsageError for a file that cannot be written; DamageError as `summarize` does.
    """
    if records is None:
        worst = np.argsort(cache.column("log_prob"), kind="stable")[:RECORDS]
        records = [cache[int(place)] for place in worst]
    summary = summarize(cache)
    room = PAGE_BYTES
    shown = []
    for record in records:
        shown.append(_shown(record, room))
        room -= sum(len(uri or "") for _, _, uri in shown[-1]["images"])
    write_page(
        out,
        "cache.html",
        option="--html",
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
            ("Log-probability of the given answer, mean of a sample, nats per token", _bars(summary.log_prob_histogram)),
        ],
        bytes=_sizes(summary.bytes),
        columns=[(kind, _sizes({c.name: c.bytes for c in part.columns})) for kind, part in summary.columns.items()],
        fidelity=[
            [tier, summary.codecs[tier], str(cost.rows), f"{cost.kl_mean:.2g}", f"{cost.kl_p99:.2g}",
             percent(cost.top1_agreement, 1)]
            for tier, cost in summary.fidelity.items()
        ],
        skipped=_skipped(summary),
        records=shown,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- summary


def _facts(summary: Summary) -> list[tuple[str, str]]:
    finished, planned = summary.shards
    teacher = summary.teacher
    draws = f", {summary.sampled_targets} draws per row" if summary.sampled_targets else ""
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
        ("teacher on these answers", _teacher_words(summary)),
    ]  # fmt: skip


def _teacher_words(found: Summary | RecordDescription) -> str:
    return (
        f"log-probability {found.log_prob:.3f} nats per token, entropy {found.entropy:.3f}, top-1 agreement "
        f"{percent(found.top1_agreement, 1)}"
    )


def _counts(counts: Mapping[str, int], unnamed: str) -> list[Bar]:
    most = max(counts.values(), default=1)
    bars = [(name or unnamed, f"{count:,}", count / most) for name, count in itertools.islice(counts.items(), NAMES)]
    rest = list(counts.values())[NAMES:]
    return bars + ([(f"{len(rest)} others", f"{sum(rest):,}", 0.0)] if rest else [])


def _bars(found: Histogram, digits: int = 3) -> list[Bar]:
    edges = [f"{edge:.{digits}f}" for edge in found.edges]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    most = max(found.counts, default=1)
    bars = [(name, f"{count:,}", count / most) for name, count in zip(names, found.counts, strict=False)]
    return bars + ([("NaN or infinite", f"{found.not_finite:,}", 0.0)] if found.not_finite else [])


def _sizes(sizes: Mapping[str, int]) -> list[Bar]:
    total, most = sum(sizes.values()) or 1, max(sizes.values(), default=1) or 1
    return [(name, f"{size(count)}, {count / total:.1%}", count / most) for name, count in sizes.items()]


def _quantiles(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of lengths."""
    found = {name: values for name, values in summary.token_quantiles.items() if values}
    rows = [
        [name.replace("_tokens", " tokens"), *(f"{value:,}" for value in values.values())]
        for name, values in found.items()
    ]
    return ["", *next(iter(found.values()), {})], rows


def _skipped(summary: Summary) -> list[list[str]]:
    reasons = itertools.islice(summary.skip_reasons.items(), NAMES)
    rows = [[reason, str(count), summary.skip_examples[reason]] for reason, count in reasons]
    rest = list(summary.skip_reasons.values())[NAMES:]
    return rows + ([[f"{len(rest)} other reasons", str(sum(rest)), ""]] if rest else [])


# ---------------------------------------------------------------------------------------------------------------- records


def _shown(record: CachedRecord, room: int) -> dict[str, Any]:
    """A record for the template, or why it cannot be read. `room`: characters left for images."""
    shown: dict[str, Any] = {"key": record.key, "facts": [], "images": [], "turns": [], "notes": [], "problem": ""}
    try:
        described = describe_record(record)
        for image, member in zip(described.images, image_members(record)[:IMAGES], strict=False):
            shown["images"].append(_image(image, record.read(member), room))
            room -= len(shown["images"][-1][2] or "")
    except DamageError as error:
        return shown | {"images": [], "problem": str(error)}
    states = "" if described.has_question else " (states not cached)"
    left_out = len(described.images) - len(shown["images"])
    return shown | {
        "facts": [
            ("key", described.key),
            ("sample id", described.sample_id),
            ("category", described.category or "(no category)"),
            ("source", described.source or "(no source)"),
            ("tokens", f"{described.question_tokens:,} question{states}, {described.answer_tokens:,} answer"),
            ("teacher on the answers", _teacher_words(described)),
        ],
        "turns": list(_turns(described)),
        "notes": [*described.notes, *([f"{left_out} more images are not shown"] if left_out else [])],
    }


def _image(image: ImageDescription, data: bytes, room: int) -> tuple[str, str, str | None]:
    """Caption, alt text, and a data URI, or None where the caption says why the image is not shown."""
    about = f"image {image.index}: {image.member}, {size(image.bytes)}"
    if image.problem:
        return f"{about}, cannot be read: {image.problem}", "", None
    about += f", {image.format}, {image.width} x {image.height} pixels"
    try:
        uri, small = image_uri(data, image.format, (image.width or 0) * (image.height or 0))
    except SampleError as error:
        return f"{about}; {error}", "", None
    if len(uri) > room:
        return f"{about}; not shown, the page is large enough", "", None
    return about + ("; shown smaller" if small else ""), f"image {image.index} of the conversation", uri


def _turns(record: RecordDescription) -> Iterator[dict[str, Any]]:
    """Messages: role and text; of an answer also (text, doubt, cells) of its tokens, and how many more there are."""
    turn, room = 0, TOKENS
    for message in record.messages:
        text = "".join(p["text"] if p["type"] == "text" else f"[image {p['index']}]" for p in message["content"])
        is_context = not message.get("target", True)
        role = f"{message['role']}{' (context only)' if is_context else ''}"
        tokens = []
        if message["role"] == "assistant" and not is_context:
            tokens = [token for token in record.tokens if token.turn == turn]
            turn += 1
        shown = tokens[: max(room, 0)]
        room -= len(shown)
        rows = [_token(token, record.top_k) for token in shown]
        yield {"role": role, "text": text, "tokens": rows, "more": len(tokens) - len(shown)}


def _token(token: AnswerToken, top_k: int) -> tuple[str, float, list[str]]:
    """Text, doubt (1 - probability, how strongly it is marked), and cells of the table."""
    name = quoted(token.text) if not token.end_of_turn else f"end of turn {token.vocabulary_text or ''}".strip()
    others = "  ".join(f"{_word(other)} {_probability(other.probability)}" for other in token.alternatives)
    doubt = round(min(max(1 - token.probability, 0.0), 1.0), 3)
    cells = [name, _probability(token.probability), str(token.rank or f">{top_k}"), f"{token.entropy:.3f}", others]
    return "¶" if token.end_of_turn else token.text, doubt, cells


def _word(token: Alternative) -> str:
    return f"#{token.id}" if token.text is None else quoted(token.text)


def _probability(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.0e}"
