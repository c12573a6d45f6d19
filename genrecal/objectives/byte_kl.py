"""KL from the teacher on the student's own head at every answer position, between any two tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genrecal.objectives.base import Batch, Objective, Term
from genrecal.objectives.cells import Cells, TokenMap
from genrecal.objectives.divergences import Divergence, student_losses
from genrecal.shards.mixture import Mixture, tokenizer_digest
from genrecal.shards.record import Record
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import VLM
from genrecal.vlm.pair import shared_tokens
from genrecal.vlm.rendering import Encoded


@dataclass(kw_only=True)
class ByteKlBatch(Batch):
    """cells: the teacher's distribution at each of the student's M rows."""

    cells: Cells


class ByteKl(Objective[ByteKlBatch]):
    what = "KL(teacher || student) of what comes next after every student token"
    source = "docs/method.md; of its matched part, GOLD (TRL) and ULD, arXiv 2402.12030"
    targets = ("topk",)
    logs = ("byte_kl", "compared")
    any_teacher = True

    def prepare(self, student: VLM, cache: Mixture, samples: np.ndarray, modules: Mapping[str, Any]) -> None:
        super().prepare(student, cache, samples, modules)
        # Beyond the tokenizer's entries a head has rows of padding, which count on neither side.
        entries = max(student.renderer.tokenizer.get_vocab().values()) + 1  # ids may have gaps
        self.student_ids = min(entries, student.head.out_features)
        maps: dict[str, TokenMap] = {}  # by the teacher's tokenizer
        for each in cache.caches:
            if (digest := tokenizer_digest(each)) not in maps:
                teacher = teacher_renderer(each)
                same = not shared_tokens(teacher, student.renderer).differences
                maps[digest] = TokenMap(teacher, student.renderer, student_rows=self.student_ids, same=same)
        several = len(cache.caches) > 1
        self.maps = {each.path if several else "": maps[tokenizer_digest(each)] for each in cache.caches}

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> ByteKlBatch:
        cells = [
            self.maps[record.cache].cells(
                record.answer, sample.answers, [text.encode() for text in record.sample.answers]
            )
            for sample, record in zip(samples, records, strict=True)
        ]
        return ByteKlBatch(**vars(student), cells=Cells.joined(cells))

    def terms(self, states: torch.Tensor, batch: ByteKlBatch) -> list[Term]:
        losses = student_losses(
            states.flatten(0, 1)[batch.student_rows],
            self.student.head,
            self.student.transform,
            batch.student_ids,
            batch.cells,
            Divergence(name="byte-kl", shared_ids=self.student_ids),
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            chunk_rows=self.loss.chunk_rows,
        )
        valid = batch.cells.valid
        return [
            Term(first=batch.student_first, loss=losses.weighted, log={"sft": losses.ce, "compared": valid.float()}),
            Term(first=batch.student_first[valid], log={"byte_kl": losses.kl[valid]}),
        ]
