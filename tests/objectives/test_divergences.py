"""The student's divergences from the teacher against dense formulas in float64, value and gradient, in named regimes."""

import numpy as np
import pytest
import torch

from genrecal.cache.draws import count_draws, draw
from genrecal.objectives.divergences import Divergence, student_losses
from genrecal.objectives.losses import Exact, Sampled, TopK, head_losses
from genrecal.shards.head import FrozenHead, LogitTransform

D_S, D_T, SHARED, SKEW = 12, 16, 90, 0.2
NAMES = ["kl", "reverse-kl", "skewed-kl", "uld"]
# name -> (rows, student's head rows, teacher's head rows, shared ids, spread of the logits, stored logits)
REGIMES = {
    "one head": (9, 90, 90, 90, 3.0, 8),
    "student's head padded": (9, 97, 90, 90, 3.0, 8),
    "teacher's head padded": (9, 90, 103, 90, 3.0, 8),
    "both padded": (9, 97, 103, 90, 3.0, 8),
    "flat": (9, 97, 103, 90, 0.01, 8),
    "peaked": (9, 97, 103, 90, 12.0, 8),
    "one logit": (9, 97, 103, 90, 3.0, 1),
    "k = V": (9, 97, 103, 90, 3.0, 103),
    "one row": (1, 97, 103, 90, 3.0, 8),
}
SOFTCAP = LogitTransform(scale=2.0, divisor=3.0, softcap=8.0)


