"""A written shard read back: by us, by plain tools; whole or not there; damage named."""

import dataclasses
import hashlib
import io
import json
import tarfile

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import conversation
from shard_records import make_answer, make_question

import genrecal
from genrecal.errors import DamageError, FormatError
from genrecal.files import machine_name, remove_stale_temporaries
from genrecal.samples import BadRecord, ImageSource
from genrecal.shards import index
from genrecal.shards.codecs import CODECS
from genrecal.shards.layout import manifest_name, tar_name, write_cache_json
from genrecal.shards.record import Record
from genrecal.shards.storage import open_store
from genrecal.shards.writer import ShardWriter

DESCRIPTION = {
    "format_version": 1, "answer_codec": "bf16", "question_codec": "bf16", "hidden_size": 8, "num_shards": 2,
    "question_fraction": 1.0, "teacher": {"name": "made", "dtype": "float32"}, "head_rows": 99, "top_k": 4,
    "vocab_size": 99, "image_backend": "pil", "question_seed": 0, "samples_per_shard": 4, "num_samples": 7,
}  # fmt: skip


def sample_of(number):
    sample = conversation(("What?", "a"), ("And?", "b c"), images={0: 1, 1: 1}, key=f"{number:08d}")
    return sample


def write_shard(cache, shard, numbers):
    with ShardWriter(cache, shard, answer_codec=CODECS["bf16"], question_codec=CODECS["bf16"]) as writer:
        for number in numbers:
            sample = sample_of(number)
            question = make_question(seed=number) if number % 2 == 0 else None
            record = Record(sample=sample, answer=make_answer(seed=number), question=question)
            writer.add(record, [image.read() for image in sample.images])
        writer.skip(
            BadRecord(key=f"{max(numbers) + 1:08d}-bad", sample_id="bad", location="d.json:7", reason="no image"),
            "no image",
        )
        return writer.commit()


@pytest.fixture
def cache(tmp_path):
    write_cache_json(open_store(tmp_path), DESCRIPTION)
    write_shard(tmp_path, 0, [0, 1, 2])
    write_shard(tmp_path, 1, [4, 5])
    return tmp_path


def test_records_come_back(cache):
    opened = genrecal.open_cache(cache)
    assert len(opened) == 5 and len(opened.manifest()) == 7
    assert [record.key for record in opened] == [f"{i:08d}" for i in (0, 1, 2, 4, 5)]
    for number, record in zip((0, 1, 2, 4, 5), opened, strict=True):
        sample = sample_of(number)
        assert record.images == [image.read() for image in sample.images]
        assert record.sample.to_json() == sample.to_json() and record.sample.images == sample.images
        assert np.array_equal(record.hidden(), make_answer(seed=number).hidden)
        assert (record.question_hidden() is None) == (number % 2 == 1)
    assert np.array_equal(opened[-1].answer_rows().topk_ids, make_answer(seed=5).topk_ids)
    assert opened.by_key("00000004").key == "00000004"
    with pytest.raises(FormatError, match=r"skipped: d\.json:7: no image"):
        opened.by_key("00000003-bad")
    with pytest.raises(FormatError, match="no sample"):
        opened.by_key("nothing")


def test_a_row_gives_its_members_as_arrow_does(cache):
    opened = genrecal.open_cache(cache)
    for record, row in zip(opened, opened.cached.to_pylist(), strict=True):
        assert dict(record.row) == row and record.row["members"] == row["members"]


