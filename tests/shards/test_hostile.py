"""Caches from a stranger: they cannot run code, write outside the cache, or take memory that their bytes do not pay for.

Bombs are real ones. Each is read in a child process that may not take more than 4 GiB, and its peak is measured.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import hostile_child
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from made_cache import WIDTH, make_cache, tree
from PIL import Image

from genrecal.errors import DamageError, FormatError, GenrecalError, ModelError, SampleError, UsageError
from genrecal.inspect import describe_record, save_images
from genrecal.samples import decode_image
from genrecal.shards.head import HEAD_FILE, MAX_HEADER_BYTES
from genrecal.shards.index import INDEX_FILE
from genrecal.shards.layout import manifest_name, tar_name, write_cache_json
from genrecal.shards.manifest import METADATA_KEY, ManifestRow, Member, manifest_bytes, read_manifest
from genrecal.shards.reader import open_cache
from genrecal.shards.record import answer_rows, read_table
from genrecal.shards.storage import open_store
from genrecal.shards.verify import quarantine, verify_cache
from genrecal.vlm.cached_teacher import teacher_renderer

MIB = 2**20
EIGHT_GIB = 2**33
SMALL = 260 * MIB  # what a refusal may take; reading this cache takes a few MiB


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tree(make_cache(tmp_path_factory.mktemp("hostile") / "cache"))


@pytest.fixture
def cache(made, tmp_path):
    for name, data in made.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "cache"


def rebuild(cache, replace=None, *, edit=lambda rows: rows, shard=0):
    """Shard 0 anew, with other bytes for some members and other rows, all checksums right: the index goes."""
    table, facts = read_manifest((cache / manifest_name(shard)).read_bytes(), where="manifest")
    rows = table.to_pylist()
    for tier in facts["sha256"]:
        stream = io.BytesIO()
        old = (cache / tar_name(tier, shard)).read_bytes()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for member in (member for row in rows for member in row["members"] if member["tier"] == tier):
                data = (replace or {}).get(member["name"], old[member["offset"] :][: member["size"]])
                info = tarfile.TarInfo(member["name"])
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
                offset = tar.offset - -(-len(data) // 512) * 512
                member |= {"offset": offset, "size": len(data), "xxh3": xxhash.xxh3_64_intdigest(data)}
        (cache / tar_name(tier, shard)).write_bytes(stream.getvalue())
        facts["sha256"][tier] = hashlib.sha256(stream.getvalue()).hexdigest()
    write_manifest(cache, edit(rows), facts, shard)


def write_manifest(cache, rows, facts, shard=0):
    made = [ManifestRow(**row | {"members": [Member(**member) for member in row["members"]]}) for row in rows]
    (cache / manifest_name(shard)).write_bytes(manifest_bytes(made, facts))
    (cache / INDEX_FILE).unlink(missing_ok=True)


def member_of(cache, suffix, number=0):
    """A record's member's name and bytes."""
    record = open_cache(cache)[number]
    member = next(member for member in record.row["members"] if member["name"].endswith(suffix))
    return member["name"], record.read(member)


def refused(cache, error, finding=None, *, most=SMALL):
    """Reading gives genrecal's error with these words, verify a finding with them, and neither takes much memory."""
    outcome = hostile_child.run(hostile_child.read_and_verify, str(cache))
    assert any(error in line for line in outcome.errors), outcome.lines
    assert any((finding or error) in line for line in outcome.findings), outcome.lines
    assert outcome.peak < most, f"{outcome.peak / MIB:.0f} MiB"
    return outcome


# -------------------------------------------------------------------------------------------------------- Arrow members


@pytest.mark.parametrize("size", [EIGHT_GIB, 2**62, -(2**40)])
def test_a_buffer_that_claims_to_decompress_to_gigabytes_is_refused(cache, size):
    name, data = member_of(cache, ".answer.arrow")
    place = data.index(b"\x28\xb5\x2f\xfd") - 8  # of zstd's first frame, behind its length
    rebuild(cache, {name: data[:place] + struct.pack("<q", size) + data[place + 8 :]})
    refused(cache, "not a readable Arrow file")


