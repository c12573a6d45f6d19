"""What an objective is. `docs/howto/objective.md` shows how to add one.

Letters: B samples; M answer tokens of the student, N of the teacher; R stored rows; D_s, D_t sizes of a state.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from genrecal.errors import DamageError, UsageError
from genrecal.objectives.losses import Exact, Sampled, Target, TopK, chunked_cross_entropy
from genrecal.objectives.settings import LossConfig, Settings
from genrecal.shards.codecs import Coded, CodedStates
from genrecal.shards.head import FrozenHead
from genrecal.shards.mixture import Mixture
from genrecal.shards.reader import Cache
from genrecal.shards.record import Record
from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Encoded


class Tier(IntEnum):
    """What is read of a cached sample; each includes those before it."""

    NONE = 0  # the conversation alone
    TARGETS = 1  # the teacher's token ids, top-k logits and draws of each answer row
    STATES = 2  # the teacher's states of the answer rows
    QUESTIONS = 3  # the teacher's states of the questions


@dataclass(kw_only=True)
class Batch:
    """A micro-batch as the student sees it. An objective that reads the teacher adds fields in a subclass.

    Fields may be tensors, the teacher's coded states, or dataclasses of them. `to` moves all to a device; `decoded` decodes
    the states there, before `Objective.terms`.

    Args:
        keys: the samples.
        student_inputs: collated tensors of the student's own rendering, text padded on the right to `[B, L]`.
        student_passes: of a student that must run each conversation alone, every conversation's own tensors; else empty.
        student_rows: int64 `[M]`, flat in B * L: the student's positions that predict an answer token.
        student_ids: int64 `[M]`, the token each predicts. student_first: bool `[M]`, the first of a turn's answer.
        filler: whether it only keeps this rank in step with the others: it is computed, and counts nothing.
    """

    keys: list[str]
    student_inputs: dict[str, torch.Tensor]
    student_rows: torch.Tensor
    student_ids: torch.Tensor
    student_first: torch.Tensor
    student_passes: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    filler: bool = False

    def to(self: "B", device: torch.device, student_dtype: torch.dtype) -> "B":
        """Move to a device; floating student inputs (images) take the student's dtype."""

        def move(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            dtypes = {name: student_dtype if x.is_floating_point() else None for name, x in inputs.items()}
            return {name: x.to(device, dtypes[name], non_blocking=True) for name, x in inputs.items()}

        moved = map_tensors(self, lambda x: x.to(device, non_blocking=True))
        passes = [move(inputs) for inputs in self.student_passes]
        return dataclasses.replace(moved, student_inputs=move(self.student_inputs), student_passes=passes)

    def decoded(self: "B") -> "B":
        """With float32 `[R, D_t]` in place of the teacher's coded states, decoded on the device where they are."""
        return map_tensors(self, lambda states: states.decode(), kind=CodedStates)


B = TypeVar("B", bound=Batch)
T = TypeVar("T")


def map_tensors(value: T, function: Any, kind: type = torch.Tensor) -> T:
    """`function` on every tensor (or other `kind`) of a dataclass, its dataclasses, dicts, lists and tuples."""
    if isinstance(value, kind):
        return function(value)  # type: ignore[no-any-return]
    if isinstance(value, list):
        return [map_tensors(item, function, kind) for item in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: map_tensors(item, function, kind) for name, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function, kind) for item in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), function, kind) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


