"""Two models' token types side by side: what may be distilled from one to the other (the paper's Appendix A and B).

Distillation in the traditional way compares the two heads' outputs position by position and row by row. It needs the same
vocabulary size, token splits, index order and number of image tokens. Config, tokenizer and processor say all of it; no
weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import ImageRef, Message
from genrecal.vlm.config_file import read_json
from genrecal.vlm.loading import first_line, image_token_id, load_processor, model_folder
from genrecal.vlm.rendering import Renderer

TEXT = """\
A gear train is two or more meshing gears; its ratio is the product of the ratios of each pair. What is the total?
The receipt of 2024-03-17 lists 3 x 12.50 + 1,249.99 = 1287.49 EUR (VAT 19 %), see https://example.org/a?id=0x7F.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # O(n)

| year | sales |\t$E = mc^2$, \\frac{a}{b} ≤ √2, naïve café, Größe, l'été, ¿cuánto?
图中显示了什么?三个红色的正方形。 日本の首都は東京です。 사진에 무엇이 있습니까? Что изображено? ما هذا؟
👍🏽 👩‍🔬 🇪🇺 ✅ → …"""
SIZES = {"square": (448, 448), "photo": (1024, 768), "screen": (1920, 1080), "page": (1240, 1754), "strip": (300, 1200)}
SHOWN_TOKENS = 12  # of a list of special tokens in a report
SHOWN_BYTES = 32  # of text that is split alike, a line of the report


@dataclass(frozen=True, kw_only=True)
class TokenTypes:
    """What one model makes of a text and of pictures.

    Args:
        vocabulary: entries that the tokenizer knows. head_rows: of the head, which may be padded.
        ids: of the text. ends: bytes of the text up to the end of each.
        image_tokens: by picture, the placeholders that visual embeddings take the place of; `image_positions`: all tokens
            that the picture adds to a prompt. None for a model that takes no pictures.
        prompt: the question "Hi" as the model is given it. end_of_turn: what closes an answer.
        special_tokens: text -> id.
    """

    name: str
    vocabulary: int
    head_rows: int
    ids: list[int]
    ends: list[int]
    image_tokens: dict[str, int] | None
    image_positions: dict[str, int] | None
    prompt: str
    end_of_turn: str
    special_tokens: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SharedTokens:
    """How far two tokenizers are one.

    Args:
        ids: the ids 0 to `ids` - 1 stand for the same token in both.
        differences: in words; none where both give an answer the same ids, all of them among those.
    """

    ids: int
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Whether something holds or applies, and the figures that say so."""

    name: str
    holds: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A teacher beside a student.

    Args:
        text: the text compared; num_bytes: its length in UTF-8.
        same_splits: tokens that cover the same bytes in both. same_ids: of them, those with the same id.
        aligned: byte positions where a token ends in both, so that the prefixes before them are the same text.
        common_entries: byte strings that are entries of both vocabularies. common_ids: of them, those with the same ids.
        shared: whether answers have the same tokens, whatever stands before them.
        conditions: of traditional distillation; it is possible where all hold.
    """

    teacher: TokenTypes
    student: TokenTypes
    text: str
    num_bytes: int
    same_splits: int
    same_ids: int
    aligned: list[int]
    common_entries: int
    common_ids: int
    shared: SharedTokens
    conditions: list[Finding]

    @property
    def traditional(self) -> bool:
        """Whether traditional distillation is possible."""
        return all(condition.holds for condition in self.conditions)


def compare_pair(
    teacher: str | Path,
    student: str | Path,
    *,
    text: str = TEXT,
    pictures: dict[str, Image.Image] | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """Compare two model folders or hub names.

    Args:
        text: tokenised as an answer, so it may hold no special token.
        pictures: by name; None takes blank ones of SIZES, since tokens are counted by size.

    Raises:
        UsageError: the text is empty.
        ModelError: a folder lacks its config, tokenizer or chat template, or its tokenizer loses some of the text.
        SampleError: a processor refuses a picture.
    """
    if not text:
        raise UsageError("--text: expected some text")
    if pictures is None:
        pictures = {
            f"{name} {width}x{height}": Image.new("RGB", (width, height)) for name, (width, height) in SIZES.items()
        }
    (of_teacher, entries_t, renderer_t), (of_student, entries_s, renderer_s) = (
        _token_types(path, text, pictures, trust_remote_code) for path in (teacher, student)
    )
    spans_t, spans_s = _spans(of_teacher), _spans(of_student)
    same_splits = spans_t.keys() & spans_s.keys()
    common = entries_t.keys() & entries_s.keys()
    figures: dict[str, Any] = {
        "teacher": of_teacher,
        "student": of_student,
        "same_splits": len(same_splits),
        "same_ids": sum(spans_t[span] == spans_s[span] for span in same_splits),
        "common_entries": len(common),
        "common_ids": sum(entries_t[entry] == entries_s[entry] for entry in common),
    }
    return Pair(
        **figures,
        text=text,
        num_bytes=len(text.encode()),
        aligned=sorted(set(of_teacher.ends) & set(of_student.ends)),
        shared=shared_tokens(renderer_t, renderer_s, text=text),
        conditions=_conditions(**figures),
    )


def shared_tokens(teacher: Renderer, student: Renderer, *, text: str = TEXT) -> SharedTokens:
    """Whether two tokenizers give every answer the same tokens, and how many leading ids mean the same in both.

    A model may have special tokens of its own behind those: no answer holds one, and heads are padded unlike there.
    """
    tokens_t, tokens_s = (
        {token_id: token for token, token_id in renderer.tokenizer.get_vocab().items()}
        for renderer in (teacher, student)
    )
    end = min(max(tokens_t), max(tokens_s)) + 1
    ids = next((i for i in range(end) if tokens_t.get(i) != tokens_s.get(i)), end)
    differences = []
    for tokens, renderer in ((tokens_t, teacher), (tokens_s, student)):
        added = renderer.tokenizer.added_tokens_decoder
        if any(token_id >= ids and token_id not in added for token_id in tokens):
            differences = [f"id {ids} is {tokens_t.get(ids)!r} and {tokens_s.get(ids)!r}"]
    closings = teacher.marks.end_of_turn_id, student.marks.end_of_turn_id
    if closings[0] != closings[1] or closings[0] >= ids:
        differences.append(
            f"an answer is closed by {teacher.marks.end_of_turn!r} ({closings[0]}) and {student.marks.end_of_turn!r} "
            f"({closings[1]})"
        )
    answers = []
    for renderer in (teacher, student):
        try:
            answered = [Message(role="user", parts=("Hi",)), Message(role="assistant", parts=(text,))]
            answers.append(renderer.encode_messages(answered, []).answers[0].ids[:-1].tolist())
        except SampleError as error:
            return SharedTokens(ids=ids, differences=(*differences, f"a text cannot be compared: {error}"))
    if answers[0] != answers[1]:
        same = sum(a == b for a, b in zip(*answers, strict=False))
        differences.append(f"a text has {len(answers[0])} and {len(answers[1])} tokens, {same} alike place by place")
    return SharedTokens(ids=ids, differences=tuple(differences))


def _conditions(
    *, teacher: TokenTypes, student: TokenTypes, same_splits: int, same_ids: int, common_entries: int, common_ids: int
) -> list[Finding]:
    """Those of section 1 and Appendix A."""
    sizes = teacher.vocabulary, student.vocabulary
    counts = len(teacher.ids), len(student.ids)
    pictures = _different_pictures(teacher, student)
    return [
        Finding(
            name="vocabulary size",
            holds=sizes[0] == sizes[1],
            why=f"{sizes[0]} and {sizes[1]} entries in the tokenizers",
        ),
        Finding(
            name="token splits",
            holds=same_splits == counts[0] == counts[1],
            why=f"{same_splits} tokens of the text cover the same bytes, of {counts[0]} and {counts[1]}",
        ),
        Finding(
            name="index order",
            holds=0 < common_ids == common_entries and same_ids == same_splits,
            why=f"{common_ids} of {common_entries} entries in common have the same id, "
            f"{same_ids} of {same_splits} in the text",
        ),
        Finding(name="image tokens", holds=not pictures, why=pictures or _same_pictures(teacher)),
    ]


def _different_pictures(teacher: TokenTypes, student: TokenTypes) -> str:
    """How the numbers of image tokens differ; empty if they do not."""
    if teacher.image_tokens is None or student.image_tokens is None:
        blind = [side for side, types in (("teacher", teacher), ("student", student)) if types.image_tokens is None]
        return f"the {blind[0]} takes no pictures" if len(blind) == 1 else ""
    return "; ".join(
        f"{name}: {count} and {student.image_tokens[name]}"
        for name, count in teacher.image_tokens.items()
        if count != student.image_tokens[name]
    )


def _same_pictures(teacher: TokenTypes) -> str:
    if teacher.image_tokens is None:
        return "neither takes pictures"
    return "as many for every picture tried"


# ------------------------------------------------------------------------------------------------------------- one model


def _token_types(
    path: str | Path, text: str, pictures: dict[str, Image.Image], trust_remote_code: bool
) -> tuple[TokenTypes, dict[bytes, set[int]], Renderer]:
    """A model's token types; its vocabulary, the bytes of every entry and the ids that stand for them; its renderer."""
    folder = model_folder(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: expected a model folder, found no config.json in it")
    config = _config(folder, trust_remote_code)
    processor = load_processor(folder, trust_remote_code=trust_remote_code)
    try:
        renderer = Renderer(processor)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    tokenizer = renderer.tokenizer
    advice = "; give another --text"
    try:
        renderer.byte_tokenizer(text)
        advice = ""
        answered = [Message(role="user", parts=("Hi",)), Message(role="assistant", parts=(text,))]
        tokens = renderer.encode_messages(answered, []).answers[0]
    except SampleError as error:
        raise ModelError(f"{path}: {error}{advice}") from None
    of_text = tokens.ends[:-1] > 0  # not what the template writes before an answer; the last token closes it
    entries: dict[bytes, set[int]] = {}
    for token_id in tokenizer.get_vocab().values():
        entries.setdefault(renderer.byte_tokenizer.token_bytes(token_id), set()).add(token_id)
    counts = None
    if hasattr(processor, "image_processor"):
        placeholder = _image_token(config, processor)
        counts = {name: _count(renderer, path, name, picture, placeholder) for name, picture in pictures.items()}
    types = TokenTypes(
        name=Path(path).resolve().name if Path(path).is_dir() else str(path),
        vocabulary=len(tokenizer),
        head_rows=_head_rows(config, path),
        ids=tokens.ids[:-1][of_text].tolist(),
        ends=np.maximum.accumulate(tokens.ends[:-1][of_text]).tolist(),
        image_tokens=None if counts is None else {name: count[0] for name, count in counts.items()},
        image_positions=None if counts is None else {name: count[1] for name, count in counts.items()},
        prompt=tokenizer.decode(_prompt(renderer, [])),
        end_of_turn=renderer.marks.end_of_turn,
        special_tokens={str(t): i for i, t in tokenizer.added_tokens_decoder.items() if getattr(t, "special", False)},
    )
    return types, entries, renderer


def _spans(types: TokenTypes) -> dict[tuple[int, int], int]:
    """(first byte, end) -> id of each token of the text."""
    return dict(zip(zip([0, *types.ends], types.ends, strict=False), types.ids, strict=True))


def _prompt(renderer: Renderer, pictures: Sequence[Image.Image]) -> list[int]:
    question = Message(role="user", parts=(*map(ImageRef, range(len(pictures))), "Hi"))
    return renderer.encode_prompt([question], pictures)["input_ids"][0].tolist()


def _count(renderer: Renderer, path: str | Path, name: str, picture: Image.Image, placeholder: int) -> tuple[int, int]:
    """Image tokens of a picture, and how much longer a prompt is with it."""
    try:
        ids = torch.tensor(_prompt(renderer, [picture]))
    except SampleError as error:
        raise SampleError(f"{path}: picture {name}: {error}") from None
    return int((ids == placeholder).sum()), len(ids) - len(_prompt(renderer, []))


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """The config as transformers reads it; config.json as it is where the class is not transformers' own."""
    from transformers import AutoConfig

    content = read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "model_type" not in content:
            raise ModelError(f"{folder}: its config cannot be read: {first_line(error)}") from None
        return content


def _head_rows(config: Any, path: str | Path) -> int:
    if isinstance(config, dict):
        texts = [config.get(name) for name in ("llm_config", "text_config", "language_config")]
        rows = next((text.get("vocab_size") for text in [*texts, config] if isinstance(text, dict)), None)
    else:
        rows = getattr(config.get_text_config(), "vocab_size", None)
        rows = rows or getattr(getattr(config, "llm_config", None), "vocab_size", None)
    if not isinstance(rows, int):
        raise ModelError(f"{path}: its config does not say how many rows its head has (vocab_size)")
    return rows


def _image_token(config: Any, processor: Any) -> int:
    found = None if isinstance(config, dict) else image_token_id(config)
    found = found if found is not None else getattr(processor, "image_token_id", None)
    if found is None:
        raise ModelError("neither config nor processor says which token stands for a picture")
    return int(found)


# ------------------------------------------------------------------------------------------------------------ the report


def pair_report(pair: Pair, objectives: Sequence[Finding]) -> Group:
    """The comparison as tables for a terminal.

    Args:
        objectives: whether each applies (`genrecal.objectives.findings`).
    """
    answer = "possible" if pair.traditional else "not possible"
    return Group(
        _facts(pair),
        "",
        _side_by_side(pair),
        "",
        *(Text(line) for line in _special_lines(pair.teacher, pair.student)),
        "",
        f"traditional distillation: {answer}",
        _findings(pair.conditions, "yes", "NO"),
        "",
        "objectives",
        _findings(objectives, "applies", "no"),
    )


def _facts(pair: Pair) -> Table:
    table = Table("", "teacher", "student", box=None, pad_edge=False)
    teacher, student = sides = pair.teacher, pair.student

    def row(name: str, *values: Any) -> None:
        table.add_row(Text(name), *(Text(str(value)) for value in values))

    row("model", teacher.name, student.name)
    row("tokenizer entries", teacher.vocabulary, student.vocabulary)
    row("head rows", teacher.head_rows, student.head_rows)
    row("entries in common", *(_share(pair.common_entries, side.vocabulary) for side in sides))
    row("with the same id", *(_share(pair.common_ids, side.vocabulary) for side in sides))
    row(f"tokens of the text ({pair.num_bytes} bytes)", *(len(side.ids) for side in sides))
    row("split alike", *(_share(pair.same_splits, len(side.ids)) for side in sides))
    row("split alike, same id", *(_share(pair.same_ids, len(side.ids)) for side in sides))
    row("end where one of the other's ends", *(_share(len(pair.aligned), len(side.ids)) for side in sides))
    for name in teacher.image_tokens or student.image_tokens or ():
        row(f"image tokens, {name}", *(_image_figures(side, name) for side in sides))
    row("prompt of 'Hi'", repr(teacher.prompt), repr(student.prompt))
    row("an answer is closed by", teacher.end_of_turn, student.end_of_turn)
    return table


def _share(count: int, of: int) -> str:
    return f"{count} ({count / max(of, 1):.1%})"


def _image_figures(types: TokenTypes, name: str) -> str:
    if types.image_tokens is None or types.image_positions is None:
        return "takes none"
    return f"{types.image_tokens[name]} (prompt + {types.image_positions[name]})"


def _side_by_side(pair: Pair) -> Table:
    """The text, cut where a token ends in both; pieces that both take as one token stand together."""
    table = Table("", "text", "teacher's ids", "student's ids", box=None, pad_edge=False)
    data = pair.text.encode()
    for start, end, alike in _pieces(pair):
        ids = [_ids_between(side, start, end) for side in (pair.teacher, pair.student)]
        mark = ("=" if ids[0] == ids[1] else "") if alike else "≠"
        text = repr(data[start:end].decode("utf-8", "backslashreplace"))[1:-1]
        table.add_row(Text(mark), Text(text), *(Text(" ".join(map(str, found))) for found in ids))
    return table


def _pieces(pair: Pair) -> list[tuple[int, int, bool]]:
    """(first byte, end, whether both split it in the same way) over the whole text."""
    pieces: list[tuple[int, int, bool]] = []
    data, start = pair.text.encode(), 0
    for end in pair.aligned:
        alike = all(len(_ids_between(side, start, end)) == 1 for side in (pair.teacher, pair.student))
        in_character = start < len(data) and data[start] & 0xC0 == 0x80  # such a piece cannot be shown alone
        if pieces and alike and pieces[-1][2] and (in_character or end - pieces[-1][0] <= SHOWN_BYTES):
            pieces[-1] = (pieces[-1][0], end, True)
        else:
            pieces.append((start, end, alike))
        start = end
    return pieces


def _ids_between(types: TokenTypes, start: int, end: int) -> list[int]:
    first, last = np.searchsorted(types.ends, [start, end], side="right")
    return types.ids[int(first) : int(last)]


def _findings(findings: Sequence[Finding], yes: str, no: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for found in findings:
        table.add_row(Text(f"  {found.name}"), Text(yes if found.holds else no), Text(found.why))
    return table


def _special_lines(teacher: TokenTypes, student: TokenTypes) -> list[str]:
    lines = []
    for side, mine, other in (("teacher", teacher, student), ("student", student, teacher)):
        only = [token for token in mine.special_tokens if token not in other.special_tokens]
        lines.append(f"special tokens of the {side} alone: {_listed(only)}")
    moved = [
        f"{token} {token_id}/{student.special_tokens[token]}"
        for token, token_id in teacher.special_tokens.items()
        if student.special_tokens.get(token, token_id) != token_id
    ]
    return [*lines, f"special tokens with other ids (teacher/student): {_listed(moved)}"]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN_TOKENS
    return ", ".join(names[:SHOWN_TOKENS]) + (f" and {rest} more" if rest > 0 else "") if names else "none"