def written(table, compression="zstd", batches=1):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for _ in range(batches):
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def forged_extension(name, storage, data=b""):
    field = pa.field("turn", storage, metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": data})
    return pa.table([pa.array([], storage)], schema=pa.schema([field]))


HOSTILE_TABLES = {
    "a string": lambda: {"turn": ["a"]},
    "a dictionary": lambda: {"turn": pa.array(["a" * 1000]).dictionary_encode()},
    "a list": lambda: {"turn": [[1]]},
    "a struct": lambda: {"turn": [{"a": 1}]},
    "a column of nulls": lambda: {"turn": pa.nulls(2**20)},
    "a decimal": lambda: {"turn": pa.array([1], pa.decimal256(70))},
    "a run": lambda: {"turn": pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), pa.array([1]))},
    "a uuid": lambda: {"turn": pa.array([b"0" * 16], pa.uuid())},
    "many columns": lambda: {f"c{i}": pa.array([1], pa.int8()) for i in range(100)},
    "a tensor of tensors": lambda: {"turn": pa.array([], pa.fixed_shape_tensor(pa.list_(pa.int8(), 2), [3]))},
}


@pytest.mark.parametrize("kind", HOSTILE_TABLES)
def test_columns_that_the_format_has_not_are_refused(kind):
    try:
        data = written(pa.table(HOSTILE_TABLES[kind]()))
    except (pa.ArrowException, NotImplementedError, TypeError, ValueError) as error:
        pytest.skip(f"Arrow itself refuses to write it: {error}")
    with pytest.raises(DamageError, match=r"a\.tar: not a readable Arrow file"):
        read_table(data, where="a.tar")


def test_a_tensor_in_another_order_or_of_two_dimensions_is_refused(cache):
    name, data = member_of(cache, ".answer.arrow")
    table = pa.ipc.open_file(data).read_all()
    place = table.column_names.index("hidden_hi")
    storage = table.column("hidden_hi").combine_chunks().storage
    for kind in (
        pa.fixed_shape_tensor(pa.uint8(), [4, 4]),
        pa.fixed_shape_tensor(pa.uint8(), [WIDTH], permutation=[0]),
        pa.fixed_shape_tensor(pa.uint8(), [4, 4], permutation=[1, 0]),
    ):
        column = pa.ExtensionArray.from_storage(kind, storage)
        rebuild(cache, {name: written(table.set_column(place, "hidden_hi", column))})
        if kind == pa.fixed_shape_tensor(pa.uint8(), [WIDTH]):
            continue  # Arrow takes the only order of one dimension for none
        with pytest.raises(FormatError, match="column hidden_hi: expected uint8 tensors of"):
            open_cache(cache)[0].record()
        assert any("column hidden_hi" in str(finding) for finding in verify_cache(cache).findings)


def test_columns_of_other_numbers_or_twice_are_refused(cache):
    name, data = member_of(cache, ".answer.arrow")
    table = pa.ipc.open_file(data).read_all()
    for place, column in enumerate(table.column_names):
        other = pa.array(np.zeros(len(table)), pa.float64())
        for changed in (table.set_column(place, column, other), table.append_column(column, table.column(column))):
            with pytest.raises(FormatError, match=f"column {column}"):
                answer_rows(read_table(written(changed), where="x"), where="x")
    for changed in (table.set_column(0, "turn", other), table.append_column("turn", table.column("turn"))):
        rebuild(cache, {name: written(changed)})
        assert not verify_cache(cache).whole


def test_an_old_pickled_extension_type_is_not_unpickled(tmp_path):
    mark = tmp_path / "ran"

    class Touches:
        def __reduce__(self):
            return Path.touch, (mark,)

    payload = pickle.dumps(Touches())
    pickle.loads(payload)
    assert mark.exists()
    mark.unlink()
    for name in ("arrow.py_extension_type", "arrow.fixed_shape_tensor", "arrow.no_such"):
        with pytest.raises((DamageError, FormatError)):
            table = read_table(written(forged_extension(name, pa.null(), payload)), where="x")
            raise FormatError(str(table.schema))  # never reached: a null column is no number
        read_or_refused = written(forged_extension(name, pa.int32(), payload))
        try:
            assert read_table(read_or_refused, where="x").num_rows == 0
        except DamageError:
            pass
    assert not mark.exists()


