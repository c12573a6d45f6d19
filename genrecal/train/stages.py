"""The three stages: what is trained in each, and what one micro-step computes (paper, section 3.3, Algorithms 1-3)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from genrecal.errors import ModelError
from genrecal.shards.head import FrozenHead
from genrecal.train.batches import MicroBatch, Splice, Wanted
from genrecal.train.config import LoraConfig, LossConfig, TrainConfig
from genrecal.train.divergences import Divergence, student_losses
from genrecal.train.dual_space import DualSpace
from genrecal.train.losses import Exact, RowLosses, Sampled, Target, TopK, chunked_cross_entropy, head_losses
from genrecal.train.objectives import OBJECTIVES
from genrecal.train.recalibrator import Recalibrator
from genrecal.vlm.loading import VLM

VISION_PARTS = ("visual", "vision_tower", "vision_model", "image_tower", "vision_encoder")
PROJECTOR_PARTS = ("merger", "merger_list", "deepstack_merger_list", "multi_modal_projector", "connector", "projector")


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Rows that each term is divided by: their number in the whole global batch (all micro-steps, all ranks)."""

    teacher_rows: int
    student_rows: int
    aligned_rows: int = 0


Log = Callable[[str, torch.Tensor, torch.Tensor], None]  # a term's name, its rows, which of them are first tokens
Weighed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # the same rows -> their weighted sum


class StepOutput(NamedTuple):
    """A micro-step's part of the global batch's loss, and sums of its terms over rows for the log.

    sums: name -> float32 scalar; counts: name -> rows summed. A term's mean is sums / counts.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    counts: dict[str, int]


def wanted_by(stage: int, config: TrainConfig) -> Wanted:
    """What a stage reads of the cache."""
    objective, loss = OBJECTIVES[config.objective], config.loss
    if not objective.targets or (objective.recalibrates and stage == 3):
        return Wanted(teacher=False, questions=False, splice=False)
    splice, aligned = objective.recalibrates and loss.splice_weight > 0, config.objective == "genrecal-aligned"
    return Wanted(
        teacher=True,
        questions=stage == 1 and splice and loss.reg_weight > 0,
        last_answer=stage > 1 or aligned,
        exact=loss.target == "exact",
        sampled=loss.target == "sample",
        splice=splice,
        aligned=aligned,
        beside=objective.beside,
    )


def needs_recalibrator(stage: int, config: TrainConfig) -> bool:
    return OBJECTIVES[config.objective].recalibrates and stage < 3


def needs_teacher_head(stage: int, config: TrainConfig) -> bool:
    """Whether something is read by the teacher's head: what the Recalibrator or the dual space makes, or an exact target."""
    wanted = wanted_by(stage, config)
    return wanted.teacher and (wanted.exact or needs_recalibrator(stage, config) or config.objective == "dskd")