def problem(rows, student_rows, teacher_rows, spread, *, seed=0):
    """Student's head and states, teacher's head and states, targets; float32, the student's near the teacher's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    head = torch.nn.Linear(D_S, student_rows)
    head.weight.data, head.bias.data = normal(student_rows, D_S) * spread / D_S**0.5, normal(student_rows) * spread / 9
    teacher = FrozenHead(weight=normal(teacher_rows, D_T) * spread / D_T**0.5, vocab_size=SHARED)
    ids = torch.randint(0, SHARED, (rows,), generator=generator)
    return head, normal(rows, D_S), teacher, normal(rows, D_T), ids


def topk_of(logits, k):
    values, ids = logits.topk(k, -1)
    return TopK(ids=ids, log_probs=values - logits.logsumexp(-1, keepdim=True))


def dense_buckets(z, p, stored, shared, name):
    """Row by row in float64 from the definition: z student logits [V_s], p the teacher's probabilities [V_t] over its head.

    stored: the ids whose probabilities are known, or None for all. The reverse KL's tail has 1e-6 at least.
    """
    if name == "uld":
        q = z.softmax(-1)
        q, p = (torch.nn.functional.pad(side.sort(descending=True)[0], (0, 200 - len(side))) for side in (q, p))
        if stored is None:
            return (p - q).abs().sum()
        k = len(stored)
        return (p[:k] - q[:k]).abs().sum() + (p[k:].sum() - q[k:].sum()).abs()
    q = z[:shared].softmax(-1)
    if stored is None:
        p = p[:shared] / p[:shared].sum()
    else:
        kept = [int(i) for i in stored if i < shared]
        rest = [i for i in range(shared) if i not in kept]
        p = p / (1 - sum(p[int(i)] for i in stored if i >= shared))
        tail = (1 - p[kept].sum()).clamp_min(1e-6 if name == "reverse-kl" else 1e-38)
        q, p = q[kept + rest], p[kept]
        if rest:
            q, p = torch.cat([q[: len(kept)], q[len(kept) :].sum()[None]]), torch.cat([p, tail[None]])
        else:
            p = p / p.sum()
    if name == "kl":
        return (p * (p.log() - q.log())).sum()
    if name == "reverse-kl":
        return (q * (q.log() - p.log())).sum()
    return (p * (p.log() - (SKEW * p + (1 - SKEW) * q).log())).sum()


def wide(head):
    copy = torch.nn.Linear(head.in_features, head.out_features).double()
    copy.load_state_dict(head.state_dict())
    return copy


def assert_close(got, wanted, atol):
    assert torch.isfinite(got).all()
    assert (got.double() - wanted.double()).abs().max() <= atol * wanted.abs().max().clamp_min(1.0), (got, wanted)


@pytest.mark.parametrize("kind", ["topk", "exact"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regime", REGIMES)
def test_value_and_gradient_are_those_of_the_dense_formula(regime, name, kind):
    rows, student_rows, teacher_rows, shared, spread, k = REGIMES[regime]
    head, hidden, teacher, states, ids = problem(rows, student_rows, teacher_rows, spread)
    logits = teacher.logits(states)
    target = topk_of(logits, k) if kind == "topk" else Exact(hidden=states)
    upstream = torch.linspace(0.5, 1.5, rows)

    exact_head, leaf = wide(head), hidden.double().requires_grad_()
    z, p = SOFTCAP(exact_head(leaf)), logits.double().softmax(-1)
    stored = [None] * rows
    if kind == "topk":  # as stored: a tail of 1 less their sum feels float32's rounding
        stored = target.ids
        p.scatter_(1, stored, target.log_probs.double().exp())
    counts = (torch.arange(rows) % 3 != 1).float()
    expected = torch.stack([dense_buckets(z[i], p[i], stored[i], shared, name) for i in range(rows)]) * counts
    ce = torch.nn.functional.cross_entropy(z, ids, reduction="none")
    ((0.7 * ce + 1.3 * expected) * upstream).sum().backward()

    for trained in (False, True):
        head.requires_grad_(trained)
        head.zero_grad()
        mine = hidden.clone().requires_grad_()
        losses = student_losses(
            mine, head, SOFTCAP, ids, target, Divergence(name=name, shared_ids=shared, skew=SKEW),
            teacher_head=teacher, counts=counts, ce_weight=0.7, kl_weight=1.3, chunk_rows=4,
        )  # fmt: skip
        (losses.weighted * upstream).sum().backward()
        assert_close(losses.ce, ce.detach(), 2e-5)
        assert_close(losses.kl, expected.detach(), 1e-4)
        assert_close(mine.grad, leaf.grad, 2e-4)
        assert (head.weight.grad is not None) == trained
        if trained:
            assert_close(head.weight.grad, exact_head.weight.grad, 2e-4)
            assert_close(head.bias.grad, exact_head.bias.grad, 2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_top_k_is_never_above_the_exact_value_and_all_of_them_equal_it(name):
    head, hidden, teacher, states, ids = problem(64, 97, 90, 3.0)
    head.requires_grad_(False)

    def value(target):
        divergence = Divergence(name=name, shared_ids=SHARED, skew=SKEW)
        return student_losses(hidden, head, LogitTransform(), ids, target, divergence, teacher_head=teacher).kl

    exact, previous = value(Exact(hidden=states)), torch.zeros(64)
    for k in (1, 4, 16, 64, 90):
        bucketed = value(topk_of(teacher.logits(states), k))
        assert (bucketed <= exact + 1e-4).all() and (bucketed >= previous - 1e-4).all()
        previous = bucketed
    assert torch.allclose(previous, exact, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "skewed-kl"])
@pytest.mark.parametrize("kind", ["topk", "exact"])
def test_what_heads_are_padded_with_counts_on_neither_side(kind, name):
    """Padding of huge logits on both sides changes neither value nor gradient of the divergence, if its ids are known."""
    head, hidden, teacher, states, ids = problem(9, 97, 103, 3.0)
    found = []
    for bias in (-50.0, 4.0):
        head.bias.data[SHARED:] = bias
        padded = FrozenHead(weight=teacher.weight, bias=torch.zeros(103), vocab_size=SHARED)
        padded.bias[SHARED:] = bias
        target = topk_of(padded.logits(states), 103) if kind == "topk" else Exact(hidden=states)
        leaf = hidden.clone().requires_grad_()
        losses = student_losses(
            leaf, head, LogitTransform(), ids, target, Divergence(name=name, shared_ids=SHARED, skew=SKEW),
            teacher_head=padded, ce_weight=0.0,
        )  # fmt: skip
        losses.weighted.sum().backward()
        found.append((losses.kl, leaf.grad))
        assert losses.ce.mean() > 0
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [60.0, 400.0])
def test_saturated_teachers_and_students_stay_finite(spread, name):
    """Probabilities of exactly 0 and 1 in float32 on both sides; a teacher that knows one token alone."""
    head, hidden, teacher, states, ids = problem(32, 97, 103, spread)
    head.requires_grad_(False)
    for target in (topk_of(teacher.logits(states), 4), Exact(hidden=states)):
        leaf = hidden.clone().requires_grad_()
        divergence = Divergence(name=name, shared_ids=SHARED)
        losses = student_losses(leaf, head, LogitTransform(), ids, target, divergence, teacher_head=teacher)
        losses.weighted.sum().backward()
        assert torch.isfinite(losses.kl).all() and torch.isfinite(leaf.grad).all()
        assert (losses.kl >= -1e-4).all()
        if name == "skewed-kl":  # by its definition at most -log skew
            assert (losses.kl <= -np.log(0.1) + 1e-4).all()
        if name == "uld":
            assert (losses.kl <= 2 + 1e-5).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_as_student_has_no_divergence_and_no_gradient(name):
    head, hidden, _, _, ids = problem(9, 90, 90, 3.0)
    head.requires_grad_(False)
    teacher = FrozenHead(weight=head.weight, bias=head.bias, vocab_size=90)
    for target in (topk_of(teacher.logits(hidden), 8), Exact(hidden=hidden)):
        leaf = hidden.clone().requires_grad_()
        divergence = Divergence(name=name, shared_ids=90)
        losses = student_losses(
            leaf, head, LogitTransform(), ids, target, divergence, teacher_head=teacher, ce_weight=0.0
        )
        losses.weighted.sum().backward()
        assert losses.kl.abs().max() < 1e-5
        if name != "uld":  # whose slope is not continuous there: a rounding error has the sign of a difference
            assert leaf.grad.abs().max() < 1e-4


def test_kl_of_unpadded_heads_is_that_of_the_recalibrators_loss():
    """Two ways to the same number: the student's head as a frozen one, in `head_losses`."""
    head, hidden, teacher, states, ids = problem(9, 90, 90, 3.0)
    head.requires_grad_(False)
    numbers = torch.from_numpy(np.random.default_rng(0).random((9, 20)))
    drawn, entropy = draw(teacher.logits(states), numbers)
    distinct, counts = (torch.from_numpy(part) for part in count_draws(drawn.numpy()))
    sampled = Sampled.of_counts(distinct.long(), counts, entropy.float())
    frozen = FrozenHead(weight=head.weight, bias=head.bias, vocab_size=90)
    for target in (topk_of(teacher.logits(states), 8), sampled):
        found = []
        for function in (
            lambda x, t: student_losses(x, head, LogitTransform(), ids, t, Divergence(name="kl", shared_ids=90)),
            lambda x, t: head_losses(x, frozen, ids, t),
        ):
            leaf = hidden.clone().requires_grad_()
            losses = function(leaf, target)
            losses.weighted.sum().backward()
            found.append((losses.ce, losses.kl, leaf.grad))
        for got, wanted in zip(*found, strict=True):
            assert_close(got, wanted, 1e-5)


