"""Which of the teacher's answer rows and which of the student's positions have read the same text of an answer.

Two tokenizers cut an answer at different places. Where both have a cut, the two models have read the same bytes of it and
each says what comes next. A row's prefix is the answer's text before the token that it predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genrecal.shards.record import AnswerRows
from genrecal.vlm.tokens import TokenizedText

NOWHERE = -1  # of a row whose prefix ends inside of a character, which is cut differently by every tokenizer


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A sample's pairs of rows, in order.

    Args:
        teacher_rows: int64 `[A]`, of the teacher's answer rows that have a target, all turns counted on.
        student_rows: int64 `[A]`, of the student's answer tokens, all turns counted on: the position that predicts each.
        first: bool `[A]`, whether the prefix is empty: the first token of a turn's answer.
    """

    teacher_rows: np.ndarray
    student_rows: np.ndarray
    first: np.ndarray


def align(teacher: AnswerRows, student: Sequence[TokenizedText]) -> Alignment:
    """A sample's teacher rows and student positions that predict at the same byte of the same turn's answer.

    In every turn the first rows are such a pair, and so are those that predict the end of turn.

    Args:
        student: each turn's answer in the student's tokens, the end-of-turn token last.
    """
    keep = teacher.predicts
    turn, starts, ends = teacher.turn[keep], teacher.target_start[keep], teacher.target_end[keep]
    rows, places, first = [], [], []
    first_place = 0
    for number, answer in enumerate(student):
        own = np.flatnonzero(turn == number)
        pairs = align_turn(prefix_ends(starts[own], ends[own]), prefix_ends(answer.starts, answer.ends))
        rows.append(own[pairs[:, 0]])
        places.append(pairs[:, 1] + first_place)
        first.append(np.arange(len(pairs)) == 0)
        first_place += len(answer.ids)
    return Alignment(
        teacher_rows=np.concatenate(rows), student_rows=np.concatenate(places), first=np.concatenate(first)
    )


def prefix_ends(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where each token's prefix ends, int64 `[n]`, in bytes of the answer; NOWHERE inside of a character.

    Args:
        starts, ends: int `[n]`, the bytes that each token covers. A tokenizer that normalises gives several tokens of one
            character the whole of it; all but the first of these begin before their prefix ends.
    """
    before = np.append(0, np.maximum.accumulate(ends.astype(np.int64))[:-1])
    return np.where((starts == before) | (np.arange(len(starts)) == 0), before, NOWHERE)


def align_turn(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Pairs of rows whose prefixes end at the same byte, int64 `[A, 2]`, from both sides' `prefix_ends`.

    Of several rows of one side that end at the same byte the last counts. The others predict tokens without text, such as
    the white space before an answer that some templates leave to it, and say nothing of what the answer is.
    """
    last = [len(ends) - 1 - np.unique(ends[::-1], return_index=True)[1] for ends in (teacher, student)]
    rows_t, rows_s = (rows[ends[rows] != NOWHERE] for rows, ends in zip(last, (teacher, student), strict=True))
    _, in_t, in_s = np.intersect1d(teacher[rows_t], student[rows_s], assume_unique=True, return_indices=True)
    return np.stack([rows_t[in_t], rows_s[in_s]], axis=1)