def test_manifest_measures_the_rows(cache):
    row = genrecal.open_cache(cache)[0].row
    rows = make_answer(seed=0)
    keep = rows.predicts
    probs = np.exp(rows.topk_logits[keep] - rows.logsumexp[keep, None])
    tail = 1 - probs.sum(1)
    entropy = -(probs * np.log(probs)).sum(1) - tail * np.log(tail)
    assert row["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert row["log_prob"] == pytest.approx((rows.target_logit - rows.logsumexp)[keep].mean(), rel=1e-5)
    assert (row["answer_tokens"], row["turns"], row["images"]) == (5, 2, 2)
    assert row["question_tokens"] == rows.position[-1] + 1 - 5


def test_plain_tools_read_it(cache):
    with tarfile.open(cache / tar_name("samples", 0)) as tar:
        names = tar.getnames()
        assert all(m.mtime == 0 and m.uid == m.gid == 0 and m.uname == m.gname == "" for m in tar)
        table = pa.ipc.open_file(io.BytesIO(tar.extractfile("00000000.answer.arrow").read())).read_all()
    keys = [name.split(".", 1)[0] for name in names]
    assert names[:4] == ["00000000.json", "00000000.0.png", "00000000.1.png", "00000000.answer.arrow"]
    assert keys == sorted(keys)  # a sample's members stand together
    assert table.num_rows == 7
    found = list(webdataset.WebDataset(str(cache / tar_name("samples", 0)), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["00000000", "00000001", "00000002"]
    assert json.loads(found[0]["json"])["category"] == "test" and found[0]["0.png"] == sample_of(0).images[0].read()
    counts = duckdb.sql(
        f"select status, count(*), sum(answer_tokens) from '{cache}/manifest/*.parquet' group by status order by status"
    ).fetchall()
    assert counts == [("cached", 5, 25), ("skipped", 2, None)]


def test_offsets_are_the_members_own(cache):
    for record in genrecal.open_cache(cache):
        for member in record.row["members"]:
            with tarfile.open(cache / tar_name(member["tier"], record.row["shard"])) as tar:
                info = tar.getmember(member["name"])
                assert (info.offset_data, info.size) == (member["offset"], member["size"])


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / name, 0, [0, 1])
    for path in ("samples/00000.tar", "questions/00000.tar", "manifest/00000.parquet"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_a_suffix_that_is_no_pictures_is_taken_from_the_bytes(tmp_path):
    """Readers choose a decoder by it: 0.pkl would be unpickled."""
    png, other = sample_of(0).images[0].read(), b"no picture"
    given = [("pkl", png), ("jpgw800", png), ("jpg", png), ("webp", other), ("json", other), ("img", other)]
    images = tuple(ImageSource(data=data, suffix=suffix) for suffix, data in given)
    record = Record(sample=dataclasses.replace(sample_of(0), images=images), answer=make_answer(), question=None)
    with ShardWriter(tmp_path, 0, answer_codec=CODECS["bf16"], question_codec=None) as writer:
        writer.add(record, [data for _, data in given])
        writer.commit()
    with tarfile.open(tmp_path / tar_name("samples", 0)) as tar:
        pictures = [member for member in tar if member.name.split(".")[1].isdigit()]
        assert [member.name.split(".", 1)[1] for member in pictures] == [
            "0.png", "1.png", "2.jpg", "3.webp", "4.img", "5.img"
        ]  # fmt: skip
        assert [tar.extractfile(member).read() for member in pictures] == [data for _, data in given]


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path, 0, answer_codec=CODECS["bf16"], question_codec=None) as writer,
    ):
        writer.skip(BadRecord(key="0", sample_id="", location="x:1", reason="r"), "r")
        raise RuntimeError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path):
    import os

    (tmp_path / "samples").mkdir()
    machine = machine_name()
    dead = tmp_path / "samples" / f".00000.tar.{machine}.999999999.tmp"
    alive = tmp_path / "samples" / f".00001.tar.{machine}.{os.getppid()}.tmp"
    elsewhere, old = (tmp_path / "samples" / f".0000{i}.tar.another-host.1.tmp" for i in (2, 3))
    for path in (dead, alive, elsewhere, old):
        path.touch()
    os.utime(old, (0, path.stat().st_mtime - 25 * 3600))
    assert sorted(remove_stale_temporaries(tmp_path)) == [dead, old]
    assert alive.exists() and elsewhere.exists() and not dead.exists() and not old.exists()


