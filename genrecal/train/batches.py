"""Records and student renderings -> what one micro-step computes on."""

import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from genrecal.errors import DamageError, GenrecalError, SampleError
from genrecal.samples import ImageRef, Message, Sample
from genrecal.shards.memory import BatchMemory
from genrecal.shards.mixture import Mixture
from genrecal.shards.order import MixedOrder, micro_batches
from genrecal.shards.reader import Cache
from genrecal.shards.record import AnswerRows, Record
from genrecal.train.advice import loader_died
from genrecal.train.align import align
from genrecal.train.handover import Packed, allow_open_files, pack, unpack
from genrecal.train.splice import splice_index
from genrecal.vlm.rendering import Encoded, Renderer


@dataclass(kw_only=True)
class Splice:
    """One splice of a batch on the device; see `genrecal.train.splice`.

    Args:
        rows: int64 `[B, L]`; predicts: int64 `[N]`, flat in B * L.
    """

    rows: torch.Tensor
    predicts: torch.Tensor

    def to(self, device: torch.device) -> "Splice":
        return Splice(rows=self.rows.to(device), predicts=self.predicts.to(device))


@dataclass(kw_only=True)
class MicroBatch:
    """One micro-step's input. B samples; N teacher rows that predict; M student tokens that are predicted.

    Args:
        keys: the samples.
        student_inputs: collated tensors of the student's own rendering, text padded on the right to `[B, L_s]`.
        sft_rows: int64 `[M]`, flat in B * L_s: the student's positions that predict an answer token.
        sft_ids: int64 `[M]`, the token each predicts; sft_first: bool `[M]`, the first of a turn's answer.
        answer_states: `[R, D_t]`, z_a of every turn: the answer's own states; float32 or the dtype of computing.
        splice: student's questions with the teacher's answers; None where only the student's own loss is wanted.
        target_ids: int64 `[N]`; first: bool `[N]`, the first token of a turn's answer.
        topk_ids, topk_log_probs: `[N, k]`; exact_states: float32 `[N, D_t]`, the teacher's state at each row.
        sample_ids: int64 `[N, K]`; sample_counts: float32 `[N, K]`; entropy: float32 `[N]`, nats.
        teacher_rows: int64 `[M]`, the teacher's row that each of the student's is compared with, -1 for none; None where they
            stand one to one.
        teacher_states: float32 `[N, D_t]`, the teacher's state at each row; token_ids: int64 `[N]`, its token there.
        sft_turns, turns: int64 `[M]` and `[N]`, a number for each turn of each sample.
        question_states: as answer_states, `[Q, D_t]`, z_q of the samples that have it; None without the regularisation pass.
        reg_splice: the teacher's questions with its own answers; reg_rows: int64, which of the N rows it predicts.
        aligned_rows: int64 `[A]`, which of the N rows a position of the student's lines up with (`genrecal.train.align`);
            aligned_at: int64 `[A]`, those positions, flat in B * L_s; aligned_first: bool `[A]`, the first of a turn's answer.
            None where the aligned path is not wanted.
    """

    keys: list[str]
    student_inputs: dict[str, torch.Tensor]
    sft_rows: torch.Tensor
    sft_ids: torch.Tensor
    sft_first: torch.Tensor
    answer_states: torch.Tensor | None = None
    splice: Splice | None = None
    target_ids: torch.Tensor | None = None
    first: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_log_probs: torch.Tensor | None = None
    exact_states: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    sample_counts: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    teacher_rows: torch.Tensor | None = None
    teacher_states: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    sft_turns: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    reg_splice: Splice | None = None
    reg_rows: torch.Tensor | None = None
    aligned_rows: torch.Tensor | None = None
    aligned_at: torch.Tensor | None = None
    aligned_first: torch.Tensor | None = None

    def to(self, device: torch.device, student_dtype: torch.dtype) -> "MicroBatch":
        """Move to a device; floating student inputs (pictures) take the student's dtype."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=True)
            elif isinstance(value, Splice):
                value = value.to(device)
            moved[item.name] = value
        moved["student_inputs"] = {
            name: value.to(device, student_dtype if value.is_floating_point() else None)
            for name, value in self.student_inputs.items()
        }
        return MicroBatch(**moved)


# ----------------------------------------------------------------------------------------------------- sources of records


Fetched = tuple[Sample, Record | None] | DamageError


class RecordSource(Protocol):
    """Where a stage's teacher states come from: the shards, or a live teacher."""

    def fetch(self, indices: Sequence[int], *, teacher: bool, questions: bool) -> list[Fetched]:
        """Samples of the cache and, where `teacher` states are wanted, their records, with questions or without.

        In the place of one whose bytes are damaged stands the error that says so.
        """


