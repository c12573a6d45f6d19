"""What `genrecal inspect` shows in a terminal: rich renderables of a summary, a record or an SQL result.

A cache may come from anywhere, so control characters (and those that turn the reading direction) in its texts are shown
as escapes, and no text is taken for markup.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from genrecal.inspect.record import Alternative, AnswerToken, RecordDescription
from genrecal.inspect.sql import SqlResult
from genrecal.inspect.summary import Histogram, MeasuredColumns, Summary
from genrecal.progress import counted

Line = tuple[str, str]  # a name and a value
BAR = 32  # columns of the longest bar
CELL = 60  # columns of a cell of an SQL result
TOKEN = 24  # columns of a token's text
SHOWN_ROWS = 200  # of an SQL result
SHOWN_NAMES = 20  # categories, sources, reasons
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode categories that are shown as escapes
JOINERS = "\u200d\ufe0e\ufe0f"  # inside emoji; terminals do not agree on the width of what they join


def visible(text: str, keep: str = "") -> str:
    """Text with what would move the cursor, or hide, as escapes (`\\n`, `\\x1b`, `\\u202e`); `keep` stands as it is."""
    return "".join(
        char if char in keep or unicodedata.category(char) not in INVISIBLE else _escape(char) for char in text
    )


def _escape(char: str) -> str:
    return repr(char)[1:-1] if ord(char) < 128 else char.encode("ascii", "backslashreplace").decode()


def quoted(text: str) -> str:
    """A token's text on one line, in quotes, so that its spaces are seen."""
    plain = visible(text)
    return '"' + "".join(_escape(char) if char in JOINERS else char for char in plain) + '"'


def size(count: int) -> str:
    """Bytes in words: `378.48 kB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def teacher_line(figures: "Summary | RecordDescription", is_own: bool) -> Line:
    """How well the teacher knows the answers."""
    return f"teacher on {'its own' if is_own else 'the given'} answers", (
        f"log-probability {figures.log_prob:.3f} nats per token, entropy {figures.entropy:.3f}, "
        f"top-1 agreement {figures.top1_agreement:.1%}"
    )


# --------------------------------------------------------------------------------------------------------------- summary


def summary_text(summary: Summary) -> Group:
    """The whole summary, warnings last."""
    parts: list[Any] = [_pairs(_summary_lines(summary))]
    for kind, measured in summary.columns.items():
        parts += [Text(), _columns_table(kind, measured)]
    for title, histogram in (
        ("entropy, mean of a sample, nats", summary.entropy_histogram),
        ("log-probability of the given answer, mean of a sample, nats", summary.log_prob_histogram),
    ):
        parts += [Text(), Text(f"{title}: samples", style="bold"), *_bars(histogram)]
    parts += [Text(f"warning: {visible(warning)}", style="bold yellow") for warning in summary.warnings]
    return Group(*parts)


def _summary_lines(summary: Summary) -> list[Line]:
    finished, planned = summary.shards
    teacher = summary.teacher
    draws = f", {summary.sampled_targets} draws per row" if summary.sampled_targets else ""
    return [
        ("images", f"{summary.with_images} of {summary.cached} samples have images ({counted(summary.images, 'image')})"),
        ("cache", f"{summary.path} (format {summary.format_version})"),
        ("teacher", f"{teacher['name']}, {teacher['dtype']}, D {summary.hidden_size}, V {summary.head_rows}"),
        ("shards", f"{finished} of {planned}, {'complete' if finished == planned else 'unfinished'}"),
        ("samples", f"{summary.cached} cached, {summary.skipped} skipped"),
        *_first((f"  {name or '(no category)'}", count) for name, count in summary.categories.items()),
        *_first((f"  skipped: {summary.skip_examples[reason]}", count) for reason, count in summary.skip_reasons.items()),
        *_first((f"  not read: {what}", count) for what, count in summary.not_read.items()),
        ("turns", str(summary.turns)),
        ("tokens", f"{summary.question_tokens} question, {summary.answer_tokens} answer"),
        *((f"  {name.removesuffix('_tokens')} per sample", ", ".join(f"{q} {value}" for q, value in values.items()))
          for name, values in summary.token_quantiles.items() if values),
        ("answers", str(summary.answers)),
        ("states", f"answers {summary.codecs['answer']}, questions {summary.codecs['question']} "
                   f"({summary.with_question} of {summary.cached} samples), top-{summary.top_k} logits{draws}"),
        *((f"  {tier} codec's cost", f"KL mean {cost.kl_mean:.2g}, 99th percentile {cost.kl_p99:.2g} nats, top-1 agreement "
                                     f"{cost.top1_agreement:.1%} ({cost.rows} rows)")
          for tier, cost in summary.fidelity.items()),
        *((f"  {name}", size(count)) for name, count in summary.bytes.items()),
        teacher_line(summary, summary.answers.written_by_teacher),
    ]  # fmt: skip


def _first(counts: Iterable[tuple[str, int]]) -> Iterator[Line]:
    """The first SHOWN_NAMES of some counts, and how many others there are."""
    entries = list(counts)
    yield from ((name, str(count)) for name, count in entries[:SHOWN_NAMES])
    if rest := entries[SHOWN_NAMES:]:
        yield f"  {len(rest)} others", str(sum(count for _, count in rest))


def _columns_table(kind: str, measured: MeasuredColumns) -> Group:
    total = sum(column.bytes for column in measured.columns)
    table = Table("  column", box=None, pad_edge=False)
    for name in ("bytes", "share", "bytes per row", "of uncompressed"):
        table.add_column(name, justify="right", no_wrap=True)
    for column in measured.columns:
        table.add_row(
            Text(f"  {visible(column.name)}"),
            size(column.bytes),
            f"{column.bytes / total:.1%}",
            f"{column.bytes / measured.rows:.1f}" if measured.rows else "",
            f"{column.bytes / column.raw_bytes:.2f}" if column.raw_bytes else "",
        )
    which = "all" if measured.records == measured.of_records else f"{measured.records} evenly spread of"
    title = (
        f"{kind} files by column, measured on {which} {counted(measured.of_records, 'record')} ({measured.rows} rows)"
    )
    return Group(Text(title, style="bold"), table)


def _bars(histogram: Histogram) -> Iterator[Text]:
    """A line for each bin: its edges, a bar, its count."""
    most = max(histogram.counts, default=0)
    edges = [f"{edge:.3f}" for edge in histogram.edges]
    width = max((len(edge) for edge in edges), default=0)
    for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False):
        bar = "█" * max(round(BAR * count / most), count > 0)
        yield Text(f"  {low:>{width}} to {high:>{width}} {bar:{BAR}} {count}")
    if histogram.not_finite:
        yield Text(f"  NaN or infinite: {histogram.not_finite}")


def _pairs(lines: list[Line]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in lines:
        table.add_row(Text(visible(name)), Text(visible(value)))
    return table


# ---------------------------------------------------------------------------------------------------------------- record


def record_text(record: RecordDescription) -> Group:
    """A record: facts, images, the conversation, and each turn's answer tokens as a table."""
    lines = [
        ("key", record.key),
        ("sample id", record.sample_id),
        ("category", record.category or "(no category)"),
        ("source", record.source or "(no source)"),
        ("shard", str(record.shard)),
        ("tokens", f"{record.question_tokens} question{'' if record.has_question else ' (states not cached)'}, "
                   f"{record.answer_tokens} answer"),
        teacher_line(record, bool(record.given_answers)),
        *((f"image {image.index}", f"{image.member}, {size(image.bytes)}, " + (
            image.problem or f"{image.format} of {image.width} x {image.height} pixels")) for image in record.images),
    ]  # fmt: skip
    parts: list[Any] = [_pairs(lines)]
    turn = 0
    for message in record.messages:
        parts += [Text(), Text(visible(message["role"]), style="bold"), _message_text(message)]
        if not message.get("target", True):
            parts += [Text("context only, not an answer to learn", style="dim")]
        elif message["role"] == "assistant":
            if record.given_answers:
                given = (
                    visible(record.given_answers[turn], keep="\n" + JOINERS) if turn < len(record.given_answers) else ""
                )
                parts += [Text(f"given answer: {given}", style="dim")]
            parts += [Text(), _token_table([token for token in record.tokens if token.turn == turn], record.top_k)]
            turn += 1
    parts += [Text(f"note: {visible(note)}", style="yellow") for note in record.notes]
    return Group(*parts)


