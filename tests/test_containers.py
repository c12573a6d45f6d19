"""Tars and tables -> samples: the same as from json, whatever the order they are asked in; damage; what is selected."""

import dataclasses
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import mixed_samples, png
from hypothesis import given, settings
from hypothesis import strategies as st
from made_cache import make_cache

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import DataError, FormatError, UsageError
from genrecal.samples import BadRecord, FieldMap, ImageRef, Sample, SampleSet, Selection, open_samples, parse_split
from genrecal.samples.table_file import MAX_GROUPS
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

datasets.disable_progress_bars()
Record = dict[str, Any]


def content(sample: Sample | BadRecord) -> Any:
    """All of a sample but where it was read from."""
    if isinstance(sample, BadRecord):
        return sample.key, sample.reason
    return sample.key, sample.to_json(), [(image.read(), image.suffix) for image in sample.images]


def records(count: int = 12) -> list[tuple[Record, list[bytes]]]:
    """LLaVA records with their pictures: one, none, one, and two in different turns."""
    made = []
    for i, sample in enumerate(mixed_samples(count)):
        turns = [
            {
                "from": {"user": "human", "assistant": "gpt"}[message.role],
                "value": "".join(part if isinstance(part, str) else "<image>\n" for part in message.parts),
            }
            for message in sample.messages
        ]
        record = {"id": f"s{i}", "conversations": turns, "category": f"c{i % 3}", "source": "made"}
        made.append((record, [image.read() for image in sample.images]))
    return made


def write_tar(path: Path, made: list[tuple[Record, list[bytes]]]) -> Path:
    """As the webdataset library writes it, the conversations untouched, the pictures named by nothing but their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for i, (record, pictures) in enumerate(made):
            writer.write(
                {"__key__": f"part/{i:05d}", "json": record} | {f"{j}.png": data for j, data in enumerate(pictures)}
            )
    return path


def make_dataset(made: list[tuple[Record, list[bytes]]]) -> datasets.Dataset:
    """As Hugging Face image datasets are: pictures as structs of bytes and a path."""
    rows = [record | {"images": [{"bytes": data, "path": "a.png"} for data in pictures]} for record, pictures in made]
    names = dict.fromkeys(("id", "category", "source"), datasets.Value("string"))
    turns = datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})
    features = datasets.Features(names | {"conversations": turns, "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same conversations in every container."""
    folder = tmp_path_factory.mktemp("containers")
    made, dataset = records(), make_dataset(records())
    lines = []
    for i, (record, pictures) in enumerate(made):
        names = [f"{i}-{j}.png" for j in range(len(pictures))]
        for name, data in zip(names, pictures, strict=True):
            (folder / name).write_bytes(data)
        lines.append(json.dumps(record | {"image": names}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    write_tar(folder / "tars/000.tar", made[:5])
    write_tar(folder / "tars/001.tar", made[5:])
    (folder / "hub").mkdir()
    dataset.select(range(7)).to_parquet(folder / "hub/train-00000-of-00002.parquet", batch_size=3)
    dataset.select(range(7, 12)).to_parquet(folder / "hub/train-00001-of-00002.parquet", batch_size=2)
    dataset.save_to_disk(folder / "saved", num_shards=2)
    return {
        "jsonl": folder / "data.jsonl", "tar": folder / "tars", "tar names": folder / "tars/{000..001}.tar",
        "parquet": folder / "hub", "parquet names": folder / "hub/train-*.parquet", "dataset": folder / "saved",
    }  # fmt: skip


def test_every_container_gives_the_same_samples(containers: dict[str, Path]) -> None:
    expected = [content(sample) for sample in open_samples([containers["jsonl"]])]
    assert len(expected) == 12 and sum(len(pictures) for *_, pictures in expected) == 12
    for name, path in containers.items():
        samples = open_samples([path])
        assert [content(sample) for sample in samples] == expected, name
        order = random.Random(name).sample(range(12), 12)
        assert [content(samples[i]) for i in order] == [expected[i] for i in order], name
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(content, pool.map(samples.__getitem__, order)))
        assert found == [expected[i] for i in order], name


def test_a_cache_is_the_same_from_every_container(
    containers: dict[str, Path], teacher: HFTeacher, tmp_path: Path
) -> None:
    shards = {}
    for name in ("jsonl", "tar", "parquet"):
        run_cache_job(teacher, open_samples([containers[name]]), tmp_path / name, CacheOptions(samples_per_shard=5))
        shards[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("*/*.tar"))]
    assert len(shards["jsonl"]) == 6
    assert all(found == shards["jsonl"] for found in shards.values())


