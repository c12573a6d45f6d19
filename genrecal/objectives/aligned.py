"""GenRecal with one more pass: the Recalibrator over the student's own sequence, read where both have read the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genrecal.errors import UsageError
from genrecal.objectives.align import align
from genrecal.objectives.base import Batch, Term, Tier
from genrecal.objectives.genrecal import Genrecal, GenrecalBatch
from genrecal.objectives.settings import LossConfig
from genrecal.shards.record import Record
from genrecal.vlm.rendering import Encoded


@dataclass(kw_only=True)
class AlignedBatch(GenrecalBatch):
    """aligned_rows: int64 `[A]`, which of the N teacher rows a position of the student's lines up with
    (`genrecal.objectives.align`). aligned_at: int64 `[A]`, those positions, flat in B * L. aligned_first: bool `[A]`, the
    first of a turn's answer."""

    aligned_rows: torch.Tensor
    aligned_at: torch.Tensor
    aligned_first: torch.Tensor


class GenrecalAligned(Genrecal):
    what = "the Recalibrator's states, also over the student's own answer, where both have read the same bytes"
    source = "ours, beside GenRecal's losses"
    logs = (*Genrecal.logs, "aligned_ce", "aligned_kl")

    @classmethod
    def check_settings(cls, name: str, loss: LossConfig) -> None:
        super().check_settings(name, loss)
        if not loss.aligned_weight:
            raise UsageError("objective genrecal-aligned with loss.aligned_weight 0 is objective genrecal; set that")

    @property
    def last_answer(self) -> bool:
        return True

    @property
    def extra_blocks(self) -> int:
        return super().extra_blocks + self.config.recalibrator.layers

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> Any:
        paper = super().batch(student, samples, records)
        if self.tier == Tier.NONE:
            return paper
        rows, places, first = [], [], []
        row_place = place = 0
        for item, record in zip(samples, records, strict=True):
            found = align(record.answer, item.answers)
            rows.append(found.teacher_rows + row_place)
            places.append(found.student_rows + place)
            first.append(found.first)
            row_place += int(record.answer.predicts.sum())
            place += sum(item.answer_lengths)
        return AlignedBatch(
            **vars(paper),
            aligned_rows=torch.from_numpy(np.concatenate(rows)),
            aligned_at=student.student_rows[torch.from_numpy(np.concatenate(places))],
            aligned_first=torch.from_numpy(np.concatenate(first)),
        )

    def passes(self, states: torch.Tensor, batch: Any) -> list[Term]:
        rows = self.recalibrator(states, batch.aligned_at)  # [A, D_t]
        aligned = self.against_teacher(
            "aligned_", rows, batch, batch.aligned_rows, batch.aligned_first, self.loss.aligned_weight
        )
        share = torch.zeros(len(batch.target_ids), device=rows.device).index_fill(0, batch.aligned_rows, 1.0)
        return [*super().passes(states, batch), aligned, Term(first=batch.first, log={"aligned_share": share})]
