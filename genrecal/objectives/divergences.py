"""How far the student's own distribution is from the teacher's, row by row: distillation without a Recalibrator.

`student_losses` never holds more than some rows of logits, forward or backward. With a frozen head it computes the
gradient while they exist.

Letters: N rows, r rows of a chunk, V_s and V_t head rows of student and teacher, C ids that they share, k stored logits a
row, K draws a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from genrecal.objectives.cells import Cells, cell_kl
from genrecal.objectives.losses import Exact, RowLosses, Sampled, Target, TopK, rows_at_once, rows_of, trained_logits
from genrecal.shards.head import FrozenHead, LogitTransform, linear_float32

NOTHING = -1e4  # log-probability of a cell that neither side has
# The tail is 1 less k probabilities that come from a float32 logsumexp, so less than about this is noise. The reverse KL
# takes its logarithm.
LEAST_TAIL = 1e-6

Chunk = tuple[torch.Tensor, torch.Tensor]  # cross-entropy and divergence of some rows


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What student and teacher are compared by.

    Args:
        name: "kl", "reverse-kl", "skewed-kl": over the ids that both tokenizers share; "uld": over sorted probabilities;
            "byte-kl": over the cells of a `Cells` target.
        shared_ids: C; both distributions are taken over the ids below it alone ("byte-kl": the student's). "uld" needs none.
        skew: of "skewed-kl".
        only_where_right: rows count only where the teacher's likeliest id is the target.
    """

    name: str
    shared_ids: int = 0
    skew: float = 0.1
    only_where_right: bool = False


def student_losses(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    transform: LogitTransform,
    target_ids: torch.Tensor,
    target: Target | Cells,
    divergence: Divergence,
    *,
    teacher_head: FrozenHead | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    counts: torch.Tensor | None = None,
    chunk_rows: int = 0,
) -> RowLosses:
    """Cross-entropy of each row through the student's head, and its divergence from the teacher's distribution as `kl`.

    With p the teacher's probabilities and q the student's, each over the C shared ids alone, so that what a head is padded
    with counts on neither side:

        kl          sum_v p_v (log p_v - log q_v)                    Hinton et al. 2015; LLaVA-KD, arXiv 2410.16236
        reverse-kl  sum_v q_v (log q_v - log p_v)                    MiniLLM, arXiv 2306.08543
        skewed-kl   sum_v p_v (log p_v - log(a p_v + (1 - a) q_v))   DistiLLM, arXiv 2402.03898; a is `skew`
        uld         sum_i |p_(i) - q_(i)|                            ULD, arXiv 2402.12030; by falling probability, over
                                                                     each model's whole head, the shorter one with zeros

    A TopK target makes one cell of all but its k ids (uld: of all but the k likeliest of each side); by the log sum and
    the triangle inequality that is never above the exact value, and equals it where k ids are all. What a teacher's head is
    padded with stays in that cell if it is not among the k. A Sampled target gives kl alone, as in `head_losses`.

    Args:
        hidden: `[N, D_s]`, any float dtype. target_ids: int64 `[N]`. target: a teacher's row for each of them.
        teacher_head: reads the states of an Exact target.
        counts: float32 `[N]`, multiplies the rows' divergences; None for ones.
        chunk_rows: rows whose logits exist at once; 0 for as many as `genrecal.objectives.losses.CHUNK_BYTES` hold.
    """
    chunk_rows = chunk_rows or rows_at_once(head.out_features)

    def chunk(logits: torch.Tensor, rows: slice) -> Chunk:
        part = None if counts is None else counts[rows]
        some = target.rows(rows.start, rows.stop) if isinstance(target, Cells) else rows_of(target, rows)
        return _chunk(logits, target_ids[rows], some, divergence, teacher_head, part)

    if not head.weight.requires_grad:
        with torch.autocast(hidden.device.type, enabled=False):
            weighted, ce, kl = _FrozenHeadChunks.apply(
                hidden, head, transform, chunk, (ce_weight, kl_weight), chunk_rows
            )
        return RowLosses(weighted=weighted, ce=ce, kl=kl)

    def trained(part: torch.Tensor, rows: slice) -> Chunk:
        return chunk(trained_logits(part, head, transform), rows)

    starts = range(0, max(hidden.shape[0], 1), chunk_rows)
    pieces = [
        torch.utils.checkpoint.checkpoint(trained, hidden[rows], rows, use_reentrant=False)
        for rows in (slice(start, start + chunk_rows) for start in starts)
    ]
    ce, kl = (torch.cat(column) for column in zip(*pieces, strict=True))
    return RowLosses(weighted=ce_weight * ce + kl_weight * kl, ce=ce.detach(), kl=kl.detach())