def _message_text(message: Mapping[str, Any]) -> Text:
    pieces = [
        visible(part["text"], keep="\n" + JOINERS) if part["type"] == "text" else f"[image {part['index']}]"
        for part in message["content"]
    ]
    return Text("".join(pieces))


def _token_table(tokens: list[AnswerToken], top_k: int) -> Table:
    """One line per token: numbers stand whole, texts that do not fit are cut off with an ellipsis, nothing is wrapped."""
    table = Table(box=None, pad_edge=False)
    for name in ("position", "token", "id", "probability", "rank", "entropy", "other tokens"):
        # rich narrows the columns that it may wrap, and leaves the others; the texts themselves forbid wrapping.
        is_text = "token" in name
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            max_width=TOKEN if name == "token" else None,
        )
    for token in tokens:
        others = "  ".join(f"{_word(other)} {_probability(other.probability)}" for other in token.alternatives)
        table.add_row(
            str(token.position),
            _cut(_token_name(token)),
            str(token.id),
            Text(_probability(token.probability), style="" if token.rank == 1 else "bold yellow"),
            str(token.rank or f">{top_k}"),
            f"{token.entropy:.3f}",
            _cut(others),
        )
    return table


def _cut(text: str, style: str = "") -> Text:
    """Text of one line, cut to the width that there is."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _token_name(token: AnswerToken) -> str:
    if not token.end_of_turn:
        return quoted(token.text)
    return "end of turn" if token.vocabulary_text is None else f"end of turn {visible(token.vocabulary_text)}"


def _word(token: Alternative) -> str:
    return f"#{token.id}" if token.text is None else quoted(token.text)


def _probability(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


# ------------------------------------------------------------------------------------------------------------------- SQL


def sql_text(result: SqlResult) -> Group:
    """An SQL result as a table of one line per row; long cells and further rows are cut, and it says so."""
    table = Table(box=None, pad_edge=False)
    for name in result.columns:
        table.add_column(_cut(visible(name)), max_width=CELL)
    for row in result.rows[:SHOWN_ROWS]:
        table.add_row(*(_cut("null", style="dim") if value is None else _cut(visible(str(value))) for value in row))
    rest = len(result.rows) - SHOWN_ROWS
    return Group(table, *([Text(f"and {rest} more rows; --json prints all", style="yellow")] if rest > 0 else []))