def test_the_tars_of_a_cache_are_data(tmp_path: Path) -> None:
    """So another teacher can be run over what one cache holds."""
    cache = open_cache(make_cache(tmp_path / "cache"))
    samples = list(open_samples([tmp_path / "cache/samples"]))
    assert len(samples) == 10
    for record, sample in zip(cache, samples, strict=True):
        assert sample.to_json() == record.sample.to_json()
        assert [image.read() for image in sample.images] == record.images


# ----------------------------------------------------------------------------------------------------------------- tars


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data.encode() if isinstance(data, str) else data))
    return path


def turns(question: Any = "q", **fields: Any) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]} | fields
    )


def one(path: Path, *members: tuple[str, bytes | str]) -> Any:
    [sample] = open_samples([tar(path / "d.tar", *members)])
    return sample


def test_numbered_pictures_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    sample = one(
        tmp_path, *((f"k.{i}.png", png(i)) for i in (10, 0, 9, 1)), ("k.json", turns()), ("k.txt", "no picture")
    )
    assert [image.read() for image in sample.images] == [png(i) for i in (0, 1, 9, 10)]
    assert sample.messages[0].parts == (*map(ImageRef, range(4)), "q")
    assert (sample.sample_id, sample.key, sample.location) == ("k", "00000000-k", f"{tmp_path / 'd.tar'}:k")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"images": ["k.b.png", "k.a.png"]}, [1, 0]),
        ({"images": ["b.png", "x/k.a.png"]}, [1, 0]),
        ({"image": "k.b.png"}, [1]),
        ({"images": ["coco/17.jpg", "coco/3.jpg"]}, [0, 1]),  # names of before it was packed: as many, so in order
        ({"question": [{"type": "image", "image": "k.b.png"}, {"type": "text", "text": "q"}]}, [1]),
        ({"question": [{"type": "image"}, {"type": "text", "text": "q"}, {"type": "image"}]}, [0, 1]),
    ],
)
def test_pictures_are_found_by_what_the_record_calls_them(tmp_path: Path, fields: Record, expected: list[int]) -> None:
    question = fields.pop("question", "q")
    sample = one(tmp_path, ("k.json", turns(question, **fields)), ("k.a.png", png(0)), ("k.b.png", png(1)))
    assert [image.read() for image in sample.images] == [png(i) for i in expected]


BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes | str]], str]] = {
    "no json": ([("k.png", png())], "no k.json beside its other members"),
    "broken json": ([("k.json", "{"), ("k.png", png())], "broken JSON"),
    "no conversation": ([("k.json", '{"caption": "a cat"}'), ("k.jpg", png())], "non-empty list under"),
    "same name twice": ([("k.json", turns()), ("k.png", png(0)), ("k.PNG", png(1))], "have the same extension"),
    "another's picture": (
        [("k.json", turns(images=["l.png", "m.png"])), ("k.png", png())],
        "image l.png is none of the mem",
    ),
    "a file outside": (
        [("k.json", turns(image="/etc/hostname")), ("k.a.png", b""), ("k.b.png", b"")],
        "is none of the mem",
    ),
    "too many places": ([("k.json", turns("<image><image>")), ("k.png", png())], "more image places than the 1"),
    "not utf-8": ([("k.json", b'{"id": "\xff"}')], "broken JSON"),
    "no object": ([("k.json", "[1]"), ("k.png", png())], "expected a record"),
}


