"""How much memory a micro-step's activations take, found by running it on tensors that have shapes and no memory.

The student's decoder, the Recalibrator and the losses run forward and backward under torch's FakeTensorMode with
transformers' own code, while the storages that are alive are counted. Two decoders of few layers give the line on
which that of all layers lies, so no formula of any family is needed. (torch's own MemTracker refuses frozen parameters.)
"""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.train.config import TrainConfig
from genrecal.train.divergences import Divergence, student_losses
from genrecal.train.dual_space import DualSpace
from genrecal.train.last_layer import Reads
from genrecal.train.losses import Exact, Sampled, Target, TopK, chunked_cross_entropy, head_losses
from genrecal.train.objectives import OBJECTIVES
from genrecal.train.recalibrator import Recalibrator, checkpoint_activations
from genrecal.train.stages import add_lora, needs_recalibrator, select_trainable, wanted_by

FEW_LAYERS = (2, 3)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A micro-step's sizes: B samples, padded to the longest of them.

    Args:
        samples: B. student_tokens: L_s, of the longest rendering.
        splice: L, the longest splice; reg_splice: of the regularisation pass, 0 without one.
        answers: the teacher's answer tokens in all; most_answers: of one sample; questions: its question tokens in all,
            0 without the pass.
        student_answers: the student's answer tokens in all.
    """

    samples: int
    student_tokens: int
    splice: int
    reg_splice: int
    answers: int
    most_answers: int
    questions: int
    student_answers: int


@dataclass(frozen=True, kw_only=True)
class TeacherSide:
    """What the trainer holds of a teacher: its head's shape `[head_rows, hidden_size]`, and targets a row."""

    hidden_size: int
    head_rows: int
    top_k: int
    draws: int = 0


