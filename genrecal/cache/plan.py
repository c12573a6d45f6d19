"""The forecast: what a cache will hold and cost, from a probe of the data and the teacher's config.

The teacher's own processor renders some of the records (or, for a known teacher without a folder, rules count their tokens).
Arrow members are sized by coding made states and logits of the teacher's widths with the real codecs.

How long the answers of `--generate` will be is not known. The forecast assumes the length of the given ones, and prints
beside it what answers of the largest length would cost.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genrecal.cache.answers import with_answers
from genrecal.cache.draws import count_draws, draw, uniforms
from genrecal.cache.options import CacheOptions
from genrecal.errors import DataError, SampleError, UsageError
from genrecal.progress import counted as number_of
from genrecal.progress import human_bytes
from genrecal.samples import BadRecord, Sample, SampleSet
from genrecal.samples.survey import Reasons
from genrecal.shards.codecs import CODECS, round_to_bf16
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, SampledTargets, to_arrow
from genrecal.shards.storage import LocalStore, open_store
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.shape import ModelShape, patches_of

WITH_STATES = CacheOptions()
UTILISATION = 0.4  # share of a card's peak that the teacher's forward pass is assumed to reach
BLOCK, TAR_END = 512, 1024 + (10_240 - 512) // 2  # of a tar: what members are padded to, and its end on average
CODED_ROWS = (1, 4, 16, 64, 128)  # numbers of rows that are coded; between them, a line
MANIFEST_SHARD_BYTES, MANIFEST_ROW_BYTES = 8600, 90  # measured on caches of 16 to 256 records per shard
INDEX_BYTES, INDEX_ROW_BYTES, INDEX_SHARD_BYTES = 3900, 13, 40
BYTES_PER_TOKEN, TOKENS_PER_TURN, SYSTEM_TOKENS = 4.0, 10, 14  # by rule: English text, and what a template adds


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet: dense bfloat16 TFLOP/s, memory in GB, and its bandwidth in GB/s."""

    tflops: float
    gigabytes: float
    bandwidth: float