@pytest.mark.parametrize(("members", "reason"), BAD_MEMBERS.values(), ids=BAD_MEMBERS.keys())
def test_a_bad_record_of_a_tar_costs_no_other(tmp_path: Path, members: list[Any], reason: str) -> None:
    good = ("good.json", turns()), ("good.png", png())
    samples = list(open_samples([tar(tmp_path / "d.tar", *good, *members, ("after.json", turns()))]))
    assert [type(sample) for sample in samples] == [Sample, BadRecord, Sample]
    assert reason in samples[1].reason


def test_what_stands_beside_a_tars_json(tmp_path: Path) -> None:
    members = [
        ("one.json", turns()), ("one.jpg", png(0)), ("one.txt", "words"),
        ("two.json", turns()), ("two.mp4", b"x"),
        ("three.json", turns(image="0.png")), ("three.0.png", png(0)), ("three.depth.png", png(1)),
    ]  # fmt: skip
    first, second, third = open_samples([tar(tmp_path / "d.tar", *members)])
    assert [image.read() for image in first.images] == [png(0)] and first.unread == ("a member 'txt'",)
    assert isinstance(second, BadRecord) and "the member 'mp4' is a video" in second.reason
    assert [image.read() for image in third.images] == [png(0)] and third.unread == ("a member 'depth.png'",)


def test_links_folders_and_sparse_members_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "d.tar", "w") as file:
        for kind, name in ((tarfile.SYMTYPE, "k.png"), (tarfile.LNKTYPE, "k.0.png"), (tarfile.DIRTYPE, "d.x")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            file.addfile(info)
        info = tarfile.TarInfo("k.json")
        info.size = len(turns())
        file.addfile(info, io.BytesIO(turns().encode()))
    [sample] = open_samples([tmp_path / "d.tar"])
    assert isinstance(sample, Sample) and sample.images == ()


def joined(data: bytes) -> bytes:
    return data + data


def spoiled(data: bytes) -> bytes:
    return data[:1024] + b"\x01" * 512 + data[1536:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-9000], "breaks off"),
        (lambda data: data.rstrip(b"\0")[:-600], "breaks off|unexpected end of data"),
        (lambda data: data[:3072], "without the mark of a tar's end"),
        (joined, "something that is no member follows byte"),
        (spoiled, "something that is no member follows byte 1024"),
        (lambda data: b"", "not a readable tar: empty file"),
        (lambda data: b"hello" * 500, "not a readable tar"),
        (lambda data: data[:512] + data[10240 - 512 :], "no records in|breaks off|not a readable"),
    ],
)
def test_a_broken_tar_is_refused_in_one_line(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = tar(tmp_path / "d.tar", *((f"{i}.{kind}", turns()) for i in range(4) for kind in ("json", "txt")))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=reason):
        open_samples([path])


# ---------------------------------------------------------------------------------------------------------------- tables


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


PAIRS = [
    [{"user": f"q{i}", "assistant": f"a{i}", "source": "vqa"}, {"user": "more", "assistant": "b"}] for i in range(40)
]


def test_a_table_of_question_and_answer_pairs(tmp_path: Path) -> None:
    """The Cauldron's columns, and no name."""
    pictures = [[{"bytes": png(i), "path": None}] for i in range(40)]
    pq.write_table(table(images=pictures, texts=PAIRS), tmp_path / "t.parquet", row_group_size=3)
    samples = open_samples([tmp_path / "t.parquet"])
    order = random.Random(0).sample(range(40), 40)  # of 14 row groups, more than are kept decoded
    for i in order:
        sample = samples[i]
        assert sample.answers == (f"a{i}", "b") and sample.images[0].read() == png(i)
        assert (sample.key, sample.source) == (f"{i:08d}", "vqa")
        assert sample.location == f"{tmp_path / 't.parquet'} row {i}"
        assert sample.messages[0].parts == (ImageRef(0), f"q{i}")
    assert len(samples.files[0].groups.last) == MAX_GROUPS


PART = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
MESSAGE = pa.struct([("content", pa.list_(PART)), ("role", pa.string())])


