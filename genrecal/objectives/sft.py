"""Supervised fine-tuning: the student's own cross-entropy, in its own tokens."""

import torch

from genrecal.objectives.base import Batch, Objective, Term


class Sft(Objective[Batch]):
    what = "the student's own cross-entropy, in its own tokens"
    source = "supervised fine-tuning, the baseline of arXiv 2506.15681"
    any_teacher = True

    def terms(self, states: torch.Tensor, batch: Batch) -> list[Term]:
        return [self.own_cross_entropy(states, batch)]


class SeqKD(Sft):
    what = "sft on answers that the teacher wrote"
    source = "sequence-level knowledge distillation, Kim and Rush, arXiv 1606.07947"
    own_answers = True