def test_rows_where_the_teacher_is_wrong_can_be_left_out():
    head, hidden, teacher, states, _ = problem(9, 97, 90, 3.0)
    head.requires_grad_(False)
    ids = teacher.logits(states).argmax(-1)
    ids[::2] = (ids[::2] + 1) % 90
    target = Exact(hidden=states)
    some, every = (
        student_losses(
            hidden, head, LogitTransform(), ids, target,
            Divergence(name="kl", shared_ids=90, only_where_right=only), teacher_head=teacher,
        ).kl
        for only in (True, False)
    )  # fmt: skip
    assert (some[::2] == 0).all() and torch.equal(some[1::2], every[1::2]) and (some[1::2] > 0).all()


def test_whole_logits_never_exist():
    """No tensor of a chunked pass has more rows of a vocabulary than a chunk, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] >= SHARED:
                    self.rows = max(self.rows, tensor.shape[0])
            return result

    head, hidden, teacher, states, ids = problem(80, 97, 103, 3.0)
    for name in NAMES:
        for trained in (False, True):
            head.requires_grad_(trained)
            with Largest() as largest:
                leaf = hidden.clone().requires_grad_()
                student_losses(
                    leaf, head, LogitTransform(), ids, Exact(hidden=states),
                    Divergence(name=name, shared_ids=SHARED), teacher_head=teacher, chunk_rows=7,
                ).weighted.sum().backward()  # fmt: skip
            assert 7 <= largest.rows <= D_T  # a weight's transpose has D rows