class Distiller(nn.Module):
    """Everything a stage computes with, in one module whose forward is a whole micro-step.

    Args:
        stage: 1, 2 or 3.
        student: the student; LoRA, if any, is already in its model.
        recalibrator: None in stage 3, and for objectives without one. head: the teacher's, where something is read by it.
        objective: of OBJECTIVES. shared_ids: the ids that both tokenizers share, for objectives that need one tokenizer.
        dual_space: of objective "dskd".
        question_fraction: share of samples whose questions are cached; their regularisation terms are weighted by its
            inverse, so that the expected loss is that of a full question tier.
    """

    def __init__(
        self,
        stage: int,
        student: VLM,
        recalibrator: Recalibrator | None,
        head: FrozenHead | None,
        loss: LossConfig,
        *,
        question_fraction: float = 1.0,
        objective: str = "genrecal",
        shared_ids: int = 0,
        dual_space: DualSpace | None = None,
    ):
        super().__init__()
        self.objective, self.shared_ids, self.dual_space = objective, shared_ids, dual_space
        self.stage, self.student, self.loss = stage, student, loss
        self.model = student.model  # registers the student's parameters
        self.recalibrator, self.head = recalibrator, head
        self.question_fraction = question_fraction
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in VISION_PARTS:
                module.eval()  # frozen in every stage: no dropout

    def forward(self, batch: MicroBatch, denominators: Denominators) -> StepOutput:
        """One micro-step; `loss` sums to the global batch's loss over its micro-steps."""
        with torch.set_grad_enabled(self.stage > 1 and torch.is_grad_enabled()):
            sequences = self._student_states(batch)  # [B, L, D_s]
        states = sequences.flatten(0, 1)
        loss = states.new_zeros((), dtype=torch.float32)
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        config = self.loss

        def weighed(values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            """The sum over rows; the first tokens of answers have a weight of their own."""
            return torch.where(first, config.first_token_weight * values, values).sum()

        def log(name: str, values: torch.Tensor, first: torch.Tensor) -> None:
            """The first token of an answer apart from the later ones: only there the student's state is not bypassed."""
            values = values.detach()
            for suffix, rows in (("", slice(None)), ("_first", first), ("_later", ~first)):
                sums[name + suffix] = values[rows].sum()
                counts[name + suffix] = int(values[rows].numel())

        def against_teacher(
            name: str, recalibrated: torch.Tensor, which: slice | torch.Tensor, first: torch.Tensor, weight: float
        ) -> torch.Tensor:
            """A pass's cross-entropy and KL, at the rows `which` of the teacher's; weight has the denominator in it."""
            losses = self._losses(recalibrated, batch, which)
            log(f"{name}ce", losses.ce, first)
            log(f"{name}kl", losses.kl, first)
            return weight * weighed(losses.weighted, first)

        if self.recalibrator is not None and batch.splice is not None:
            assert self.recalibrator.rec_proj_pre is not None
            assert batch.answer_states is not None and batch.first is not None
            answers = self.recalibrator.rec_proj_pre(batch.answer_states)  # [R, D_s]
            weight = config.splice_weight / denominators.teacher_rows
            rows = self._recalibrated(states, answers, batch.splice)
            loss = loss + against_teacher("", rows, slice(None), batch.first, weight)
            if self.stage == 1 and batch.reg_splice is not None:
                assert batch.question_states is not None and batch.reg_rows is not None
                questions = self.recalibrator.rec_proj_pre(batch.question_states)  # [Q, D_s]
                weight *= config.reg_weight / self.question_fraction
                rows = self._recalibrated(questions, answers, batch.reg_splice)
                loss = loss + against_teacher("reg_", rows, batch.reg_rows, batch.first[batch.reg_rows], weight)
        if self.recalibrator is not None and batch.aligned_rows is not None:
            assert batch.aligned_at is not None and batch.aligned_first is not None and batch.target_ids is not None
            weight = config.aligned_weight / denominators.aligned_rows
            rows = self.recalibrator(sequences, batch.aligned_at)  # [A, D_t]
            loss = loss + against_teacher("aligned_", rows, batch.aligned_rows, batch.aligned_first, weight)
            sums["aligned_share"] = loss.new_tensor(len(batch.aligned_rows))
            counts["aligned_share"] = len(batch.target_ids)
        if OBJECTIVES[self.objective].direct:
            compare = self._against_teacher if self.dual_space is None else self._in_dual_space
            loss = loss + compare(states[batch.sft_rows], batch, denominators, weighed, log)
        elif self.stage > 1:
            ce = chunked_cross_entropy(
                states[batch.sft_rows],
                self.student.head,
                self.student.transform,
                batch.sft_ids,
                chunk_rows=self.loss.chunk_rows,
            )
            weight = config.sft_weight if self.recalibrator is not None else 1.0
            loss = loss + weight * weighed(ce, batch.sft_first) / denominators.student_rows
            log("sft", ce, batch.sft_first)
        return StepOutput(loss=loss, sums=sums, counts=counts)

    def _student_states(self, batch: MicroBatch) -> torch.Tensor:
        """The student's body over a batch, `[B, L, D_s]`.

        Without its attention mask: no position looks at padding on its right, and without a mask the attention kernels
        take their causal path.
        """
        inputs = {name: value for name, value in batch.student_inputs.items() if name != "attention_mask"}
        return self.student.body(**inputs, use_cache=False).last_hidden_state

    def _recalibrated(self, questions: torch.Tensor, answers: torch.Tensor, splice: Splice) -> torch.Tensor:
        """Recalibrator(splice) at the prediction positions, `[N, D_t]`."""
        assert self.recalibrator is not None
        source = torch.cat([questions.to(answers.dtype), answers])
        recalibrated: torch.Tensor = self.recalibrator(source[splice.rows], splice.predicts)
        return recalibrated

    def _losses(self, rows: torch.Tensor, batch: MicroBatch, which: slice | torch.Tensor) -> RowLosses:
        assert self.head is not None and batch.target_ids is not None
        return head_losses(
            rows,
            self.head,
            batch.target_ids[which],
            self._target(batch, which),
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            chunk_rows=self.loss.chunk_rows,
        )

    def _against_teacher(
        self, rows: torch.Tensor, batch: MicroBatch, denominators: Denominators, weighed: Weighed, log: Log
    ) -> torch.Tensor:
        """The student's own cross-entropy at its rows `[M, D_s]`, and its divergence from the teacher's distribution there."""
        divergence = Divergence(name=self.objective, shared_ids=self.shared_ids, skew=self.loss.skew)
        which: slice | torch.Tensor = slice(None)
        counts = None
        if batch.teacher_rows is not None:
            which, counts = batch.teacher_rows.clamp_min(0), (batch.teacher_rows >= 0).float()
        losses = self._student_losses(rows, batch, self._target(batch, which), divergence, self.head, counts)
        log("sft", losses.ce, batch.sft_first)
        (term,) = OBJECTIVES[self.objective].terms
        compared = slice(None) if counts is None else counts.bool()
        log(term, losses.kl[compared], batch.sft_first[compared])
        return weighed(losses.weighted, batch.sft_first) / denominators.student_rows

    def _in_dual_space(
        self, rows: torch.Tensor, batch: MicroBatch, denominators: Denominators, weighed: Weighed, log: Log
    ) -> torch.Tensor:
        """The student's own cross-entropy, and the three terms of dual-space distillation (arXiv 2406.17328).

        Of the projected teacher, its cross-entropy, which trains the projection; the student's KL from it, where it is
        right; and the projected student's KL from the teacher. Neither head gets a gradient from a projected state.
        """
        assert self.dual_space is not None and self.head is not None and batch.target_ids is not None
        assert batch.teacher_states is not None and batch.token_ids is not None
        assert batch.sft_turns is not None and batch.turns is not None and batch.first is not None
        head, weights = self.student.head, self.loss
        with torch.no_grad():
            ids = batch.student_inputs["input_ids"].flatten()[batch.sft_rows]
            student_tokens = self.model.get_input_embeddings()(torch.stack([ids, batch.sft_ids], 1))  # [M, 2, D_s]
            teacher_tokens = self.head.weight[torch.stack([batch.token_ids, batch.target_ids], 1)]  # [N, 2, D_t]
        t2s, s2t = self.dual_space(
            rows, student_tokens, batch.sft_turns, batch.teacher_states, teacher_tokens, batch.turns
        )
        own = FrozenHead(
            weight=head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
            transform=self.student.transform,
            vocab_size=head.out_features,
        )
        projected = head_losses(
            t2s, own, batch.sft_ids, None, ce_weight=weights.kl_weight, chunk_rows=weights.chunk_rows
        )
        divergence = Divergence(name="kl", shared_ids=head.out_features, only_where_right=True)
        losses = self._student_losses(rows, batch, Exact(hidden=t2s.detach()), divergence, own)
        back = head_losses(
            s2t,
            self.head,
            batch.target_ids,
            self._target(batch, slice(None)),
            ce_weight=0.0,
            kl_weight=weights.kl_weight,
            chunk_rows=weights.chunk_rows,
        )
        log("sft", losses.ce, batch.sft_first)
        log("t2s_ce", projected.ce, batch.sft_first)
        log("t2s_kl", losses.kl, batch.sft_first)
        log("s2t_kl", back.kl, batch.first)
        in_student = weighed(losses.weighted + projected.weighted, batch.sft_first) / denominators.student_rows
        return in_student + weighed(back.weighted, batch.first) / denominators.teacher_rows

    def _student_losses(
        self,
        rows: torch.Tensor,
        batch: MicroBatch,
        target: Target,
        divergence: Divergence,
        teacher_head: FrozenHead | None,
        counts: torch.Tensor | None = None,
    ) -> RowLosses:
        return student_losses(
            rows,
            self.student.head,
            self.student.transform,
            batch.sft_ids,
            target,
            divergence,
            teacher_head=teacher_head,
            ce_weight=self.loss.ce_weight,
            kl_weight=self.loss.kl_weight,
            counts=counts,
            chunk_rows=self.loss.chunk_rows,
        )

    @staticmethod
    def _target(batch: MicroBatch, which: slice | torch.Tensor) -> Target:
        """What the cache holds of the teacher's distribution at some of its rows."""
        assert batch.topk_ids is not None
        if batch.exact_states is not None:
            return Exact(hidden=batch.exact_states[which])
        if batch.sample_ids is not None:
            assert batch.sample_counts is not None and batch.entropy is not None
            return Sampled.of_counts(batch.sample_ids[which], batch.sample_counts[which], batch.entropy[which])
        assert batch.topk_log_probs is not None
        return TopK(ids=batch.topk_ids[which], log_probs=batch.topk_log_probs[which])


# ----------------------------------------------------------------------------------------------------- what is trained


class HasModel(Protocol):
    """A student with or without weights; a `VLM` is one."""

    @property
    def path(self) -> str: ...

    @property
    def model(self) -> Any: ...


def language_model_linears(student: HasModel) -> str:
    """A pattern for PEFT that matches the linear layers of the student's language model, and nothing else."""
    decoder = student.model.get_decoder()
    names = {id(module): name for name, module in student.model.named_modules()}
    leaves = sorted({name.split(".")[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)})
    if id(decoder) not in names or not leaves:
        raise ModelError(f"{student.path}: no language model with linear layers was found in the student")
    return rf"{re.escape(names[id(decoder)])}\..*\.({'|'.join(map(re.escape, leaves))})"


def add_lora(student: HasModel, config: LoraConfig) -> None:
    """Put LoRA into the student's language model, in place; the model keeps its class."""
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=language_model_linears(student),
    )
    peft.inject_adapter_in_model(settings, student.model)


