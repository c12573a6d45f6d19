"""A small cache with every part that a real one has, whose logits are its head's, made without a teacher."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import Image

from genrecal.cache.draws import count_draws, draw, uniforms
from genrecal.samples import BadRecord, ImageRef, ImageSource, Message, Sample
from genrecal.shards.codecs import CODECS, round_to_bf16
from genrecal.shards.head import HEAD_FILE, FrozenHead
from genrecal.shards.index import complete_cache
from genrecal.shards.layout import write_cache_json
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, Record, SampledTargets
from genrecal.shards.storage import open_store
from genrecal.shards.writer import ShardWriter

WIDTH, VOCABULARY, TOP_K, DRAWS = 16, 60, 4, 5
SAMPLES, PER_SHARD, SKIPPED = 11, 4, 5
FRACTION, SEED = 0.6, 3


def make_head() -> FrozenHead:
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    return FrozenHead(weight=weight, vocab_size=VOCABULARY - 2)


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_sample(index: int) -> Sample:
    """One to three turns, none to two pictures."""
    turns, images = 1 + index % 3, index % 3
    messages = []
    for turn in range(turns):
        refs = tuple(ImageRef(i) for i in range(images)) if turn == 0 else ()
        messages.append(Message(role="user", parts=(*refs, f"question {turn} of {index}?")))
        messages.append(Message(role="assistant", parts=(f"the answer is {index}{'!' * turn}",)))
    return Sample(
        key=f"{index:08d}-s{index}",
        sample_id=f"s{index}",
        messages=tuple(messages),
        images=tuple(ImageSource(data=picture(10 * index + i), suffix="png") for i in range(images)),
        category=f"kind {index % 2}",
        source="made",
    )


def make_states(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Normalised, as after a final norm."""
    states = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    return round_to_bf16(states / np.sqrt((states**2).mean(1, keepdims=True)))


def make_record(index: int, head: FrozenHead, *, question: bool, hidden=lambda states: states) -> Record:
    """`hidden` spoils the stored states, after the logits were computed from the right ones."""
    rng = np.random.default_rng(index)
    sample = make_sample(index)
    lengths = [2 + (index + turn) % 3 for turn in range(len(sample.answers))]
    turn = np.repeat(np.arange(len(lengths)), [n + 1 for n in lengths]).astype(np.int32)
    last = np.append(turn[1:] != turn[:-1], True)
    rows = len(turn)
    position = (np.arange(rows) + 5 + 3 * turn).astype(np.int32)  # 6 tokens of the first Q segment, 4 of every other
    states = make_states(rng, rows)
    logits = head.logits(torch.from_numpy(states))
    values, ids = logits.topk(TOP_K)
    target = rng.integers(0, VOCABULARY, rows)
    drawn, entropy = draw(logits, torch.from_numpy(uniforms(sample.key, rows, DRAWS)))
    distinct, counts = count_draws(drawn.numpy())
    answer = AnswerRows(
        turn=turn,
        position=position,
        token_id=rng.integers(0, VOCABULARY, rows).astype(np.int32),
        states=hidden(states),
        target_id=np.where(last, NO_TARGET, target).astype(np.int32),
        target_start=np.where(last, NO_TARGET, np.arange(rows) % 5).astype(np.int32),
        target_end=np.where(last, NO_TARGET, np.arange(rows) % 5 + 1).astype(np.int32),
        target_logit=logits.numpy()[np.arange(rows), target],
        topk_ids=ids.int().numpy(),
        topk_logits=values.numpy(),
        logsumexp=logits.logsumexp(-1).numpy(),
        sampled=SampledTargets(ids=distinct, counts=counts, entropy=entropy.float().numpy()),
    )
    if not question:
        return Record(sample=sample, answer=answer, question=None)
    asked = np.setdiff1d(np.arange(position[-1] + 1), position[np.append(False, turn[1:] == turn[:-1])])
    rows = QuestionRows(
        turn=np.searchsorted(position[last], asked).astype(np.int32),
        position=asked.astype(np.int32),
        token_id=rng.integers(0, VOCABULARY, len(asked)).astype(np.int32),
        states=make_states(rng, len(asked)),
    )
    return Record(sample=sample, answer=answer, question=rows)


def has_question(key: str) -> bool:
    return xxhash.xxh3_64_intdigest(f"{SEED}:{key}".encode()) / 2**64 < FRACTION


def write_shard(
    cache: Path, shard: int, head: FrozenHead, *, codec: str = "bf16", hidden=lambda states: states
) -> list:
    """Write one shard of the plan; returns its manifest's rows."""
    with ShardWriter(cache, shard, answer_codec=CODECS[codec], question_codec=CODECS[codec]) as writer:
        for index in range(shard * PER_SHARD, min(SAMPLES, (shard + 1) * PER_SHARD)):
            sample = make_sample(index)
            if index == SKIPPED:
                writer.skip(BadRecord(key=sample.key, sample_id="s", location="d.json:7", reason="no"), "no image")
                continue
            record = make_record(index, head, question=has_question(sample.key), hidden=hidden)
            writer.add(record, [image.read() for image in sample.images])
        writer.commit()
    return writer.rows


def make_cache(cache: Path, *, codec: str = "bf16", hidden=lambda states: states) -> Path:
    """Three shards, eleven records, one of them skipped; `hidden` spoils the states of every shard."""
    head = make_head()
    cache.mkdir(parents=True, exist_ok=True)
    head.save(cache / HEAD_FILE)
    (cache / "teacher").mkdir()
    for name, text in (("config.json", '{"model_type": "made"}\n'), ("chat_template.jinja", "{{ messages }}\n")):
        (cache / "teacher" / name).write_text(text)
    for shard in range(3):
        write_shard(cache, shard, head, codec=codec, hidden=hidden)
    write_cache_json(open_store(cache), description(cache, codec))
    finish(cache)
    return cache


def finish(cache: Path) -> None:
    """Write the index and totals of what the shards are now."""
    complete_cache(open_store(cache), 3)


def description(cache: Path, codec: str) -> dict:
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (cache / "teacher").iterdir()}
    return {
        "format_version": 1,
        "software": {"genrecal": "0", "torch": "0", "transformers": "0"},
        "teacher": {
            "name": "made", "dtype": "float32", "files_sha256": digests,
            "head_sha256": hashlib.sha256((cache / HEAD_FILE).read_bytes()).hexdigest(),
        },
        "image_backend": "pil", "hidden_size": WIDTH, "head_rows": VOCABULARY, "vocab_size": VOCABULARY - 2,
        "top_k": TOP_K, "sampled_targets": DRAWS, "answer_codec": codec, "question_codec": codec,
        "question_fraction": FRACTION, "question_seed": SEED,
        "samples_per_shard": PER_SHARD, "batch_tokens": 100, "max_tokens": 0, "num_samples": SAMPLES, "num_shards": 3,
        "data": [{"name": "d.json", "sha256": "00"}],
    }  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path in the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
