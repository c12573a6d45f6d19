"""Next-token distributions of two tokenizers made comparable: cells that a teacher's and a student's tokens both fill.

A student position has read b bytes of a turn's answer. Its teacher row is the last one whose prefix ends at a <= b; the
bytes u = answer[a:b] lie inside the teacher's token (none where both tokenizers cut: an aligned row). Given u, the teacher's
candidates are its stored tokens v whose bytes begin with u, brought to 1. Each goes to the cell of the student's token that
begins what is left of v. A longer student token joins that cell only if the teacher would write it beginning with v. All
else is one rest cell on both sides. With one tokenizer every token is its own cell.

Cells hold only ids that the student's tokenizer writes: a byte fallback beside the entry of the same text would let the
student lower the loss by tokens that it never writes.

Letters: M student rows, k stored logits per teacher row, C cells, E pairs of a cell and a student id.
"""

import bisect
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genrecal.errors import SampleError
from genrecal.objectives.align import NOWHERE, prefix_ends
from genrecal.shards.record import AnswerRows
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MIN_MASS = (
    1e-3  # of the candidates that begin with u: below it the teacher would not be here, and says nothing of this row
)
MIN_LONGER = 1e-3  # of a token whose cell longer student tokens join: a space begins thousands of them
NONE = -1


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The teacher's distribution over cells at each of M student rows. Pairs and cells are sorted by row.

    Args:
        pair_ids, pair_cells: int64 `[E]`, a student id and the cell that holds it.
        pair_rows, cell_rows: int64 `[E]` and `[C]`, the row of each.
        log_p: float32 `[C]`, the teacher's log-probability of each cell; log_rest: float32 `[M]`, of all else.
        valid: bool `[M]`, rows that are compared.
        pair_starts, cell_starts: M + 1 offsets of each row's pairs and cells, on the host.
    """

    pair_ids: torch.Tensor
    pair_cells: torch.Tensor
    pair_rows: torch.Tensor
    cell_rows: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor
    valid: torch.Tensor
    pair_starts: tuple[int, ...]
    cell_starts: tuple[int, ...]

    def rows(self, start: int, end: int) -> "Cells":
        """Rows start to end - 1, counted from 0."""
        end = min(end, len(self.valid))
        pairs = slice(self.pair_starts[start], self.pair_starts[end])
        cells = slice(self.cell_starts[start], self.cell_starts[end])
        return Cells(
            pair_ids=self.pair_ids[pairs],
            pair_cells=self.pair_cells[pairs] - cells.start,
            pair_rows=self.pair_rows[pairs] - start,
            cell_rows=self.cell_rows[cells] - start,
            log_p=self.log_p[cells],
            log_rest=self.log_rest[start:end],
            valid=self.valid[start:end],
            pair_starts=tuple(place - pairs.start for place in self.pair_starts[start : end + 1]),
            cell_starts=tuple(place - cells.start for place in self.cell_starts[start : end + 1]),
        )

    @classmethod
    def joined(cls, parts: "Sequence[RowCells]") -> "Cells":
        """The rows of several samples, one after another."""
        rows = np.cumsum([0, *(len(part.valid) for part in parts)])
        cells = np.cumsum([0, *(len(part.log_p) for part in parts)])
        pair_rows = np.concatenate([part.pair_rows + start for part, start in zip(parts, rows, strict=False)])
        cell_rows = np.concatenate([part.cell_rows + start for part, start in zip(parts, rows, strict=False)])
        pair_cells = np.concatenate([part.pair_cells + start for part, start in zip(parts, cells, strict=False)])
        edges = np.arange(rows[-1] + 1)
        return cls(
            pair_ids=torch.from_numpy(np.concatenate([part.pair_ids for part in parts])),
            pair_cells=torch.from_numpy(pair_cells),
            pair_rows=torch.from_numpy(pair_rows),
            cell_rows=torch.from_numpy(cell_rows),
            log_p=torch.from_numpy(np.concatenate([part.log_p for part in parts])),
            log_rest=torch.from_numpy(np.concatenate([part.log_rest for part in parts])),
            valid=torch.from_numpy(np.concatenate([part.valid for part in parts])),
            pair_starts=tuple(np.searchsorted(pair_rows, edges).tolist()),
            cell_starts=tuple(np.searchsorted(cell_rows, edges).tolist()),
        )


def cell_kl(logits: torch.Tensor, cells: Cells) -> torch.Tensor:
    """KL(teacher || student) over each row's cells, float `[r]`, in nats; 0 where a row is not compared.

    `sum_c p_c (log p_c - log q_c)`, the rest being one of the cells; q_c sums the student's probabilities over the cell's
    ids, by logsumexp, since a probability that is far below 1e-38 still has a gradient.

    Args:
        logits: float `[r, V_s]`, the student's.
        cells: of these rows.
    """
    log_sum = logits.logsumexp(-1)
    z = logits[cells.pair_rows, cells.pair_ids]  # [E]
    top = logits.new_full((len(cells.log_p),), -torch.inf).scatter_reduce(0, cells.pair_cells, z.detach(), "amax")
    total = logits.new_zeros(len(cells.log_p)).index_add(0, cells.pair_cells, (z - top[cells.pair_cells]).exp())
    log_q = top + total.log() - log_sum[cells.cell_rows]
    listed = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    listed[cells.pair_rows, cells.pair_ids] = True
    whole = listed.all(-1)  # nothing is left for the rest
    log_rest = logits.masked_fill(listed & ~whole[:, None], -torch.inf).logsumexp(-1) - log_sum
    p, p_rest = cells.log_p.exp(), torch.where(whole, 0.0, cells.log_rest.exp())
    kl = p_rest.to(logits.dtype) * (cells.log_rest - log_rest)
    kl = kl.index_add(0, cells.cell_rows, (p * (cells.log_p - log_q)).to(kl.dtype))
    return torch.where(cells.valid, kl, 0.0)


# ------------------------------------------------------------------------------------------------- tokens of two models


@dataclass(frozen=True, kw_only=True)
class RowCells:
    """One sample's `Cells` as numpy arrays, without offsets."""

    pair_ids: np.ndarray
    pair_cells: np.ndarray
    pair_rows: np.ndarray
    cell_rows: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray
    valid: np.ndarray


