"""The three stages: what of the student is trained in each, and one micro-step of any objective."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from genrecal.errors import ModelError
from genrecal.objectives.base import Batch, Objective, Term
from genrecal.train.config import LoraConfig
from genrecal.vlm.loading import VLM, first_line, pad_states
from genrecal.vlm.parts import find_parts


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
        for name in find_parts(self.model, path=student.path).encoders:
            self.model.get_submodule(name).eval()  # frozen in every stage: no dropout

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


def add_lora(student: HasModel, config: LoraConfig) -> None:
    """Put LoRA beside the linear layers of the student's decoder, but for routers, in place; the model keeps its class.

    Each layer is named exactly. The model is hidden from PEFT, which would take the names of some families' MLPs for those of
    their experts. Experts that lie in one tensor are no linear layers and get no LoRA.
    """
    import peft

    decoder, routers = student.model.get_decoder(), find_parts(student.model, path=student.path).routers
    frozen = {id(parameter) for name, parameter in student.model.named_parameters() if name in routers}
    names = [
        f"decoder.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in frozen
    ]
    if not names:
        raise ModelError(f"{student.path}: no language model with linear layers was found in the student")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
    )
    peft.inject_adapter_in_model(settings, nn.ModuleDict({"decoder": decoder}))


def merge_lora(student: HasModel, *, safe: bool = True) -> None:
    """Add LoRA's product to its base weights and remove LoRA, in place. `safe`: a product must be finite."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(student.model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=safe)
            parent, _, leaf = name.rpartition(".")
            setattr(student.model.get_submodule(parent), leaf, module.get_base_layer())


def try_stages(student: HasModel, config: LoraConfig) -> None:
    """Try on a student without weights what later stages do to it: find its parts, put LoRA in, and merge it.

    Raises ModelError for one with which that cannot be done.
    """
    names = set(student.model.state_dict())
    for stage in (2, 3):
        try:
            if stage == 2 and config.rank:
                add_lora(student, config)
            select_trainable(stage, student, config)
            if stage == 2 and config.rank:
                merge_lora(student, safe=False)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{student.path}: stage {stage} cannot train {type(student.model).__name__}: {first_line(error)}; take "
                "another student, or set lora.rank=0"
            ) from None
    if names != set(student.model.state_dict()):
        raise ModelError(f"{student.path}: {type(student.model).__name__} has other weights after LoRA is merged")


def select_trainable(stage: int, student: HasModel, lora: LoraConfig) -> list[str]:
    """Freeze and unfreeze the student for a stage; names of its trained parameters.

    Stage 1: none. Stage 2: LoRA, or with rank 0 the decoder layers and the final norm. Stage 3: projector and language model.
    Routers of experts stay frozen in every stage: nothing here balances what they choose.
    """
    student.model.requires_grad_(False)
    named = dict(student.model.named_parameters())
    if stage == 1:
        return []
    if stage == 2 and lora.rank:
        chosen = [name for name in named if ".lora_A." in name or ".lora_B." in name]
    else:
        parts = find_parts(student.model, path=student.path)
        chosen = [name for name in named if name in {*parts.projector, *parts.language} - parts.routers]
        if stage == 2:
            decoder = student.model.get_decoder()
            embeddings = {id(p) for p in student.model.get_input_embeddings().parameters()}
            inside = {id(p) for p in decoder.parameters()} - embeddings
            chosen = [name for name in chosen if id(named[name]) in inside]
    for name in chosen:
        named[name].requires_grad_(True)
    return chosen


def describe_trained(student: HasModel, lora: LoraConfig, stage: int) -> str:
    """What of a student a stage trains and what it leaves as it is, after `select_trainable`, in words."""
    named = dict(student.model.named_parameters())
    parts = find_parts(student.model, path=student.path)
    experts = set(parts.experts)
    groups = {
        "vision encoder": parts.encoder, "projector": parts.projector, "other encoders": parts.other,
        "routers": parts.routers, "experts": experts,
        "language model": set(parts.language) - parts.routers - experts,
    }  # fmt: skip
    sizes = {True: [], False: []}  # type: dict[bool, list[str]]
    for group, names in groups.items():
        for trained in (True, False):
            count = sum(named[name].numel() for name in names if named[name].requires_grad is trained)
            if count:
                what = "LoRA" if trained and stage == 2 and lora.rank and group == "language model" else group
                sizes[trained].append(f"{what} {count / 1e6:,.1f} M")
    return (
        f"trains {', '.join(sizes[True]) or 'nothing of the student'}; frozen: {', '.join(sizes[False]) or 'nothing'}"
    )