CARDS = {
    "a100": Card(312, 80, 2039),
    "a100-40gb": Card(312, 40, 1555),
    "b200": Card(2250, 180, 7700),
    "h100": Card(989, 80, 3350),
    "h200": Card(989, 141, 4800),
    "l4": Card(121, 24, 300),
    "l40s": Card(362, 48, 864),
    "mi300x": Card(1307, 192, 5300),
    "rtx4090": Card(165, 24, 1008),
}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a forecast assumes.

    Args:
        probe: records that are looked at, drawn from the whole input.
        num_samples: records to forecast for; 0 for as many as the data have.
        gpu: name in CARDS.
        gpus: cards that work side by side; 0 for as many as hold the teacher's weights.
        price: of one card for one hour, in any currency.
        train_rate: samples per second that the trainer takes.
    """

    probe: int = 512
    num_samples: int = 0
    gpu: str = "h100"
    gpus: int = 0
    price: float = 0.0
    train_rate: float = 64.0

    def __post_init__(self) -> None:
        for name, least in (("probe", 1), ("num_samples", 0), ("gpus", 0), ("price", 0)):
            if not getattr(self, name) >= least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more")
        if not self.train_rate > 0:
            raise UsageError(f"--train-rate {self.train_rate}: expected more than 0")
        if self.gpu not in CARDS:
            raise UsageError(f"--gpu {self.gpu}: expected one of {', '.join(CARDS)}")


@dataclass(frozen=True, kw_only=True)
class ProbedRecord:
    """What the forecast needs to know of one record; of a skipped one only the reason."""

    reason: str | None = None
    question_tokens: int = 0
    answer_tokens: int = 0
    turns: int = 0
    prompts: tuple[int, ...] = ()  # tokens before each answer
    patches: tuple[int, ...] = ()  # of each image or tile
    image_bytes: tuple[int, ...] = ()
    json_bytes: int = 0
    keeps_question: bool = False


@dataclass(frozen=True, kw_only=True)
class WrittenAnswers:
    """What it costs that the teacher writes the answers, before they are cached.

    Args:
        turns: answers to write. at_once: conversations that are written together, by `--batch-tokens`.
        tokens, flops, gpu_hours: if the answers are as long as the given ones.
        most_tokens, most_gpu_hours: if none ends before `--max-answer-tokens`.
    """

    turns: int
    at_once: int
    tokens: int
    most_tokens: int
    flops: float
    gpu_hours: float
    most_gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast.

    Args:
        skipped, question_tokens, answer_tokens: of `num_samples` records like the `probed` ones.
        bytes: by part, `total_bytes` in all; `error_bytes` is one standard error of drawing another probe.
        bytes_by_store: what `--store` adds to conversations and images, states in their default codecs.
        bytes_by_codec: the same samples' states in each codec.
        flops, gpu_hours: of caching; `answers` has those of writing answers, None if they are given.
        least_gpus: cards that hold the teacher's weights. hours, cost: of both steps on `gpus` cards.
        read_bytes: per sample and stage; `read_rate` in MB/s at `train_rate` samples per second.
        free_bytes, fits: room where --out would be; None if that cannot be asked.
        by_rule: whether tokens are counted by rule.
    """

    teacher: str
    probed: int
    num_samples: int
    skipped: int
    reasons: dict[str, int]
    num_shards: int
    question_tokens: int
    answer_tokens: int
    bytes: dict[str, int]
    total_bytes: int
    error_bytes: int
    bytes_by_store: dict[str, int]
    bytes_by_codec: dict[str, dict[str, int]]
    flops: float
    gpu_hours: float
    answers: WrittenAnswers | None
    gpu: str
    least_gpus: int
    gpus: int
    hours: float
    cost: float
    read_bytes: dict[str, int]
    train_rate: float
    read_rate: dict[str, float]
    free_bytes: int | None
    fits: bool | None
    by_rule: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    shape: ModelShape,
    renderer: Renderer | None,
    samples: SampleSet,
    options: CacheOptions,
    assumed: PlanOptions,
    *,
    out: str | None = None,
    teacher_file_bytes: int = 0,
) -> Plan:
    """Forecast a cache of `samples`.

    Args:
        renderer: with the teacher's processor; None counts tokens by the shape's rule.
        out: where the cache would be, to ask for room there.
        teacher_file_bytes: of the config and processor files.

    Raises DataError if no record of the probe can be used.
    """
    count = min(assumed.probe, len(samples))
    # Drawn, not every n-th: data that alternate between sources would show only some of them.
    places = np.sort(np.random.default_rng(0).choice(len(samples), count, replace=False))
    probed = [probe_record(samples[int(place)], shape, renderer, options) for place in places]
    reasons = Reasons.of(record.reason for record in probed if record.reason is not None)
    used = [record for record in probed if record.reason is None]
    if not used:
        raise DataError(f"none of {len(probed)} probed records can be used: {next(reasons.lines())}")
    total = assumed.num_samples or len(samples)
    scale, num_shards = total / len(probed), options.num_shards(total)

    def forecast(value: Callable[[ProbedRecord], float]) -> float:
        """A sum over all records, from the probe's."""
        return scale * sum(map(value, used))

    size = Sizes(shape, options)
    has_questions = options.question_codec != "none"
    by_store = {"targets": forecast(lambda r: size.answer(r, "none"))}
    by_store["states"] = forecast(lambda r: size.answer(r, WITH_STATES.answer_codec))
    by_store["questions"] = by_store["states"] + forecast(
        lambda r: size.question(r, WITH_STATES.question_codec, kept=True)
    )
    parts = {
        "samples": round(forecast(lambda r: _in_tar(size.sample_members(r))) + num_shards * TAR_END),
        "questions": round(forecast(lambda r: _in_tar([size.question(r)])) + num_shards * TAR_END * has_questions),
        "manifest": MANIFEST_SHARD_BYTES * num_shards + MANIFEST_ROW_BYTES * total,
        "index": INDEX_BYTES + INDEX_ROW_BYTES * total + INDEX_SHARD_BYTES * num_shards,
        "head": shape.head_rows * shape.hidden_size * shape.value_bytes * options.stores_states,
        "teacher files": teacher_file_bytes,
    }
    total_bytes = sum(parts.values())
    each = [_in_tar([*size.sample_members(r), size.question(r)]) for r in used] + [0] * (len(probed) - len(used))
    spread = np.std(each) * total * np.sqrt((1 - len(each) / max(total, len(each))) / len(each))
    card = CARDS[assumed.gpu]
    flops = forecast(lambda r: shape.flops(r.question_tokens + r.answer_tokens, r.answer_tokens + r.turns, r.patches))
    gpu_hours = flops / (card.tflops * 1e12 * UTILISATION) / 3600
    answers = _written(used, shape, options, card, scale) if options.answers.written_by_teacher else None
    all_hours = gpu_hours + (answers.gpu_hours if answers else 0.0)
    least_gpus = int(-(-shape.parameters * shape.value_bytes // (card.gigabytes * 1e9)))
    gpus = assumed.gpus or least_gpus
    read = {
        "stage 1": sum(sum(size.sample_members(r)) + size.question(r) for r in used) // len(used),
        "stage 2": sum(sum(size.sample_members(r)) for r in used) // len(used),
    }
    free, fits = _room(out, total_bytes)
    return Plan(
        teacher=shape.name,
        probed=len(probed),
        num_samples=total,
        skipped=round(scale * reasons.counts.total()),
        reasons=dict(reasons.counts.most_common()),
        num_shards=num_shards,
        question_tokens=round(forecast(lambda r: r.question_tokens)),
        answer_tokens=round(forecast(lambda r: r.answer_tokens)),
        bytes=parts,
        total_bytes=total_bytes,
        error_bytes=round(float(spread)),
        bytes_by_store={store: round(size) for store, size in by_store.items()},
        bytes_by_codec={
            codec: {
                "answer": round(forecast(lambda r, codec=codec: size.answer(r, codec))),  # type: ignore[misc]
                "question": round(forecast(lambda r, codec=codec: size.question(r, codec))),  # type: ignore[misc]
            }
            for codec in CODECS
        },
        flops=flops,
        gpu_hours=gpu_hours,
        answers=answers,
        gpu=assumed.gpu,
        least_gpus=least_gpus,
        gpus=gpus,
        hours=all_hours / gpus,
        cost=all_hours * assumed.price,
        read_bytes=read,
        train_rate=assumed.train_rate,
        read_rate={stage: assumed.train_rate * size / 1e6 for stage, size in read.items()},
        free_bytes=free,
        fits=fits,
        by_rule=renderer is None,
    )


def plan_text(plan: Plan, serves: Mapping[str, Sequence[str]]) -> str:
    """A forecast as lines of text. `serves`: the objectives that each `--store` is enough for."""
    card, answers = CARDS[plan.gpu], plan.answers
    lines = [
        f"{plan.teacher}: {number_of(plan.num_samples, 'sample')} in {number_of(plan.num_shards, 'shard')}, "
        f"from {plan.probed} probed"
        + (" (tokens counted by rule; give a folder with the teacher's processor for exact ones)" * plan.by_rule),
        f"skipped   {plan.skipped}"
        + "".join(f"; {count} of the probe: {reason}" for reason, count in list(plan.reasons.items())[:3]),
        f"tokens    {plan.question_tokens} of questions (image tokens included), {plan.answer_tokens} of answers",
        f"bytes     {human_bytes(plan.total_bytes)} ± {human_bytes(plan.error_bytes)}: "
        + ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.bytes.items()),
        *(
            f"  --store {store:<9}  {human_bytes(size)} besides images{'; also' * (store != 'targets')} for "
            + ", ".join(serves[store])
            for store, size in plan.bytes_by_store.items()
        ),
        *(
            f"  {codec:<6}  answer states {human_bytes(size['answer'])}, question states {human_bytes(size['question'])}"
            for codec, size in plan.bytes_by_codec.items()
        ),
        f"teacher   {plan.flops:.3g} FLOPs, {plan.gpu_hours:.3g} GPU-hours on {plan.gpu} at {UTILISATION:.0%} of "
        f"{card.tflops:g} TFLOP/s; its weights need {number_of(plan.least_gpus, 'card')} of {card.gigabytes:g} GB",
    ]
    if answers is not None:
        lines.append(
            f"answers   {answers.turns} written, {answers.at_once} at once, before that: {answers.flops:.3g} FLOPs, "
            f"{answers.gpu_hours:.3g} GPU-hours if they are as long as the given ones ({answers.tokens} tokens), "
            f"{answers.most_gpu_hours:.3g} if none ends early ({answers.most_tokens} tokens); bytes are by the given ones"
        )
    few = f": NOT enough for the weights, which need {plan.least_gpus}" if plan.gpus < plan.least_gpus else ""
    lines.append(
        f"time      {plan.hours:.3g} hours on {plan.gpus} {plan.gpu}{few}"
        + (f"; costs {plan.cost:,.2f}" if plan.cost else "")
    )
    lines.append(
        "trainer   "
        + ", ".join(
            f"{stage} reads {human_bytes(plan.read_bytes[stage])} per sample, {rate:.3g} MB/s"
            for stage, rate in plan.read_rate.items()
        )
        + f" at {plan.train_rate:g} samples/s"
    )
    if plan.free_bytes is not None:
        room = "enough" if plan.fits else "NOT enough"
        lines.append(f"disk      {human_bytes(plan.free_bytes)} free, {room}")
    return "\n".join(lines)


def _written(
    used: Sequence[ProbedRecord], shape: ModelShape, options: CacheOptions, card: Card, scale: float
) -> WrittenAnswers:
    """Each turn's prompt runs again, images too, as in `genrecal.cache.answers`.

    A step of generation takes as long as its FLOPs, or as reading the weights once.
    """
    prompts = [tokens for record in used for tokens in record.prompts]
    limit, turns = options.answers.max_tokens, len(prompts)
    at_once = max(1, int(options.batch_tokens // (sum(prompts) / turns + limit)))
    prefill = sum(shape.flops(tokens, 1, record.patches) for record in used for tokens in record.prompts)
    rate = card.tflops * 1e12 * UTILISATION
    weights = (shape.text_parameters + shape.head_rows * shape.hidden_size) * shape.value_bytes
    step_seconds = weights / (card.bandwidth * 1e9)

    def decoding(tokens: float) -> tuple[float, float]:
        """FLOPs and GPU-hours of writing so many tokens, spread evenly over the turns; prompts included."""
        each = tokens / turns
        more = sum(shape.text_flops(prompt + each) - shape.text_flops(prompt) for prompt in prompts)
        more += shape.head_flops(tokens)
        seconds = prefill / rate + max(more / rate, tokens / min(at_once, turns * scale) * step_seconds)
        return scale * (prefill + more), scale * seconds / 3600

    tokens = sum(record.answer_tokens for record in used)
    flops, hours = decoding(tokens)
    return WrittenAnswers(
        turns=round(scale * turns),
        at_once=at_once,
        tokens=round(scale * tokens),
        most_tokens=round(scale * limit * turns),
        flops=flops,
        gpu_hours=hours,
        most_gpu_hours=decoding(limit * turns)[1],
    )


# ------------------------------------------------------------------------------------------------------------- the probe


def probe_record(
    sample: Sample | BadRecord, shape: ModelShape, renderer: Renderer | None, options: CacheOptions
) -> ProbedRecord:
    """Render one record, or count it by rule; one that the job would skip gives its reason."""
    if isinstance(sample, BadRecord):
        return ProbedRecord(reason=sample.reason)
    try:
        images = [image.read() for image in sample.images]
        sample = sample if renderer is None else renderer.settle(sample)
        if renderer is None:
            counts = _counted_by_rule(sample, images, shape, options.max_tokens)
        else:
            counts = counted(renderer, sample, options.max_tokens)
    except SampleError as error:
        return ProbedRecord(reason=str(error))
    written = with_answers(sample, sample.answers) if options.answers.written_by_teacher else sample
    return ProbedRecord(
        **counts,
        turns=len(sample.answers),
        image_bytes=tuple(map(len, images)),
        json_bytes=len(json.dumps(written.to_json(), sort_keys=True, ensure_ascii=False).encode()),
        keeps_question=options.keeps_question(sample.key),
    )


def counted(renderer: Renderer, sample: Sample, max_tokens: int = 0) -> dict[str, Any]:
    """Tokens and patches of a sample, by rendering it."""
    encoded = renderer.encode(sample, max_tokens=max_tokens or None)
    return {
        "question_tokens": sum(encoded.question_lengths),
        "answer_tokens": sum(encoded.answer_lengths),
        "prompts": tuple(start for start, _, is_answer in encoded.segments() if is_answer),
        "patches": patches_of(encoded.inputs, renderer.processor),
    }


def _counted_by_rule(sample: Sample, images: Sequence[bytes], shape: ModelShape, max_tokens: int) -> dict[str, Any]:
    assert shape.image_rule is not None
    patches: list[int] = []
    question = SYSTEM_TOKENS
    for data in images:
        try:
            with Image.open(io.BytesIO(data)) as image:
                tokens, more = shape.image_rule(*image.size)
        except Exception as error:  # Pillow raises many kinds
            raise SampleError(f"image cannot be decoded: {type(error).__name__}") from None
        question += tokens
        patches += more
    answer = 0
    prompts = []
    for message in sample.messages:
        tokens = round(len(message.text.encode()) / BYTES_PER_TOKEN)
        if message.is_target:
            prompts.append(question + answer)
            answer, question = answer + tokens + 1, question + TOKENS_PER_TURN // 2
        else:
            question += tokens + TOKENS_PER_TURN // 2
    if max_tokens and question + answer > max_tokens:
        raise SampleError(f"{question + answer} tokens, over the limit of {max_tokens}")
    return {"question_tokens": question, "answer_tokens": answer, "prompts": tuple(prompts), "patches": tuple(patches)}


# ----------------------------------------------------------------------------------------------------------------- bytes


class Sizes:
    """Bytes of a record's members for one teacher and one set of options."""

    def __init__(self, shape: ModelShape, options: CacheOptions):
        self.options = options
        self._made = {
            kind: [rows(count, shape, options) for count in CODED_ROWS]
            for kind, rows in (("answer", made_answer), ("question", made_question))
        }
        self._coded = cache(lambda kind, codec: [len(to_arrow(rows, CODECS.get(codec))) for rows in self._made[kind]])

    def sample_members(self, record: ProbedRecord) -> list[int]:
        """Conversation, images and answer states."""
        return [record.json_bytes, *record.image_bytes, self.answer(record)]

    def answer(self, record: ProbedRecord, codec: str = "") -> int:
        """The answer states, in the option's codec or another."""
        return self._size("answer", codec or self.options.answer_codec, record.answer_tokens + record.turns)

    def question(self, record: ProbedRecord, codec: str = "", *, kept: bool = False) -> int:
        """The question states, in the option's codec or another; 0 if the record's are not kept, unless `kept`."""
        codec = codec or self.options.question_codec
        return self._size("question", codec, record.question_tokens) if kept or record.keeps_question else 0

    def _size(self, kind: str, codec: str, count: int) -> int:
        sizes = self._coded(kind, codec)
        beyond = max(0, count - CODED_ROWS[-1]) * (sizes[-1] - sizes[-2]) / (CODED_ROWS[-1] - CODED_ROWS[-2])
        return round(float(np.interp(count, CODED_ROWS, sizes)) + beyond)


def _in_tar(members: Sequence[int]) -> int:
    """Bytes of members with their headers; those of no size do not exist."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in members if size)


def made_states(rows: int, width: int) -> np.ndarray:
    """Float32 `[R, D]` that codes as real states do: Gaussian, some channels many times larger than others."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((rows, width), np.float32) * np.exp(rng.normal(0, 0.5, width)).astype(np.float32)
    return round_to_bf16(states)


def made_question(rows: int, shape: ModelShape, options: CacheOptions) -> QuestionRows:
    """Question rows of a teacher of that shape."""
    return QuestionRows(
        turn=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        token_id=np.random.default_rng(0).integers(0, shape.head_rows, rows).astype(np.int32),
        states=made_states(rows, shape.hidden_size),
    )


def made_answer(rows: int, shape: ModelShape, options: CacheOptions) -> AnswerRows:
    """Answer rows of a teacher of that shape. The same tokens are probable in many rows, as in text."""
    import torch

    generator = torch.Generator().manual_seed(1)
    common = 4 * torch.randn(shape.head_rows, generator=generator)
    logits = common + 4 * torch.randn(rows, shape.head_rows, generator=generator)
    top, ids = logits.topk(min(options.top_k, shape.head_rows))
    sampled = None
    if options.draws:
        drawn, entropy = draw(logits, torch.from_numpy(uniforms("plan", rows, options.draws)))
        distinct, counts = count_draws(drawn.numpy())
        sampled = SampledTargets(ids=distinct, counts=counts, entropy=entropy.float().numpy())
    place = np.arange(rows, dtype=np.int32)
    target = ids[:, 0].int().numpy().copy()
    target[-1] = NO_TARGET
    return AnswerRows(
        turn=np.zeros(rows, np.int32),
        position=place,
        token_id=np.roll(ids[:, 0].int().numpy(), 1),
        states=made_states(rows, shape.hidden_size),
        target_id=target,
        target_start=4 * place,
        target_end=4 * place + 4,
        target_logit=top[:, 0].numpy().copy(),
        topk_ids=ids.int().numpy(),
        topk_logits=top.numpy(),
        logsumexp=logits.logsumexp(-1).numpy(),
        sampled=sampled,
    )


def _room(out: str | None, needed: int) -> tuple[int | None, bool | None]:
    """Free bytes where the cache would be, and whether they are enough for what is not written yet."""
    store = open_store(out) if out is not None else None
    if not isinstance(store, LocalStore):
        return None, None
    place = Path(os.path.abspath(store.root))
    there = sum(sum(store.sizes(folder).values()) for folder in ("samples", "questions", "manifest"))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return free, needed - there <= free
