"""Dual-space distillation: each side's states in the other side's space, aligned by attention between the two answers.

(DSKD with cross-model attention, Zhang et al., arXiv 2406.17328; docs/method.md says what is left out.)
"""

import math

import torch
from torch import nn


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