def test_messages_with_parts_of_structs(tmp_path: Path) -> None:
    """A table has every field in every row; a picture's place may be given by its index, or hold the picture."""
    asked = [
        {"index": 0, "text": None, "type": "image"},
        {"index": None, "text": "q", "type": "text"},
        {"index": 1, "text": None, "type": "image"},
    ]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": [asked[1] | {"text": "a"}]}]
    swapped = [{"role": "user", "content": asked[::-1]}, said[1]]
    twice = [{"role": "user", "content": [asked[0], asked[0]]}, said[1]]
    messages = pa.array([said, swapped, twice], pa.list_(MESSAGE))
    pq.write_table(table(messages=messages, images=[[png(0), png(1)]] * 3), tmp_path / "t.parquet")
    good, turned, bad = open_samples([tmp_path / "t.parquet"])
    assert good.messages[0].parts == turned.messages[0].parts == (ImageRef(0), "q", ImageRef(1))
    assert [image.read() for image in good.images] == [png(0), png(1)]
    assert [image.read() for image in turned.images] == [png(1), png(0)]
    assert "image places of the numbers [0, 0]" in bad.reason


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("depth", ["whole", "turns", "contents"])
def test_json_columns_are_unpacked_where_they_stand(tmp_path: Path, depth: str, suffix: str) -> None:
    """Contents of two kinds, texts and lists of parts, are such a column in `datasets`: a text is then in quotes."""
    json_type, text = datasets.Json(), datasets.Value("string")
    types = {"whole": json_type, "turns": datasets.List(json_type)}
    types["contents"] = datasets.List({"role": text, "content": json_type})
    asked = [{"type": "text", "text": 'say "yes"'}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "42"}]
    data = datasets.Dataset.from_list([{"messages": turns}] * 2, features=datasets.Features(messages=types[depth]))
    if suffix == "parquet":
        data.to_parquet(tmp_path / "d.parquet")
    else:
        data.save_to_disk(tmp_path / "d.arrow")
    for sample in open_samples(
        [next(tmp_path.glob("d.*"))] if suffix == "parquet" else [*(tmp_path / "d.arrow").glob("*.arrow")]
    ):
        assert [message.parts for message in sample.messages] == [('say "yes"',), ("42",)]


def test_rows_without_a_picture_and_pictures_by_path(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png(1))
    image = [{"bytes": None, "path": None}, None, {"bytes": None, "path": "b.png"}, {"bytes": b"", "path": "gone.png"}]
    pq.write_table(table(image=image, texts=PAIRS[:4]), tmp_path / "t.parquet")
    samples = list(open_samples([tmp_path / "t.parquet"]))
    assert [[image.read() for image in sample.images] for sample in samples] == [[], [], [png(1)], [b""]]


def not_utf8() -> pa.Array:
    """Texts of which one is no UTF-8."""
    return pa.StringArray.from_buffers(3, *pa.array([b"one", b"tw\xff", b"three"]).buffers()[1:])


def test_text_that_is_no_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    data = table(texts=PAIRS[:3], category=not_utf8())
    pq.write_table(data, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)
    for name in ("t.parquet", "t.arrow"):
        first, bad, last = open_samples([tmp_path / name])
        assert (first.category, last.category) == ("one", "three")
        assert isinstance(bad, BadRecord) and bad.reason == "not UTF-8 text"
        [chosen] = open_samples([tmp_path / name], selection=Selection(include_categories=("three",)))
        assert chosen.key == "00000002"


def test_text_within_lists_that_is_no_utf8_costs_its_row_of_parquet_alone(tmp_path: Path) -> None:
    pairs = pa.StructArray.from_arrays([not_utf8(), pa.array(["a", "b", "c"])], ["user", "assistant"])
    pq.write_table(table(texts=pa.ListArray.from_arrays([0, 1, 2, 3], pairs)), tmp_path / "t.parquet")
    first, bad, last = open_samples([tmp_path / "t.parquet"])
    assert (first.answers, last.answers, bad.reason) == (("a",), ("c",), "not UTF-8 text")


