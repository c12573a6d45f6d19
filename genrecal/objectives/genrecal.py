"""The paper's objective (arXiv 2506.15681, section 3.3, Algorithms 1-3).

Stage 1 trains the Recalibrator on cross-entropy and KL of the main splice and of the regularisation's; stage 2 the
Recalibrator and the student on those of the main splice and the student's own cross-entropy; stage 3 is SFT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from genrecal.errors import UsageError
from genrecal.objectives.base import Batch, Objective, TeacherBatch, Term, Tier, states_of, teacher_part, turn_lengths
from genrecal.objectives.losses import head_losses, rows_of
from genrecal.objectives.recalibrator import Recalibrator
from genrecal.objectives.settings import LossConfig, Settings
from genrecal.objectives.splice import splice_index
from genrecal.shards.mixture import Mixture
from genrecal.shards.reader import Cache
from genrecal.shards.record import Record
from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Encoded


@dataclass(kw_only=True)
class Splice:
    """The student's questions with the teacher's answers; see `genrecal.objectives.splice`.

    answers: `[R, D_t]`, z_a of every turn. rows: int64 `[B, L]`, into the student's states and, behind them, the answers.
    predicts: int64 `[N]`, flat in B * L.
    """

    answers: torch.Tensor
    rows: torch.Tensor
    predicts: torch.Tensor


@dataclass(kw_only=True)
class Regularisation:
    """The teacher's questions with its own answers (Algorithm 2), of the samples whose questions are cached.

    questions: `[Q, D_t]`, z_q. rows: int64 `[B', L']`, into the questions and, behind them, the splice's answers.
    predicts: int64 `[N']`, flat in B' * L'. which: int64 `[N']`, which of the N teacher rows these are.
    """

    questions: torch.Tensor
    rows: torch.Tensor
    predicts: torch.Tensor
    which: torch.Tensor


@dataclass(kw_only=True)
class GenrecalBatch(TeacherBatch):
    """The passes of a micro-batch; None for one that the stage or the settings leave out."""

    splice: Splice | None = None
    regularisation: Regularisation | None = None


class Genrecal(Objective[GenrecalBatch]):
    what = "the Recalibrator's states, read by the teacher's head"
    source = "GenRecal, arXiv 2506.15681"
    stages = (1, 2, 3)
    chained = True
    targets = ("topk", "exact", "sample")
    logs: ClassVar[tuple[str, ...]] = ("ce", "kl", "reg_ce", "reg_kl")

    recalibrator: Recalibrator

    def __init__(self, stage: int, config: Settings):
        super().__init__(stage, config)
        self.splices = stage < 3 and self.loss.splice_weight > 0
        self.regularises = stage == 1 and self.splices and self.loss.reg_weight > 0
        self.question_share = 1.0

    @classmethod
    def check_settings(cls, name: str, loss: LossConfig) -> None:
        super().check_settings(name, loss)
        if not loss.splice_weight and cls is Genrecal:
            raise UsageError(
                "loss.splice_weight 0 leaves objective genrecal nothing of the teacher's; set objective to "
                "genrecal-aligned or sft"
            )

    # ------------------------------------------------------------------------------------------------- what it needs

    @property
    def tier(self) -> Tier:
        if self.stage == 3:
            return Tier.NONE
        if self.regularises:
            return Tier.QUESTIONS
        return Tier.STATES if self.splices or self.loss.target == "exact" else Tier.TARGETS

    @property
    def needs_head(self) -> bool:
        return self.stage < 3

    @property
    def last_answer(self) -> bool:
        return (
            self.stage > 1
        )  # stage 1 reads states of the questions alone, and these see nothing of an answer after them

    @property
    def extra_blocks(self) -> int:
        return self.config.recalibrator.layers * (int(self.splices) + int(self.regularises))

    def check_cache(self, name: str, cache: Cache) -> None:
        super().check_cache(name, cache)

    # ---------------------------------------------------------------------------------------------- what it trains

    def modules(self, student_config: Any, teacher_size: int) -> dict[str, nn.Module]:
        if self.stage == 3:
            return {}
        recalibrator = Recalibrator(
            student_config,
            teacher_size,
            num_blocks=self.config.recalibrator.layers,
            attention="sdpa" if self.config.attention == "auto" else self.config.attention,
            takes_teacher=self.loss.splice_weight > 0,
        )
        return {"recalibrator": recalibrator}

    def prepare(self, student: VLM, cache: Mixture, samples: np.ndarray, modules: Mapping[str, Any]) -> None:
        super().prepare(student, cache, samples, modules)
        if self.regularises:
            self.question_share = cache.question_share(samples)
            if not self.question_share:
                raise UsageError(
                    f"{cache.path}: stage 1's regularisation needs the teacher's question states, and this cache has none; "
                    "set loss.reg_weight=0 to train without it"
                )

    # ------------------------------------------------------------------------------------------------------ loading

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> Any:
        if self.tier == Tier.NONE:
            return student
        parts: dict[str, Any] = {}
        if self.splices:
            parts["splice"] = splice_of(student, samples, records)
        if self.regularises:
            parts["regularisation"] = regularisation_of(records)
        return GenrecalBatch(**vars(student), **teacher_part(records, self.loss.target), **parts)

    # ---------------------------------------------------------------------------------------------------- computing

    def terms(self, states: torch.Tensor, batch: GenrecalBatch) -> list[Term]:
        if self.stage == 3:
            return [self.own_cross_entropy(states, batch)]
        terms = self.passes(states, batch)
        if self.stage == 2:
            terms.append(self.own_cross_entropy(states, batch, self.loss.sft_weight))
        return terms

    def passes(self, states: torch.Tensor, batch: GenrecalBatch) -> list[Term]:
        """The terms through the Recalibrator."""
        if batch.splice is None:
            return []
        pre = self.recalibrator.rec_proj_pre
        assert pre is not None
        answers = pre(batch.splice.answers)  # [R, D_s]
        rows = self._spliced(states.flatten(0, 1), answers, batch.splice)
        terms = [self.against_teacher("", rows, batch, slice(None), batch.first, self.loss.splice_weight)]
        if (reg := batch.regularisation) is not None:
            rows = self._spliced(pre(reg.questions), answers, reg)
            # Divided by the share of samples that have questions, the expected loss is that of a full question tier.
            weight = self.loss.splice_weight * self.loss.reg_weight / self.question_share
            terms.append(self.against_teacher("reg_", rows, batch, reg.which, batch.first[reg.which], weight))
        return terms

    def _spliced(self, questions: torch.Tensor, answers: torch.Tensor, splice: Splice | Regularisation) -> torch.Tensor:
        """Recalibrator(splice) at the rows that predict, `[N, D_t]`."""
        source = torch.cat([questions.to(answers.dtype), answers])
        rows: torch.Tensor = self.recalibrator(source[splice.rows], splice.predicts)
        return rows

    def against_teacher(
        self,
        name: str,
        recalibrated: torch.Tensor,
        batch: TeacherBatch,
        which: slice | torch.Tensor,
        first: torch.Tensor,
        weight: float,
    ) -> Term:
        """A pass's cross-entropy and KL through the teacher's head, at the rows `which` of the teacher's."""
        assert self.head is not None
        losses = head_losses(
            recalibrated,
            self.head,
            batch.target_ids[which],
            rows_of(batch.target, which),
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            chunk_rows=self.loss.chunk_rows,
        )
        return Term(first=first, loss=weight * losses.weighted, log={f"{name}ce": losses.ce, f"{name}kl": losses.kl})