@pytest.mark.parametrize("tier", ["samples", "questions"])
def test_every_flipped_byte_is_named_or_harmless(cache, tier):
    """A byte of any member that changes is found when the member is read; padding and headers do not matter."""
    path = cache / tar_name(tier, 0)
    whole = path.read_bytes()
    expected = read_all(cache)
    rng = np.random.default_rng(0)
    found = 0
    for at in rng.choice(len(whole), 60, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        try:
            assert read_all(cache) == expected
        except DamageError as error:
            assert str(path) in str(error) and "member 0000000" in str(error)
            found += 1
    assert found > 10
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DamageError, match=f"{tier}/00000.tar"):
        read_all(cache)
    path.unlink()
    with pytest.raises(DamageError, match=f"{tier}/00000.tar"):
        read_all(cache)


def read_all(cache):
    result = []
    for record in genrecal.open_cache(cache):
        result.append([record.read(member) for member in record.row["members"]])
    return result


def test_versions_and_codecs_that_are_not_known_are_refused(cache):
    for change, message in (
        ({"format_version": 2}, "version 2; this genrecal reads version 1"),
        ({"answer_codec": "int3"}, "answer_codec.*int3.*bf16"),
    ):
        write_cache_json(open_store(cache), DESCRIPTION | change)
        with pytest.raises(FormatError, match=message):
            genrecal.open_cache(cache)
    with pytest.raises(FormatError, match="not a cache"):
        genrecal.open_cache(cache / "manifest")


def test_a_shard_that_is_written_anew_is_read_anew(cache):
    opened = genrecal.open_cache(cache)
    before = [record.hidden() for record in opened][:3]
    write_shard(cache, 0, [2, 1, 0])
    again = genrecal.open_cache(cache)
    assert [record.key for record in again][:3] == ["00000002", "00000001", "00000000"]
    assert all(np.array_equal(a.hidden(), b) for a, b in zip(reversed(again[:3]), before, strict=True))


def test_damaged_or_missing_manifests_are_named(cache):
    (cache / manifest_name(1)).write_bytes(b"PAR1 nonsense")
    with pytest.raises(DamageError, match=r"manifest/00001\.parquet"):
        genrecal.open_cache(cache)
    (cache / manifest_name(1)).unlink()
    assert len(genrecal.open_cache(cache)) == 3  # an unfinished cache can be looked at
    write_cache_json(open_store(cache), DESCRIPTION | {"totals": {}})
    with pytest.raises(DamageError, match=r"manifest/00001\.parquet: missing"):
        genrecal.open_cache(cache)


def test_many_shards_are_summed_as_few_are(cache, monkeypatch):
    """Blocks of shards are joined as they are scanned, whatever their size."""
    store, shards = open_store(cache), [0, 1]
    expected = index.index_bytes(index.scan(store, shards)), index.totals_of(index.scan(store, shards))
    monkeypatch.setattr(index, "BLOCK_SHARDS", 1)
    scanned = index.scan(store, shards)
    assert (
        pq.read_table(pa.BufferReader(index.index_bytes(scanned))).to_pylist()
        == pq.read_table(pa.BufferReader(expected[0])).to_pylist()
    )
    assert index.totals_of(scanned) == expected[1]


def test_what_python_shows_of_a_cache_is_short(cache):
    opened = genrecal.open_cache(cache)
    for value in (opened, opened[0], opened[0].sample):
        assert len(repr(value)) < 1000
    assert opened[0].key in repr(opened[0])
    assert "open_cache" in dir(genrecal)


def test_the_sha256_of_a_tar_is_the_files(cache):
    facts = genrecal.open_cache(cache).shard_facts
    for shard, tier in ((0, "samples"), (1, "questions")):
        digest = hashlib.sha256((cache / tar_name(tier, shard)).read_bytes()).hexdigest()
        assert facts[shard]["sha256"][tier] == digest