class _FrozenHeadChunks(torch.autograd.Function):
    """Autograd from the losses to a chunk's logits, then by the head's weight to the states; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.nn.Linear,
        transform: LogitTransform,
        chunk: Callable[[torch.Tensor, slice], Chunk],
        weights: tuple[float, float],
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ce = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        kl = torch.zeros_like(ce)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight = head.weight.detach()
        if not hidden.is_cuda:  # there linear_float32 widens the weight: once, not for every chunk
            weight = weight.float()
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            raw = linear_float32(hidden[rows], weight)  # [r, V_s] float32
            if head.bias is not None:
                raw = raw + head.bias.float()
            with torch.set_grad_enabled(gradient is not None):
                raw.requires_grad_(gradient is not None)
                ce_rows, kl_rows = chunk(transform(raw), rows)
                if gradient is not None:
                    total = (weights[0] * ce_rows + weights[1] * kl_rows).sum()
                    (slope,) = torch.autograd.grad(total, raw)
                    gradient[rows] = linear_float32(slope, weight.t()).to(hidden.dtype)
                    del slope, total
            ce[rows], kl[rows] = ce_rows.detach(), kl_rows.detach()
            del raw, ce_rows, kl_rows  # before the next chunk's are made
        ctx.gradient = gradient
        ctx.mark_non_differentiable(ce, kl)
        return weights[0] * ce + weights[1] * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, d_weighted: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradient = ctx.gradient
        return ((gradient * d_weighted[:, None]).to(gradient.dtype), *(None,) * 5)


# ------------------------------------------------------------------------------------------------------- of one chunk


def _chunk(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    target: Target | Cells,
    divergence: Divergence,
    teacher_head: FrozenHead | None,
    counts: torch.Tensor | None,
) -> Chunk:
    """Cross-entropy and divergence of rows from the student's logits `[r, V_s]`, `[r]` each."""
    ce = F.cross_entropy(logits, target_ids, reduction="none")
    teacher = None
    if isinstance(target, Exact):
        assert teacher_head is not None
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            teacher = teacher_head.logits(target.hidden).to(logits.dtype)  # [r, V_t]
    if isinstance(target, Cells):
        kl = cell_kl(logits[:, : divergence.shared_ids], target)
    elif divergence.name == "uld":
        kl = _sorted_distance(logits, teacher, target)
    elif isinstance(target, Sampled):
        kl = _estimate(logits[:, : divergence.shared_ids], target)
    else:
        log_p, log_q = _cells(logits, teacher, target, divergence)
        kl = _compared(log_p, log_q, divergence)
    if divergence.only_where_right:
        assert teacher is not None
        right = (teacher.argmax(-1) == target_ids).to(kl.dtype)
        counts = right if counts is None else counts * right
    return ce, kl if counts is None else kl * counts.to(kl.dtype)


def _compared(log_p: torch.Tensor, log_q: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """The three divergences over cells whose probabilities add up to 1 on either side."""
    if divergence.name == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence.name == "reverse-kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    assert divergence.name == "skewed-kl"
    log_mixture = torch.logaddexp(log_p + math.log(divergence.skew), log_q + math.log1p(-divergence.skew))
    return (log_p.exp() * (log_p - log_mixture)).sum(-1)


def _cells(
    logits: torch.Tensor, teacher: torch.Tensor | None, target: Target, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of teacher and student, over all shared ids `[r, C]`, or over k of them and the rest `[r, k + 1]`."""
    logits = logits[:, : divergence.shared_ids]
    if teacher is not None:
        return teacher[:, : divergence.shared_ids].log_softmax(-1), logits.log_softmax(-1)
    assert isinstance(target, TopK)
    log_sum = logits.logsumexp(-1, keepdim=True)
    stored = target.log_probs.to(logits.dtype)
    shared = target.ids < divergence.shared_ids
    ids = torch.where(shared, target.ids, 0)
    log_q = torch.where(shared, logits.gather(1, ids) - log_sum, NOTHING)
    listed = torch.zeros(len(logits), divergence.shared_ids + 1, dtype=torch.bool, device=logits.device)
    listed.scatter_(1, torch.where(shared, target.ids, divergence.shared_ids), True)  # the last column: padding ids
    log_rest = logits.masked_fill(listed[:, :-1], float("-inf")).logsumexp(-1, keepdim=True) - log_sum
    least = LEAST_TAIL if divergence.name == "reverse-kl" else 1e-38
    log_tail = (1 - stored.double().exp().sum(-1, keepdim=True)).clamp_min(least).log().to(stored.dtype)
    whole = shared.sum(-1, keepdim=True) == divergence.shared_ids  # nothing is left for the rest
    log_tail, log_rest = (torch.where(whole, NOTHING, value) for value in (log_tail, log_rest))
    # A padding id among the k has no part in either distribution: what is left of the teacher's is brought to 1.
    log_p = torch.cat([torch.where(shared, stored, NOTHING), log_tail], -1).log_softmax(-1)
    return log_p, torch.cat([log_q, log_rest], -1)


def _estimate(logits: torch.Tensor, target: Sampled) -> torch.Tensor:
    """The forward KL from draws, over the shared ids; a draw of a padding id is left out."""
    weights = torch.where(target.ids < logits.shape[-1], target.weights, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-38)
    log_q = logits.gather(1, target.ids.clamp_max(logits.shape[-1] - 1)) - logits.logsumexp(-1, keepdim=True)
    return -(weights.to(logits.dtype) * log_q).sum(-1) - target.entropy.to(logits.dtype)


def _sorted_distance(logits: torch.Tensor, teacher: torch.Tensor | None, target: Target) -> torch.Tensor:
    """The 1-norm between probabilities sorted from the likeliest down: the Wasserstein-1 distance at a uniform cost."""
    q = logits.softmax(-1)
    if teacher is not None:
        width = max(q.shape[-1], teacher.shape[-1])
        sorted_p, sorted_q = (
            F.pad(side.sort(-1, descending=True).values, (0, width - side.shape[-1]))
            for side in (teacher.softmax(-1), q)
        )
        return (sorted_p - sorted_q).abs().sum(-1)
    assert isinstance(target, TopK)
    p = target.log_probs.to(q.dtype).exp()  # [r, k], by falling probability
    top_q = q.topk(min(p.shape[-1], q.shape[-1]), -1).values
    rest_p, rest_q = (1 - side.sum(-1) for side in (p, top_q))
    top_q = F.pad(top_q, (0, p.shape[-1] - top_q.shape[-1]))
    return (p - top_q).abs().sum(-1) + (rest_p - rest_q).abs()