@dataclass(kw_only=True)
class Term:
    """Some rows of a micro-batch's loss.

    The loss of a step is the sum of `loss` over all rows of the global batch, divided by the number of the teacher's answer
    tokens in it. First tokens of answers are weighted by `loss.first_token_weight`, and logged apart.

    Args:
        first: bool `[n]`: which rows are the first token of a turn's answer.
        loss: float32 `[n]`, with its gradient, multiplied by the weights of the settings; None for rows that are only logged.
        log: name -> float `[n]`: what is logged, as a mean per row.
    """

    first: torch.Tensor
    loss: torch.Tensor | None = None
    log: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class Objective(Generic[B]):
    """One stage of an objective: what it needs, how it makes its batches, and its terms.

    Subclasses fill in the class's attributes and override the methods that they need. The order of calls: the class's
    `check_*` before anything is loaded; `modules` and `prepare` once, in the training process; `check` and `batch` in the
    processes that load; `terms` for each micro-batch.

    Args:
        stage: 1, 2 or 3. config: the run's settings.

    Attributes:
        what: the objective in a few words. source: who proposed it.
        stages: those that it has. chained: whether a stage needs the result of the one before.
        targets: what it takes from the teacher (`loss.target`); empty where it reads no target.
        logs: the terms it logs, besides "sft", the student's own cross-entropy.
        one_tokenizer: whether teacher and student must give an answer the same tokens.
        own_answers: whether the cache's answers must be the teacher's own.
        any_teacher: whether a run's caches may be of several teachers; `Record.cache` says whose a record is.
        student: after `prepare`, the student. head: the teacher's frozen head, or None.
    """

    what: ClassVar[str]
    source: ClassVar[str]
    stages: ClassVar[tuple[int, ...]] = (2, 3)
    chained: ClassVar[bool] = False
    targets: ClassVar[tuple[str, ...]] = ()
    logs: ClassVar[tuple[str, ...]] = ()
    one_tokenizer: ClassVar[bool] = False
    own_answers: ClassVar[bool] = False
    any_teacher: ClassVar[bool] = False

    student: VLM
    head: FrozenHead | None = None

    def __init__(self, stage: int, config: Settings):
        self.stage, self.config = stage, config
        self.loss: LossConfig = config.loss

    # ------------------------------------------------------------------------------------------------- what it needs

    @classmethod
    def check_settings(cls, name: str, loss: LossConfig) -> None:
        """Raises UsageError for settings that this objective cannot be trained with."""
        if cls.targets and loss.target not in cls.targets:
            raise UsageError(
                f"loss.target {loss.target!r}: objective {name} needs the teacher's probabilities themselves, of which draws "
                f"say too little; expected {' or '.join(cls.targets)}"
            )

    @classmethod
    def several_teachers(cls, loss: LossConfig) -> bool:
        """Whether a run's caches may be of several teachers."""
        return cls.any_teacher and not (cls.targets and loss.target == "exact")

    @property
    def tier(self) -> Tier:
        """What this stage reads of the cache."""
        if not self.targets:
            return Tier.NONE
        return Tier.STATES if self.loss.target == "exact" else Tier.TARGETS

    @property
    def needs_head(self) -> bool:
        """Whether this stage uses the teacher's frozen LM head."""
        return self.tier > Tier.NONE and self.loss.target == "exact"

    @property
    def needs_draws(self) -> bool:
        """Whether this stage reads sampled targets."""
        return self.tier > Tier.NONE and self.loss.target == "sample"

    @property
    def last_answer(self) -> bool:
        """Whether the student runs over the last answer too."""
        return True

    @property
    def extra_blocks(self) -> int:
        """Decoder blocks that run beside the student's in a micro-step, for the dry run."""
        return 0

    def check_cache(self, name: str, cache: Cache) -> None:
        """Raises UsageError if a cache lacks what this stage reads."""
        if self.own_answers and cache.answers.kind == "given":
            raise UsageError(
                f"--cache {cache.path}: objective {name} trains on the teacher's own answers, and this cache has the given "
                "ones; make one with `genrecal cache --generate`, or train with objective sft"
            )
        if self.tier >= Tier.STATES and not cache.has_states:
            raise UsageError(
                f"--cache {cache.path}: objective {name} reads the teacher's states in stage {self.stage}, and this cache "
                "holds targets only; use objective byte-kl, kl, uld or sft, or make a cache with `genrecal cache --store "
                f"{self.tier.name.lower()}`"
            )
        if self.needs_draws and not cache.draws:
            raise UsageError(
                f"--cache {cache.path}: loss.target sample needs sampled targets, and this cache has none; "
                "make one with `genrecal cache --targets sample:50`, or set loss.target to topk or exact"
            )

    # ---------------------------------------------------------------------------------------------- what it trains

    def modules(self, student_config: Any, teacher_size: int) -> dict[str, nn.Module]:
        """New modules that this stage trains beside the student, by name; dropped at export.

        They begin with what the stage before taught the module of the same name. `teacher_size` is D_t.
        """
        return {}

    def prepare(self, student: VLM, cache: Mixture, samples: np.ndarray, modules: Mapping[str, Any]) -> None:
        """Take hold of what the stage computes with. `samples`: int64, the cache's samples that the stage sees."""
        self.student = student
        self.head = cache.head(str(student.device)) if self.needs_head else None
        for name, module in modules.items():
            setattr(self, name, module)

    # ------------------------------------------------------------------------------------------------------ loading

    def check(self, encoded: Encoded, record: Record) -> None:
        """Raises SampleError for a sample that this objective cannot take; it is left out and named."""

    def batch(self, student: Batch, samples: Sequence[Encoded], records: Sequence[Record]) -> B:
        """One micro-batch on the CPU.

        Args:
            student: the student's part. samples: the conversations in the student's tokens.
            records: what the cache holds of them; none where `tier` is NONE.
        """
        return student  # type: ignore[return-value]

    # ---------------------------------------------------------------------------------------------------- computing

    def terms(self, states: torch.Tensor, batch: B) -> list[Term]:
        """The terms of one micro-batch, on the device, under autocast.

        Args:
            states: the student's states `[B, L, D_s]`; in stage 1 without a gradient.
        """
        raise NotImplementedError

    def own_cross_entropy(self, states: torch.Tensor, batch: Batch, weight: float = 1.0) -> Term:
        """The student's cross-entropy on its own answer tokens, as the term "sft"."""
        ce = chunked_cross_entropy(
            states.flatten(0, 1)[batch.student_rows],
            self.student.head,
            self.student.transform,
            batch.student_ids,
            chunk_rows=self.loss.chunk_rows,
        )
        return Term(first=batch.student_first, loss=weight * ce, log={"sft": ce})


