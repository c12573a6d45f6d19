"""Dual-space distillation: each side's states in the other side's space, aligned by attention between the two answers.

(DSKD with cross-model attention, Zhang et al., arXiv 2406.17328; docs/method.md says what is left out.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from genrecal.objectives.base import (
    Batch,
    Objective,
    TeacherBatch,
    Term,
    Tier,
    over_rows,
    states_of,
    teacher_part,
    turn_lengths,
)
from genrecal.objectives.divergences import Divergence, student_losses
from genrecal.objectives.losses import Exact, head_losses
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import Record
from genrecal.vlm.rendering import Encoded


@dataclass(kw_only=True)
class DskdBatch(TeacherBatch):
    """teacher_states: `[N, D_t]`, the teacher's state at each row. token_ids: int64 `[N]`, its token there.
    student_turns, turns: int64 `[M]` and `[N]`, a number for each turn of each sample."""

    teacher_states: torch.Tensor
    token_ids: torch.Tensor
    student_turns: torch.Tensor
    turns: torch.Tensor


class Dskd(Objective[DskdBatch]):
    what = "each side's states projected for the other side's head, aligned by attention"
    source = "Dual-Space Knowledge Distillation, arXiv 2406.17328"
    targets = ("topk", "exact", "sample")
    logs = ("t2s_ce", "t2s_kl", "s2t_kl")
    tier = Tier.STATES
    needs_head = True

    dual_space: "DualSpace"

    def modules(self, student_config: Any, teacher_size: int) -> dict[str, nn.Module]:
        return {"dual_space": DualSpace(student_config.get_text_config().hidden_size, teacher_size)}

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> DskdBatch:
        mine = [n for item in samples for n in item.answer_lengths]
        its = [n for record in records for n in turn_lengths(record)]
        student_turns, turns = (torch.from_numpy(np.repeat(np.arange(len(n)), n)) for n in (mine, its))
        return DskdBatch(
            **vars(student),
            **teacher_part(records, self.loss.target),
            teacher_states=states_of([record.answer.coded[record.answer.predicts] for record in records]),
            token_ids=over_rows(records, "token_id").long(),
            student_turns=student_turns,
            turns=turns,
        )

    def terms(self, states: torch.Tensor, batch: DskdBatch) -> list[Term]:
        """The student's own cross-entropy; of the projected teacher, its cross-entropy, which trains the projection; the
        student's KL from it, where it is right; and the projected student's KL from the teacher. Neither head gets a
        gradient from a projected state."""
        assert self.head is not None
        head, weights, chunk_rows = self.student.head, self.loss, self.loss.chunk_rows
        rows = states.flatten(0, 1)[batch.student_rows]
        with torch.no_grad():
            ids = batch.student_inputs["input_ids"].flatten()[batch.student_rows]
            embed = self.student.model.get_input_embeddings()
            student_tokens = embed(torch.stack([ids, batch.student_ids], 1))  # [M, 2, D_s]
            teacher_tokens = self.head.weight[torch.stack([batch.token_ids, batch.target_ids], 1)]  # [N, 2, D_t]
        t2s, s2t = self.dual_space(
            rows, student_tokens, batch.student_turns, batch.teacher_states, teacher_tokens, batch.turns
        )
        own = FrozenHead(
            weight=head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
            transform=self.student.transform,
            vocab_size=head.out_features,
        )
        projected = head_losses(t2s, own, batch.student_ids, None, ce_weight=weights.kl_weight, chunk_rows=chunk_rows)
        losses = student_losses(
            rows,
            head,
            self.student.transform,
            batch.student_ids,
            Exact(hidden=t2s.detach()),
            Divergence(name="kl", shared_ids=head.out_features, only_where_right=True),
            teacher_head=own,
            ce_weight=weights.ce_weight,
            kl_weight=weights.kl_weight,
            chunk_rows=chunk_rows,
        )
        back = head_losses(
            s2t,
            self.head,
            batch.target_ids,
            batch.target,
            ce_weight=0.0,
            kl_weight=weights.kl_weight,
            chunk_rows=chunk_rows,
        )
        in_student = {"sft": losses.ce, "t2s_ce": projected.ce, "t2s_kl": losses.kl}
        return [
            Term(first=batch.student_first, loss=losses.weighted + projected.weighted, log=in_student),
            Term(first=batch.first, loss=back.weighted, log={"s2t_kl": back.kl}),
        ]


class DualSpace(nn.Module):
    """Three projections and one attention; dropped at export.

    With e the vectors of tokens and h the states at rows that predict, "/ std" by the standard deviation over the values of
    a turn's rows, and every row looking only at rows of the same turn:

        query = to_query([e_s(token), e_s(target)])              [M, 2 D_t]
        key   = [e_t(token), e_t(target)] / std                  [N, 2 D_t]
        A     = query key' / sqrt(2 D_t)                         [M, N]
        t2s   = softmax(A) to_student(h_t / std + e_t(target) / std)      [M, D_s], read by the student's head
        s2t   = softmax(A') to_teacher(h_s)                               [N, D_t], read by the teacher's head

    Args:
        student_size, teacher_size: D_s, D_t.
    """

    def __init__(self, student_size: int, teacher_size: int):
        super().__init__()
        self.to_query = nn.Linear(2 * student_size, 2 * teacher_size)
        self.to_student = nn.Linear(teacher_size, student_size)
        self.to_teacher = nn.Linear(student_size, teacher_size)

    def forward(
        self,
        student_states: torch.Tensor,
        student_tokens: torch.Tensor,
        student_turns: torch.Tensor,
        teacher_states: torch.Tensor,
        teacher_tokens: torch.Tensor,
        teacher_turns: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's states in the student's space `[M, D_s]`, and the student's in the teacher's `[N, D_t]`, float32.

        Args:
            student_states: `[M, D_s]`; student_tokens: `[M, 2, D_s]`, vectors of each row's token and of its target;
                student_turns: int64 `[M]`, one number for each turn of each sample. The teacher's: N and D_t likewise.
        """
        size = teacher_states.shape[-1]
        query = self.to_query(student_tokens.flatten(1)).float()
        key = _spread(teacher_tokens.flatten(1), teacher_turns)
        of_teacher = _spread(teacher_states, teacher_turns) + _spread(teacher_tokens[:, 1], teacher_turns)
        in_student, in_teacher = self.to_student(of_teacher).float(), self.to_teacher(student_states).float()
        apart = student_turns[:, None] != teacher_turns
        with torch.autocast(query.device.type, enabled=False):
            scores = query @ key.T / math.sqrt(2 * size)
            return _attention(scores, apart) @ in_student, _attention(scores.T, apart.T) @ in_teacher


def _spread(values: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rows `[N, W]` divided by the standard deviation over all values of the rows of their turn, float32."""
    values = values.float()

    def mean(of: torch.Tensor) -> torch.Tensor:  # over a turn's values, at each of its rows: [N, 1]
        none = values.new_zeros(len(turns))  # there are no more turns than rows
        rows = none.index_add(0, turns, torch.ones_like(none))
        return (none.index_add(0, turns, of.mean(-1)) / rows)[turns][:, None]

    return values / mean((values - mean(values)).square()).sqrt().clamp_min(1e-12)


def _attention(scores: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(apart, float("-inf")).softmax(-1)