def merge_lora(student: VLM) -> None:
    """Add LoRA's product to the weights it stands beside and take it out, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(student.model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(student.model.get_submodule(parent), leaf, module.get_base_layer())


def select_trainable(stage: int, student: HasModel, lora: LoraConfig) -> list[str]:
    """Freeze and unfreeze the student for a stage; names of its trained parameters.

    Stage 1: none. Stage 2: LoRA, or with rank 0 the decoder layers and the final norm. Stage 3: all but the vision
    encoder (the projector is trained).
    """
    student.model.requires_grad_(False)
    named = dict(student.model.named_parameters())
    if stage == 1:
        return []
    if stage == 2 and lora.rank:
        chosen = [name for name in named if ".lora_A." in name or ".lora_B." in name]
    elif stage == 2:
        decoder = student.model.get_decoder()
        embeddings = {id(p) for p in student.model.get_input_embeddings().parameters()}
        inside = {id(p) for p in decoder.parameters()} - embeddings
        chosen = [name for name, parameter in named.items() if id(parameter) in inside]
    else:
        chosen = [name for name in named if not is_vision_encoder(name)]
        if len(chosen) == len(named) and getattr(student.model.config, "vision_config", None) is not None:
            raise ModelError(
                f"{student.path}: stage 3 trains all but the vision encoder, but none of {', '.join(VISION_PARTS)} "
                "is part of this student's parameter names"
            )
    for name in chosen:
        named[name].requires_grad_(True)
    return chosen


def is_vision_encoder(parameter: str) -> bool:
    """Whether a parameter belongs to the vision encoder: under its module, and not in the projector to the text side."""
    parts = parameter.split(".")
    return any(part in VISION_PARTS for part in parts) and not any(part in PROJECTOR_PARTS for part in parts)
