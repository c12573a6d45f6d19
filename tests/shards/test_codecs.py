"""The lossy codecs: bounds, odd values, an independent decoder, golden bytes, and what is measured of them."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shard_records import make_answer, make_question

from genrecal.errors import FormatError, SampleError
from genrecal.shards.codecs import CODECS, GROUP, Coded, CodedStates, block_size, decode, hadamard, round_to_bf16, signs
from genrecal.shards.fidelity import FidelityMeter, compare
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import answer_rows, question_rows, read_table, to_arrow

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
    return decode(codec.encode(states, facts), facts).numpy()


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
    decoded = decode(columns, facts).numpy()
    steps, relative = LOSSY[name]
    rotated = hadamard(torch.from_numpy((decoded - states) * signs(width, facts["seed"])), facts["block"])
    difference = rotated.abs().numpy()
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
    assert np.allclose(decode(columns, facts).numpy(), decoded_by_the_page(name, columns, facts), atol=1e-4)


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
        decoded = decode(CODECS[name].encode(states, facts), facts).numpy()
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
    states = torch.from_numpy(gaussian(3, width))
    rotated = hadamard(states, block)
    assert torch.allclose(rotated.norm(dim=1), states.norm(dim=1), rtol=1e-5)
    assert torch.allclose(hadamard(rotated, block), states, atol=1e-5)
    assert set(np.unique(signs(width, 0))) <= {-1.0, 1.0}


def slow_states(name, columns, facts):
    """The decoder in plain numpy: every codec, in float64, with the whole Hadamard matrix."""
    width = facts["hidden_size"]
    if name == "bf16":
        high, low = (columns[column].astype(np.uint32) for column in ("hidden_hi", "hidden_lo"))
        return (high << 24 | low << 16).view(np.float32)
    codes = columns["hidden_q"]
    if name == "int4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)[:, :width].astype(np.int8) - 8
    values = codes * np.repeat(columns["hidden_scale"].astype(np.float64), GROUP, axis=1)[:, :width]
    matrix = np.ones((1, 1))
    while len(matrix) < facts["block"]:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])  # Sylvester's construction
    rotated = values.reshape(len(values), -1, facts["block"]) @ matrix / math.sqrt(facts["block"])
    return rotated.reshape(values.shape) * signs(width, facts["seed"])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [1, 130, 384, 640, 896, 3584, 5120, 8192])
def test_decoding_is_the_slow_one(name, width):
    """Any codes, also int8's -128, which is never written; whole, and as rows of joined records of two codecs."""
    rng, rows, facts = np.random.default_rng(width), 5, CODECS[name].facts(width)
    columns = {
        column: rng.integers(0, 256, (rows, size)).astype(np.uint8).view(dtype)
        if dtype != "float16"
        else rng.normal(size=(rows, size)).astype(dtype)
        for column, (dtype, size) in CODECS[name].columns(width).items()
    }
    if name == "bf16":
        columns["hidden_hi"] &= 0x3F  # finite
    else:
        columns["hidden_scale"][3] = 0
        assert not decode(columns, facts)[3].any()
    slow = slow_states(name, columns, facts)
    error = np.abs(decode(columns, facts).numpy() - slow).max()
    assert error <= (0 if name == "bf16" else 2e-6 * np.linalg.norm(slow, axis=1).max())
    coded, other = Coded(facts=facts, columns=columns), Coded.plain(gaussian(2, width))
    batch = CodedStates.joined([coded[[4, 1]], coded[:1], other, coded])
    wanted = np.concatenate([slow[[4, 1]], slow[:1], other.columns["hidden"], slow])
    assert [len(part) for part in batch.parts] == [3, 2, 5]
    assert np.abs(batch.decode().numpy() - wanted).max() <= error + 2e-6 * np.linalg.norm(slow, axis=1).max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(columns, facts), CodedStates.joined([coded]).decode())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("width", [1, 7, 130, 256, 1536])
def test_coding_is_to_the_nearest_step(name, width):
    """Zeros, subnormals, ties of magnitude and of rounding, and a group that is not full; not rotated."""
    rng = np.random.default_rng(width)
    states = (rng.integers(-60, 60, (40, width)) / 4 * 10.0 ** rng.integers(-9, 4, (40, 1))).astype(np.float32)
    states[0], states[1], states[2] = 0, -0.0, np.finfo(np.float32).smallest_subnormal
    states[3] = rng.choice([-5, 5], width)
    facts = CODECS[name].facts(width) | {"block": 1}
    columns = CODECS[name].encode(states, facts)
    padded = np.zeros((40, -(-width // GROUP) * GROUP))
    padded[:, :width] = states * signs(width, 0)
    groups = padded.reshape(40, -1, GROUP)
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}[name]
    steps = columns["hidden_scale"].astype(np.float64)
    largest = np.abs(groups).max(-1)
    assert np.allclose(np.abs(steps), largest / -{"int8": -127, "int4": low}[name], rtol=2**-11, atol=2**-24)
    ratio = np.divide(groups, steps[..., None], out=np.zeros_like(groups), where=steps[..., None] != 0)
    codes = np.clip(np.rint(ratio), low, high).reshape(40, -1)[:, :width]
    assert np.allclose(decode(columns, facts).numpy() * signs(width, 0), codes * np.repeat(steps, GROUP, 1)[:, :width])


def test_golden_bytes():
    """What version 1 writes for these states; a change here is another format."""
    states = round_to_bf16(np.linspace(-2, 3, 2 * 160, dtype=np.float32).reshape(2, 160))
    digests = {}
    for name, codec in CODECS.items():
        columns = codec.encode(states, codec.facts(160))
        digests[name] = hashlib.sha256(b"".join(column.tobytes() for column in columns.values())).hexdigest()[:16]
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


@pytest.mark.parametrize(
    "change",
    [
        {"block": 64},
        {"group": 0},
        {"seed": -1},
        {"hidden_size": 0},
        {"hidden_size": 2**21},
        {"hidden_size": 1e9},
        {"codec": None},
    ],
)
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