class ShardSource:
    """Reads what is asked for from the shards, and nothing else. Records last until the next are fetched."""

    def __init__(self, cache: Cache | Mixture):
        self.cache, self._memory = cache, BatchMemory()

    def fetch(self, indices: Sequence[int], *, teacher: bool, questions: bool) -> list[Fetched]:
        if teacher:
            self._memory.clear()
            records = self.cache.records(indices, question=questions, memory=self._memory)
            return [found if isinstance(found, DamageError) else (found.sample, found) for found in records]
        return [self._without_record(index) for index in indices]

    def _without_record(self, index: int) -> Fetched:
        try:
            return self.cache[index].sample, None
        except DamageError as error:
            return error


class LiveSource:
    """Takes the samples from the cache and makes their states anew with a teacher that stands beside the student."""

    def __init__(self, cache: Cache | Mixture, live: Any):
        self.cache, self.live = cache, live

    def fetch(self, indices: Sequence[int], *, teacher: bool, questions: bool) -> list[Fetched]:
        entries = [self.cache[index] for index in indices]
        samples = [entry.sample for entry in entries]
        if not teacher:
            return [(sample, None) for sample in samples]
        wanted = [questions and entry.has_question for entry in entries]
        return list(zip(samples, self.live.records(samples, questions=wanted), strict=True))


# --------------------------------------------------------------------------------------------------------------- building


