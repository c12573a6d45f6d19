"""Body outputs -> answer rows and question rows. Both backends and the live teacher end here, so their records agree."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from genrecal.cache.draws import count_draws, draw, uniforms
from genrecal.errors import SampleError
from genrecal.shards.codecs import round_to_bf16
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, SampledTargets
from genrecal.vlm.rendering import Encoded

LOGIT_BUDGET = 2**25  # float32 logits that exist at once: 128 MiB, 220 rows of Qwen's vocabulary


def answer_positions(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Positions and turns of the answer rows, int64 `[R]` each: per turn, the last of Q_t to the last of A_t."""
    positions, turns = [], []
    for turn, (start, end, _) in enumerate(segment for segment in encoded.segments() if segment[2]):
        positions.append(np.arange(start - 1, end))
        turns.append(np.full(end - start + 1, turn))
    return np.concatenate(positions), np.concatenate(turns)


def question_positions(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Positions and turns of the question rows, int64 `[R]` each."""
    segments = [segment for segment in encoded.segments() if not segment[2]]
    positions = [np.arange(start, end) for start, end, _ in segments]
    turns = [np.full(end - start, turn) for turn, (start, end, _) in enumerate(segments)]
    return np.concatenate(positions), np.concatenate(turns)


def extract_answer(
    encoded: Encoded, hidden: torch.Tensor, head: FrozenHead, *, top_k: int, draws: int = 0
) -> AnswerRows:
    """One sample's answer rows.

    Args:
        hidden: `[L, D]`, the body's output over the conversation (rows past L are not looked at).
        top_k: logits kept a row; at most V are.
        draws: K of the sampled targets; 0 for none.

    Raises:
        SampleError: a state or a logit is not finite.
    """
    positions, _ = answer_positions(encoded)
    states = hidden[torch.from_numpy(positions).to(hidden.device)]
    target_id = answer_targets(encoded)["target_id"]
    found = head_targets(states, target_id, head, key=encoded.key, top_k=top_k, draws=draws)
    return answer_rows(encoded, states, found)


def answer_rows(encoded: Encoded, states: torch.Tensor, found: "HeadTargets") -> AnswerRows:
    """The answer rows of `encoded` from their states `[R, D]` and what the head made of them. Raises as `extract_answer`."""
    positions, turns = answer_positions(encoded)
    return AnswerRows(
        turn=turns.astype(np.int32),
        position=positions.astype(np.int32),
        token_id=encoded.input_ids[positions].astype(np.int32),
        hidden=_finite_bf16(states),
        **answer_targets(encoded),
        target_logit=found.target_logit,
        topk_ids=found.topk_ids,
        topk_logits=found.topk_logits,
        logsumexp=found.logsumexp,
        sampled=found.sampled,
    )


def extract_question(encoded: Encoded, hidden: torch.Tensor) -> QuestionRows:
    """One sample's question rows from `hidden` `[L, D]`. Raises SampleError if a state is not finite."""
    positions, _ = question_positions(encoded)
    return question_rows(encoded, hidden[torch.from_numpy(positions).to(hidden.device)])


def question_rows(encoded: Encoded, states: torch.Tensor) -> QuestionRows:
    """The question rows of `encoded` from their states `[R, D]`. Raises SampleError if one is not finite."""
    positions, turns = question_positions(encoded)
    return QuestionRows(
        turn=turns.astype(np.int32),
        position=positions.astype(np.int32),
        token_id=encoded.input_ids[positions].astype(np.int32),
        hidden=_finite_bf16(states),
    )


def _finite_bf16(states: torch.Tensor) -> np.ndarray:
    values = states.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise SampleError("the teacher's hidden states hold NaN or Inf")
    return round_to_bf16(values)


def answer_targets(encoded: Encoded) -> dict[str, np.ndarray]:
    """Per answer row: the next token and the bytes it covers; NO_TARGET on each turn's last row."""
    columns: dict[str, list[int]] = {"target_id": [], "target_start": [], "target_end": []}
    for answer in encoded.answers:
        for name, values in zip(columns, (answer.ids, answer.starts, answer.ends), strict=True):
            columns[name] += [*values.tolist(), NO_TARGET]
    return {name: np.array(values, np.int32) for name, values in columns.items()}


@dataclass(frozen=True, kw_only=True)
class HeadTargets:
    """What is kept of each row's logits; shapes and dtypes as in AnswerRows."""

    topk_ids: np.ndarray
    topk_logits: np.ndarray
    logsumexp: np.ndarray
    target_logit: np.ndarray
    sampled: SampledTargets | None


def head_targets(
    states: torch.Tensor, target_id: np.ndarray, head: FrozenHead, *, key: str, top_k: int, draws: int
) -> HeadTargets:
    """Run the rows' states through the head, a chunk at a time. Raises SampleError if a logit that is kept is not finite.

    Args:
        states: `[R, D]`.
        target_id: int32 `[R]`.
        key: the sample's; it begins the random numbers of the draws.
    """
    numbers = uniforms(key, len(states), draws) if draws else None  # float64 [R, K]
    rows, num_logits = len(states), head.weight.shape[0]
    k = min(top_k, num_logits)
    device = head.weight.device
    targets = torch.from_numpy(np.maximum(target_id, 0).astype(np.int64)).to(device)
    pieces, drawn = [], []
    for chunk in _chunks(rows, max(1, LOGIT_BUDGET // num_logits)):
        logits = head.logits(states[chunk])  # [r, V]
        values, ids = logits.topk(k, dim=-1)
        target = logits.gather(1, targets[chunk, None])[:, 0]
        pieces.append((ids.int().cpu(), values.cpu(), logits.logsumexp(-1).cpu(), target.cpu()))
        if not (pieces[-1][1].isfinite().all() and pieces[-1][2].isfinite().all()):
            raise SampleError("the teacher's logits are not finite")
        if numbers is not None:
            u = torch.from_numpy(numbers[chunk]).to(device)
            # They work in float64, on three copies: a few rows at a time, so that the chunk's logits stay the largest.
            for part in _chunks(len(logits), max(1, len(logits) // 8)):
                ids, entropy = draw(logits[part], u[part])
                drawn.append((ids.cpu(), entropy.float().cpu()))
    topk_ids, topk_logits, logsumexp, target_logit = (torch.cat(part).numpy() for part in zip(*pieces, strict=True))
    sampled = None
    if drawn:
        ids, entropy = (torch.cat(part) for part in zip(*drawn, strict=True))
        distinct, counts = count_draws(ids.numpy())
        sampled = SampledTargets(ids=distinct, counts=counts, entropy=entropy.numpy())
    return HeadTargets(
        topk_ids=topk_ids, topk_logits=topk_logits, logsumexp=logsumexp, target_logit=target_logit, sampled=sampled
    )


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
