"""How well student and teacher are aligned on a few fixed samples, for the run's report (paper, Figures 6, 7 and 9).

Taken by the trainer before the first step and after the last one of stage 1, and after the last one of stage 2 (which
begins where stage 1 ended), so that a report needs neither weights nor cache. It does not affect the training.

Of a conversation there are three sequences of states, whose answers' states are z_a, questions' z_q, turn by turn:

    own      [z_q of the student, z_a of the student]            what the paper's Figures 6 and 7 show of the student
    splice   [z_q of the student, pre(z_a of the teacher)]       what the Recalibrator is trained on
    teacher  [pre(z_q of the teacher), pre(z_a of the teacher)]  the regularisation's
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genrecal.errors import SampleError
from genrecal.objectives.base import Tier
from genrecal.objectives.losses import chunked_cross_entropy
from genrecal.objectives.recalibrator import Recalibrator
from genrecal.run_folder import PAIRINGS, POOLINGS, Snapshot
from genrecal.samples import Sample
from genrecal.shards.mixture import Mixture
from genrecal.shards.record import Record
from genrecal.train.batches import RecordSource
from genrecal.train.midway import at_rest
from genrecal.train.stages import Distiller
from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Encoded

COMPARED = 10  # samples of the similarity matrix (paper, Figure 7)
TOKENS = 16  # of a sample that are kept for the t-SNE, half of them answer tokens
COMPONENTS = 50  # that are kept of a token's state; what t-SNE is usually given


@dataclass
class _Found:
    """What was measured so far: cross-entropies by (whose, part), and of each compared sample its states."""

    losses: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0

    def add(self, who: str, losses: np.ndarray, first: np.ndarray) -> None:
        for part, rows in (("", slice(None)), ("_first", first), ("_later", ~first)):
            self.losses.setdefault((who, part), []).append(losses[rows])

    def means(self) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for (who, part), pieces in self.losses.items():
            values = np.concatenate(pieces)
            if len(values):
                result.setdefault(who, {})[part] = float(values.mean(dtype=np.float64))
        return result


@torch.no_grad()
def take_snapshot(
    distiller: Distiller,
    source: RecordSource,
    cache: Mixture,
    indices: np.ndarray,
    *,
    samples: int,
    moment: str,
    compute_dtype: torch.dtype,
    max_tokens: int = 0,
) -> Snapshot:
    """Measure. Samples that the student cannot take, or whose bytes are damaged, are left out.

    Args:
        indices: the stage's samples; those that are measured lie evenly spread among them, always the same ones.
        samples: how many are measured at most, beside the ten that are compared.
        moment: "start" or "end" of the distiller's stage.
    """
    student = distiller.student
    recalibrator: Recalibrator = distiller.get_submodule("recalibrator")  # type: ignore[assignment]
    compared: set[int] = set()
    if (
        recalibrator.rec_proj_pre is not None
    ):  # else it never takes the teacher's states, and there is nothing to compare
        compared = set(spread(indices[cache.column("has_question")[indices].astype(bool)], COMPARED).tolist())
    found = _Found()
    device = student.device.type
    with at_rest(distiller), torch.autocast(device, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        for index in sorted(compared | set(spread(indices, samples).tolist())):
            (fetched,) = source.fetch([index], Tier.QUESTIONS if index in compared else Tier.STATES)
            if not isinstance(fetched, tuple):
                continue  # damaged, which the steps report
            sample, record = fetched
            assert record is not None
            try:
                encoded = student.renderer.encode(sample, max_tokens=max_tokens or None)
            except SampleError:
                continue
            states = student.states([encoded])[0]  # [L, D_s]
            found.samples += 1
            found.add("student", *_student_losses(student, states, encoded, distiller.objective.loss.chunk_rows))
            found.add("teacher", *_teacher_losses(record))
            if record.question is not None:
                found.compared.append(_compared(recalibrator, states.float(), encoded, record, sample))
    return Snapshot(
        stage=distiller.stage,
        moment=moment,
        samples=found.samples,
        own=found.means(),
        keys=tuple(item["key"] for item in found.compared),
        categories=tuple(item["category"] for item in found.compared),
        similarity=_similarity(found.compared),
        **_tokens(found.compared),
    )


def spread(candidates: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the candidates, evenly spaced."""
    if len(candidates) <= count:
        return candidates
    return candidates[np.linspace(0, len(candidates) - 1, count).round().astype(np.int64)]


# ------------------------------------------------------------------------------------------------------- cross-entropies


