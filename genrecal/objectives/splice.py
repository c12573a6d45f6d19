"""The splice: one side's question states and the teacher's answer states, turn by turn, as one sequence.

    [z_q1, pre(z_a1), z_q2, pre(z_a2), ..., z_qT, pre(z_aT)]      without the last state of z_aT, which predicts nothing

(paper, section 3.2 and Algorithms 1-3; several turns are the natural generalisation). Indices are worked out on the CPU,
where the lengths are known; on the device a splice is one gather.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SpliceIndex:
    """Where the rows of a batch of splices come from, and where they predict.

    Args:
        rows: int64 `[B, L]`. Row i of the source is question state i while i < num_question_rows, and answer state
            i - num_question_rows after. Padding (on the right) repeats row 0; a causal body never looks at it.
        predicts: int64 `[N]`, flat places in `[B * L]`: the last position of each question segment and all but the
            last of each answer segment, sample by sample, in order. They line up with the answer rows that have a target.
        num_question_rows: rows of the source that are question states.
    """

    rows: np.ndarray
    predicts: np.ndarray
    num_question_rows: int


def splice_index(
    question_rows: Sequence[Sequence[np.ndarray]], answer_lengths: Sequence[Sequence[int]], num_question_rows: int
) -> SpliceIndex:
    """Plan a batch of splices.

    Args:
        question_rows: per sample and turn, int64 `[q]`: which rows of the flat question states are that segment's.
        answer_lengths: per sample and turn, n_t. Answer states are stored sample by sample, turn by turn.
        num_question_rows: rows of the flat question states.
    """
    rows, predicts, next_answer = [], [], num_question_rows
    for questions, lengths in zip(question_rows, answer_lengths, strict=True):
        pieces: list[np.ndarray] = []
        places: list[np.ndarray] = []
        at = 0
        for question, length in zip(questions, lengths, strict=True):
            pieces += [question, np.arange(next_answer, next_answer + length)]
            at += len(question)
            places.append(np.arange(at - 1, at - 1 + length))
            at += length
            next_answer += length
        rows.append(np.concatenate(pieces)[:-1])  # nothing comes after the last state that could look at it
        predicts.append(np.concatenate(places))
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    flat = [place + number * longest for number, place in enumerate(predicts)]
    return SpliceIndex(rows=padded, predicts=np.concatenate(flat), num_question_rows=num_question_rows)