def splice_of(student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> Splice:
    """The student's questions with the teacher's answers."""
    length = student.student_inputs["input_ids"].shape[1]
    own = [r.answer.coded[np.diff(r.answer.turn, prepend=-1) == 0] for r in records]  # all but each turn's first row
    questions = [
        [np.arange(s, e) + number * length for s, e, is_answer in item.segments() if not is_answer]
        for number, item in enumerate(samples)
    ]
    lengths = [turn_lengths(record) for record in records]
    index = splice_index(questions, lengths, student.student_inputs["input_ids"].numel())
    return Splice(
        answers=states_of(own),
        rows=torch.from_numpy(index.rows),
        predicts=torch.from_numpy(index.predicts),
    )


def regularisation_of(records: Sequence[Record]) -> Regularisation:
    """The teacher's own question states in place of the student's. Without any there is one row, which predicts nothing:
    ranks that work together run the same modules."""
    states, questions, kept_lengths, kept = [], [], [], []
    place = at = 0
    for record in records:
        lengths = turn_lengths(record)
        if record.question is not None:
            turn = record.question.turn
            questions.append([np.flatnonzero(turn == t) + at for t in range(len(lengths))])
            states.append(record.question.coded)
            at += len(turn)
            kept_lengths.append(lengths)
            kept.append(np.arange(place, place + sum(lengths)))
        place += sum(lengths)
    if not states:
        none = torch.zeros(0, dtype=torch.int64)
        row = torch.zeros(1, 1, dtype=torch.int64)
        width = records[0].answer.coded.facts["hidden_size"]
        return Regularisation(questions=torch.zeros(1, width), rows=row, predicts=none, which=none)
    index = splice_index(questions, kept_lengths, at)
    # The splice counts the answers of the kept samples only; point it at their places among all answer states.
    which = np.concatenate(kept)
    source = index.rows.copy()
    is_answer = source >= at
    source[is_answer] = which[source[is_answer] - at] + at
    return Regularisation(
        questions=states_of(states),
        rows=torch.from_numpy(source),
        predicts=torch.from_numpy(index.predicts),
        which=torch.from_numpy(which),
    )