# ------------------------------------------------------------------------------------------- the teacher's rows, for batches


@dataclass(kw_only=True)
class TeacherBatch(Batch):
    """A batch with the teacher's N predicting rows, sample by sample, turn by turn.

    target_ids: int64 `[N]`; first: bool `[N]`, the first token of a turn's answer; target: the teacher's distributions.
    """

    target_ids: torch.Tensor
    first: torch.Tensor
    target: Target


def teacher_part(records: Sequence[Record], kind: str) -> dict[str, Any]:
    """The fields that `TeacherBatch` adds. `kind` is `loss.target`."""
    return {
        "target_ids": over_rows(records, "target_id").long(),
        "first": torch.from_numpy(first_of([n for record in records for n in turn_lengths(record)])),
        "target": target_of(records, kind),
    }


def target_of(records: Sequence[Record], kind: str) -> Target:
    """The teacher's distribution at every row that predicts."""
    if kind == "exact":
        return Exact(hidden=states_of([record.answer.coded[record.answer.predicts] for record in records]))
    if kind == "sample":
        drawn = []
        for record in records:
            if record.answer.sampled is None:
                raise DamageError(
                    f"{record.sample.key}: no column sample_ids, in a cache that says it has sampled targets; "
                    "`genrecal verify` says which shards are damaged"
                )
            drawn.append((record.answer.sampled, record.answer.predicts))
        ids, counts, entropy = (
            torch.from_numpy(np.concatenate([getattr(sampled, name)[rows] for sampled, rows in drawn]).astype(dtype))
            for name, dtype in (("ids", np.int64), ("counts", np.float32), ("entropy", np.float32))
        )
        return Sampled.of_counts(ids, counts, entropy)
    log_probs = over_rows(records, "topk_logits") - over_rows(records, "logsumexp")[:, None]
    return TopK(ids=over_rows(records, "topk_ids").long(), log_probs=log_probs)


def states_of(coded: Sequence[Coded]) -> Any:
    """The rows of all, one after another: a tensor `[R, D_t]` once `Batch.decoded` has decoded them."""
    return CodedStates.joined(coded)


def over_rows(records: Sequence[Record], name: str) -> torch.Tensor:
    """A column of the answer rows, at the rows that predict, of all records: `[N, ...]`."""
    return torch.from_numpy(np.concatenate([getattr(r.answer, name)[r.answer.predicts] for r in records]))


def turn_lengths(record: Record) -> list[int]:
    """n_t of each turn: its answer rows less the one that belongs to the question."""
    return [int(n) - 1 for n in np.bincount(record.answer.turn)]


def first_of(lengths: Sequence[int]) -> np.ndarray:
    """bool `[sum(lengths)]`: the first of each so many."""
    return np.concatenate([np.arange(length) == 0 for length in lengths])
