"""The three stages: what of the student is trained in each, and one micro-step of any objective."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from genrecal.errors import ModelError
from genrecal.objectives.base import Batch, Objective, Term
from genrecal.train.config import LoraConfig
from genrecal.vlm.loading import VLM, pad_states

VISION_PARTS = ("visual", "vision_tower", "vision_model", "image_tower", "vision_encoder")
PROJECTOR_PARTS = ("merger", "merger_list", "deepstack_merger_list", "multi_modal_projector", "connector", "projector")


class StepOutput(NamedTuple):
    """A micro-step's part of the global batch's loss, and sums of its terms over rows for the log.

    sums: name -> float32 scalar; counts: name -> rows summed. A term's mean is sums / counts.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    counts: dict[str, int]


class Distiller(nn.Module):
    """Everything a stage computes with, in one module whose forward is a whole micro-step.

    Args:
        student: the student; LoRA, if any, is already in its model.
        objective: prepared. modules: what it trains beside the student, by name.
    """

    def __init__(self, student: VLM, objective: Objective[Any], modules: Mapping[str, nn.Module]):
        super().__init__()
        self.student, self.objective, self.stage = student, objective, objective.stage
        self.model = student.model  # registers the student's parameters
        for name, module in modules.items():
            self.add_module(name, module)
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in VISION_PARTS:
                module.eval()  # frozen in every stage: no dropout

    def forward(self, batch: Batch, tokens: int) -> StepOutput:
        """One micro-step; `loss` sums to the global batch's loss over its micro-steps.

        Args:
            tokens: the teacher's answer tokens in the global batch, by which every term is divided.
        """
        with torch.set_grad_enabled(self.stage > 1 and torch.is_grad_enabled()):
            states = self._student_states(batch)  # [B, L, D_s]
        terms = self.objective.terms(states, batch.decoded())
        loss = self._weighed(terms) / tokens
        if batch.filler:
            return StepOutput(loss=0.0 * loss, sums={}, counts={})
        sums, counts = _logged(terms)
        return StepOutput(loss=loss, sums=sums, counts=counts)

    def _weighed(self, terms: Sequence[Term]) -> torch.Tensor:
        """The sum over all rows; the first tokens of answers have a weight of their own."""
        weight = self.objective.loss.first_token_weight
        return torch.stack(
            [torch.where(t.first, weight * t.loss, t.loss).sum() for t in terms if t.loss is not None]
        ).sum()

    def _student_states(self, batch: Batch) -> torch.Tensor:
        """The student's body over a batch, `[B, L, D_s]`.

        Without its attention mask: no position looks at padding on its right, as `batch_proof.py` has tried, and without a
        mask the attention kernels take their causal path.
        """
        passes = batch.student_passes or [batch.student_inputs]
        unmasked = [{name: value for name, value in inputs.items() if name != "attention_mask"} for inputs in passes]
        return pad_states([self.student.body(**inputs, use_cache=False).last_hidden_state for inputs in unmasked])


def _logged(terms: Sequence[Term]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Each logged term's sum and number of rows: of all, of the first tokens of answers, and of the later ones, which see
    the teacher's states."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for term in terms:
        for name, values in term.log.items():
            for suffix, rows in (("", slice(None)), ("_first", term.first), ("_later", ~term.first)):
                chosen = values.detach()[rows].float()
                sums[name + suffix], counts[name + suffix] = chosen.sum(), len(chosen)
    return sums, counts


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
