"""The chunked losses against plain autograd in float64, value and gradient, in named regimes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genrecal.cache.draws import count_draws, draw
from genrecal.objectives.losses import (
    Exact,
    Sampled,
    TopK,
    chunked_cross_entropy,
    head_losses,
    head_losses_naive,
)
from genrecal.shards import head as head_module
from genrecal.shards.head import FrozenHead, LogitTransform, linear_float32

D = 16
TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=4.0),
    "scaled": LogitTransform(scale=0.5, divisor=3.0),
    "all": LogitTransform(scale=2.0, divisor=3.0, softcap=5.0),
}
# name -> (rows, head rows, spread of the logits, stored logits, rows a chunk)
REGIMES = {
    "usual": (13, 97, 3.0, 8, 4),
    "flat": (13, 97, 0.01, 8, 4),
    "peaked": (13, 97, 12.0, 8, 4),
    "saturated": (13, 97, 60.0, 8, 4),
    "one row": (1, 97, 3.0, 8, 4),
    "odd chunk": (13, 97, 3.0, 8, 5),
    "one chunk": (13, 97, 3.0, 8, 256),
    "one logit": (13, 97, 3.0, 1, 4),
    "k = V": (13, 97, 3.0, 97, 4),
    "k = V - 1": (13, 97, 3.0, 96, 4),
}


def problem(rows, vocab, spread, *, bias=False, transform=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = FrozenHead(
        weight=(normal(vocab, D) * spread / D**0.5).to(dtype),
        bias=normal(vocab).to(dtype) if bias else None,
        transform=transform or LogitTransform(),
        vocab_size=vocab,
    )
    hidden = normal(rows, D).to(dtype)
    teacher = (hidden.double() + 0.5 * normal(rows, D)).to(dtype)
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    return head, hidden, teacher, ids


def topk_of(head, teacher, k):
    logits = head.logits(teacher)
    values, ids = logits.topk(k, -1)
    return TopK(ids=ids, log_probs=values - logits.logsumexp(-1, keepdim=True))


def sampled_of(logits, draws, *, seed=0):
    """Sampled targets of float32 logits `[N, V]`, through the cache job's own functions."""
    numbers = torch.from_numpy(np.random.default_rng(seed).random((len(logits), draws)))
    ids, entropy = draw(logits, numbers)
    distinct, counts = (torch.from_numpy(part) for part in count_draws(ids.numpy()))
    return Sampled.of_counts(distinct.long(), counts, entropy.float())


def both(head, hidden, ids, target, *, chunk_rows, **weights):
    """(losses, gradient) of the chunked function in float32 and of the naive one in float64."""
    upstream = torch.linspace(0.5, 1.5, len(ids))
    fast_input = hidden.clone().requires_grad_()
    fast = head_losses(fast_input, head, ids, target, chunk_rows=chunk_rows, **weights)
    (fast.weighted * upstream).sum().backward()
    wide = FrozenHead(
        weight=head.weight.double(),
        bias=None if head.bias is None else head.bias.double(),
        transform=head.transform,
        vocab_size=head.vocab_size,
    )
    slow_input = hidden.double().requires_grad_()
    slow = head_losses_naive(slow_input, wide, ids, target, **weights)
    (slow.weighted * upstream.double()).sum().backward()
    return fast, fast_input.grad, slow, slow_input.grad


def assert_close(got, wanted, *, rtol=2e-5, atol=2e-5):
    assert torch.isfinite(got).all()
    scale = wanted.abs().max().clamp_min(1.0)
    assert (got.double() - wanted).abs().max() <= atol * scale + rtol * wanted.abs().max(), (got, wanted)