def test_many_record_batches_are_refused():
    table = pa.table({"turn": pa.array([1], pa.int32())})
    assert read_table(written(table, batches=3), where="x").num_rows == 3
    with pytest.raises(DamageError, match="1025 record batches"):
        read_table(written(table, batches=1025), where="x")


@pytest.mark.parametrize("compression", ["zstd", None])
def test_lengths_that_lie_are_refused_or_change_nothing(cache, compression):
    """Every int32 and int64 of the file's messages and footer, one at a time: too large, negative and zero."""
    _, data = member_of(cache, ".answer.arrow")
    table = pa.ipc.open_file(data).read_all().slice(0, 2)
    table = pa.ipc.open_file(written(table.select(["turn", "topk_ids"]), compression)).read_all()
    data, refused_lies = written(table, compression), 0
    for place in range(8, len(data) - 6, 4):
        for lie in (struct.pack("<i", 2**31 - 1), struct.pack("<i", -1), struct.pack("<q", 2**40), bytes(4)):
            changed = data[:place] + lie + data[place + len(lie) :]
            try:
                read_table(changed, where="x").validate(full=True)
            except DamageError as error:
                assert "\n" not in str(error)
                refused_lies += 1
    assert refused_lies > 100


# ---------------------------------------------------------------------------------------------- manifests and the index


def manifest_table(cache, shard=0):
    return pq.read_table(pa.BufferReader((cache / manifest_name(shard)).read_bytes()))


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", "write_page_checksum": True} | options)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "what", ["a footer beyond the file", "metadata that is no JSON", "a page header without an end"]
)
def test_footers_and_pages_that_no_manifest_has(cache, what):
    data = (cache / manifest_name(0)).read_bytes()
    if what.startswith("a footer"):
        data = data[:-8] + struct.pack("<i", 2**31 - 1) + b"PAR1"
    elif what.startswith("metadata"):
        data = parquet(manifest_table(cache).replace_schema_metadata({METADATA_KEY: "[" * 2**20}))
    else:
        data = data[:4] + b"\x1c" * 200 + data[204:]
    (cache / manifest_name(0)).write_bytes(data)
    (cache / INDEX_FILE).unlink()
    with pytest.raises(DamageError, match="not a readable manifest"):
        open_cache(cache)
    assert any("not a readable manifest" in str(finding) for finding in verify_cache(cache).findings)


@pytest.mark.parametrize(
    "value", [None, -1, "\ud800", {"samples": 1}, [1], 10**400, {"answer": {"rows": float("inf")}}]
)
def test_facts_of_any_kind_give_a_named_error(cache, value):
    table, facts = read_manifest((cache / manifest_name(0)).read_bytes(), where="x")
    (cache / INDEX_FILE).unlink()
    for text in (
        *(json.dumps(facts | {name: value}) for name in facts),
        "NaN",
        "{",
        "",
        json.dumps({"format_version": 1}),
    ):
        data = parquet(table.replace_schema_metadata({METADATA_KEY: text}))
        (cache / manifest_name(0)).write_bytes(data)
        with contextlib.suppress(GenrecalError):
            open_cache(cache)[0].record()
        verify_cache(cache)


# ---------------------------------------------------------------------------------------------------------- cache.json


