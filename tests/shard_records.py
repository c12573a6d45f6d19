"""Made-up teacher rows, as the store's tests write them."""

import numpy as np

from genrecal.shards.codecs import round_to_bf16
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, SampledTargets


def make_answer(turn_lengths=(2, 3), width=8, k=4, vocab=200_000, seed=0, draws=0):
    """Answer rows of the given turns; ids go past 131,072. With `draws`, sampled targets too."""
    rng = np.random.default_rng(seed)
    rows = sum(n + 1 for n in turn_lengths)
    turn = np.repeat(np.arange(len(turn_lengths)), [n + 1 for n in turn_lengths]).astype(np.int32)
    last = np.cumsum([n + 1 for n in turn_lengths]) - 1
    target = rng.integers(0, vocab, rows).astype(np.int32)
    target[last] = NO_TARGET
    return AnswerRows(
        turn=turn,
        position=np.arange(10, 10 + rows, dtype=np.int32),
        token_id=rng.integers(0, vocab, rows).astype(np.int32),
        states=round_to_bf16(rng.normal(size=(rows, width)).astype(np.float32)),
        target_id=target,
        target_start=np.where(target == NO_TARGET, NO_TARGET, np.arange(rows)).astype(np.int32),
        target_end=np.where(target == NO_TARGET, NO_TARGET, np.arange(rows) + 1).astype(np.int32),
        target_logit=rng.normal(size=rows).astype(np.float32),
        topk_ids=rng.integers(131_072, vocab, (rows, k)).astype(np.int32),
        topk_logits=np.sort(rng.normal(size=(rows, k)).astype(np.float32))[:, ::-1].copy(),
        logsumexp=(rng.normal(size=rows) + 5).astype(np.float32),
        sampled=make_sampled(rng, rows, draws, vocab) if draws else None,
    )


def make_sampled(rng, rows, draws, vocab):
    """Two ids a row."""
    ids, counts = np.zeros((rows, draws), np.int32), np.zeros((rows, draws), np.uint16)
    ids[:, 0], ids[:, 1] = rng.integers(0, vocab // 2, rows), rng.integers(vocab // 2, vocab, rows)
    counts[:, 0] = rng.integers(1, draws, rows)
    counts[:, 1] = draws - counts[:, 0]
    return SampledTargets(ids=ids, counts=counts, entropy=rng.random(rows).astype(np.float32))


def make_question(rows=5, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return QuestionRows(
        turn=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        token_id=rng.integers(0, 99, rows).astype(np.int32),
        states=round_to_bf16(rng.normal(size=(rows, width)).astype(np.float32)),
    )