@pytest.mark.parametrize("kind", ["topk", "exact", "sampled", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("regime", REGIMES)
def test_value_and_gradient_equal_the_naive_ones(regime, transform, kind):
    rows, vocab, spread, k, chunk_rows = REGIMES[regime]
    head, hidden, teacher, ids = problem(rows, vocab, spread, bias=True, transform=TRANSFORMS[transform])
    target = {
        "topk": topk_of(head, teacher, k), "exact": Exact(hidden=teacher), "none": None,
        "sampled": sampled_of(head.logits(teacher), 2 * k),
    }[kind]  # fmt: skip
    fast, gradient, slow, slow_gradient = both(
        head, hidden, ids, target, chunk_rows=chunk_rows, ce_weight=0.7, kl_weight=1.3
    )
    assert_close(fast.ce, slow.ce)
    # A tail of 1 - sum(p) carries float32's rounding of the stored probabilities; both sides get the same ones.
    assert_close(fast.kl, slow.kl, atol=1e-4 if kind == "topk" else 2e-5)
    assert_close(fast.weighted.detach(), slow.weighted.detach(), atol=1e-4)
    assert_close(gradient, slow_gradient, atol=1e-4)


def test_bfloat16_head_and_states_lose_no_more_than_their_own_rounding():
    head, hidden, teacher, ids = problem(31, 1000, 4.0, dtype=torch.bfloat16)
    target = topk_of(head, teacher, 16)
    fast, gradient, slow, slow_gradient = both(head, hidden, ids, target, chunk_rows=8)
    assert gradient.dtype == torch.bfloat16
    assert_close(fast.ce, slow.ce, atol=1e-5)  # products of bfloat16 summed in float32
    assert_close(gradient.float(), slow_gradient, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["topk", "exact", "sampled"])
def test_real_vocabulary(kind):
    head, hidden, teacher, ids = problem(5, 152_064, 4.0, transform=TRANSFORMS["all"])
    target = {
        "topk": lambda: topk_of(head, teacher, 64),
        "exact": lambda: Exact(hidden=teacher),
        "sampled": lambda: sampled_of(head.logits(teacher), 50),
    }[kind]()
    fast, gradient, slow, slow_gradient = both(head, hidden, ids, target, chunk_rows=2)
    assert_close(fast.ce, slow.ce)
    assert_close(fast.kl, slow.kl, atol=1e-4)
    assert_close(gradient, slow_gradient, atol=1e-4)


@pytest.mark.parametrize("certain", [30.0, 300.0, 3000.0])
def test_a_student_certain_of_what_the_teacher_doubts(certain):
    """Q, the student's mass outside the top k, is e**-certain, that of the teacher a third: P / Q overflows float32."""
    weight = torch.tensor([1.0] * 2 + [0.0, 2**-7] * 4, dtype=torch.float64)[:, None]
    head = FrozenHead(weight=weight.float(), vocab_size=10)
    hidden = torch.full((2, 1), certain)
    log_probs = torch.full((2, 2), 1 / 3).log()
    target = TopK(ids=torch.tensor([[0, 1], [1, 0]]), log_probs=log_probs)
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses = head_losses(leaf, head, torch.tensor([0, 9]), target, ce_weight=0.0)
    losses.weighted.sum().backward()
    log_q = (exact @ weight.T).log_softmax(-1)
    rest = log_q.scatter(1, target.ids, float("-inf")).logsumexp(-1)
    log_p = log_probs.double()
    kl = (log_p.exp() * (log_p - log_q.gather(1, target.ids))).sum(-1) + (log_p[:, 0] - rest) / 3
    kl.sum().backward()
    assert_close(losses.kl, kl.detach())
    assert_close(leaf.grad, exact.grad, atol=max(2e-5, 1e-7 * certain))  # float32's spacing at such logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_a_narrow_weight_is_widened_block_by_block(monkeypatch, dtype, rows):
    """The product is that of the whole weight in float32, and gradients flow as through any product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 48, generator=generator, requires_grad=True)
    weight = torch.randn(1003, 48, generator=generator).to(dtype)
    whole = linear_float32(x, weight)
    assert torch.equal(whole, torch.nn.functional.linear(x, weight.float()))
    whole.sum().backward()
    assert torch.allclose(x.grad, weight.float().sum(0).expand(rows, -1), atol=1e-4)
    for values in (1, 48 * 7, 48 * 1003, 2**20):
        monkeypatch.setattr(head_module, "WIDENED", values)
        found = linear_float32(x.detach(), weight)
        assert found.dtype == torch.float32 and torch.allclose(found, whole, atol=5e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_sums_narrow_products_in_float32(dtype):
    """Logits near 256 would be rounded to whole numbers in bfloat16; a sum of 8192 products in bfloat16 is worse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 8192, generator=generator).to("cuda", dtype)
    weight = (torch.rand(1000, 8192, generator=generator) / 8).to("cuda", dtype)
    got = linear_float32(x, weight)
    assert got.dtype == torch.float32
    wanted = x.double() @ weight.double().T
    assert ((got - wanted).abs() / wanted).max() < 1e-5


def test_bucketed_kl_is_never_above_the_exact_one_and_equals_it_at_all_logits():
    head, hidden, teacher, ids = problem(64, 200, 3.0)
    exact = head_losses(hidden, head, ids, Exact(hidden=teacher)).kl
    previous = torch.zeros_like(exact)
    for k in (1, 4, 16, 64, 199):
        bucketed = head_losses(hidden, head, ids, topk_of(head, teacher, k)).kl
        assert (bucketed <= exact + 1e-4).all()
        assert (bucketed >= previous - 1e-4).all()  # splitting a bucket only adds
        previous = bucketed
    assert torch.allclose(head_losses(hidden, head, ids, topk_of(head, teacher, 200)).kl, exact, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ sampled targets


def dense_kl(hidden, head, p):
    """float64: KL(p || softmax(head(hidden))) `[N]` and its gradient in `hidden` `[N, D]`, written out."""
    leaf = hidden.double().requires_grad_()
    log_q = (leaf @ head.weight.double().T).log_softmax(-1)
    kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    kl.sum().backward()
    return kl.detach(), leaf.grad


def estimates(hidden, head, proposal, entropy, *, draws, trials, seed=0):
    """`trials` estimates from draws of `proposal` `[N, V]` (logits): values `[T, N]` and gradients `[T, N, D]`, float64."""
    rows = len(hidden)
    target = sampled_of(proposal.repeat(trials, 1), draws, seed=seed)
    target = Sampled(ids=target.ids, weights=target.weights, entropy=entropy.float().repeat(trials))
    leaf = hidden.repeat(trials, 1).requires_grad_()
    ids = torch.zeros(len(leaf), dtype=torch.int64)
    losses = head_losses(leaf, head, ids, target, ce_weight=0.0)
    losses.weighted.sum().backward()
    return losses.kl.double().view(trials, rows), leaf.grad.double().view(trials, rows, -1)


def off_by(samples, exact):
    """How many standard errors the means over trials are off, at most."""
    error = samples.std(0) / len(samples) ** 0.5
    return ((samples.mean(0) - exact).abs() / error).max().item()


@pytest.mark.parametrize(("draws", "spread"), [(1, 3.0), (8, 3.0), (50, 3.0), (8, 0.5), (8, 8.0)])
def test_sampled_kl_is_unbiased_in_value_and_gradient(draws, spread):
    """Mean over 4000 independent sets of draws, against the dense float64 formula; a renormalised top k fails the same."""
    head, hidden, teacher, _ = problem(6, 97, spread)
    logits = head.logits(teacher)
    p = logits.double().softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    exact, exact_gradient = dense_kl(hidden, head, p)
    kl, gradient = estimates(hidden, head, logits, entropy, draws=draws, trials=4000)
    assert off_by(kl, exact) < 4
    assert off_by(gradient, exact_gradient) < 4.5  # the largest of 96
    top = logits.topk(8, -1).indices
    renormalised = torch.full_like(logits, float("-inf")).scatter(1, top, logits.gather(1, top))
    kl, gradient = estimates(hidden, head, renormalised, entropy, draws=draws, trials=4000)
    if spread < 8:  # else the top 8 are all there is
        assert off_by(kl, exact) > 8 and off_by(gradient, exact_gradient) > 8


def test_sampled_kl_of_teacher_equal_student_is_zero_in_expectation_and_not_by_itself():
    head, hidden, _, ids = problem(6, 97, 3.0)
    logits = head.logits(hidden)
    p = logits.double().softmax(-1)
    kl, gradient = estimates(hidden, head, logits, -torch.special.xlogy(p, p).sum(-1), draws=8, trials=4000)
    assert off_by(kl, 0.0) < 4 and off_by(gradient, 0.0) < 4.5
    assert (kl < 0).any() and (kl > 0).any() and kl.std() > 0.1
    certain = head_losses(hidden, FrozenHead(weight=1e3 * head.weight, vocab_size=97), ids, sampled_of(1e3 * logits, 8))
    assert certain.kl.abs().max() < 1e-6  # nothing is left to chance


def test_ids_that_fill_a_row_up_add_nothing():
    head, hidden, teacher, ids = problem(6, 97, 3.0)
    target = sampled_of(head.logits(teacher), 8)
    assert (target.weights == 0).any()
    elsewhere = Sampled(
        ids=torch.where(target.weights > 0, target.ids, 5), weights=target.weights, entropy=target.entropy
    )
    results = []
    for each in (target, elsewhere):
        leaf = hidden.clone().requires_grad_()
        losses = head_losses(leaf, head, ids, each)
        losses.weighted.sum().backward()
        results.append((losses.kl, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_teacher_equal_student_gives_zero():
    head, hidden, _, ids = problem(32, 300, 5.0)
    for target in (Exact(hidden=hidden), topk_of(head, hidden, 8)):
        leaf = hidden.clone().requires_grad_()
        losses = head_losses(leaf, head, ids, target, ce_weight=0.0)
        losses.weighted.sum().backward()
        assert losses.kl.abs().max() < 1e-5
        assert leaf.grad.abs().max() < 1e-5


def test_the_head_gets_no_gradient():
    head, hidden, teacher, ids = problem(4, 50, 3.0)
    head.weight.requires_grad_()
    head_losses(hidden.requires_grad_(), head, ids, Exact(hidden=teacher)).weighted.sum().backward()
    assert head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_chunked_cross_entropy_equals_the_naive_one(transform, chunk_rows, trained):
    torch.manual_seed(0)
    head, rows = torch.nn.Linear(D, 60).double().requires_grad_(trained), 11
    hidden, ids = torch.randn(rows, D, dtype=torch.float64), torch.randint(0, 60, (rows,))
    gradients = []
    for function in (
        lambda x: chunked_cross_entropy(x, head, TRANSFORMS[transform], ids, chunk_rows=chunk_rows),
        lambda x: F.cross_entropy(TRANSFORMS[transform](head(x)), ids, reduction="none"),
    ):
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        value = function(leaf)
        (value * torch.arange(1.0, rows + 1)).sum().backward()
        assert (head.weight.grad is not None) == trained
        parts = [p.grad.clone() for p in head.parameters()] if trained else []
        gradients.append((value.detach().double(), leaf.grad, *parts))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_logits_are_float32_inside_autocast(trained):
    """Rounded to bfloat16 they would move a token's loss by up to 0.06 here, and a bfloat16 1/N its gradient by 0.2 %."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(D, 97, bias=True)
    head.weight.data = 3 * torch.randn(97, D, generator=generator)
    head.requires_grad_(trained)
    hidden = torch.randn(13, D, generator=generator).to(torch.bfloat16).requires_grad_()
    ids = torch.randint(0, 97, (13,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = chunked_cross_entropy(hidden, head, LogitTransform(), ids, chunk_rows=4)
        (losses.sum() / 387).backward()
    whole = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(whole, weight, head.bias.detach().double()), ids, reduction="none")
    (expected.sum() / 387).backward()
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), whole.grad.to(torch.bfloat16).double(), rtol=1e-2, atol=1e-6)
    if trained:
        assert torch.allclose(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)
