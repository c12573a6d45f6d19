"""The forecast: what a cache will hold and cost, from a probe of the data and the teacher's config, before it is made.

A sample of the records is rendered by the teacher's own processor (or, of a known teacher without a folder, counted by
rule). Arrow members are sized by coding made states and logits of the teacher's widths with the real codecs, so that
their fixed cost, padding and compression are in the figures.

How long the answers will be that the teacher writes itself (`--generate`) is not known: they are taken to be as long as the
given ones, and what the longest that are allowed would cost stands beside it.
"""

import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genrecal.cache.answers import with_answers
from genrecal.cache.draws import count_draws, draw, uniforms
from genrecal.cache.options import CacheOptions
from genrecal.errors import DataError, SampleError, UsageError
from genrecal.progress import human_bytes
from genrecal.samples import BadRecord, Sample, SampleSet
from genrecal.samples.survey import Reasons
from genrecal.shards.codecs import CODECS, Codec, round_to_bf16
from genrecal.shards.manifest import CACHED, SKIPPED, ManifestRow, Member, manifest_bytes
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, SampledTargets, to_arrow
from genrecal.shards.storage import LocalStore, open_store
from genrecal.vlm.rendering import Encoded, Renderer
from genrecal.vlm.shape import ModelShape, patches_of

BLOCK, RECORD = 512, 10_240  # of a tar: members are padded to the one, files to the other
CODED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # numbers of rows that are coded for real; between them, a line
INDEX_BYTES, INDEX_ROW_BYTES, INDEX_SHARD_BYTES = 3900, 13, 40  # of index.parquet
BYTES_PER_TOKEN, TOKENS_PER_TURN, SYSTEM_TOKENS = 4.0, 10, 14  # by rule: English text, and what a template adds


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a forecast assumes.

    Args:
        probe: records that are looked at, drawn from the whole input.
        num_samples: records to forecast for; 0 for as many as the data have.
        peak_tflops: of a GPU, dense, in the teacher's dtype. utilisation: share of it that the forward pass reaches.
        gpu_gigabytes: memory of a GPU. gpu_bandwidth: of that memory, GB/s, with which a step of generation reads the weights.
        train_rate: samples a second that the trainer takes.
    """

    probe: int = 512
    num_samples: int = 0
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    gpu_gigabytes: float = 80.0
    gpu_bandwidth: float = 3350.0
    train_rate: float = 64.0

    def __post_init__(self) -> None:
        if self.probe < 1 or self.num_samples < 0:
            raise UsageError(
                f"--probe {self.probe}, --num-samples {self.num_samples}: expected 1 or more, and 0 or more"
            )
        for name in ("peak_tflops", "gpu_gigabytes", "gpu_bandwidth", "train_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected more than 0")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation {self.utilisation}: expected a share over 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class ProbedRecord:
    """What the forecast needs to know of one record; of a skipped one only the reason."""

    key: str
    sample_id: str = ""
    category: str = ""
    source: str = ""
    reason: str | None = None
    question_tokens: int = 0
    answer_tokens: int = 0
    turns: int = 0
    prompts: tuple[int, ...] = ()  # tokens before each answer
    patches: tuple[int, ...] = ()  # of each picture or tile
    image_bytes: tuple[int, ...] = ()
    json_bytes: int = 0
    keeps_question: bool = False


@dataclass(frozen=True, kw_only=True)
class WrittenAnswers:
    """What it costs that the teacher writes the answers, before they are cached.

    Args:
        turns: answers to write. at_once: conversations that are written together, by `--batch-tokens`.
        tokens: of them all, if they are as long as the given ones; most_tokens: if none ends before `--max-answer-tokens`.
        flops, gpu_hours, most_gpu_hours: likewise. Prompts run at the assumed share of the peak; a step of generation takes
            as long as that, or as reading the weights once.
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
    """A forecast. Bytes and FLOPs are of the whole cache; `bytes` by part, `read_bytes` a sample of each stage.

    `flops` and `gpu_hours` are those of caching; `answers` has those of writing answers, None where they are given.
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
    error_bytes: int  # one standard error of the total, of drawing another probe
    bytes_by_codec: dict[str, dict[str, int]]  # the same samples' states in each codec
    flops: float
    gpu_hours: float
    answers: WrittenAnswers | None
    least_gpus: int  # that hold the weights
    read_bytes: dict[str, int]
    read_rate: dict[str, float]  # MB/s at the trainer's rate
    free_bytes: int | None  # where --out would be; None where that cannot be asked
    fits: bool | None
    by_rule: bool
    assumed: dict[str, float] = field(default_factory=dict)

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
    # Drawn, not every n-th: data that take turns between sources would show some of them only.
    places = np.sort(np.random.default_rng(0).choice(len(samples), count, replace=False))
    probed = [probe_record(samples[int(place)], shape, renderer, options) for place in places]
    reasons = Reasons.of(record.reason for record in probed if record.reason is not None)
    used = [record for record in probed if record.reason is None]
    if not used:
        raise DataError(f"none of {len(probed)} probed records can be used: {next(reasons.lines())}")
    total = assumed.num_samples or len(samples)
    scale, num_shards = total / len(probed), options.num_shards(total)
    sizes = Sizes(shape, options)
    parts = _parts(probed, used, sizes, total, num_shards, options)
    parts |= {"head": shape.head_rows * shape.hidden_size * shape.value_bytes, "teacher files": teacher_file_bytes}
    total_bytes = sum(parts.values())
    each = [sum(_tar_bytes(sizes.members(record))) if record.reason is None else 0 for record in probed]
    spread = np.std(each) * total * np.sqrt((1 - len(each) / max(total, len(each))) / len(each))
    flops = scale * sum(
        shape.flops(r.question_tokens + r.answer_tokens, r.answer_tokens + r.turns, r.patches) for r in used
    )
    read = {
        "stage 1": sum(sum(sizes.members(record)) for record in used) // len(used),
        "stage 2": sum(sum(sizes.members(record, question=False)) for record in used) // len(used),
    }
    free, fits = _room(out, total_bytes)
    return Plan(
        teacher=shape.name,
        probed=len(probed),
        num_samples=total,
        skipped=round(scale * reasons.counts.total()),
        reasons=dict(reasons.counts.most_common()),
        num_shards=num_shards,
        question_tokens=round(scale * sum(record.question_tokens for record in used)),
        answer_tokens=round(scale * sum(record.answer_tokens for record in used)),
        bytes=parts,
        total_bytes=total_bytes,
        error_bytes=round(float(spread)),
        bytes_by_codec=_by_codec(used, shape, options, scale),
        flops=flops,
        gpu_hours=flops / (assumed.peak_tflops * 1e12 * assumed.utilisation) / 3600,
        answers=_written(used, shape, options, assumed, scale) if options.answers.written_by_teacher else None,
        least_gpus=int(-(-shape.parameters * shape.value_bytes // (assumed.gpu_gigabytes * 1e9))),
        read_bytes=read,
        read_rate={stage: assumed.train_rate * size / 1e6 for stage, size in read.items()},
        free_bytes=free,
        fits=fits,
        by_rule=renderer is None,
        assumed={name: value for name, value in asdict(assumed).items() if isinstance(value, float)},
    )


def plan_text(plan: Plan) -> str:
    """A forecast as lines of text."""
    lines = [
        f"{plan.teacher}: {plan.num_samples} samples in {plan.num_shards} shards, from {plan.probed} probed"
        + (" (tokens counted by rule; give a folder with the teacher's processor for exact ones)" * plan.by_rule),
        f"skipped   {plan.skipped}"
        + "".join(f"; {count} of the probe: {reason}" for reason, count in list(plan.reasons.items())[:3]),
        f"tokens    {plan.question_tokens} of questions (pictures' with them), {plan.answer_tokens} of answers",
        f"bytes     {human_bytes(plan.total_bytes)} ± {human_bytes(plan.error_bytes)}: "
        + ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.bytes.items()),
        *(
            f"  {codec:<6}  answer states {human_bytes(size['answer'])}, question states {human_bytes(size['question'])}"
            for codec, size in plan.bytes_by_codec.items()
        ),
        f"teacher   {plan.flops:.3g} FLOPs, {plan.gpu_hours:.3g} GPU-hours at {plan.assumed['utilisation']:.0%} of "
        f"{plan.assumed['peak_tflops']:g} TFLOP/s; its weights need {plan.least_gpus} GPUs of "
        f"{plan.assumed['gpu_gigabytes']:g} GB",
        *_answers_lines(plan),
        "trainer   "
        + ", ".join(
            f"{stage} reads {human_bytes(plan.read_bytes[stage])} a sample, {rate:.3g} MB/s"
            for stage, rate in plan.read_rate.items()
        )
        + f" at {plan.assumed['train_rate']:g} samples/s",
    ]
    if plan.free_bytes is not None:
        room = "enough" if plan.fits else "NOT enough"
        lines.append(f"disk      {human_bytes(plan.free_bytes)} free, {room}")
    return "\n".join(lines)


def _answers_lines(plan: Plan) -> list[str]:
    written = plan.answers
    if written is None:
        return []
    return [
        f"answers   {written.turns} written, {written.at_once} at once, before that: {written.flops:.3g} FLOPs, "
        f"{written.gpu_hours:.3g} GPU-hours if they are as long as the given ones ({written.tokens} tokens), "
        f"{written.most_gpu_hours:.3g} if none ends early ({written.most_tokens} tokens); bytes are by the given ones"
    ]


def _written(
    used: Sequence[ProbedRecord], shape: ModelShape, options: CacheOptions, assumed: PlanOptions, scale: float
) -> WrittenAnswers:
    """Each turn's prompt runs again, pictures too, as `genrecal.cache.answers` does it."""
    prompts = [tokens for record in used for tokens in record.prompts]
    limit, turns = options.answers.max_tokens, len(prompts)
    at_once = max(1, int(options.batch_tokens // (sum(prompts) / turns + limit)))
    prefill = sum(shape.flops(tokens, 1, record.patches) for record in used for tokens in record.prompts)
    rate = assumed.peak_tflops * 1e12 * assumed.utilisation
    weights = (shape.text_parameters + shape.head_rows * shape.hidden_size) * shape.value_bytes
    step_seconds = weights / (assumed.gpu_bandwidth * 1e9)

    def decoding(tokens: float) -> tuple[float, float]:
        """FLOPs and GPU-seconds of so many tokens, spread evenly over the turns."""
        each = tokens / turns
        more = sum(shape.text_flops(prompt + each) - shape.text_flops(prompt) for prompt in prompts)
        more += shape.head_flops(tokens)
        return more, max(more / rate, tokens / min(at_once, turns * scale) * step_seconds)

    tokens = sum(record.answer_tokens for record in used)
    flops, seconds = decoding(tokens)
    _, most_seconds = decoding(limit * turns)
    return WrittenAnswers(
        turns=round(scale * turns),
        at_once=at_once,
        tokens=round(scale * tokens),
        most_tokens=round(scale * limit * turns),
        flops=scale * (prefill + flops),
        gpu_hours=scale * (prefill / rate + seconds) / 3600,
        most_gpu_hours=scale * (prefill / rate + most_seconds) / 3600,
    )


# ------------------------------------------------------------------------------------------------------------- the probe


def probe_record(
    sample: Sample | BadRecord, shape: ModelShape, renderer: Renderer | None, options: CacheOptions
) -> ProbedRecord:
    """Render one record, or count it by rule; one that the job would skip gives its reason."""
    names: dict[str, Any] = {
        "key": sample.key,
        "sample_id": sample.sample_id,
        "category": sample.category,
        "source": sample.source,
    }
    if isinstance(sample, BadRecord):
        return ProbedRecord(**names, reason=sample.reason)
    try:
        images = [image.read() for image in sample.images]
        sample = sample if renderer is None else renderer.settle(sample)
        if renderer is None:
            counts = _counted_by_rule(sample, images, shape, options.max_tokens)
        else:
            counts = _counted(renderer.encode(sample, max_tokens=options.max_tokens or None), renderer)
    except SampleError as error:
        return ProbedRecord(**names, reason=str(error))
    return ProbedRecord(
        **names,
        **counts,
        turns=len(sample.answers),
        image_bytes=tuple(map(len, images)),
        json_bytes=_json_bytes(with_answers(sample, sample.answers) if options.answers.written_by_teacher else sample),
        keeps_question=options.keeps_question(sample.key),
    )


def _json_bytes(sample: Sample) -> int:
    return len(json.dumps(sample.to_json(), sort_keys=True, ensure_ascii=False).encode())


def _counted(encoded: Encoded, renderer: Renderer) -> dict[str, Any]:
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
    """Bytes of members for one teacher and one set of options."""

    def __init__(self, shape: ModelShape, options: CacheOptions):
        self.shape, self.options = shape, options

    def members(self, record: ProbedRecord, *, question: bool = True) -> list[int]:
        """Of a record's members: conversation, pictures, answer states and, where kept, question states."""
        return [*self.plain(record), self.answer(record), *([self.question(record)] if question else [])]

    def plain(self, record: ProbedRecord) -> list[int]:
        return [record.json_bytes, *record.image_bytes]

    def answer(self, record: ProbedRecord) -> int:
        rows, sizes = self._answer_sizes
        return _between(record.answer_tokens + record.turns, rows, sizes)

    def question(self, record: ProbedRecord) -> int:
        """0 where the record's question states are not kept."""
        if not record.keeps_question:
            return 0
        rows, sizes = self._question_sizes
        return _between(record.question_tokens, rows, sizes)

    @cached_property
    def _answer_sizes(self) -> tuple[list[int], list[int]]:
        rows = made_answer(CODED_ROWS[-1], self.shape, self.options)
        return _coded_sizes(rows, CODECS[self.options.answer_codec])

    @cached_property
    def _question_sizes(self) -> tuple[list[int], list[int]]:
        rows = made_question(CODED_ROWS[-1], self.shape)
        return _coded_sizes(rows, CODECS[self.options.question_codec])


def _coded_sizes(rows: QuestionRows, codec: Codec) -> tuple[list[int], list[int]]:
    return list(CODED_ROWS), [len(to_arrow(_first_rows(rows, count), codec)) for count in CODED_ROWS]


def _first_rows(rows: Any, count: int) -> Any:
    """The first rows of any of the row classes; of answer rows the last has no target, as in a record."""
    values = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    first: dict[str, Any] = {
        name: value[:count].copy() if isinstance(value, np.ndarray) else _first_rows(value, count) if value else None
        for name, value in values.items()
    }
    if "target_id" in first:
        first["target_id"][-1] = NO_TARGET
    return type(rows)(**first)


def _between(count: int, rows: Sequence[int], sizes: Sequence[int]) -> int:
    if count > rows[-1]:
        return round(sizes[-1] + (count - rows[-1]) * (sizes[-1] - sizes[-2]) / (rows[-1] - rows[-2]))
    return round(float(np.interp(count, rows, sizes)))


def made_states(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Float32 `[R, D]` that codes as real states do: Gaussian, some channels many times larger than others."""
    states = rng.standard_normal((rows, width), np.float32) * np.exp(rng.normal(0, 0.5, width)).astype(np.float32)
    return round_to_bf16(states)


def made_question(rows: int, shape: ModelShape) -> QuestionRows:
    """Question rows of a teacher of that shape."""
    rng = np.random.default_rng(0)
    return QuestionRows(
        turn=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        token_id=rng.integers(0, shape.head_rows, rows).astype(np.int32),
        hidden=made_states(rng, rows, shape.hidden_size),
    )


def made_answer(rows: int, shape: ModelShape, options: CacheOptions) -> AnswerRows:
    """Answer rows of a teacher of that shape. Its most probable tokens come back from row to row, as they do in text."""
    import torch

    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    k, common = min(options.top_k, shape.head_rows), 4 * torch.randn(shape.head_rows, generator=generator)
    ids, values, sums, drawn = [], [], [], []
    numbers = uniforms("plan", rows, options.draws) if options.draws else None
    for start in range(0, rows, 16):
        logits = common + 4 * torch.randn(min(16, rows - start), shape.head_rows, generator=generator)
        top, places = logits.topk(k)
        ids.append(places.int().numpy())
        values.append(top.numpy())
        sums.append(logits.logsumexp(-1).numpy())
        if numbers is not None:
            drawn.append(draw(logits, torch.from_numpy(numbers[start : start + 16]))[0].numpy())
    topk_ids, topk_logits, logsumexp = (np.concatenate(part) for part in (ids, values, sums))
    sampled = None
    if drawn:
        distinct, counts = count_draws(np.concatenate(drawn))
        sampled = SampledTargets(ids=distinct, counts=counts, entropy=rng.random(rows).astype(np.float32))
    place = np.arange(rows, dtype=np.int32)
    target = topk_ids[:, 0].copy()
    return AnswerRows(
        turn=np.zeros(rows, np.int32),
        position=place,
        token_id=np.roll(target, 1),
        hidden=made_states(rng, rows, shape.hidden_size),
        target_id=target,
        target_start=4 * place,
        target_end=4 * place + 4,
        target_logit=topk_logits[:, 0].copy(),
        topk_ids=topk_ids,
        topk_logits=topk_logits,
        logsumexp=logsumexp,
        sampled=sampled,
    )


def _tar_bytes(members: Sequence[int]) -> list[int]:
    """Of members with their headers; those of no size are not there."""
    return [BLOCK + -(-size // BLOCK) * BLOCK for size in members if size]


def _parts(
    probed: Sequence[ProbedRecord],
    used: Sequence[ProbedRecord],
    sizes: Sizes,
    total: int,
    num_shards: int,
    options: CacheOptions,
) -> dict[str, int]:
    """Bytes of the tars and Parquet files of `total` records like the probe's."""
    scale = total / len(probed)
    end = 2 * BLOCK + (RECORD - BLOCK) // 2  # of a tar, its padding on average
    samples = scale * sum(sum(_tar_bytes(sizes.members(record, question=False))) for record in used) + num_shards * end
    questions = 0.0
    if options.question_codec != "none":
        questions = scale * sum(sum(_tar_bytes([sizes.question(record)])) for record in used) + num_shards * end
    return {
        "samples": round(samples),
        "questions": round(questions),
        "manifest": _manifest_bytes(probed, sizes, total, num_shards, options),
        "index": INDEX_BYTES + INDEX_ROW_BYTES * total + INDEX_SHARD_BYTES * num_shards,
    }


def _manifest_bytes(
    probed: Sequence[ProbedRecord], sizes: Sizes, total: int, num_shards: int, options: CacheOptions
) -> int:
    """All manifests: a line through a made shard's and half of one."""
    rng = np.random.default_rng(2)
    length = min(options.samples_per_shard, total)
    rows = [_manifest_row(probed[i % len(probed)], i, sizes, rng) for i in range(length)]
    facts = {
        "sha256": dict.fromkeys(("samples", "questions"), rng.bytes(32).hex()),
        "fidelity": rng.random(12).tolist(),
    }
    half = max(1, length // 2)
    small, whole = (len(manifest_bytes(rows[:count], facts)) for count in (half, length))
    each = (whole - small) / max(1, length - half)
    return round(num_shards * (small - half * each) + total * each)


def _manifest_row(record: ProbedRecord, number: int, sizes: Sizes, rng: np.random.Generator) -> ManifestRow:
    key = f"{number:08d}{record.key[8:]}"
    if record.reason is not None:
        return ManifestRow(key=key, sample_id=record.sample_id, status=SKIPPED, reason=record.reason, shard=0)
    names = ["json", *(f"{i}.jpg" for i in range(len(record.image_bytes))), "answer.arrow", "question.arrow"]
    members = [
        Member(
            name=f"{key}.{name}",
            tier="questions" if name.startswith("question") else "samples",
            offset=int(rng.integers(2**30)),
            size=size,
            xxh3=int(rng.integers(2**63)),
        )
        for name, size in zip(names, sizes.members(record), strict=True)
        if size
    ]
    entropy, log_prob, agreement = rng.random(3)
    return ManifestRow(
        key=key,
        sample_id=record.sample_id,
        status=CACHED,
        shard=0,
        members=members,
        category=record.category,
        source=record.source,
        turns=record.turns,
        images=len(record.image_bytes),
        question_tokens=record.question_tokens,
        answer_tokens=record.answer_tokens,
        entropy=float(entropy),
        log_prob=float(log_prob),
        top1_agreement=float(agreement),
        has_question=record.keeps_question,
    )


def _by_codec(
    used: Sequence[ProbedRecord], shape: ModelShape, options: CacheOptions, scale: float
) -> dict[str, dict[str, int]]:
    """Bytes of the answer and the question states in each codec, whatever the options chose."""
    answer, question = made_answer(CODED_ROWS[-1], shape, options), made_question(CODED_ROWS[-1], shape)
    result = {}
    for name, codec in CODECS.items():
        answers, questions = _coded_sizes(answer, codec), _coded_sizes(question, codec)
        result[name] = {
            "answer": round(scale * sum(_between(r.answer_tokens + r.turns, *answers) for r in used)),
            "question": round(scale * sum(_between(r.question_tokens, *questions) for r in used if r.keeps_question)),
        }
    return result


def _room(out: str | None, needed: int) -> tuple[int | None, bool | None]:
    """Free bytes where the cache would be, and whether they are enough for what is not there yet."""
    store = open_store(out) if out is not None else None
    if not isinstance(store, LocalStore):
        return None, None
    place = Path(os.path.abspath(store.root))
    there = sum(sum(store.sizes(folder).values()) for folder in ("samples", "questions", "manifest"))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return free, needed - there <= free