SAME, PLACES, TURNS = "same", "places", "turns"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a stage reads: teacher states at all, the question tier, and what `exact` or `sampled` targets need.

    splice: the teacher's answer states beside the student's questions. aligned: which rows and positions line up.
    last_answer: whether the student runs over the last answer too. Stage 1 reads its states of the questions alone, and
    these see nothing of an answer after them.
    beside: which of the student's own rows the teacher's are compared with: SAME, token for token the same; PLACES, those
    at the same place of a turn; TURNS, all of the turn.
    """

    teacher: bool
    questions: bool
    last_answer: bool = True
    exact: bool = False
    sampled: bool = False
    splice: bool = True
    aligned: bool = False
    beside: str = ""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of a micro-batch's samples: `batch` is None if the student could take none of them.

    skipped: "key: reason" of samples that it could not; damaged: where and how the bytes of others are damaged; error:
    what stopped the loading, in place of a batch (a worker process hands it over as a value: torch would wrap a raised
    one in its own traceback).
    """

    batch: MicroBatch | None = None
    skipped: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    error: GenrecalError | None = None


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A made conversation that keeps a rank busy where it has no sample, or none with a picture. No row of it is read.

    Ranks that work together run the same modules in every micro-step, or they wait for each other for ever. Behind the
    stand-in all gradients are zeros, so it changes no number.

    Args:
        encoded: the conversation, in the student's rendering.
        with_text: whether it also stands beside samples that have no pictures; it has one then.
        teacher_size: D_t, for teacher states of zero rows.
    """

    encoded: Encoded
    with_text: bool
    teacher_size: int

    @classmethod
    def make(cls, renderer: Renderer, teacher_size: int, *, picture: bool) -> "StandIn":
        parts = (ImageRef(0), "?") if picture else ("?",)
        messages = [Message(role="user", parts=parts), Message(role="assistant", parts=("!",))]
        encoded = renderer.encode_messages(messages, [Image.new("RGB", (56, 56))] if picture else [])
        return cls(encoded=encoded, with_text=picture, teacher_size=teacher_size)


class BatchBuilder(Dataset[Loaded]):
    """Indices of samples -> MicroBatch; a Dataset so that torch's DataLoader can do it in worker processes.

    Args:
        stand_in: put beside samples without pictures, and in the place of none at all.
        states_dtype: of the states that Rec-proj-pre reads. Handed over in the dtype that it computes in, they take half
            the memory and are the very numbers that it would round them to.
    """

    def __init__(
        self,
        source: RecordSource,
        renderer: Renderer,
        wanted: Wanted,
        *,
        max_tokens: int = 0,
        on_damage: str = "fail",
        stand_in: StandIn | None = None,
        states_dtype: torch.dtype = torch.float32,
    ):
        self.source, self.renderer, self.wanted, self.stand_in = source, renderer, wanted, stand_in
        self.max_tokens, self.on_damage, self.states_dtype = max_tokens, on_damage, states_dtype

    def __getitem__(self, indices: Sequence[int]) -> Loaded:  # type: ignore[override]
        """One micro-batch. A sample that the student cannot take is left out, with its reason; so is a damaged one, or it
        stops the loading (`data.on_damage`)."""
        try:
            return self._load([int(i) for i in indices])
        except GenrecalError as error:
            return Loaded(error=error)

    def _load(self, indices: list[int]) -> Loaded:
        fetched = self.source.fetch(indices, teacher=self.wanted.teacher, questions=self.wanted.questions)
        encoded, records, skipped, damaged = [], [], [], []
        for item in fetched:
            if isinstance(item, DamageError):
                if self.on_damage == "fail":
                    raise item
                damaged.append(str(item))
                continue
            sample, record = item
            try:
                rendered = self.renderer.encode(sample, max_tokens=self.max_tokens or None)
                if self.wanted.beside == SAME and record is not None:
                    _check_same_tokens(rendered, record)
                encoded.append(rendered if self.wanted.last_answer else self.renderer.without_last_answer(rendered))
                records.append(record)
            except SampleError as error:
                skipped.append(f"{sample.key}: {error}")
        lost = Loaded(skipped=tuple(skipped), damaged=tuple(damaged))
        extra = self.stand_in
        if not encoded:
            return replace(lost, batch=_empty_batch(extra, self.renderer, self.wanted) if extra else None)
        beside = [extra.encoded] if extra and extra.with_text and not any(e.num_images for e in encoded) else []
        batch = _student_part(encoded, self.renderer, beside=beside)
        if self.wanted.teacher:
            _add_teacher_part(batch, encoded, [r for r in records if r is not None], self.wanted)
            for name in ("answer_states", "question_states"):
                if (states := getattr(batch, name)) is not None:
                    setattr(batch, name, states.to(self.states_dtype))
            if self.wanted.questions and batch.reg_splice is None and extra:
                _add_empty_regularisation(batch, extra)
        return replace(lost, batch=batch)


def _empty_batch(stand_in: StandIn, renderer: Renderer, wanted: Wanted) -> MicroBatch:
    """A micro-batch of no samples: the stand-in goes through every module, and no row of it is read."""
    inputs = renderer.collate([stand_in.encoded])
    none = torch.zeros(0, dtype=torch.int64)
    batch = MicroBatch(
        keys=[],
        student_inputs=inputs,
        sft_rows=none,
        sft_ids=none,
        sft_first=none.bool(),
    )
    if wanted.teacher:
        if wanted.splice:
            batch.answer_states = torch.zeros(0, stand_in.teacher_size)
            batch.splice = Splice(rows=torch.arange(inputs["input_ids"].shape[1])[None], predicts=none)
        if wanted.aligned:
            batch.aligned_rows, batch.aligned_first = none, none.bool()
            batch.aligned_at = none
        if wanted.beside == PLACES:
            batch.teacher_rows = none
        if wanted.beside == TURNS:
            batch.teacher_states = torch.zeros(0, stand_in.teacher_size)
            batch.token_ids = batch.sft_turns = batch.turns = none
        batch.target_ids, batch.first = none, none.bool()
        batch.topk_ids, batch.topk_log_probs = none[:, None], torch.zeros(0, 1)
        batch.exact_states = torch.zeros(0, stand_in.teacher_size) if wanted.exact else None
        if wanted.sampled:
            batch.sample_ids, batch.sample_counts, batch.entropy = none[:, None], torch.zeros(0, 1), torch.zeros(0)
        if wanted.questions:
            _add_empty_regularisation(batch, stand_in)
    return batch


def _add_empty_regularisation(batch: MicroBatch, stand_in: StandIn) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch.question_states = torch.zeros(1, stand_in.teacher_size)
    batch.reg_splice = Splice(rows=torch.zeros(1, 1, dtype=torch.int64), predicts=none)
    batch.reg_rows = none


def _student_part(encoded: Sequence[Encoded], renderer: Renderer, *, beside: Sequence[Encoded] = ()) -> MicroBatch:
    """`beside` goes through the student too, after the samples; no row of it is read."""
    inputs = renderer.collate([*encoded, *beside])
    length = inputs["input_ids"].shape[1]
    rows, first = [], []
    for number, item in enumerate(encoded):
        for start, end, is_answer in item.segments():
            if is_answer:
                rows.append(np.arange(start - 1, end - 1) + number * length)
                first.append(_first_of(end - start))
    flat = torch.from_numpy(np.concatenate(rows))
    return MicroBatch(
        keys=[item.key for item in encoded],
        student_inputs=inputs,
        sft_rows=flat,
        sft_ids=inputs["input_ids"].flatten()[flat + 1],
        sft_first=torch.from_numpy(np.concatenate(first)),
    )


def _add_teacher_part(batch: MicroBatch, encoded: Sequence[Encoded], records: Sequence[Record], wanted: Wanted) -> None:
    answers = [record.answer for record in records]
    lengths = [_turn_lengths(record) for record in records]
    if wanted.splice:
        _add_splice(batch, encoded, answers, lengths)
    if wanted.aligned:
        _add_alignment(batch, encoded, answers)
    predicts = [a.predicts for a in answers]

    def over_rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(a, name)[p] for a, p in zip(answers, predicts, strict=True)]))

    batch.target_ids = over_rows("target_id").long()
    batch.first = torch.from_numpy(np.concatenate([_first_of(n) for turns in lengths for n in turns]))
    batch.topk_ids = over_rows("topk_ids").long()
    batch.topk_log_probs = over_rows("topk_logits") - over_rows("logsumexp")[:, None]
    if wanted.exact:
        batch.exact_states = over_rows("hidden")
    if wanted.sampled:
        _add_sampled(batch, records)
    student_lengths = [n for item in encoded for n in item.answer_lengths]
    teacher_lengths = [n for turns in lengths for n in turns]
    if wanted.beside == PLACES:
        batch.teacher_rows = torch.from_numpy(rows_by_place(student_lengths, teacher_lengths))
    elif wanted.beside == TURNS:
        batch.teacher_states = batch.exact_states if wanted.exact else over_rows("hidden")
        batch.token_ids = over_rows("token_id").long()
        batch.sft_turns, batch.turns = (
            torch.from_numpy(np.repeat(np.arange(len(counts)), counts)) for counts in (student_lengths, teacher_lengths)
        )
    if any(record.question is not None for record in records):
        _add_regularisation(batch, records, lengths)


def rows_by_place(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> np.ndarray:
    """Of each of the student's rows `[M]`, the teacher's row at the same place of the turn; -1 past its last."""
    rows, start = [np.empty(0, np.int64)], 0
    for mine, its in zip(student_lengths, teacher_lengths, strict=True):
        place = np.arange(mine)
        rows.append(np.where(place < its, place + start, -1))
        start += its
    return np.concatenate(rows)


def _check_same_tokens(encoded: Encoded, record: Record) -> None:
    ids = np.concatenate([answer.ids for answer in encoded.answers])
    teacher_ids = record.answer.target_id[record.answer.predicts]
    if not np.array_equal(ids, teacher_ids):
        raise SampleError(
            f"its answers are {len(teacher_ids)} tokens of the teacher and {len(ids)} of the student that are not the same"
        )


def _add_splice(
    batch: MicroBatch, encoded: Sequence[Encoded], answers: Sequence[AnswerRows], lengths: Sequence[list[int]]
) -> None:
    """The student's questions with the teacher's answers."""
    length = batch.student_inputs["input_ids"].shape[1]
    own = []  # all but each turn's first row, as slices: masks would copy the states once more
    for answer in answers:
        turns = np.split(answer.hidden, np.flatnonzero(np.diff(answer.turn)) + 1)
        own += [turn[1:] for turn in turns]
    batch.answer_states = torch.from_numpy(np.concatenate(own))
    questions = [
        [np.arange(s, e) + number * length for s, e, is_answer in item.segments() if not is_answer]
        for number, item in enumerate(encoded)
    ]
    index = splice_index(questions, lengths, batch.student_inputs["input_ids"].numel())
    batch.splice = Splice(rows=torch.from_numpy(index.rows), predicts=torch.from_numpy(index.predicts))


def _add_alignment(batch: MicroBatch, encoded: Sequence[Encoded], answers: Sequence[AnswerRows]) -> None:
    """Where the student's own sequence, questions and answers, is read against the teacher's rows."""
    rows, places, first = [], [], []
    row_place, place = 0, 0
    for item, answer in zip(encoded, answers, strict=True):
        found = align(answer, item.answers)
        rows.append(found.teacher_rows + row_place)
        places.append(found.student_rows + place)
        first.append(found.first)
        row_place += int(answer.predicts.sum())
        place += sum(item.answer_lengths)
    batch.aligned_rows = torch.from_numpy(np.concatenate(rows))
    batch.aligned_at = batch.sft_rows[torch.from_numpy(np.concatenate(places))]
    batch.aligned_first = torch.from_numpy(np.concatenate(first))


def _add_sampled(batch: MicroBatch, records: Sequence[Record]) -> None:
    drawn = []
    for record in records:
        if record.answer.sampled is None:
            raise DamageError(
                f"{record.sample.key}: no column sample_ids, in a cache that says it has sampled targets; "
                "`genrecal verify` says which shards are damaged"
            )
        drawn.append((record.answer.sampled, record.answer.predicts))
    batch.sample_ids = torch.from_numpy(np.concatenate([sampled.ids[rows] for sampled, rows in drawn])).long()
    counts = np.concatenate([sampled.counts[rows] for sampled, rows in drawn])
    batch.sample_counts = torch.from_numpy(counts.astype(np.float32))  # torch computes little with uint16
    batch.entropy = torch.from_numpy(np.concatenate([sampled.entropy[rows] for sampled, rows in drawn]))


def _add_regularisation(batch: MicroBatch, records: Sequence[Record], lengths: Sequence[list[int]]) -> None:
    """Algorithm 2: the teacher's own question states in place of the student's, for the samples that have them."""
    states, questions, kept_lengths, rows = [], [], [], []
    answer_place, row_place, kept_answers = 0, 0, []
    at = 0
    for record, turns in zip(records, lengths, strict=True):
        count = sum(turns)
        if record.question is not None:
            turn = record.question.turn
            questions.append([np.flatnonzero(turn == t) + at for t in range(len(turns))])
            states.append(record.question.hidden)
            at += len(turn)
            kept_lengths.append(turns)
            kept_answers.append(np.arange(answer_place, answer_place + count))
            rows.append(np.arange(row_place, row_place + count))
        answer_place += count
        row_place += count
    index = splice_index(questions, kept_lengths, at)
    # The splice counts the answers of the kept samples only; point it at their places among all answer states.
    kept = np.concatenate(kept_answers)
    source = index.rows.copy()
    is_answer = source >= at
    source[is_answer] = kept[source[is_answer] - at] + at
    batch.question_states = torch.from_numpy(np.concatenate(states))
    batch.reg_splice = Splice(rows=torch.from_numpy(source), predicts=torch.from_numpy(index.predicts))
    batch.reg_rows = torch.from_numpy(np.concatenate(rows))


def _turn_lengths(record: Record) -> list[int]:
    """n_t of each turn: its answer rows less the one that belongs to the question."""
    return [int(n) - 1 for n in np.bincount(record.answer.turn)]


def _first_of(count: int) -> np.ndarray:
    first = np.zeros(count, bool)
    first[:1] = True
    return first


# ---------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class Step:
    """A rank's share of an optimizer step.

    Args:
        batches: its micro-batches; as many on every rank, unless one is None for want of samples.
        skipped, damaged: why samples of it were left out.
        error: what stopped the loading.
    """

    batches: list[MicroBatch | None]
    skipped: list[str]
    damaged: list[str]
    error: GenrecalError | None = None


def micro_batch_stream(
    builder: BatchBuilder,
    *,
    order: MixedOrder,
    lengths: np.ndarray,
    steps: range,
    global_batch: int,
    last_sample: int,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Step, None, None]:
    """This rank's micro-batches of each optimizer step of `steps`, read ahead in worker processes.

    A step begins with all of its micro-batches, since their rows divide each one's loss; so the whole next step is read
    while one is computed. Close it at the end: the interpreter would ask its processes to end by the signal that they
    ignore, and wait.

    Args:
        last_sample: where the stage ends in the endless stream of samples; the last step takes what is left.
    """

    def plan() -> Iterator[list[np.ndarray]]:
        for step in steps:
            batch = order.slice(step * global_batch, min((step + 1) * global_batch, last_sample))
            yield micro_batches(batch, lengths, batch_size=batch_size, rank=rank, world_size=world_size)

    micro_steps = -(-global_batch // (batch_size * world_size))
    try:
        allow_open_files(2 * micro_steps if workers else 0)
    except GenrecalError as error:
        yield Step(batches=[], skipped=[], damaged=[], error=error)
        return
    sampler: Any = (indices for share in plan() for indices in share)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's advice on the number of workers
        loader = iter(
            DataLoader(
                builder,
                sampler=sampler,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=max(2, -(-micro_steps // workers)) if workers else None,
                multiprocessing_context="fork" if workers else None,  # processors and readers are shared, not pickled
                collate_fn=_hand_over if workers else None,
                worker_init_fn=_ignore_stop_signals,
                generator=torch.Generator(),  # its own: a draw from the global one would change dropout after a resume
            )
        )
    for step in steps:
        samples = min((step + 1) * global_batch, last_sample) - step * global_batch
        try:
            handed = [next(loader) for _ in range(-(-samples // (batch_size * world_size)))]
        except (RuntimeError, EOFError, ConnectionError) as error:  # the connection, of one killed while it hands over
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            yield Step(batches=[], skipped=[], damaged=[], error=loader_died(error))
            return
        loaded: list[Loaded] = [unpack(item) if workers else item for item in handed]
        yield Step(
            batches=[item.batch for item in loaded],
            skipped=[text for item in loaded for text in item.skipped],
            damaged=[text for item in loaded for text in item.damaged],
            error=next((item.error for item in loaded if item.error is not None), None),
        )


def _hand_over(loaded: Any) -> Packed:
    try:
        return pack(loaded)
    except GenrecalError as error:
        return pack(Loaded(error=error))


def _ignore_stop_signals(_: int) -> None:
    """A scheduler signals every process of a job; what the training process makes of it still needs its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
