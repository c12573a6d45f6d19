"""Losses through a frozen head: cross-entropy on the given token and KL from the teacher, chunk by chunk.

`head_losses` never holds more than `chunk_rows` rows of logits, forward or backward; `head_losses_naive` is the same in
plain autograd, and the tests hold the two together in value and gradient.

Letters: N rows, r rows of a chunk, D hidden size, V head rows, k stored logits a row, K draws a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from genrecal.shards.head import FrozenHead, linear_float32


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The teacher's k largest logits of each row and the rest as one bucket.

    ids: int64 `[N, k]`; log_probs: float32 `[N, k]`, exact (logit - logsumexp over all V).
    """

    ids: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The teacher's state at each row, `[N, D]`: its whole distribution is recomputed through the head."""

    hidden: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Draws with replacement from the teacher's own distribution at each row, and that distribution's entropy.

    ids: int64 `[N, K]`; weights: float32 `[N, K]`, the share of the row's draws that each id has, adding up to 1 (0 where an
    id only fills the row up); entropy: float32 `[N]`, nats, exact.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of_counts(cls, ids: torch.Tensor, counts: torch.Tensor, entropy: torch.Tensor) -> "Sampled":
        """From how often each id was drawn, `[N, K]`."""
        counts = counts.float()
        return cls(ids=ids, weights=counts / counts.sum(-1, keepdim=True), entropy=entropy)


Target = TopK | Exact | Sampled | None


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Per row, float32 `[N]`. Only `weighted` = ce_weight * ce + kl_weight * kl carries a gradient."""

    weighted: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def head_losses(
    hidden: torch.Tensor,
    head: FrozenHead,
    target_ids: torch.Tensor,
    target: Target,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    chunk_rows: int = 256,
) -> RowLosses:
    """Cross-entropy and forward KL (teacher first, temperature 1, summed over the vocabulary) of each row.

        ce = -log softmax(z)[target_id]            z = head(hidden), softcap and scale included
        kl = sum_v p_v (log p_v - log softmax(z)_v)

    With a TopK target the sum runs over the k ids and one bucket for the rest, which is never above the exact KL and
    equals it at k = V (paper, Algorithms 1-3; the bucket is ours). With a Sampled target kl is an estimate,

        kl = -sum_i weights_i log softmax(z)_i - entropy

    whose expectation over the draws is the exact KL, as that of its gradient is the exact one (arXiv 2503.16870). It may
    be negative.

    Args:
        hidden: `[N, D]`, any float dtype; the gradient comes back in it.
        target_ids: int64 `[N]`.
        target: None leaves the KL out (zeros).
    """
    if target is None:
        kl_weight = 0.0
    with torch.autocast(hidden.device.type, enabled=False):  # logits are float32 whatever the blocks compute in
        weighted, ce, kl = _FrozenHeadLosses.apply(hidden, head, target_ids, target, ce_weight, kl_weight, chunk_rows)
    return RowLosses(weighted=weighted, ce=ce, kl=kl)


class _FrozenHeadLosses(torch.autograd.Function):
    """Works out the gradient while the logits of a chunk exist; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: FrozenHead,
        target_ids: torch.Tensor,
        target: Target,
        ce_weight: float,
        kl_weight: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows = hidden.shape[0]
        ce = torch.zeros(num_rows, dtype=torch.float32, device=hidden.device)
        kl = torch.zeros_like(ce)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = head.logits(hidden[rows])  # [r, V] float32
            slope = head.transform.slope(logits)
            log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
            ids = target_ids[rows, None]
            ce[rows] = -log_q.gather(1, ids)[:, 0]
            d_kl: torch.Tensor | None = None
            if target is not None:
                kl[rows], d_kl = _kl(log_q, head, target, rows, gradient is not None)
            if gradient is None:
                continue
            d_logits = log_q.exp_()  # softmax(z)
            d_logits.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
            d_logits.mul_(ce_weight)
            if d_kl is not None and kl_weight:
                d_logits.add_(d_kl, alpha=kl_weight)
            del d_kl
            d_logits.mul_(slope)
            gradient[rows] = linear_float32(d_logits, head.weight.t()).to(hidden.dtype)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(ce, kl)
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, d_weighted: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradient = ctx.gradient
        return (gradient * d_weighted[:, None].to(gradient.dtype), *(None,) * 6)


