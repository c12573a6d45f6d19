"""The traditional objectives: the student's distribution against the teacher's, token by token, of one tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from genrecal.errors import SampleError
from genrecal.objectives.base import Batch, Objective, TeacherBatch, Term, teacher_part
from genrecal.objectives.divergences import Divergence, student_losses
from genrecal.shards.mixture import Mixture
from genrecal.shards.record import Record
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import VLM
from genrecal.vlm.pair import shared_tokens
from genrecal.vlm.rendering import Encoded


class Kl(Objective[TeacherBatch]):
    """Also the base of the others: `divergence` is the name of what they compare by."""

    what = "KL(teacher || student) of every answer token"
    source = "LLaVA-KD, arXiv 2410.16236; Hinton et al., arXiv 1503.02531"
    targets: ClassVar[tuple[str, ...]] = ("topk", "exact", "sample")
    logs = ("kl",)
    one_tokenizer = True
    divergence = "kl"

    def prepare(self, student: VLM, cache: Mixture, samples: np.ndarray, modules: Mapping[str, Any]) -> None:
        super().prepare(student, cache, samples, modules)
        shared = shared_tokens(teacher_renderer(cache.first), student.renderer)
        # The ids that both tokenizers share: what a head is padded with counts on neither side.
        self.shared_ids = min(shared.ids, cache.head_rows, student.head.out_features)

    def check(self, encoded: Encoded, record: Record) -> None:
        ids = np.concatenate([answer.ids for answer in encoded.answers])
        teacher_ids = record.answer.target_id[record.answer.predicts]
        if not np.array_equal(ids, teacher_ids):
            raise SampleError(
                f"its answers are {len(teacher_ids)} tokens of the teacher and {len(ids)} of the student that are not the same"
            )

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> TeacherBatch:
        return TeacherBatch(**vars(student), **teacher_part(records, self.loss.target))

    def terms(self, states: torch.Tensor, batch: TeacherBatch) -> list[Term]:
        losses = student_losses(
            states.flatten(0, 1)[batch.student_rows],
            self.student.head,
            self.student.transform,
            batch.student_ids,
            batch.target,
            Divergence(name=self.divergence, shared_ids=self.shared_ids, skew=self.loss.skew),
            teacher_head=self.head,
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            chunk_rows=self.loss.chunk_rows,
        )
        (name,) = self.logs
        return [Term(first=batch.student_first, loss=losses.weighted, log={"sft": losses.ce, name: losses.kl})]


class ReverseKl(Kl):
    what = "KL(student || teacher) of every answer token"
    source = "MiniLLM, arXiv 2306.08543, off-policy: on the cache's answers, not on the student's"
    targets = ("topk", "exact")
    logs = ("reverse_kl",)
    divergence = "reverse-kl"


class SkewedKl(Kl):
    what = "KL(teacher || a mixture of teacher and student) of every answer token"
    source = "DistiLLM, arXiv 2402.03898, off-policy"
    targets = ("topk", "exact")
    logs = ("skewed_kl",)
    divergence = "skewed-kl"