def change(cache, **settings):
    """Write cache.json with other settings and the digest that fits them."""
    write_cache_json(open_store(cache), json.loads((cache / "cache.json").read_text()) | settings)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, "{" + " " * 2**24 + "}", '{"format_version": 1e400}', '{"format_version": NaN}', "nul",
     '{"format_version": ' + "1" * 5000 + "}", '"' + "\\ud800" + '"', "\xff", "1", "[]", "{}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_cache_json_that_is_none(cache, text):
    (cache / "cache.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match=r"cache\.json"):
        open_cache(cache)
    (finding,) = verify_cache(cache).findings
    assert finding.file == "cache.json"


def test_a_cache_json_of_a_terabyte_is_not_read(cache):
    os.truncate(cache / "cache.json", 2**40)
    refused(cache, "the limit is 8388608")


@pytest.mark.parametrize("name", [
    "format_version", "teacher", "image_backend", "hidden_size", "head_rows", "vocab_size", "top_k", "answer_codec",
    "question_codec", "question_fraction", "question_seed", "samples_per_shard", "num_samples", "num_shards", "totals",
    "data", "answers", "content_xxh3", "index_sha256",
])  # fmt: skip
def test_every_field_of_cache_json_of_any_type(cache, name):
    before = json.loads((cache / "cache.json").read_text())
    for value in (None, -1, 1.5, 10**30, "\x00", [[]], {}, True, ...):
        content = {key: kept for key, kept in before.items() if key != name} | ({} if value is ... else {name: value})
        (cache / "cache.json").write_text(json.dumps(content))
        with contextlib.suppress(FormatError, DamageError):
            opened = open_cache(cache)
            assert opened[0].record()
            opened.head()
        assert content == before or not verify_cache(cache).whole


def test_a_million_million_shards_are_not_counted_one_by_one(cache):
    change(cache, num_shards=10**12, num_samples=10**12, samples_per_shard=1)
    refused(
        cache, "num_shards in cache.json: expected a whole number from 0 to 10000000, got 1000000000000", "num_shards"
    )


# ------------------------------------------------------------------------------------------------------------- members


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (0, -1), (2**63 - 1, 2**63 - 1), (512, 2**40), (0, 2**32 + 1)])
def test_places_that_no_member_has(cache, offset, size):
    table, facts = read_manifest((cache / manifest_name(0)).read_bytes(), where="x")
    rows = table.to_pylist()
    rows[0]["members"][0] |= {"offset": offset, "size": size}
    write_manifest(cache, rows, facts)
    if size == 2**40:
        os.truncate(cache / tar_name("samples", 0), 2**40)
    with pytest.raises(DamageError, match="member 00000000-s0."):
        open_cache(cache)[0].record()
    if size != 2**40:  # which takes its time to hash
        assert any("member 00000000-s0.json" in str(finding) for finding in verify_cache(cache).findings)


def test_members_that_lie_over_each_other_are_refused(cache):
    def edit(rows):
        first, second = rows[2]["members"][1:3]
        second |= {"offset": first["offset"], "size": first["size"], "xxh3": first["xxh3"]}
        return rows

    rebuild(cache, edit=edit)
    with pytest.raises(DamageError, match="expected members one after another"):
        open_cache(cache)[2].record()
    assert any("bytes at offset" in str(finding) for finding in verify_cache(cache).findings)


@pytest.mark.parametrize(
    "name", ["../../x.0.png", "/etc/passwd", "k.0.png\x00", "k.0.p\nng", "k.0." + "p" * 300, "", ".", "\x1b[2J"]
)
def test_names_that_lead_elsewhere_are_neither_read_nor_written(cache, tmp_path, name):
    def edit(rows):
        rows[1]["members"][1]["name"] = name
        return rows

    rebuild(cache, edit=edit)
    record = open_cache(cache)[1]
    before = tree(tmp_path)
    with pytest.raises(DamageError):
        assert record.sample
    with pytest.raises(DamageError, match="expected a name such as"):
        save_images(record, tmp_path / "images")
    assert any("name of a member" in str(finding) for finding in verify_cache(cache).findings)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("key", ["../../k", "/k", "k\x00", "k\n", ""])
def test_keys_that_lead_elsewhere_write_nothing(cache, tmp_path, key):
    def edit(rows):
        for member in rows[1]["members"]:
            member["name"] = member["name"].replace(rows[1]["key"], key)
        rows[1]["key"] = key
        return rows

    rebuild(cache, edit=edit)
    record = open_cache(cache)[1]
    with pytest.raises(DamageError, match="expected a name such as"):
        save_images(record, tmp_path / "images")
    assert not verify_cache(cache).whole


CONVERSATION = {"sample_id": "s0", "category": "", "source": "", "messages": []}


