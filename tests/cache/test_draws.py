"""Draws: the rule of the format's page in plain numpy, the distribution that comes out, and what they do not depend on."""

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genrecal.cache.draws import count_draws, draw, uniforms

KEY = "00000012-chart-7"


def test_random_numbers_are_those_of_the_key_and_the_row_alone():
    numbers = uniforms(KEY, 6, 5)
    assert numbers.shape == (6, 5) and numbers.dtype == np.float64
    assert np.array_equal(uniforms(KEY, 4, 5), numbers[:4])  # other rows change nothing
    assert not np.isin(uniforms("00000013-chart-7", 6, 5), numbers).any()
    many = uniforms(KEY, 1000, 50)
    assert (many >= 0).all() and (many < 1).all() and abs(many.mean() - 0.5) < 4 / (12 * many.size) ** 0.5


def test_random_numbers_are_golden():
    """Philox4x64-10 by the 128-bit XXH3 of the key: any library that has both makes these, in any version."""
    assert xxhash.xxh3_128_hexdigest(KEY.encode()) == "fa2c10ffb83d11ce7191c78a79077f9b"
    assert uniforms(KEY, 1, 4)[0].tolist() == [
        0.2839140836164642,
        0.8473416314076369,
        0.3452651691005487,
        0.3044955887394172,
    ]


def test_draws_are_the_inverse_of_the_distribution_function():
    rng = np.random.default_rng(0)
    logits = (4 * rng.normal(size=(7, 301))).astype(np.float32)
    numbers = rng.random((7, 200))
    ids, entropy = draw(torch.from_numpy(logits), torch.from_numpy(numbers))
    for row in range(7):
        p = np.exp(logits[row].astype(np.float64) - logits[row].max())
        p /= p.sum()
        expected = [next(v for v, total in enumerate(np.cumsum(p)) if total > u) for u in numbers[row]]
        assert ids[row].tolist() == expected
        assert entropy[row].item() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)


def test_draws_at_the_ends():
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    certain = torch.full((1, 50), float("-inf"))
    certain[0, 17] = 3.0
    ids, entropy = draw(certain, ends)
    assert ids.tolist() == [[17, 17]] and entropy.item() == 0
    ids, entropy = draw(torch.zeros(1, 152_064), ends)
    assert ids.tolist() == [[0, 152_063]] and entropy.item() == pytest.approx(np.log(152_064), rel=1e-12)
    # Small probabilities keep theirs: 1e-9 each, which a running sum in float32 would lose next to 1.
    logits = torch.tensor([[0.0] + [np.log(1e-9)] * 1000])
    ids, _ = draw(logits, torch.tensor([[1 - 0.75e-6, 1 - 0.25e-6]], dtype=torch.float64))
    assert np.allclose(ids.numpy(), [[251, 751]], atol=1)


def test_draws_come_as_often_as_the_distribution_says():
    generator = np.random.default_rng(1)
    logits = torch.from_numpy((3 * generator.normal(size=(1, 40))).astype(np.float32))
    n = 200_000
    ids, _ = draw(logits, torch.from_numpy(uniforms(KEY, 1, n)))
    p = logits.double().softmax(-1)[0].numpy()
    share = np.bincount(ids[0].numpy(), minlength=40) / n
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / n)).all()


@given(hnp.arrays(np.int64, st.tuples(st.integers(0, 5), st.integers(1, 30)), elements=st.integers(0, 12)))
def test_counts_are_numpys(ids):
    distinct, counts = count_draws(ids)
    assert (distinct.dtype, counts.dtype) == (np.int32, np.uint16)
    assert distinct.shape == counts.shape == ids.shape
    for row, drawn in enumerate(ids):
        values, number = np.unique(drawn, return_counts=True)
        rest = [0] * (len(drawn) - len(values))
        assert distinct[row].tolist() == [*values.tolist(), *rest]
        assert counts[row].tolist() == [*number.tolist(), *rest]