def _student_losses(
    student: VLM, states: torch.Tensor, encoded: Encoded, chunk_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The student's own cross-entropy of each answer token, and which are the first of a turn."""
    answers = [(start, end) for start, end, is_answer in encoded.segments() if is_answer]
    rows = np.concatenate([np.arange(start - 1, end - 1) for start, end in answers])
    ids = torch.from_numpy(encoded.input_ids[rows + 1]).to(states.device)
    losses = chunked_cross_entropy(states[rows], student.head, student.transform, ids, chunk_rows=chunk_rows)
    return losses.float().cpu().numpy(), _firsts([end - start for start, end in answers])


def _teacher_losses(record: Record) -> tuple[np.ndarray, np.ndarray]:
    answer = record.answer
    return -answer.target_log_prob[answer.predicts], _firsts([int(n) - 1 for n in np.bincount(answer.turn)])


def _firsts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(length) == 0 for length in lengths])


# --------------------------------------------------------------------------------------------------------------- features


def _compared(
    recalibrator: Recalibrator, states: torch.Tensor, encoded: Encoded, record: Record, sample: Sample
) -> dict[str, Any]:
    """A sample's means over tokens of recalibrated states, and some tokens' states before and after the Recalibrator."""
    pre = recalibrator.rec_proj_pre
    assert record.question is not None and pre is not None
    device = states.device

    def projected(hidden: np.ndarray) -> torch.Tensor:
        return pre(torch.from_numpy(hidden).to(device)).float()

    turn = record.answer.turn
    own_rows = np.diff(turn, prepend=-1) == 0  # all but the first row of each turn: the answer's own states
    teacher_a = projected(record.answer.hidden[own_rows])
    teacher_q = projected(record.question.hidden)
    turns = range(int(turn.max()) + 1)
    split_a = [teacher_a[torch.from_numpy(turn[own_rows] == t)] for t in turns]
    split_q = [teacher_q[torch.from_numpy(record.question.turn == t)] for t in turns]
    segments = [(states[start:end], is_answer) for start, end, is_answer in encoded.segments()]
    sequences = {
        "own": segments,
        "splice": [
            (split_a[i // 2] if is_answer else piece, is_answer) for i, (piece, is_answer) in enumerate(segments)
        ],
        "teacher": [pair for q, a in zip(split_q, split_a, strict=True) for pair in ((q, False), (a, True))],
    }
    result: dict[str, Any] = {"key": sample.key, "category": sample.category}
    for name, pieces in sequences.items():
        before = torch.cat([piece for piece, _ in pieces])  # [L, D_s]
        answers = np.concatenate([np.full(len(piece), is_answer) for piece, is_answer in pieces])
        body = before[None]
        if recalibrator.rec_body is not None:
            body = recalibrator.rec_body(inputs_embeds=body, use_cache=False).last_hidden_state
        after = recalibrator.rec_norm(recalibrator.rec_proj_post(body))[0].float()  # [L, D_t]
        rows = {"question": ~answers, "answer": answers, "all": np.ones(len(answers), bool)}
        result[name] = torch.stack([after[torch.from_numpy(rows[pooling])].mean(0) for pooling in POOLINGS])
        if name != "splice":
            chosen = np.concatenate(
                [spread(np.flatnonzero(rows[part]), TOKENS // 2) for part in ("question", "answer")]
            )
            who = "student" if name == "own" else "teacher"
            result[f"{who} before"], result[f"{who} after"] = before[chosen].cpu(), body[0, chosen].float().cpu()
            result[f"{who} is answer"] = answers[chosen]
    return result


def _similarity(compared: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Cosines `[S, S]` by "pairing.pooling": row i is the student's sample i, column j the teacher's sample j."""
    if len(compared) < 2:
        return {}
    teacher = F.normalize(torch.stack([item["teacher"] for item in compared]), dim=-1)  # [S, 3, D_t]
    found: dict[str, np.ndarray] = {}
    for pairing in PAIRINGS:
        ours = F.normalize(torch.stack([item[pairing] for item in compared]), dim=-1)
        cosines = torch.einsum("ipd,jpd->pij", ours, teacher).cpu().numpy()
        found |= {f"{pairing}.{pooling}": cosines[p] for p, pooling in enumerate(POOLINGS)}
    return found


def _tokens(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens' states `[P, C]` by group, in the main directions of all groups together: distances are those of the states.

    All stand in the space of the student's states: before the Recalibrator as z of the student and pre(z) of the teacher,
    after it as its decoder blocks leave them, before the projection to the teacher's size.
    """
    groups = [f"{who} {when}" for who in ("student", "teacher") for when in ("before", "after")]
    if len(compared) < 2:
        return {"tokens": {}, "token_is_answer": {}}
    states = {group: torch.cat([item[group] for item in compared]) for group in groups}
    everything = torch.cat(list(states.values()))
    everything = everything - everything.mean(0)
    if not everything.isfinite().all():
        return {"tokens": {}, "token_is_answer": {}}
    u, s, _ = torch.linalg.svd(everything, full_matrices=False)
    places = (u * s)[:, :COMPONENTS].split([len(value) for value in states.values()])
    return {
        "tokens": {group: place.numpy() for group, place in zip(groups, places, strict=True)},
        "token_is_answer": {
            who: np.concatenate([item[f"{who} is answer"] for item in compared]) for who in ("student", "teacher")
        },
    }
