"""Losses through a frozen head: cross-entropy on the given token and KL from the teacher, chunk by chunk.

`head_losses` never holds more than some rows of logits, forward or backward; `head_losses_naive` is the same in
plain autograd, and the tests hold the two together in value and gradient.

Letters: N rows, r rows of a chunk, D hidden size, V head rows, k stored logits a row, K draws a row.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from genrecal.shards.head import FrozenHead, LogitTransform, linear_float32

CHUNK_BYTES = 2**28  # of float32 logits: with fewer rows the head's weight is read too often, more gain no speed


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


def rows_of(target: Target, rows: "slice | torch.Tensor") -> Target:
    """A target at some of its rows."""
    if target is None:
        return None
    return dataclasses.replace(target, **{name: value[rows] for name, value in vars(target).items()})


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Per row, float32 `[N]`. Only `weighted` = ce_weight * ce + kl_weight * kl carries a gradient."""

    weighted: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def rows_at_once(num_logits: int) -> int:
    """How many rows of logits `CHUNK_BYTES` hold, a multiple of 64 where that many fit (441 -> 384 at V = 152,064)."""
    rows = CHUNK_BYTES // (4 * num_logits)
    return rows // 64 * 64 or max(rows, 1)


def head_losses(
    hidden: torch.Tensor,
    head: FrozenHead,
    target_ids: torch.Tensor,
    target: Target,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    chunk_rows: int = 0,
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
        chunk_rows: rows whose logits exist at once; 0 for as many as `CHUNK_BYTES` hold.
    """
    if target is None:
        kl_weight = 0.0
    with torch.autocast(hidden.device.type, enabled=False):  # logits are float32 whatever the blocks compute in
        weighted, ce, kl = _FrozenHeadLosses.apply(
            hidden, head, target_ids, target, ce_weight, kl_weight, chunk_rows or rows_at_once(head.weight.shape[0])
        )
    return RowLosses(weighted=weighted, ce=ce, kl=kl)


class _FrozenHeadLosses(torch.autograd.Function):
    """Works out the gradient while the logits of a chunk exist; backward only scales it.

    A chunk's logits are overwritten by exponentials and these by the gradient, which is a multiple of softmax(z) a row
    but at the few ids that a target names. So a chunk takes one `[r, V]` tensor (an Exact target two more, a softcap's
    slope one) and few passes over it.
    """

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
        if not hidden.is_cuda:  # there linear_float32 widens the weight: once, not for every chunk
            head = dataclasses.replace(head, weight=head.weight.float())
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = head.logits(hidden[rows])  # [r, V] float32
            slope = head.transform.slope(logits) if gradient is not None else 1.0
            ids = target_ids[rows, None]
            weights = (ce_weight, kl_weight) if gradient is not None else None
            z_target = logits.gather(1, ids)
            log_sum, kl[rows] = _kl_and_gradient_(logits, head, target, rows, weights)
            ce[rows] = (log_sum - z_target)[:, 0]
            if gradient is not None:
                logits.scatter_add_(1, ids, torch.full_like(z_target, -ce_weight))
                if isinstance(slope, torch.Tensor) or slope != 1.0:
                    logits.mul_(slope)
                gradient[rows] = linear_float32(logits, head.weight.t()).to(hidden.dtype)
            del logits, slope  # before the next chunk's are made
        ctx.gradient = gradient
        ctx.mark_non_differentiable(ce, kl)
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, d_weighted: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradient = ctx.gradient
        return ((gradient * d_weighted[:, None]).to(gradient.dtype), *(None,) * 6)


Weights = tuple[float, float] | None  # of cross-entropy and KL; None where no gradient is wanted


def _kl_and_gradient_(
    logits: torch.Tensor, head: FrozenHead, target: Target, rows: slice, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A chunk's logsumexp `[r, 1]` and KL `[r]`. The logits are overwritten:

    by d(ce_weight ce + kl_weight kl) / d logits, but for the -ce_weight at the target id, or by nothing of use.
    """
    if target is None:
        top, total = _exponentials_(logits)
        if weights:
            logits.mul_(weights[0] / total)
        return top + total.log(), 0.0
    if isinstance(target, TopK):
        return _topk_(logits, target.ids[rows], target.log_probs[rows], weights)
    if isinstance(target, Exact):
        return _exact_(logits, head.logits(target.hidden[rows]), weights)
    return _sampled_(logits, target.ids[rows], target.weights[rows], target.entropy[rows], weights)


def _exponentials_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(z - top) in place of the logits z; each row's `top` and the sum of its exponentials, `[r, 1]`."""
    top = logits.amax(-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)  # of a row that is all -inf
    return top, logits.sub_(top).exp_().sum(-1, keepdim=True)


def _topk_(
    logits: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k ids and the rest as one bucket.

    With the rest's mass P of the teacher and Q of softmax(z), dKL/dz_j = q_j - p_j at the k ids, and elsewhere
    q_j - P q_j / Q, the bucket's share of the softmax. Both logQ and q_j / Q come from the rest's own exponentials:
    1 - sum would lose all digits of a small Q, and P / Q overflow.
    """
    z = logits.gather(1, ids)
    top, total = _exponentials_(logits.scatter_(1, ids, float("-inf")))
    log_rest = top + total.log()
    log_sum = torch.logaddexp(log_rest, z.logsumexp(-1, keepdim=True))
    p, log_q = log_p.exp(), z - log_sum
    tail_p = _tail_mass(p, num_logits=logits.shape[-1])[:, None]
    kl = (p * (log_p - log_q)).sum(-1, keepdim=True)
    kl = kl + torch.where(tail_p > 0, tail_p * (tail_p.clamp_min(1e-38).log() + log_sum - log_rest), 0.0)
    if weights:
        ce_weight, kl_weight = weights
        softmax = ce_weight + kl_weight * (p.sum(-1, keepdim=True) + tail_p)  # p and the tail: 1, but for rounding
        logits.mul_(softmax * (top - log_sum).exp() - kl_weight * tail_p / total.clamp_min(1))
        logits.scatter_(1, ids, softmax * log_q.exp() - kl_weight * p)
    return log_sum, kl[:, 0]


def _tail_mass(p: torch.Tensor, *, num_logits: int) -> torch.Tensor:
    """The teacher's mass outside its top k, `[r]`; none where the top k is the whole vocabulary."""
    tail = (1 - p.sum(-1)).clamp_min(0)
    return torch.zeros_like(tail) if p.shape[-1] == num_logits else tail


def _exact_(logits: torch.Tensor, teacher: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole vocabulary: kl = sum_v p_v (z^t_v - z_v) - log sum exp z^t + log sum exp z; dKL/dz = q - p."""
    difference = teacher - logits
    top, total = _exponentials_(logits)
    log_sum = top + total.log()
    top_p, total_p = _exponentials_(teacher)
    kl = difference.mul_(teacher).sum(-1, keepdim=True) / total_p - (top_p + total_p.log()) + log_sum
    if weights:
        ce_weight, kl_weight = weights
        logits.mul_((ce_weight + kl_weight) / total).sub_(teacher.mul_(kl_weight / total_p))
    return log_sum, kl[:, 0]


def _sampled_(
    logits: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, entropy: torch.Tensor, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate of the KL; dKL/dz = q - shares, the shares of the draws being what p is."""
    z = logits.gather(1, ids)
    top, total = _exponentials_(logits)
    log_sum = top + total.log()
    kl = -(shares * (z - log_sum)).sum(-1) - entropy
    if weights:
        ce_weight, kl_weight = weights
        logits.mul_((ce_weight + kl_weight) / total)
        # An id that only fills a row up is there more than once, with share 0; scatter_add takes that.
        logits.scatter_add_(1, ids, -kl_weight * shares)
    return log_sum, kl


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
    transform: LogitTransform,
    target_ids: torch.Tensor,
    *,
    chunk_rows: int = 0,
) -> torch.Tensor:
    """Cross-entropy of each row through a head that may be trained itself, float32 `[N]`; arguments as `head_losses`.

    The student's own loss. Of a head that is trained, a chunk's logits are thrown away and computed again in the
    backward pass, so that `[N, V]` never exists whole; autograd does the rest, the head's gradient included (zeros
    without rows). A frozen one saves that: `head_losses` works out the gradient at once.
    """
    if not head.weight.requires_grad:
        frozen = FrozenHead(weight=head.weight, bias=head.bias, transform=transform, vocab_size=head.weight.shape[0])
        return head_losses(hidden, frozen, target_ids, None, chunk_rows=chunk_rows).weighted
    chunk_rows = chunk_rows or rows_at_once(head.out_features)
    pieces = [
        torch.utils.checkpoint.checkpoint(
            _cross_entropy, hidden[start : start + chunk_rows], head, transform, target_ids[start : start + chunk_rows],
            use_reentrant=False,
        )
        for start in range(0, max(hidden.shape[0], 1), chunk_rows)
    ]  # fmt: skip
    return torch.cat(pieces)


def _cross_entropy(
    hidden: torch.Tensor, head: torch.nn.Linear, transform: LogitTransform, ids: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(trained_logits(hidden, head, transform), ids, reduction="none")


def trained_logits(hidden: torch.Tensor, head: torch.nn.Linear, transform: LogitTransform) -> torch.Tensor:
    """Logits float32 `[r, V]` of a head that may be trained, under autocast too.

    On CUDA under autocast the operands are as narrow as it says, and the sums float32; elsewhere all is float32.
    """
    device = hidden.device.type
    narrow = torch.get_autocast_dtype(device) if hidden.is_cuda and torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        # Not a call of the module: ZeRO-3 wants the same calls on all ranks, and they have different numbers of chunks.
        logits: torch.Tensor = _LinearFloat32.apply(hidden, head.weight, narrow)
        return transform(logits if head.bias is None else logits + head.bias.float())


class _LinearFloat32(torch.autograd.Function):
    """`linear_float32` with gradients of both operands, each product summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, narrow: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.narrow = narrow
        return linear_float32(x.to(narrow), weight.to(narrow))

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        slope, d_x, d_weight = slope.to(ctx.narrow), None, None
        with torch.autocast(slope.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                d_x = linear_float32(slope, weight.to(ctx.narrow).t()).to(x.dtype)
            if ctx.needs_input_grad[1]:
                d_weight = linear_float32(slope.t(), x.to(ctx.narrow).t()).to(weight.dtype)
        return d_x, d_weight, None