def activation_bytes(
    student_config: Any, stage: int, config: TrainConfig, teacher: TeacherSide, shape: StepShape, dtype: torch.dtype
) -> int:
    """Peak bytes of a micro-step beyond weights, gradients and optimizer state: its batch, activations, logits chunk.

    Of the language model's side: the image encoder runs before it and holds nothing (it is frozen). On CUDA products
    of the heads' weights need no float32 copies of them; elsewhere they do, and those are not counted.
    """
    few = [_traced(student_config, stage, config, teacher, shape, dtype, layers=layers) for layers in FEW_LAYERS]
    per_layer = (few[1] - few[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    layers = student_config.get_text_config().num_hidden_layers
    return round(few[0] + per_layer * (layers - FEW_LAYERS[0]))


def _traced(
    student_config: Any,
    stage: int,
    config: TrainConfig,
    teacher: TeacherSide,
    shape: StepShape,
    dtype: torch.dtype,
    *,
    layers: int,
) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        step = _Step(student_config, stage, config, teacher, dtype, layers=layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.move()
        with _Alive(step.standing()) as alive:
            step.run(shape)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still held; `peak` is the most there were at once.

    Args:
        standing: tensors that were there before, and are not counted.
    """

    def __init__(self, standing: Iterable[torch.Tensor]):
        super().__init__()
        self.peak = self._now = 0
        self._standing = [tensor.untyped_storage() for tensor in standing]  # held, so that no other takes its place
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._standing}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self._now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)


class _Step:
    """A micro-step of a stage as `genrecal.train.stages.Distiller` computes it, from made inputs."""

    def __init__(
        self,
        student_config: Any,
        stage: int,
        config: TrainConfig,
        teacher: TeacherSide,
        dtype: torch.dtype,
        *,
        layers: int,
    ):
        self.stage, self.config, self.teacher, self.dtype = stage, config, teacher, dtype
        student = _student_of(student_config, layers)
        if stage == 2 and config.lora.rank:
            add_lora(student, config.lora)
        trained = set(select_trainable(stage, student, config.lora))
        self.base_dtype = torch.float32 if stage == 3 or (stage == 2 and not config.lora.rank) else dtype
        for name, parameter in student.model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in trained else self.base_dtype)
        self.decoder, self.head = student.model.get_decoder(), student.model.get_output_embeddings()
        self.head.weight.data = self.head.weight.data.float()  # as the teacher's: no copy of it on the fake CPU
        self.recalibrator: Recalibrator | None = None
        if needs_recalibrator(stage, config):
            self.recalibrator = Recalibrator.of(config, student_config, teacher.hidden_size)
        self.dual_space: DualSpace | None = None
        if config.objective == "dskd":
            self.dual_space = DualSpace(self.head.weight.shape[1], teacher.hidden_size)
        if config.gradient_checkpointing:
            checkpoint_activations(student.model if stage > 1 else None, self.recalibrator)
        modules = (self.decoder, self.head, self.recalibrator, self.dual_space)
        self._modules = [module for module in modules if module is not None]

    def move(self) -> None:
        """From the meta device to the current (fake) one, with the gradients that a second micro-step finds."""
        moved: dict[int, torch.nn.Parameter] = {}  # a head may be the embedding
        for part in (part for module in self._modules for part in module.modules()):
            part.train()
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in moved:
                        fresh = torch.nn.Parameter(
                            torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                        )
                        fresh.grad = torch.empty_like(fresh) if fresh.requires_grad else None
                        moved[id(parameter)] = fresh
                    part._parameters[name] = moved[id(parameter)]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        teacher = self.teacher
        weight = torch.empty(teacher.head_rows, teacher.hidden_size)
        self.teacher_head = FrozenHead(weight=weight, vocab_size=teacher.head_rows)

    def standing(self) -> list[torch.Tensor]:
        """What is in memory before the step: weights, buffers, gradients."""
        tensors = [self.teacher_head.weight]
        for module in self._modules:
            tensors += module.buffers()
            for parameter in module.parameters():
                tensors += [parameter.data, *([parameter.grad] if parameter.grad is not None else [])]
        return tensors

    def run(self, shape: StepShape) -> None:
        width = self.decoder.config.hidden_size
        # The residual stream has the embeddings' dtype, float32 where the student's own weights are trained.
        embeddings = torch.empty(shape.samples, shape.student_tokens, width, dtype=self.base_dtype)
        embeddings.requires_grad_(self.stage == 3)  # they come from trained embeddings and a trained projector
        loss = torch.zeros(())
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.set_grad_enabled(self.stage > 1):
                states = self.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state.flatten(0, 1)
            if self.recalibrator is not None:
                loss = loss + self._teacher_terms(self.recalibrator, states, shape)
            if OBJECTIVES[self.config.objective].direct:
                loss = loss + self._direct_terms(states, shape)
            elif self.stage > 1:
                ids = torch.zeros(shape.student_answers, dtype=torch.int64)
                ce = chunked_cross_entropy(
                    states[ids], self.head, LogitTransform(), ids, chunk_rows=self.config.loss.chunk_rows
                )
                loss = loss + ce.sum()
        loss.backward()

    def _teacher_terms(self, recalibrator: Recalibrator, states: torch.Tensor, shape: StepShape) -> torch.Tensor:
        teacher = self.teacher
        total = torch.zeros(())
        ids = torch.zeros(shape.answers, dtype=torch.int64)

        def add(splice: torch.Tensor) -> None:
            nonlocal total
            length = splice.shape[1]
            positions = torch.zeros(shape.samples, min(shape.most_answers, length), dtype=torch.int64)
            recalibrated = recalibrator(splice, Reads(positions=positions, chosen=ids))
            chunk_rows = self.config.loss.chunk_rows
            target = self._target(shape.answers)
            total = (
                total + head_losses(recalibrated, self.teacher_head, ids, target, chunk_rows=chunk_rows).weighted.sum()
            )

        if shape.splice:
            assert recalibrator.rec_proj_pre is not None
            answers = recalibrator.rec_proj_pre(torch.empty(shape.answers, teacher.hidden_size))
            passes = [(states, shape.splice)]
            if shape.reg_splice:
                asked = torch.empty(shape.questions, teacher.hidden_size)
                passes.append((recalibrator.rec_proj_pre(asked), shape.reg_splice))
            for questions, length in passes:
                source = torch.cat([questions.to(answers.dtype), answers])
                rows = torch.zeros(shape.samples, length, dtype=torch.int64)
                add(source[rows])
        if wanted_by(self.stage, self.config).aligned:
            add(states.unflatten(0, (shape.samples, shape.student_tokens)))
        return total

    def _direct_terms(self, states: torch.Tensor, shape: StepShape) -> torch.Tensor:
        """`Distiller._against_teacher` and `Distiller._in_dual_space`."""
        mine, its = (torch.zeros(rows, dtype=torch.int64) for rows in (shape.student_answers, shape.answers))
        rows, chunk_rows = states[mine], self.config.loss.chunk_rows
        name, width = self.config.objective, self.head.out_features
        if self.dual_space is None:
            shared = min(width, self.teacher.head_rows)
            divergence, target, head = (
                Divergence(name=name, shared_ids=shared),
                self._target(len(mine)),
                self.teacher_head,
            )
            total = torch.zeros(())
        else:
            t2s, s2t = self.dual_space(
                rows,
                torch.empty(len(mine), 2, self.head.in_features),
                mine,
                torch.empty(len(its), self.teacher.hidden_size),
                torch.empty(len(its), 2, self.teacher.hidden_size),
                its,
            )
            head = FrozenHead(weight=self.head.weight.detach(), vocab_size=width)
            divergence = Divergence(name="kl", shared_ids=width, only_where_right=True)
            target = Exact(hidden=t2s.detach())
            total = head_losses(t2s, head, mine, None, chunk_rows=chunk_rows).weighted.sum()
            back = head_losses(s2t, self.teacher_head, its, self._target(len(its)), chunk_rows=chunk_rows)
            total = total + back.weighted.sum()
        losses = student_losses(
            rows, self.head, LogitTransform(), mine, target, divergence, teacher_head=head, chunk_rows=chunk_rows
        )
        return total + losses.weighted.sum()

    def _target(self, rows: int) -> Target:
        if self.config.loss.target == "exact":
            return Exact(hidden=torch.empty(rows, self.teacher.hidden_size))
        if self.config.loss.target == "sample":
            drawn = torch.zeros(rows, self.teacher.draws, dtype=torch.int64)
            return Sampled(ids=drawn, weights=torch.empty(drawn.shape), entropy=torch.empty(rows))
        ids = torch.zeros(rows, self.teacher.top_k, dtype=torch.int64)
        return TopK(ids=ids, log_probs=torch.empty(ids.shape))


@dataclass(frozen=True, kw_only=True)
class _Student:
    path: str
    model: Any


def _student_of(student_config: Any, layers: int) -> _Student:
    """A model of the student's class with `layers` decoder layers."""
    from genrecal.vlm.loading import auto_class

    config = copy.deepcopy(student_config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    return _Student(path="", model=auto_class(config).from_config(config))