def test_every_column_is_read_or_named(tmp_path: Path) -> None:
    rows = {"question": ["q"] * 2, "answer": ["a"] * 2, "jpg": [png(0), png(1)], "notes": ["x", None], "width": [8, 8]}
    pq.write_table(table(**rows), tmp_path / "t.parquet")
    pa.feather.write_feather(table(**rows), tmp_path / "t.feather")
    for name in ("t.parquet", "t.feather"):
        samples = list(open_samples([tmp_path / name]))
        assert [[image.read() for image in sample.images] for sample in samples] == [[png(0)], [png(1)]]
        assert [sample.unread for sample in samples] == [("a field 'notes'",), ()]


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_of_every_kind(tmp_path: Path, compression: str, kind: str) -> None:
    data = table(texts=PAIRS, image=[{"bytes": png(i) * 50, "path": None} for i in range(40)])
    path = tmp_path / "t.ARROW"
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "uncompressed" else compression)
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, data.schema, options=options) as writer:
        writer.write_table(data, max_chunksize=7)
    before = pa.total_allocated_bytes()
    samples = open_samples([path])
    assert pa.total_allocated_bytes() - before < 10_000  # batches lie in mapped memory, packed or not
    for i in random.Random(0).sample(range(40), 40):
        assert samples[i].answers == (f"a{i}", "b") and samples[i].images[0].read() == png(i) * 50


