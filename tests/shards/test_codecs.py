"""The lossy codecs: bounds, odd values, an independent decoder, golden bytes, and what is measured of them."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shard_records import make_answer, make_question

from genrecal.errors import FormatError, SampleError
from genrecal.shards import codecs
from genrecal.shards.codecs import CODECS, GROUP, round_to_bf16
from genrecal.shards.fidelity import FidelityMeter, compare
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import answer_rows, question_rows, read_table, to_arrow
from genrecal.shards.rotation import block_size, hadamard, hadamard_reference, rotate, rotate_back, signs

WIDTHS = [1, 2, 7, 64, 100, 129, 896, 1536, 3584, 4096, 5120, 8192]
# The largest error of one value after rotation, in steps of its group, and the relative L2 error on Gaussian states.
GOLDEN_SIGNS = "---+--++---+++-++++-++++--------"
GOLDEN = {"bf16": "514e48ec51f2061a", "int8": "da5adbf08bede520", "int4": "4ff5a21d7d3d3d05"}
LOSSY = {"int8": (0.5, 0.008), "int4": (1.0, 0.11)}


def gaussian(rows, width, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def round_trip(name, states):
    codec = CODECS[name]
    facts = codec.facts(states.shape[1])
    return codec.decode(codec.encode(states, facts), facts)


def decoded_by_the_page(name, columns, facts):
    """The decoder as docs/shard-format.md says it, value by value and with plain matrices."""
    width, block, group = facts["hidden_size"], facts["block"], facts["group"]
    if name == "int4":
        nibbles = [
            [(byte >> shift) & 15 for byte in row for shift in (0, 4)][:width] for row in columns["hidden_q"].tolist()
        ]
        codes = np.array(nibbles, np.float64).reshape(len(nibbles), width) - 8
    else:
        codes = columns["hidden_q"].astype(np.float64)
    scales = columns["hidden_scale"].astype(np.float64)
    values = np.stack([codes[:, i] * scales[:, i // group] for i in range(width)], axis=1)
    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / block**0.5
    values = np.concatenate([values[:, i : i + block] @ matrix for i in range(0, width, block)], axis=1)
    for i in range(width):
        digest = hashlib.sha256(facts["seed"].to_bytes(8, "little") + (i // 256).to_bytes(8, "little")).digest()
        if digest[(i // 8) % 32] >> (i % 8) & 1:
            values[:, i] *= -1
    return values


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_within_its_bound(name, width):
    states = gaussian(64, width)
    states[:, width // 3] *= 50  # an outlier channel
    codec, facts = CODECS[name], CODECS[name].facts(width)
    columns = codec.encode(states, facts)
    decoded = codec.decode(columns, facts)
    steps, relative = LOSSY[name]
    difference = np.abs(rotate(decoded - states, block=facts["block"], seed=facts["seed"]))
    bound = np.repeat(np.abs(columns["hidden_scale"].astype(np.float32)), GROUP, axis=1)[:, :width] * steps
    assert (difference <= bound * 1.01 + 1e-5 * np.abs(states).max()).all()
    if block_size(width) >= 64:
        assert np.linalg.norm(decoded - states) <= relative * np.linalg.norm(states)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("width", [1, 6, 7, 96, 130, 256])
def test_decodes_as_the_page_says(name, width):
    states = gaussian(5, width)
    codec, facts = CODECS[name], CODECS[name].facts(width)
    columns = codec.encode(states, facts)
    assert np.allclose(codec.decode(columns, facts), decoded_by_the_page(name, columns, facts), atol=1e-4)


@pytest.mark.parametrize(("name", "expected"), [("int8", 1 + 2 / 128), ("int4", 0.5 + 2 / 128)])
def test_bytes_a_value(name, expected):
    columns = CODECS[name].encode(gaussian(4, 8192), CODECS[name].facts(8192))
    assert sum(column.nbytes for column in columns.values()) / (4 * 8192) == expected


@pytest.mark.parametrize("name", LOSSY)
def test_rotation_is_what_makes_outlier_channels_cheap(name):
    """Huge channels as in large models: without the rotation their groups lose everything else."""
    states = gaussian(64, 1024)
    states[:, [5, 700]] *= 300
    plain = dict(CODECS[name].facts(1024), block=1)
    small = np.delete(np.arange(1024), [5, 700])
    errors = {}
    for label, facts in (("rotated", CODECS[name].facts(1024)), ("plain", plain)):
        decoded = CODECS[name].decode(CODECS[name].encode(states, facts), facts)
        group = small[small < 128]  # the channels that share a scale with a huge one
        errors[label] = np.linalg.norm(decoded[:, group] - states[:, group]) / np.linalg.norm(states[:, group])
    assert errors["rotated"] < errors["plain"]


@pytest.mark.parametrize("name", CODECS)
def test_zero_rows_stay_zero(name):
    states = round_to_bf16(gaussian(4, 256))
    states[1] = 0
    assert not round_trip(name, states)[1].any()
    assert round_trip(name, np.zeros((0, 256), np.float32)).shape == (0, 256)


@pytest.mark.parametrize("name", LOSSY)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 300)),
        elements=st.floats(-1e5, 1e5, width=32, allow_subnormal=True),
    )
)
@settings(max_examples=150)
def test_any_states_come_back_within_a_step_of_their_largest(name, states):
    states = round_to_bf16(states)
    decoded = round_trip(name, states)
    assert np.isfinite(decoded).all()
    per_value = {"int8": 1 / 127, "int4": 1 / 4}[name]
    rows = np.linalg.norm(states.astype(np.float64), axis=1)  # a rotation keeps lengths, so a group's largest is within
    bound = rows * per_value * np.sqrt(states.shape[1]) + 6e-8 * 8 * np.sqrt(states.shape[1])
    assert (np.linalg.norm(decoded.astype(np.float64) - states, axis=1) <= bound + 1e-6 * rows).all()


@pytest.mark.parametrize(("name", "largest"), [("int8", 3e7), ("int4", 3e6)])
def test_states_past_the_scale_are_refused_not_written(name, largest):
    states = gaussian(2, 1)
    states[1] = largest
    with pytest.raises(SampleError, match=f"{name}'s float16 scale"):
        CODECS[name].encode(states, CODECS[name].facts(1))


@pytest.mark.parametrize(("width", "block"), [(3584, 512), (8192, 8192), (5120, 1024), (896, 128), (7, 1), (1, 1)])
def test_rotation_is_orthogonal_and_its_own_way_back(width, block):
    assert block_size(width) == block
    states = gaussian(3, width)
    rotated = rotate(states, block=block, seed=0)
    assert np.allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(states, axis=1), rtol=1e-5)
    assert np.allclose(rotate_back(rotated, block=block, seed=0), states, atol=1e-5)
    assert set(np.unique(signs(width, 0))) <= {-1.0, 1.0}


@pytest.mark.parametrize("block", [2**bits for bits in range(13)])
def test_fast_transform_is_the_product_with_the_matrix(block):
    states = gaussian(3, 3 * block)
    assert np.allclose(hadamard(states, block), hadamard_reference(states, block), atol=1e-5)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("width", [128, 384, 896, 1536, 3072, 3584, 5120, 8192, 16384])
def test_fast_decoding_is_the_slow_one(name, width):
    """All codes there are, also -128, which is never written: every block from one group to 128 of them."""
    rng = np.random.default_rng(width)
    facts, rows = CODECS[name].facts(width), 5
    low, high = {"int8": (-128, 128), "int4": (-8, 8)}[name]
    codes = rng.integers(low, high, (rows, width)).astype(np.int8)
    codes[0], codes[1], codes[2] = low, high - 1, rng.choice([low, high - 1], width)
    scales = rng.normal(size=(rows, width // GROUP)).astype(np.float16)
    scales[3] = 0
    stored = codes if name == "int8" else ((codes[:, 0::2] + 8) | (codes[:, 1::2] + 8) << 4).astype(np.uint8)
    fast = CODECS[name].decode({"hidden_q": stored, "hidden_scale": scales}, facts)
    values = codes * np.repeat(scales.astype(np.float32), GROUP, axis=1)
    slow = hadamard_reference(values, facts["block"]) * signs(width, facts["seed"])
    assert np.abs(fast - slow).max() <= 2e-6 * np.linalg.norm(values, axis=1).max()
    assert not fast[3].any()


@pytest.mark.parametrize("name", LOSSY)
def test_many_states_are_decoded_as_a_few_are(name):
    rng, facts = np.random.default_rng(0), CODECS[name].facts(8192)
    stored = rng.integers(-127, 128, (70, 8192)).astype(np.int8)
    stored = stored if name == "int8" else stored[:, :4096].view(np.uint8)
    columns = {"hidden_q": stored, "hidden_scale": rng.random((70, 64)).astype(np.float16)}
    few = [CODECS[name].decode({c: v[i : i + 1] for c, v in columns.items()}, facts) for i in range(70)]
    assert np.array_equal(CODECS[name].decode(columns, facts), np.concatenate(few))


@pytest.mark.parametrize("width", [1, 7, 130, 256, 1536])
def test_fast_coding_is_the_slow_one(width):
    """Zeros, subnormals, ties of magnitude and of rounding, and a group that is not full."""
    rng = np.random.default_rng(width)
    rotated = (rng.integers(-60, 60, (40, width)) / 4 * 10.0 ** rng.integers(-9, 4, (40, 1))).astype(np.float32)
    rotated[0], rotated[1], rotated[2] = 0, -0.0, np.finfo(np.float32).smallest_subnormal
    rotated[3] = rng.choice([-5, 5], width)
    groups = np.zeros((40, -(-width // GROUP), GROUP), np.float32)
    groups.reshape(40, -1)[:, :width] = rotated
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    assert np.array_equal(codecs._largest(rotated, GROUP), largest)
    for scales in (np.abs(largest / 127).astype(np.float16), (largest / -8).astype(np.float16)):
        step = scales.astype(np.float32)[..., None]
        ratio = np.divide(groups, step, out=np.zeros_like(groups), where=step != 0)
        for low, high in ((-127, 127), (-8, 7)):
            codes = np.clip(np.rint(ratio), low, high).astype(np.int8).reshape(40, -1)[:, :width]
            assert np.array_equal(codecs._quantised(rotated, scales, GROUP, low, high), codes)


def test_golden_bytes():
    """What version 1 writes for these states; a change here is another format."""
    states = round_to_bf16(np.linspace(-2, 3, 2 * 160, dtype=np.float32).reshape(2, 160))
    digests = {}
    for name, codec in CODECS.items():
        columns = codec.encode(states, codec.facts(160))
        digests[name] = hashlib.sha256(b"".join(columns[c].tobytes() for c in codec.columns)).hexdigest()[:16]
    assert "".join("-" if s < 0 else "+" for s in signs(32, 0)) == GOLDEN_SIGNS
    assert digests == GOLDEN


@pytest.mark.parametrize("name", CODECS)
def test_rows_go_through_arrow(name):
    codec = CODECS[name]
    answer, question = make_answer(width=192), make_question(width=192)
    for rows, read in ((answer, answer_rows), (question, question_rows)):
        got = read(read_table(to_arrow(rows, codec), where="x"), where="x")
        assert np.array_equal(got.hidden, round_trip(name, rows.hidden))
        assert np.array_equal(got.token_id, rows.token_id)


@pytest.mark.parametrize("change", [{"block": 64}, {"group": 0}, {"seed": -1}, {"hidden_size": 0}, {"codec": None}])
def test_facts_that_this_codec_does_not_write_are_refused(change):
    import json

    table = read_table(to_arrow(make_answer(width=256), CODECS["int8"]), where="x")
    facts = json.loads(table.schema.metadata[b"genrecal"]) | change
    with pytest.raises(FormatError, match=r"a\.tar"):
        answer_rows(table.replace_schema_metadata({"genrecal": json.dumps(facts)}), where="a.tar")


# -------------------------------------------------------------------------------------------------------------- fidelity


def a_head(width=256, vocab=500):
    torch.manual_seed(0)
    return FrozenHead(weight=torch.randn(vocab, width) * 0.3, vocab_size=vocab)


def test_fidelity_is_what_its_words_say():
    head, states = a_head(), round_to_bf16(gaussian(100, 256))
    decoded = round_trip("int4", states)
    got = compare(head, states, decoded)
    p, q = (torch.softmax(torch.from_numpy(x).double() @ head.weight.double().T, -1) for x in (states, decoded))
    kl = (p * (p.log() - q.log())).sum(-1).numpy()
    assert got.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert got.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert got.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(states, decoded, strict=True)]
    assert got.cosine == pytest.approx(np.mean(cosine), rel=1e-5)
    assert got.relative_l2 == pytest.approx(np.linalg.norm(decoded - states) / np.linalg.norm(states), rel=1e-5)


def test_wider_codecs_are_better_and_the_lossless_one_is_exact():
    head, states = a_head(), round_to_bf16(gaussian(200, 256))
    results = {}
    for name, codec in CODECS.items():
        meter = FidelityMeter(codec)
        for start in range(0, 200, 20):
            meter.add(meter.pick(states[start : start + 20]))
        results[name] = meter.measure(head)
    assert results["bf16"].kl_mean == 0 and results["bf16"].top1_agreement == 1
    assert 0 < results["int8"].kl_mean < results["int4"].kl_mean / 20
    assert results["int8"].rows == 80  # a few of each sample
