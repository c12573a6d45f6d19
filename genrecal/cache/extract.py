"""Body outputs -> answer rows and question rows. Both backends and the live teacher end here, so their records agree."""

from collections.abc import Iterable, Iterator, Sequence
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
    (answer,) = extract_answers([encoded], [hidden], head, top_k=top_k, draws=draws)
    if isinstance(answer, SampleError):
        raise answer
    return answer


def extract_answers(
    batch: Sequence[Encoded], hidden: Iterable[torch.Tensor], head: FrozenHead, *, top_k: int, draws: int = 0
) -> list[AnswerRows | SampleError]:
    """The answer rows of several samples, which go through the head together; else as `extract_answer`."""
    items = []
    for encoded, rows in zip(batch, hidden, strict=True):
        states = rows[torch.from_numpy(answer_positions(encoded)[0]).to(rows.device)]
        items.append((encoded.key, states, answer_targets(encoded)["target_id"]))
    results: list[AnswerRows | SampleError] = []
    found = head_targets(items, head, top_k=top_k, draws=draws)
    for encoded, (_, states, _), targets in zip(batch, items, found, strict=True):
        try:
            results.append(targets if isinstance(targets, SampleError) else answer_rows(encoded, states, targets))
        except SampleError as error:
            results.append(error)
    return results


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
    items: Sequence[tuple[str, torch.Tensor, np.ndarray]], head: FrozenHead, *, top_k: int, draws: int
) -> list[HeadTargets | SampleError]:
    """Run the rows of several samples through the head, a chunk at a time; an error where a logit that is kept is not finite.

    Args:
        items: per sample its key, which begins the random numbers of the draws, its states `[R, D]` and target ids int32
            `[R]`.
    """
    counts = [len(target_id) for _, _, target_id in items]
    states, target_id = torch.cat([item[1] for item in items]), np.concatenate([item[2] for item in items])
    # float64 [rows, K]
    numbers = (
        np.concatenate([uniforms(item[0], n, draws) for item, n in zip(items, counts, strict=True)]) if draws else None
    )
    num_logits, device = head.weight.shape[0], head.weight.device
    targets = torch.from_numpy(np.maximum(target_id, 0).astype(np.int64)).to(device)
    pieces, drawn = [], []
    for chunk in _chunks(sum(counts), max(1, LOGIT_BUDGET // num_logits)):
        logits = head.logits(states[chunk])  # [r, V]
        values, ids = logits.topk(min(top_k, num_logits), dim=-1)
        target = logits.gather(1, targets[chunk, None])[:, 0]
        pieces.append((ids.int().cpu(), values.cpu(), logits.logsumexp(-1).cpu(), target.cpu()))
        if numbers is not None:
            u = torch.from_numpy(numbers[chunk]).to(device)
            # They work in float64, on three copies: a few rows at a time, so that the chunk's logits stay the largest.
            for part in _chunks(len(logits), max(1, len(logits) // 8)):
                ids, entropy = draw(logits[part], u[part])
                drawn.append((ids.cpu(), entropy.float().cpu()))
    columns = [torch.cat(part) for part in zip(*pieces, strict=True)]
    topk_ids, topk_logits, logsumexp, target_logit = (column.numpy() for column in columns)
    finite = np.isfinite(topk_logits).all(1) & np.isfinite(logsumexp)
    if drawn:
        ids, entropy = (torch.cat(part) for part in zip(*drawn, strict=True))
        distinct, times = count_draws(ids.numpy())
    results: list[HeadTargets | SampleError] = []
    for end, count in zip(np.cumsum(counts), counts, strict=True):
        rows = slice(end - count, end)
        if not finite[rows].all():
            results.append(SampleError("the teacher's logits are not finite"))
            continue
        results.append(
            HeadTargets(
                topk_ids=topk_ids[rows],
                topk_logits=topk_logits[rows],
                logsumexp=logsumexp[rows],
                target_logit=target_logit[rows],
                sampled=SampledTargets(ids=distinct[rows], counts=times[rows], entropy=entropy[rows].numpy())
                if drawn
                else None,
            )
        )
    return results


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