def _kl(
    log_q: torch.Tensor, head: FrozenHead, target: TopK | Exact | Sampled, rows: slice, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL of some rows of the target, `[r]`, and its gradient in the logits, `[r, V]`."""
    if isinstance(target, TopK):
        return _topk_kl(log_q, target.ids[rows], target.log_probs[rows], needs_gradient)
    if isinstance(target, Exact):
        return _exact_kl(log_q, head, target.hidden[rows], needs_gradient)
    return _sampled_kl(log_q, target.ids[rows], target.weights[rows], target.entropy[rows], needs_gradient)


def _topk_kl(
    log_q: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL over k ids and the rest as one bucket, `[r]`, and its gradient in the logits, `[r, V]`.

    With q's tail Q = 1 - sum_k q and p's tail P: dKL/dz_j = q_j - p_j for stored j, and q_j (1 - P / Q) for the others
    (the bucket's share of the softmax).
    """
    p, log_q_k = log_p.exp(), log_q.gather(1, ids)
    tail_p = _tail_mass(p, num_logits=log_q.shape[-1])
    log_tail_q = _log_tail(log_q, ids)
    entropy_tail = torch.where(tail_p > 0, tail_p * (tail_p.clamp_min(1e-38).log() - log_tail_q), 0.0)
    kl = (p * (log_p - log_q_k)).sum(-1) + entropy_tail
    if not needs_gradient:
        return kl, None
    q = log_q.exp()
    ratio = torch.where(tail_p > 0, (tail_p.clamp_min(1e-38).log() - log_tail_q).exp(), 0.0)
    covered = p.sum(-1) + tail_p  # 1, but for rounding
    gradient = q * (covered - ratio)[:, None]
    gradient.scatter_(1, ids, q.gather(1, ids) * covered[:, None] - p)
    return kl, gradient


def _tail_mass(p: torch.Tensor, *, num_logits: int) -> torch.Tensor:
    """The teacher's mass outside its top k, `[r]`; none where the top k is the whole vocabulary."""
    tail = (1 - p.sum(-1)).clamp_min(0)
    return torch.zeros_like(tail) if p.shape[-1] == num_logits else tail


def _log_tail(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log of q's mass outside `ids`, `[r]`, from the tail itself: 1 - sum would lose all digits of a small tail.

    Where the ids cover the whole vocabulary there is no tail, and the lowest finite logarithm stands for it.
    """
    rest = log_q.scatter(1, ids, float("-inf"))
    return rest.logsumexp(-1).clamp_min(torch.finfo(log_q.dtype).min)


def _exact_kl(
    log_q: torch.Tensor, head: FrozenHead, teacher_hidden: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL over the whole vocabulary, `[r]`, and its gradient in the logits, q - p, `[r, V]`."""
    with torch.no_grad():
        log_p = head.logits(teacher_hidden).log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    return kl, log_q.exp().sub_(p) if needs_gradient else None


def _sampled_kl(
    log_q: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, entropy: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The estimate of the KL, `[r]`, and its gradient in the logits, `[r, V]`: q - weights, the weights being what p is."""
    kl = -(weights * log_q.gather(1, ids)).sum(-1) - entropy
    # An id that only fills a row up is there more than once, with weight 0; scatter_add takes that.
    return kl, log_q.exp().scatter_add_(1, ids, -weights) if needs_gradient else None


def head_losses_naive(
    hidden: torch.Tensor,
    head: FrozenHead,
    target_ids: torch.Tensor,
    target: Target,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
) -> RowLosses:
    """What `head_losses` computes, with whole logits and plain autograd, in the dtype of its inputs."""
    logits = head.transform(F.linear(hidden, head.weight.to(hidden.dtype), _as(head.bias, hidden)))
    log_q = logits.log_softmax(-1)
    ce = F.nll_loss(log_q, target_ids, reduction="none")
    kl = torch.zeros_like(ce)
    if isinstance(target, Exact):
        teacher = target.hidden.to(hidden.dtype)
        log_p = head.transform(F.linear(teacher, head.weight.to(hidden.dtype), _as(head.bias, hidden))).log_softmax(-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    elif isinstance(target, TopK):
        log_p = target.log_probs.to(hidden.dtype)
        p, q = log_p.exp(), log_q.exp()
        tail_p = _tail_mass(p, num_logits=logits.shape[-1])
        tail_q = q.scatter(1, target.ids, 0.0).sum(-1)
        kl = (p * (log_p - log_q.gather(1, target.ids))).sum(-1)
        kl = kl + torch.where(tail_p > 0, tail_p * (tail_p.clamp_min(1e-38).log() - tail_q.clamp_min(1e-38).log()), 0.0)
    elif isinstance(target, Sampled):
        p = torch.zeros_like(log_q).scatter_add(1, target.ids, target.weights.to(hidden.dtype))
        kl = -(p * log_q).sum(-1) - target.entropy.to(hidden.dtype)
    return RowLosses(weighted=ce_weight * ce + kl_weight * kl, ce=ce.detach(), kl=kl.detach())


def _as(bias: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(like.dtype)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    transform: Callable[[torch.Tensor], torch.Tensor],
    target_ids: torch.Tensor,
    *,
    chunk_rows: int = 256,
) -> torch.Tensor:
    """Cross-entropy of each row through a head that may be trained itself, float32 `[N]`.

    The student's own loss. A chunk's logits are thrown away and computed again in the backward pass, so that `[N, V]`
    never exists whole; autograd does the rest, the head's gradient included. Without rows that gradient is zeros.
    """
    pieces = [
        torch.utils.checkpoint.checkpoint(
            _cross_entropy, hidden[start : start + chunk_rows], head, transform, target_ids[start : start + chunk_rows],
            use_reentrant=False,
        )
        for start in range(0, max(hidden.shape[0], 1), chunk_rows)
    ]  # fmt: skip
    return torch.cat(pieces)


def _cross_entropy(
    hidden: torch.Tensor, head: torch.nn.Linear, transform: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    # Not a call of the module: ZeRO-3 wants the same calls on all ranks, and they have different numbers of chunks.
    logits = transform(F.linear(hidden, head.weight, head.bias))
    return F.cross_entropy(logits.float(), ids, reduction="none")
