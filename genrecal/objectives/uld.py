"""Universal Logit Distillation (arXiv 2402.12030): the distance of the sorted probabilities, of any two tokenizers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genrecal.objectives.base import Batch, Objective, TeacherBatch, Term, teacher_part, turn_lengths
from genrecal.objectives.divergences import Divergence, student_losses
from genrecal.objectives.losses import rows_of
from genrecal.shards.record import Record
from genrecal.vlm.rendering import Encoded


@dataclass(kw_only=True)
class UldBatch(TeacherBatch):
    """teacher_rows: int64 `[M]`, the teacher's row that each of the student's is compared with, -1 for none."""

    teacher_rows: torch.Tensor


class Uld(Objective[UldBatch]):
    what = "distance of the sorted probabilities, token by token up to the shorter answer"
    source = "Universal Logit Distillation, arXiv 2402.12030"
    any_teacher = True
    targets = ("topk", "exact")
    logs = ("uld",)

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> UldBatch:
        rows = rows_by_place(
            [n for item in samples for n in item.answer_lengths],
            [n for record in records for n in turn_lengths(record)],
        )
        return UldBatch(**vars(student), **teacher_part(records, self.loss.target), teacher_rows=torch.from_numpy(rows))

    def terms(self, states: torch.Tensor, batch: UldBatch) -> list[Term]:
        compared = batch.teacher_rows >= 0
        losses = student_losses(
            states.flatten(0, 1)[batch.student_rows],
            self.student.head,
            self.student.transform,
            batch.student_ids,
            rows_of(batch.target, batch.teacher_rows.clamp_min(0)),
            Divergence(name="uld"),
            teacher_head=self.head,
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            counts=compared.float(),
            chunk_rows=self.loss.chunk_rows,
        )
        return [
            Term(first=batch.student_first, loss=losses.weighted, log={"sft": losses.ce}),
            Term(first=batch.student_first[compared], log={"uld": losses.kl[compared]}),
        ]


def rows_by_place(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> np.ndarray:
    """Of each of the student's rows `[M]`, the teacher's row at the same place of the turn; -1 past its last."""
    rows, start = [np.empty(0, np.int64)], 0
    for mine, its in zip(student_lengths, teacher_lengths, strict=True):
        place = np.arange(mine)
        rows.append(np.where(place < its, place + start, -1))
        start += its
    return np.concatenate(rows)
