"""Records as Arrow files: round trips for any shape, stable bytes, and readers that refuse what they do not know."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shard_records import make_answer, make_question

from genrecal.errors import DamageError, FormatError
from genrecal.shards.codecs import CODECS, decode, round_to_bf16
from genrecal.shards.record import answer_rows, question_rows, read_table, to_arrow

BF16 = CODECS["bf16"]
FLOATS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(1, 40)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def assert_same(got, wanted):
    for name in vars(wanted):
        values = getattr(wanted, name)
        if name == "sampled":
            assert (getattr(got, name) is None) == (values is None)
            if values is not None:
                assert_same(getattr(got, name), values)
        elif name == "states":
            assert np.array_equal(got.hidden, wanted.hidden)
        elif name == "target_logit":  # null on a turn's last row, on disk
            assert np.array_equal(getattr(got, name)[wanted.predicts], values[wanted.predicts])
        else:
            assert np.array_equal(getattr(got, name), values), name
            assert getattr(got, name).dtype == values.dtype, name


@pytest.mark.parametrize("draws", [0, 2, 50, 1000])
@pytest.mark.parametrize("width", [1, 7, 64, 896, 1536, 3584, 8192])
def test_answer_rows_round_trip(width, draws):
    rows = make_answer(width=width, draws=draws)
    assert_same(answer_rows(read_table(to_arrow(rows, BF16), where="x"), where="x"), rows)


def test_question_rows_round_trip():
    rows = make_question()
    assert_same(question_rows(read_table(to_arrow(rows, BF16), where="x"), where="x"), rows)


@given(FLOATS)
@settings(max_examples=200)
def test_bf16_is_lossless_for_any_bfloat16(values):
    """Subnormals, zero rows, huge channels, signed zeros: bit for bit."""
    rounded = round_to_bf16(values)
    decoded = decode(BF16.encode(rounded), BF16.facts(values.shape[1])).numpy()
    assert np.array_equal(decoded.view(np.uint32), rounded.view(np.uint32))


@given(FLOATS)
@settings(max_examples=200)
def test_rounding_is_torchs(values):
    import torch

    expected = torch.from_numpy(values).bfloat16().float().numpy()
    finite = np.isfinite(expected)
    assert np.array_equal(round_to_bf16(values)[finite], expected[finite])


def test_the_same_rows_give_the_same_bytes():
    assert to_arrow(make_answer(), BF16) == to_arrow(make_answer(), BF16)


def test_plain_pyarrow_reads_it():
    rows = make_answer()
    table = pa.ipc.open_file(pa.py_buffer(to_arrow(rows, BF16))).read_all()
    high = table["hidden_hi"].combine_chunks().to_numpy_ndarray().astype(np.uint32)
    low = table["hidden_lo"].combine_chunks().to_numpy_ndarray().astype(np.uint32)
    assert np.array_equal((high << 24 | low << 16).view(np.float32), rows.hidden)
    assert table["target_id"].null_count == 2  # one a turn
    assert json.loads(table.schema.metadata[b"genrecal"]) == {"codec": "bf16", "hidden_size": 8}


def test_unknown_codec_missing_column_and_wrong_width_are_refused():
    table = read_table(to_arrow(make_answer(), BF16), where="x")
    unknown = table.replace_schema_metadata({"genrecal": json.dumps({"codec": "fp3", "hidden_size": 8})})
    with pytest.raises(FormatError, match="'fp3'.*bf16"):
        answer_rows(unknown, where="a.tar")
    with pytest.raises(FormatError, match="hidden_lo is missing"):
        answer_rows(table.drop_columns(["hidden_lo"]), where="a.tar")
    wide = table.replace_schema_metadata({"genrecal": json.dumps({"codec": "bf16", "hidden_size": 9})})
    with pytest.raises(
        FormatError, match="column hidden_hi: expected uint8 tensors of \\[9\\], got uint8 tensors of \\[8\\]"
    ):
        answer_rows(wide, where="a.tar")
    with pytest.raises(FormatError, match="codec and hidden size"):
        answer_rows(table.replace_schema_metadata(None), where="a.tar")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_cut_files_are_damage(cut):
    with pytest.raises(DamageError, match="not a readable Arrow file"):
        read_table(to_arrow(make_answer(), BF16)[:cut], where="a.tar")


def test_a_part_of_a_table_and_several_batches_are_read_as_the_rows_they_are():
    rows = make_answer()
    table = read_table(to_arrow(rows, BF16), where="x")
    part = answer_rows(table.slice(1, 3), where="x")
    assert np.array_equal(part.hidden, rows.hidden[1:4]) and np.array_equal(part.target_id, rows.target_id[1:4])
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    assert len(pieces.to_batches()) == 2
    assert_same(answer_rows(pieces, where="x"), rows)


def test_nulls_where_numbers_must_be_are_damage():
    table = read_table(to_arrow(make_answer(), BF16), where="x")
    turn = pa.array([None, *table["turn"].to_pylist()[1:]], pa.int32())
    with pytest.raises(DamageError, match="column turn: expected no nulls, got 1"):
        answer_rows(table.set_column(table.column_names.index("turn"), "turn", turn), where="x")
    ids = table["topk_ids"].combine_chunks()
    numbers = pa.array([None, *ids.storage.flatten().to_pylist()[1:]], pa.int32())
    storage = pa.FixedSizeListArray.from_arrays(numbers, ids.type.shape[0])
    ids = pa.ExtensionArray.from_storage(ids.type, storage)
    with pytest.raises(DamageError, match="column topk_ids: expected no nulls, got 1"):
        answer_rows(table.set_column(table.column_names.index("topk_ids"), "topk_ids", ids), where="x")


def test_rows_are_read_without_their_states():
    rows = make_answer(width=128, draws=5)
    table = read_table(to_arrow(rows, CODECS["int8"]), where="x", states=False)
    assert not [name for name in table.column_names if name.startswith("hidden")]
    part = answer_rows(table, where="x", states=False)
    assert part.states is None and np.array_equal(part.topk_logits, rows.topk_logits)