@pytest.mark.parametrize("content", [
    "[" * 10**6, '{"messages":' * 10**5, "NaN", "1", "null", "[]", "{}", '"\\ud800"', "{" + " " * 2**24 + "}",
    json.dumps(CONVERSATION | {"messages": [1]}),
    json.dumps(CONVERSATION | {"messages": [{"role": "tool", "content": []}]}),
    json.dumps(CONVERSATION | {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}),
    json.dumps(CONVERSATION | {"messages": [{"role": "user", "content": [{"type": "image", "index": 10**9}]}]}),
    json.dumps(CONVERSATION | {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    json.dumps(CONVERSATION | {"sample_id": 1}),
], ids=lambda text: text[:60])  # fmt: skip
def test_a_conversation_that_is_none(cache, content):
    name, _ = member_of(cache, ".json")
    rebuild(cache, {name: content.encode()})
    with pytest.raises(DamageError, match="not a conversation"):
        assert open_cache(cache)[0].sample
    assert any(name.removesuffix(".json") in str(finding) for finding in verify_cache(cache).findings)


# ------------------------------------------------------------------------------------------------------------ images


def png(width, height, *chunks, bits=1):
    """A PNG of zeros with more chunks; 30,000 rows a side are 110 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, row = zlib.compressobj(9), bytes(1 + -(-width * bits // 8))
    pixels = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*part) for part in chunks), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_image_of_too_many_pixels_is_not_decoded(cache):
    bomb = png(30_000, 30_000)
    assert len(bomb) < 200_000
    outcome = hostile_child.run(hostile_child.decode, bomb)
    assert len(outcome.errors) == 1 and outcome.peak < SMALL
    name, _ = member_of(cache, ".0.png", 1)
    rebuild(cache, {name: bomb})
    outcome = hostile_child.run(hostile_child.read_and_verify, str(cache))  # the bytes are passed on as they are
    assert outcome.lines == [] and outcome.peak < SMALL


def test_text_of_gigabytes_in_a_png_is_not_unpacked():
    squeeze, piece = zlib.compressobj(9), bytes(2**20)
    data = b"".join(squeeze.compress(piece) for _ in range(2**8)) + squeeze.flush()
    outcome = hostile_child.run(hostile_child.decode, png(8, 8, *[(b"zTXt", b"a\0\0" + data)] * 4))
    assert outcome.peak < SMALL


def test_formats_that_other_programs_read_are_refused(monkeypatch):
    """Pillow hands EPS to Ghostscript."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"
    with pytest.raises(SampleError, match="of no format that is read here"):
        decode_image(eps)
    assert started == []


# ----------------------------------------------------------------------------------------------- the head and teacher/


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def head_header(facts, shape=(60, WIDTH), dtype="F32", size=60 * WIDTH * 4):
    metadata = (
        facts
        if isinstance(facts, str)
        else json.dumps({"scale": 1.0, "divisor": 1.0, "softcap": None, "vocab_size": 58} | facts)
    )
    return {
        "__metadata__": {"genrecal": metadata},
        "weight": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]},
    }