def test_names_for_fields_and_roles(tmp_path: Path) -> None:
    """The same map in every container, for what is read and for what is selected."""
    rows = [{"q": f"q{i}", "gold": f"a{i}", "pic": f"{i}.png", "kind": "xy"[i % 2], "nr": f"n{i}"} for i in range(4)]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "d.csv").write_text("\n".join(",".join(row) for row in [list(rows[0]), *(r.values() for r in rows)]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    fields = FieldMap.parse(["question=q", "answer=gold", "image=pic", "category=kind", "id=nr"])
    for name in ("d.csv", "d.parquet"):
        samples = list(open_samples([tmp_path / name], fields=fields))
        assert [sample.messages[0].parts for sample in samples] == [(ImageRef(0), f"q{i}") for i in range(4)]
        assert [sample.images[0].read() for sample in samples] == [png(i) for i in range(4)]
        assert {sample.unread for sample in samples} == {()}
        chosen = open_samples([tmp_path / name], fields=fields, selection=Selection(include_categories=("y",)))
        assert [(sample.key, sample.answers) for sample in chosen] == [(f"0000000{i}-n{i}", (f"a{i}",)) for i in (1, 3)]


def test_a_damaged_table_ends_the_job_and_is_named(
    containers: dict[str, Path], teacher: HFTeacher, tmp_path: Path
) -> None:
    path = tmp_path / "d.parquet"
    data = bytearray((containers["parquet"] / "train-00000-of-00002.parquet").read_bytes())
    data[4:200] = bytes(196)  # the first column's pages
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"d\.parquet: row group \d cannot be read: .*; copy or download the file again"
    ):
        run_cache_job(teacher, open_samples([path]), tmp_path / "cache", CacheOptions(samples_per_shard=2))


DAMAGE_SCRIPT = """
import random, sys
from genrecal.errors import GenrecalError
from genrecal.samples import open_samples
path, seeds = sys.argv[1], range(int(sys.argv[2]))
data = open(path, "rb").read()
outcomes = set()
for seed in seeds:
    rng = random.Random(seed)
    changed = bytearray(data)
    if seed % 4 == 0:
        del changed[rng.randrange(len(changed)):]
    for _ in range(rng.choice([1, 4, 30])):
        if changed:
            place = rng.randrange(len(changed)) if seed % 3 else -1 - rng.randrange(min(600, len(changed)))
            changed[place] = rng.randrange(256)
    with open(path, "wb") as file:
        file.write(changed)
    try:
        for sample in open_samples([path]):
            outcomes.add(type(sample).__name__)
    except GenrecalError as error:
        assert "\\n" not in str(error), str(error)
        outcomes.add(type(error).__name__)
print(sorted(outcomes))
"""


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_damage_gives_named_errors_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d.{kind}"
    data = table(
        images=[[{"bytes": png(i), "path": None}] for i in range(6)], texts=PAIRS[:6], id=[str(i) for i in range(6)]
    )
    if kind == "tar":
        write_tar(path, records(6))
    elif kind == "parquet":
        pq.write_table(data, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data, max_chunksize=2)
    done = subprocess.run(  # in a process of its own: these libraries are in C++
        [sys.executable, "-c", DAMAGE_SCRIPT, str(path), "80"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DataError" in done.stdout and "Sample" in done.stdout


# --------------------------------------------------------------------------------------------------------- which files


def test_folders_and_patterns_that_are_unclear_are_refused(containers: dict[str, Path], tmp_path: Path) -> None:
    hub = containers["parquet"]
    with pytest.raises(DataError, match=r"gone-000\.tar: No such file"):
        open_samples([tmp_path / "gone-{000..002}.tar"])
    with pytest.raises(DataError, match=r"\*\.tar: no file matches"):
        open_samples([tmp_path / "*.tar"])
    with pytest.raises(DataError, match="File name too long"):
        open_samples([tmp_path / ("x" * 300 + ".tar")])
    with pytest.raises(DataError, match="found none of them in it; give files"):
        open_samples([tmp_path])
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_bytes((hub / "train-00000-of-00002.parquet").read_bytes())
    with pytest.raises(DataError, match=r"several splits \(test, train\); give one, as '.*/test-\*'"):
        open_samples([tmp_path])
    assert len(open_samples([f"{tmp_path}/train-*"])) == 7
    (tmp_path / "000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"found \.tar and \.parquet in it"):
        open_samples([tmp_path])
    (tmp_path / "dict/train").mkdir(parents=True)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "dict/train/state.json").write_text("{}")
    with pytest.raises(DataError, match="expected one split of a saved dataset; give .*/SPLIT, of train"):
        open_samples([tmp_path / "dict"])
    with pytest.raises(DataError, match=r"state\.json: not a saved dataset's"):
        open_samples([tmp_path / "dict/train"])
    with pytest.raises(DataError, match="a compressed tar"):
        open_samples([tmp_path / "d.tar.gz"])


def test_a_name_with_braces_that_exists_is_a_name(tmp_path: Path) -> None:
    assert len(open_samples([tar(tmp_path / "{0..3}[a].tar", ("k.json", turns()))])) == 1


# -------------------------------------------------------------------------------------------------------------- selection


def test_categories_keep_places_and_keys(containers: dict[str, Path]) -> None:
    everything = [content(sample) for sample in open_samples([containers["jsonl"]])]
    for path in containers.values():
        for selection, places in (
            (Selection(include_categories=("c1",)), [1, 4, 7, 10]),
            (Selection(exclude_categories=("c1", "c2")), [0, 3, 6, 9]),
            (Selection(include_categories=("c0", "c1"), exclude_categories=("c0",)), [1, 4, 7, 10]),
        ):
            samples = open_samples([path], selection=selection)
            assert [content(sample) for sample in samples] == [everything[place] for place in places]
            assert content(samples[-1]) == everything[places[-1]]
            limited = open_samples([path], selection=selection, limit=2)
            assert [content(sample) for sample in limited] == [everything[place] for place in places[:2]]


def test_a_category_that_no_record_has_is_an_error(containers: dict[str, Path]) -> None:
    for option in ("include", "exclude"):
        with pytest.raises(
            UsageError, match=f"--{option}-category 'x': no record has it; the data have 'c0', 'c1', 'c2'"
        ):
            open_samples([containers["tar"]], selection=Selection(**{f"{option}_categories": ("x",)}))
    with pytest.raises(DataError, match="no record of .* is left"):
        selection = Selection(include_categories=("c0",), exclude_categories=("c0",))
        open_samples([containers["tar"]], selection=selection)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 records: every id twice, forty without one."""
    path = tmp_path_factory.mktemp("many") / "d.jsonl"
    lines = [json.loads(turns()) | ({"id": f"i{i // 2}"} if i % 10 else {}) for i in range(400)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def keys(path: Path, **selection: Any) -> list[str]:
    try:
        return [sample.key for sample in open_samples([path], selection=Selection(**selection))]
    except DataError:
        return []


@settings(max_examples=8)
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3, unique=True), st.integers(0, 5))
def test_splits_share_the_records_out(many: Path, cuts: list[float], seed: int) -> None:
    bounds = [0.0, *sorted(cuts), 1.0]
    parts = [keys(many, split=pair, split_seed=seed) for pair in zip(bounds, bounds[1:], strict=False)]
    assert sorted(key for part in parts for key in part) == keys(many)
    names = [{key.partition("-")[2] for key in part if "-" in key} for part in parts]
    assert sum(map(len, names)) == len(set.union(*names))  # records of one id are never apart
    assert abs(len(parts[0]) / 400 - bounds[1]) < 0.15


def test_a_split_depends_on_ids_and_seed_alone(many: Path, tmp_path: Path) -> None:
    part = {"split": (0.0, 0.5)}
    lines = [line for line in many.read_text().splitlines() if '"id"' in line]
    (tmp_path / "d.jsonl").write_text("\n".join(reversed(lines)))
    ids = {key.partition("-")[2] for key in keys(many, **part) if "-" in key}
    assert {key.partition("-")[2] for key in keys(tmp_path / "d.jsonl", **part)} == ids
    assert keys(many, **part) != keys(many, **part, split_seed=1)


@pytest.mark.parametrize("text", ["", "0.5", "a:b", "0.5:0.5", "0.9:0.1", "-0.1:0.5", "0:1.1", "0:nan"])
def test_a_split_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="--split .*: expected two shares"):
        Selection(split=parse_split(text))


def test_another_selection_or_other_data_do_not_resume_a_cache(
    containers: dict[str, Path], teacher: HFTeacher, tmp_path: Path
) -> None:
    options = CacheOptions(samples_per_shard=3, question_codec="none")

    def run(samples: SampleSet) -> Any:
        return run_cache_job(teacher, samples, tmp_path / "cache", options)

    half = Selection(split=(0.0, 0.5), split_seed=3, exclude_categories=("c0",))
    samples = open_samples([containers["tar"]], selection=half)
    done = run(samples)
    assert done.cached == len(samples) and open_cache(tmp_path / "cache").description["selection"] == half.to_json()
    assert run(open_samples([containers["tar"]], selection=half)).shards_done == 0
    cache = open_cache(tmp_path / "cache")
    assert len(cache.shards) > 1 and int(cache[0].key[:8]) > 0  # places in a shard are not the numbers in keys
    assert [cache.by_key(record.key).key for record in cache] == [record.key for record in cache]
    with pytest.raises(FormatError, match="no sample"):
        cache.by_key("00000000")
    assert verify_cache(tmp_path / "cache").findings == ()
    for other in (Selection(), dataclasses.replace(half, split_seed=4)):
        with pytest.raises(UsageError, match="selection was"):
            run(open_samples([containers["tar"]], selection=other))


@pytest.mark.parametrize("name", ["tar", "parquet", "dataset"])
def test_changed_data_have_another_digest(containers: dict[str, Path], tmp_path: Path, name: str) -> None:
    files = open_samples([containers[name]]).files
    digests = [file.sha256() for file in files]
    assert digests == [file.sha256() for file in open_samples([containers[name]]).files] and len(set(digests)) == 2
    copy = tmp_path / files[0].path.name
    copy.write_bytes(files[0].path.read_bytes().replace(b"How many?", b"How manx?"))
    assert open_samples([copy]).files[0].sha256() != digests[0]


def test_a_large_tables_digest_is_of_pieces(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pictures = [[random.Random(i).randbytes(400_000)] for i in range(20)]
    pq.write_table(table(images=pictures, texts=PAIRS[:20]), path, compression="none")
    data, digest = path.read_bytes(), open_samples([path]).files[0].sha256()
    assert len(data) > 4e6 and digest == open_samples([path]).files[0].sha256()
    pictures[7] = [pictures[7][0][:-1]]
    pq.write_table(table(images=pictures, texts=PAIRS[:20]), path, compression="none")
    assert open_samples([path]).files[0].sha256() != digest
    path.write_bytes(data[:1000] + b"x" + data[1001:])
    assert open_samples([path]).files[0].sha256() != digest
