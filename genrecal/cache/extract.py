"""Body outputs -> answer rows and question rows. Both backends and the live teacher end here, so their records agree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genrecal.cache.draws import count_draws, draw, uniforms
from genrecal.errors import SampleError
from genrecal.shards.codecs import round_to_bf16
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import NO_TARGET, AnswerRows, QuestionRows, SampledTargets
from genrecal.vlm.rendering import Encoded

LOGIT_BUDGET = 2**25  # float32 logits that exist at once: 128 MiB, 220 rows of Qwen's vocabulary
HeadTargets = dict[str, Any]  # what is kept of each row's logits, under the names that AnswerRows has


@dataclass(frozen=True, kw_only=True)
class States:
    """A teacher's states over one sample; `question` is None unless it was asked for."""

    answer: AnswerRows
    question: QuestionRows | None


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


def states_of(
    encoded: Encoded, answer: torch.Tensor, found: HeadTargets | SampleError, question: torch.Tensor | None
) -> States | SampleError:
    """One sample's rows from its answer states `[R, D]`, what the head made of them, and its question states `[Q, D]`.

    Gives the error instead if a state or a logit is not finite.
    """
    if isinstance(found, SampleError):
        return found
    try:
        rows: dict[str, Any] = {**_columns(encoded, *answer_positions(encoded), answer), **answer_targets(encoded)}
        return States(
            answer=AnswerRows(**rows, **found),
            question=None
            if question is None
            else QuestionRows(**_columns(encoded, *question_positions(encoded), question)),
        )
    except SampleError as error:
        return error


def _columns(encoded: Encoded, positions: np.ndarray, turns: np.ndarray, states: torch.Tensor) -> dict[str, np.ndarray]:
    hidden = states.float().cpu().numpy()
    if not np.isfinite(hidden).all():
        raise SampleError("the teacher's hidden states hold NaN or Inf")
    return {
        "turn": turns.astype(np.int32),
        "position": positions.astype(np.int32),
        "token_id": encoded.input_ids[positions].astype(np.int32),
        "states": round_to_bf16(hidden),
    }


def answer_targets(encoded: Encoded) -> dict[str, np.ndarray]:
    """Per answer row: the next token and the bytes it covers; NO_TARGET on each turn's last row."""
    columns: dict[str, list[int]] = {"target_id": [], "target_start": [], "target_end": []}
    for answer in encoded.answers:
        for name, values in zip(columns, (answer.ids, answer.starts, answer.ends), strict=True):
            columns[name] += [*values.tolist(), NO_TARGET]
    return {name: np.array(values, np.int32) for name, values in columns.items()}


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
    numbers = [uniforms(item[0], n, draws) for item, n in zip(items, counts, strict=True)] if draws else []
    num_logits, device = head.weight.shape[0], head.weight.device
    targets = torch.from_numpy(np.maximum(target_id, 0).astype(np.int64)).to(device)
    pieces, drawn = [], []
    for chunk in _chunks(sum(counts), max(1, LOGIT_BUDGET // num_logits)):
        logits = head.logits(states[chunk])  # [r, V]
        values, ids = logits.topk(min(top_k, num_logits), dim=-1)
        target = logits.gather(1, targets[chunk, None])[:, 0]
        pieces.append((ids.int().cpu(), values.cpu(), logits.logsumexp(-1).cpu(), target.cpu()))
        if draws:
            u = torch.from_numpy(np.concatenate(numbers)[chunk]).to(device)  # float64 [r, K]
            # They work in float64, on three copies: a few rows at a time, so that the chunk's logits stay the largest.
            for part in _chunks(len(logits), max(1, len(logits) // 8)):
                ids, entropy = draw(logits[part], u[part])
                drawn.append((ids.cpu(), entropy.float().cpu()))
    names = ("topk_ids", "topk_logits", "logsumexp", "target_logit")
    columns = {name: torch.cat(part).numpy() for name, part in zip(names, zip(*pieces, strict=True), strict=True)}
    finite = np.isfinite(columns["topk_logits"]).all(1) & np.isfinite(columns["logsumexp"])
    if drawn:
        ids, entropy = (torch.cat(part) for part in zip(*drawn, strict=True))
        distinct, times = count_draws(ids.numpy())
    results: list[HeadTargets | SampleError] = []
    for end, count in zip(np.cumsum(counts), counts, strict=True):
        rows = slice(end - count, end)
        if not finite[rows].all():
            results.append(SampleError("the teacher's logits are not finite"))
            continue
        kept: HeadTargets = {name: column[rows] for name, column in columns.items()}
        kept["sampled"] = (
            SampledTargets(ids=distinct[rows], counts=times[rows], entropy=entropy[rows].numpy()) if drawn else None
        )
        results.append(kept)
    return results


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