ZEROS = bytes(60 * WIDTH * 4)
HEADS = {
    "no bytes": b"",
    "a header beyond the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of 80 MB": safetensors_bytes(b'{"a":' + b" " * 80_000_000 + b"1}"),
    "a deep header": safetensors_bytes(b"[" * 500_000),
    "a shape beyond the file": safetensors_bytes(head_header({}, (2**40, 2**40), size=len(ZEROS)), ZEROS),
    "another dtype": safetensors_bytes(head_header({}, (60, WIDTH * 4), "U8"), ZEROS),
    "one dimension": safetensors_bytes(head_header({}, (60 * WIDTH,)), ZEROS),
    "no rows": safetensors_bytes(head_header({}, (0, WIDTH), size=0)),
    "deep metadata": safetensors_bytes(head_header("[" * 500_000), ZEROS),
    "metadata that is a list": safetensors_bytes(head_header("[]"), ZEROS),
    **{
        f"{name} {value!r}": safetensors_bytes(head_header({name: value}), ZEROS)
        for name, values in (
            ("scale", (float("nan"), float("inf"), 0, "1", None, [], 10**400)), ("divisor", (0, float("nan"), -1, "1")),
            ("softcap", (0, float("inf"), "1", {})), ("vocab_size", (-1, 61, 10**30, "58", 5.0)), ("other", (1,)),
        )
        for value in values
    },
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_a_head_that_is_none(cache, what):
    (cache / HEAD_FILE).write_bytes(HEADS[what])
    teacher = json.loads((cache / "cache.json").read_text())["teacher"]
    change(cache, teacher=teacher | {"head_sha256": hashlib.sha256(HEADS[what]).hexdigest()})
    with pytest.raises((FormatError, DamageError), match=r"head\.safetensors: expected"):
        open_cache(cache).head()
    (finding,) = verify_cache(cache, deep=True).findings
    assert str(finding).startswith("head.safetensors: expected a head written by genrecal")
    assert MAX_HEADER_BYTES < 80_000_000


def test_a_head_of_a_terabyte_is_not_read(cache):
    os.truncate(cache / HEAD_FILE, 2**40)
    with pytest.raises(DamageError, match=r"head\.safetensors: expected at most"):
        open_cache(cache).head()


VOCABULARIES = [
    "[" * 10**6, "1", '{"model": {"vocab": {"a": 1e400}}}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": [[]]}}',
    '{"model": {"vocab": [[{}]]}, "added_tokens": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("text", VOCABULARIES, ids=lambda text: text[:40])
def test_a_vocabulary_that_is_none_is_said_and_ids_are_shown(cache, text):
    (cache / "teacher/tokenizer.json").write_text(text)
    assert "tokens are shown by their ids" in describe_record(open_cache(cache)[0]).notes[0]


def test_a_vocabulary_of_a_terabyte_is_not_read(cache):
    (cache / "teacher/tokenizer.json").touch()
    os.truncate(cache / "teacher/tokenizer.json", 2**40)
    assert "tokens are shown by their ids" in describe_record(open_cache(cache)[0]).notes[0]


AUDIT = """
import sys, os
cache, seen = os.path.realpath(sys.argv[1]), []
def hook(event, args):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        seen.append((event, str(args)))
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append((event, str(args)))
    if event == "exec" and cache in getattr(args[0], "co_filename", ""):
        seen.append((event, str(args)))
import genrecal.inspect as inspect, genrecal.inspect.text
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache
import torch, safetensors.torch
[record.record() for record in open_cache(cache)]  # compiles the codec's loops, which are written to genrecal's own folder
os.chdir(cache + "/teacher")
sys.addaudithook(hook)
opened = open_cache(cache)
print(len([record.record() for record in opened]), opened.head().vocab_size)
inspect.summarize(opened), inspect.describe_record(opened[0])
print(verify_cache(cache, deep=True).whole, seen)
"""


def test_nothing_of_a_cache_is_run(cache):
    """Code, a template and pickles in teacher/ are bytes with a checksum, to reader, inspect and verify --deep."""
    ran = cache.parent / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    files = {
        "config.json": json.dumps({"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil", "AutoProcessor": "evil.Evil"}}),
        "evil.py": code, "__init__.py": code, "torch.py": code, "sitecustomize.py": code,
        "chat_template.jinja": f"{{{{ cycler.__init__.__globals__.os.system('touch {ran}') }}}}",
        "tokenizer.json": '{"model": {"vocab": {"a": 1}}}',
    }  # fmt: skip
    for name, text in files.items():
        (cache / "teacher" / name).write_text(text)
    (cache / "teacher/pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (cache / "teacher").iterdir()}
    change(cache, teacher=json.loads((cache / "cache.json").read_text())["teacher"] | {"files_sha256": digests})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", AUDIT, str(cache)], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["10 58", "True []"], done.stderr[-2000:]
    with pytest.raises(ModelError):
        teacher_renderer(open_cache(cache))
    (cache / "teacher/tokenizer.json").write_text("{}")
    with pytest.raises(DamageError, match="teacher/tokenizer.json: expected sha256"):
        teacher_renderer(open_cache(cache))
    (cache / "teacher/tokenizer.json").unlink()
    with pytest.raises(DamageError, match="teacher/tokenizer.json: No such file"):
        teacher_renderer(open_cache(cache))
    assert not ran.exists()


# --------------------------------------------------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    return folder


def test_nothing_is_written_through_a_folder_that_is_a_link(cache, outside):
    store, before = open_store(cache), tree(outside)
    (cache / "linked").symlink_to(outside)
    temporary = store.temporary("real")
    temporary.write_bytes(b"x")
    for write in (
        lambda: store.write("linked/x", b"x"),
        lambda: store.write("../x", b"x"),
        lambda: store.temporary("linked/x"),
        lambda: store.place(temporary, "linked/x"),
        lambda: store.move("cache.json", "linked/x"),
        lambda: store.move("linked/secret", "x"),
    ):
        with pytest.raises(UsageError, match="where nothing is written"):
            write()
    assert tree(outside) == before and not (cache.parent / "x").exists()
    (cache / "inside").mkdir()
    (cache / "alias").symlink_to(cache / "inside")
    store.write("alias/x", b"x")
    assert (cache / "inside/x").read_bytes() == b"x"


def test_a_file_that_is_a_link_is_replaced_and_not_followed(cache, outside):
    store = open_store(cache)
    for name in ("cache.json", "loop"):
        (cache / name).unlink(missing_ok=True)
        (cache / name).symlink_to(outside / "secret")
    store.write("cache.json", b"new")
    store.move("loop", "moved")
    assert (outside / "secret").read_text() == "secret"
    assert (cache / "cache.json").read_bytes() == b"new" and (cache / "moved").is_symlink()


def test_a_link_under_a_temporary_name_is_not_followed(cache, outside):
    from genrecal.files import temporary_path

    store = open_store(cache)
    temporary_path(cache / "x").symlink_to(outside / "secret")
    store.write("x", b"new")
    temporary_path(cache / "y").symlink_to(outside / "secret")
    store.temporary("y").write_bytes(b"new")
    assert (outside / "secret").read_text() == "secret"


def test_clearing_away_unfinished_files_leaves_those_of_a_linked_folder(cache, outside):
    from genrecal.files import temporary_path

    name = temporary_path(Path("x")).name.replace(str(os.getpid()), "999999999")
    for folder in (outside, cache / "samples"):
        (folder / name).touch()
    (cache / "linked").symlink_to(outside)
    open_store(cache).prepare()
    assert (outside / name).exists() and not (cache / "samples" / name).exists()
    (cache / "samples" / name).touch()
    for folder in ("linked", "samples"):
        open_store(cache).discard_temporaries(folder)
    assert (outside / name).exists() and not (cache / "samples" / name).exists()


def test_quarantine_through_a_linked_folder_is_refused(cache, outside):
    (cache / tar_name("samples", 0)).write_bytes(b"")
    (cache / "quarantine").symlink_to(outside)
    found = verify_cache(cache)
    assert found.damaged_shards == [0]
    with pytest.raises(UsageError, match="where nothing is written"):
        quarantine(found)
    assert list(tree(outside)) == ["secret"] and (cache / manifest_name(0)).exists()


def test_a_link_to_a_file_elsewhere_is_read_as_any_file(cache, outside):
    """A snapshot of a hub's download folder is made of such links."""
    os.replace(cache / tar_name("samples", 0), outside / "blob")
    (cache / tar_name("samples", 0)).symlink_to(outside / "blob")
    assert verify_cache(cache).whole and open_cache(cache)[0].record()
    (cache / tar_name("samples", 0)).unlink()
    (cache / tar_name("samples", 0)).symlink_to("/etc/passwd")
    with pytest.raises(DamageError):
        open_cache(cache)[0].record()
    assert verify_cache(cache).damaged_shards == [0]


@pytest.mark.parametrize(
    "name", ["cache.json", HEAD_FILE, INDEX_FILE, "manifest/00000.parquet", "samples/00000.tar", "teacher/config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_what_is_no_file_is_not_waited_for(cache, name, kind):
    path = cache / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    try:
        opened = open_cache(cache)
        assert [record.record() for record in opened]
        opened.head()
    except (FormatError, DamageError):
        pass
    assert not verify_cache(cache).whole


# -------------------------------------------------------------------------------------------------- what is shown of it


@pytest.mark.parametrize("settings", [{"hidden_size": "\x1b[2J\u202e\x00"}, {"top_k": "\x1b[2J"}])
def test_what_is_printed_moves_no_cursor(cache, capsys, settings):
    from genrecal.cli import main

    change(cache, **settings)
    for command in ("verify", "inspect"):
        with pytest.raises(SystemExit, match="1"):
            main([command, str(cache)])
        out, err = capsys.readouterr()
        assert "x1b[2J" in out + err and not {"\x1b", "\u202e", "\x00"} & set(out + err)