class TokenMap:
    """Which student token begins each teacher token, and which longer student tokens the teacher would begin with it.

    The tables are made once per pair, from the tokenizers alone.

    Args:
        teacher, student: the two models' renderers.
        student_rows: rows of the student's head; ids beyond have no logit.
        same: the two tokenizers are one: each id is its own cell, special tokens included.
    """

    def __init__(self, teacher: Renderer, student: Renderer, *, student_rows: int, same: bool = False):
        self._teacher, self._student = teacher.byte_tokenizer, student.byte_tokenizer
        self.teacher_end, self.student_end = teacher.marks.end_of_turn_id, student.marks.end_of_turn_id
        vocabulary = teacher.tokenizer.get_vocab().values()
        self._same, self._special = same, set() if same else _special_ids(teacher)
        self.first = np.full(max(vocabulary) + 1, NONE, np.int64)  # teacher id -> student id
        self._entries: list[tuple[bytes, int]] = []  # what the student writes: bytes and id, sorted
        if same:
            ids = np.array(sorted(vocabulary))
            ids = ids[ids < student_rows]
            self.first[ids] = ids
            longer: list[tuple[int, int]] = []
        else:
            self._entries = self._written_entries(student, student_rows)
            plain = [token_id for token_id in sorted(vocabulary) if token_id not in self._special]
            for token_id, found in zip(plain, self._begin(map(self._teacher.token_bytes, plain)), strict=True):
                self.first[token_id] = found if found < student_rows else NONE
            longer = self._longer_entries()
        self.first[list(self._special)] = NONE
        self.first[self.teacher_end] = self.student_end
        longer.sort()
        pairs = np.array(longer, np.int64).reshape(-1, 2)
        self._longer_ids = pairs[:, 1]  # of all teacher ids, one after another
        self._longer_starts = np.searchsorted(pairs[:, 0], np.arange(len(self.first) + 1))
        self._inside = functools.cache(self._find_inside)

    def _written_entries(self, student: Renderer, student_rows: int) -> list[tuple[bytes, int]]:
        """The student's entries that its tokenizer makes of their own text; parts of characters are taken at their word
        where no other entry has the same bytes and characters are cut by rule (byte-level BPE), not as a last resort."""
        special, tokens = _special_ids(student), self._student
        ids = [i for i in sorted(student.tokenizer.get_vocab().values()) if i < student_rows and i not in special]
        contents = [tokens.token_bytes(token_id) for token_id in ids]
        split = _split(tokens, contents)
        entries = [
            (content, token_id)
            for token_id, content, found in zip(ids, contents, split, strict=True)
            if content and (found == [token_id] or (found is None and self._cuts_characters))
        ]
        return sorted(entries)

    @functools.cached_property
    def _cuts_characters(self) -> bool:
        """Whether the student's entries may end inside a character: of byte-level BPE, whose bytes are letters to it."""
        fallback = getattr(self._student, "has_byte_fallback", None)
        if fallback is None:
            fallback = "<0x0A>" in self._student.tokenizer.get_vocab()
        return not fallback

    def _begin(self, contents: Iterable[bytes]) -> list[int]:
        """The student's token that begins each of these texts; NONE for none."""
        listed = list(contents)
        return [
            found[0] if found else NONE if found is not None else self._longest_entry(content)
            for content, found in zip(listed, _split(self._student, listed), strict=True)
        ]

    def _longest_entry(self, content: bytes) -> int:
        """The longest entry that begins bytes which are no text; NONE for none."""
        for end in range(len(content), 0, -1):
            place = bisect.bisect_left(self._entries, (content[:end],))
            if place < len(self._entries) and self._entries[place][0] == content[:end]:
                return self._entries[place][1]
        return NONE

    def _longer_entries(self) -> list[tuple[int, int]]:
        """(teacher id, student id) of the student's entries that the teacher writes as that token and more."""
        split = _split(self._teacher, [content for content, _ in self._entries])
        return [
            (found[0], token_id)
            for (content, token_id), found in zip(self._entries, split, strict=True)
            if found is not None and len(found) > 1 and len(self._teacher.token_bytes(found[0])) < len(content)
        ]

    def _find_inside(self, token: int, skip: int) -> tuple[int, tuple[int, ...]]:
        """The student's token that begins what is left of a teacher's token after `skip` bytes, and longer ones as above.

        Where the student cuts the whole token at that place, what follows in its own split; else the split of the rest.
        """
        content = self._teacher.token_bytes(token)
        before, left = content[:skip], content[skip:]
        first = NONE
        with_cut = self._tokens_at(content, skip)
        if with_cut:
            first = with_cut[0]
        else:
            first = self._begin([left])[0]
        start = bisect.bisect_left(self._entries, (left,))
        longer = []
        for entry, token_id in self._entries[start:]:
            if not entry.startswith(left):
                break
            if len(entry) > len(left):
                longer.append((before + entry, token_id))
        split = _split(self._teacher, [text for text, _ in longer])
        found = tuple(
            token_id
            for (_, token_id), ids in zip(longer, split, strict=True)
            if ids and len(ids) > 1 and ids[0] == token
        )
        return first, found

    def _tokens_at(self, content: bytes, place: int) -> list[int]:
        """The student's tokens of a text from a byte on, if it cuts there."""
        try:
            tokens = self._student(content.decode())
        except (UnicodeDecodeError, SampleError):
            return []
        (at,) = np.flatnonzero(tokens.starts == place)[-1:] if (tokens.starts == place).any() else (None,)
        return [] if at is None else tokens.ids[at:].tolist()

    # ---------------------------------------------------------------------------------------------------------- rows

    def cells(self, teacher: AnswerRows, student: Sequence[TokenizedText], texts: Sequence[bytes]) -> RowCells:
        """The cells of all of a sample's student rows, turn by turn.

        Args:
            student: each turn's answer in the student's tokens, the end-of-turn token last.
            texts: each turn's answer, UTF-8.
        """
        keep = teacher.predicts
        turn, starts, ends = teacher.turn[keep], teacher.target_start[keep], teacher.target_end[keep]
        aligned: list[tuple[int, int]] = []  # student row, teacher row
        inside: list[tuple[int, int, bytes]] = []
        place = 0
        for number, (answer, text) in enumerate(zip(student, texts, strict=True)):
            own = np.flatnonzero(turn == number)
            cuts, mine = prefix_ends(starts[own], ends[own]), prefix_ends(answer.starts, answer.ends)
            usable = np.flatnonzero(cuts != NOWHERE)
            for row, b in enumerate(mine):
                later = row + 1 < len(mine) and mine[row + 1] == b
                if b == NOWHERE or later:  # of several rows that have read the same text, the last predicts it
                    continue
                j = usable[np.searchsorted(cuts[usable], b, side="right") - 1]
                j = int(usable[np.searchsorted(cuts[usable], cuts[j], side="right") - 1])
                if cuts[j] == b:
                    aligned.append((place + row, int(own[j])))
                else:
                    inside.append((place + row, int(own[j]), text[cuts[j] : b]))
            place += len(answer.ids)
        found = [self._inside_row(teacher, keep, *row) for row in inside]
        parts = [part for part in found if part is not None]
        return _rows(place, [self._aligned(teacher, keep, np.array(aligned, np.int64).reshape(-1, 2)), *parts])

    def _candidates(self, teacher: AnswerRows, keep: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and probabilities of the stored tokens, int64 and float64 `[A, k + 1]`: the target last, with 0 if it is one
        of the k, or with one tokenizer, where this is the plain KL of the top k.

        What the teacher's head is padded with has no part in its distribution.
        """
        at = np.flatnonzero(keep)[rows]
        ids = teacher.topk_ids[at].astype(np.int64)
        p = np.exp((teacher.topk_logits[at] - teacher.logsumexp[at][:, None]).astype(np.float64))
        target = teacher.target_id[at].astype(np.int64)
        stored = (ids == target[:, None]).any(1) | self._same
        own = np.where(stored, 0.0, np.exp(teacher.target_log_prob[at].astype(np.float64)))
        ids, p = np.concatenate([ids, target[:, None]], 1), np.concatenate([p, own[:, None]], 1)
        padding = np.where(ids < len(self.first), 0.0, p)
        return ids, (p - padding) / (1 - padding.sum(1, keepdims=True))

    def _aligned(self, teacher: AnswerRows, keep: np.ndarray, pairs: np.ndarray) -> "_Part":
        ids, p = self._candidates(teacher, keep, pairs[:, 1])
        first = np.where(ids < len(self.first), self.first[np.minimum(ids, len(self.first) - 1)], NONE)
        taken = (first != NONE) & (p > 0)
        row, column = np.nonzero(taken)
        chosen, mass, tokens = first[row, column], p[row, column], ids[row, column]
        width = int(self.first.max()) + 1
        keys, cell = np.unique(row * width + chosen, return_inverse=True)  # a cell per row and student token
        masses = np.bincount(cell, mass, len(keys))
        counts = np.where(mass < MIN_LONGER, 0, self._longer_starts[tokens + 1] - self._longer_starts[tokens])
        of = np.repeat(np.arange(len(tokens)), counts)
        steps = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        longer = self._longer_ids[self._longer_starts[tokens][of] + steps]
        free = ~np.isin(row[of] * width + longer, keys)  # a token that begins another candidate has a cell of its own
        return _Part(
            rows=pairs[:, 0],
            pair_rows=pairs[:, 0][np.concatenate([keys // width, row[of][free]])],
            pair_ids=np.concatenate([keys % width, longer[free]]),
            pair_cells=np.concatenate([np.arange(len(keys)), cell[of][free]]),
            cell_rows=pairs[:, 0][keys // width],
            mass=masses,
            rest=1 - np.bincount(keys // width, masses, len(pairs)),
        )

    def _inside_row(self, teacher: AnswerRows, keep: np.ndarray, row: int, j: int, u: bytes) -> "_Part | None":
        ids, p = self._candidates(teacher, keep, np.array([j]))
        cells: dict[int, float] = {}
        longer: list[tuple[float, int, tuple[int, ...]]] = []
        rest = 0.0
        for token, value in zip(ids[0].tolist(), p[0].tolist(), strict=True):
            if token in self._special or token == self.teacher_end or token >= len(self.first) or not value:
                continue
            content = self._teacher.token_bytes(token)
            if not content.startswith(u):
                continue
            first, more = self._inside(token, len(u)) if len(content) > len(u) else (NONE, ())
            if first == NONE:  # one that ends at u: what follows it stands in no row
                rest += value
                continue
            cells[first] = cells.get(first, 0.0) + value
            longer.append((value, first, more))
        whole = sum(cells.values()) + rest
        if whole < MIN_MASS or not cells:
            return None
        number = {token: place for place, token in enumerate(cells)}
        members = {
            token: number[first] for value, first, more in longer if value >= MIN_LONGER * whole for token in more
        } | number
        return _Part(
            rows=np.array([row]),
            pair_rows=np.full(len(members), row),
            pair_ids=np.array(list(members), np.int64),
            pair_cells=np.array(list(members.values()), np.int64),
            cell_rows=np.full(len(cells), row),
            mass=np.array(list(cells.values())) / whole,
            rest=np.array([rest / whole]),
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some rows' cells: masses `[C]` and what is left for the rest, by row."""

    rows: np.ndarray
    pair_rows: np.ndarray
    pair_ids: np.ndarray
    pair_cells: np.ndarray
    cell_rows: np.ndarray
    mass: np.ndarray
    rest: np.ndarray


def _rows(count: int, parts: Sequence[_Part]) -> RowCells:
    """Parts of a sample, sorted by row."""
    offsets = np.cumsum([0, *(len(part.mass) for part in parts)])
    cell_rows = np.concatenate([part.cell_rows for part in parts])
    pair_rows = np.concatenate([part.pair_rows for part in parts])
    pair_cells = np.concatenate([part.pair_cells + start for part, start in zip(parts, offsets, strict=False)])
    valid, rest = np.zeros(count, bool), np.ones(count)
    for part in parts:
        valid[part.rows] = True
        rest[part.rows] = part.rest
    order, new = np.argsort(cell_rows, kind="stable"), np.empty(len(cell_rows), np.int64)
    new[order] = np.arange(len(order))
    by_row = np.argsort(pair_rows, kind="stable")
    mass = np.concatenate([part.mass for part in parts])
    return RowCells(
        pair_ids=np.concatenate([part.pair_ids for part in parts])[by_row].astype(np.int64),
        pair_cells=new[pair_cells][by_row],
        pair_rows=pair_rows[by_row].astype(np.int64),
        cell_rows=cell_rows[order].astype(np.int64),
        log_p=np.log(mass[order]).astype(np.float32),
        log_rest=np.log(np.clip(rest, 1e-38, None)).astype(np.float32),
        valid=valid,
    )


def _special_ids(renderer: Renderer) -> set[int]:
    return {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)}


def _split(tokens: ByteTokenizer, contents: Sequence[bytes]) -> list[list[int] | None]:
    """Each text's token ids in the middle of an answer; empty if the tokenizer loses the text, None for no whole characters."""
    texts = []
    for content in contents:
        try:
            texts.append(content.decode())
        except UnicodeDecodeError:
            texts.append("")
    backend = getattr(tokens.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encoded = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = [[] for _ in texts]
    result: list[list[int] | None] = []
    for content, text, ids in zip(contents, texts, encoded, strict=True):
        if content and not text:
            result.append(None)
        elif b"".join(map(tokens.token_bytes, ids)) == content:
            result.append(list(ids))
        else:  # a normaliser, or a space put before the text
            try:
                result.append(tokens(text).ids.tolist())
            except SampleError:
                result.append([])
    return result
