"""What other tools read from a cache that the job made: webdataset, Megatron-Energon, datasets, pyarrow.dataset, DuckDB."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import torch
import webdataset
from conftest import mixed_samples, picture, write_llava
from made_cache import make_cache
from PIL import Image

import genrecal
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import DamageError
from genrecal.samples import open_samples
from genrecal.shards.index import INDEX_FILE
from genrecal.shards.index import SCHEMA as INDEX_SCHEMA
from genrecal.shards.reader import Cache, open_cache
from genrecal.shards.verify import verify_cache

PER_SHARD = 3
NO_ANSWER = {"id": "bad", "conversations": [{"from": "human", "value": "q"}]}


class Job:
    """A cache job and its cache: four shards, none to two pictures a sample, and a shard where every record is skipped."""

    def __init__(self, folder: Path, teacher: HFTeacher):
        self.cache, self.teacher = folder / "cache", teacher
        self.data = write_llava(folder / "data", mixed_samples(8))
        images = folder / "data/images"
        picture(7).save(images / "a.webp", lossless=True)
        picture(8).save(images / "b.JPEG", quality=90)
        (images / "0-0.png").rename(images / "c.png?w=800")  # as a downloader leaves it
        text = self.data.read_text()
        for old, new in (("0-0.png", "c.png?w=800"), ("1-0.png", "a.webp"), ("1-1.png", "b.JPEG")):
            text = text.replace(f"images/{old}", f"images/{new}")
        records = json.loads(text)
        records[PER_SHARD:PER_SHARD] = [NO_ANSWER] * PER_SHARD
        self.data.write_text(json.dumps(records))
        self.run()

    def run(self):
        options = CacheOptions(top_k=5, samples_per_shard=PER_SHARD, max_skip=0.5)
        return run_cache_job(self.teacher, open_samples([self.data]), self.cache, options)

    @property
    def tars(self) -> list[str]:
        return [str(path) for path in sorted((self.cache / "samples").glob("*.tar"))]


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Job:
    return Job(tmp_path_factory.mktemp("job"), HFTeacher.load(tiny("qwen2_vl")))


@pytest.fixture(scope="module")
def opened(job) -> Cache:
    cache = open_cache(job.cache)
    assert len(cache) == 8 and {record.row["images"] for record in cache} == {0, 1, 2}
    assert cache.num_shards == 4 and {record.row["shard"] for record in cache} == {0, 2, 3}
    return cache


def check_sample(record, conversation, images, arrow: bytes) -> None:
    """One tool's view of a sample against the record: the conversation, every picture's pixels, the Arrow table."""
    assert conversation == record.sample.to_json()
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in record.images]
    assert len(images) == len(expected)
    for found, pixels in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(found.convert("RGB")), pixels)
    table = pa.ipc.open_file(arrow).read_all()
    assert table.equals(record.answer)
    assert np.array_equal(table.column("topk_ids").combine_chunks().to_numpy_ndarray(), record.answer_rows().topk_ids)


def pictures(sample) -> list:
    """The pictures of a dict of members, in order."""
    names = [name for name in sample if name.split(".")[0].isdecimal() and sample[name] is not None]
    return [sample[name] for name in sorted(names, key=lambda name: int(name.split(".")[0]))]


def test_pictures_have_suffixes_that_tools_decode_by(job, opened):
    """The input's suffix where it is a picture's; else that of the bytes, which are never changed."""
    names = [member["name"].split(".", 1)[1] for record in opened for member in record.row["members"]]
    assert {name for name in names if name[0].isdigit()} == {"0.png", "0.webp", "1.jpg", "1.png"}
    assert names.count("0.webp") == 1 and names.count("1.jpg") == 1
    images = job.data.parent / "images"
    assert opened[0].images == [(images / "c.png?w=800").read_bytes()]
    assert opened[1].images == [(images / name).read_bytes() for name in ("a.webp", "b.JPEG")]


# ---------------------------------------------------------------------------------------------------------- webdataset


def test_webdataset_streams_every_sample_once(job, opened):
    urls = f"{job.cache}/samples/{{00000..00003}}.tar"
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [record.key for record in opened]
    for sample, record in zip(found, opened, strict=True):
        check_sample(record, sample["json"], pictures(sample), sample["answer.arrow"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_webdataset_pipeline_gives_what_the_reader_gives(opened, workers):
    """Sample by sample, in this process and in the workers of a stock DataLoader."""
    pipeline = genrecal.webdataset_pipeline(opened)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    found = {sample["__key__"]: sample for sample in loader}
    assert sorted(found) == [record.key for record in opened] and (workers or list(found) == sorted(found))
    for record in opened:
        sample, rows = found[record.key], record.answer_rows()
        assert sample["json"] == record.sample.to_json()
        assert [image.mode for image in sample["images"]] == ["RGB"] * len(record.images)
        for image, data in zip(sample["images"], record.images, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert np.array_equal(sample["answer"].hidden, record.hidden())
        for name in ("topk_ids", "topk_logits", "logsumexp", "target_id", "turn", "position"):
            assert np.array_equal(getattr(sample["answer"], name), getattr(rows, name))


def test_the_pages_pipeline_reads_a_cache(job, opened):
    page = (Path(__file__).parents[2] / "docs/shard-format.md").read_text()
    (script,) = re.findall(r"# read_pipeline\.py\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", script, str(job.cache)], capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == [
        f"{r.key} {len(r.sample.messages)} {len(r.images)} {r.hidden().shape} {r.answer_rows().topk_ids.shape}"
        for r in opened
    ], done.stderr


def test_the_webdataset_pipeline_is_divided_among_ranks_and_can_be_extended(opened, monkeypatch):
    keys = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        shuffled = genrecal.webdataset_pipeline(opened).compose(webdataset.shuffle(100, seed=0))
        keys.append([sample["__key__"] for sample in shuffled])
    assert sorted(keys[0] + keys[1]) == [record.key for record in opened] and min(map(len, keys)) > 0


@pytest.mark.parametrize("damage", ["a byte", "the end", "the file"])
def test_the_webdataset_pipeline_names_damage(tmp_path, damage):
    cache = make_cache(tmp_path / "cache")
    tar = cache / "samples/00001.tar"
    data = tar.read_bytes()
    member = open_cache(cache)[4].row["members"][0]
    if damage == "a byte":
        tar.write_bytes(data[: member["offset"]] + b"?" + data[member["offset"] + 1 :])
    elif damage == "the end":
        tar.write_bytes(data[: len(data) // 2])
    else:
        tar.unlink()
    with pytest.raises(DamageError, match=f"{tar}: "):
        list(genrecal.webdataset_pipeline(open_cache(cache)))


def test_webdataset_reads_the_questions(job, opened):
    tars = [str(path) for path in sorted((job.cache / "questions").glob("*.tar"))]
    found = {s["__key__"]: s["question.arrow"] for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert found.keys() == {record.key for record in opened if record.has_question}
    assert all(pa.ipc.open_file(found[r.key]).read_all().equals(r.question) for r in opened)


# ------------------------------------------------------------------------------------------------------------- Energon


def prepare(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("energon"), "prepare", "--non-interactive", "--no-progress"]
    command += ["--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", *options, folder]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prepared(job, opened) -> Path:
    """The cache, prepared in place, as a user would; a shard without samples stops Energon unless it is left out."""
    before = {path: path.read_bytes() for path in job.cache.rglob("*") if path.is_file()}
    samples = job.cache / "samples"
    refused = prepare(samples)
    assert "Shard 00001.tar has no samples" in refused.stdout + refused.stderr
    shutil.rmtree(samples / ".nv-meta")  # what is left of it Energon takes for another kind of data set
    done = prepare(samples, "--exclude", "00001")
    assert done.returncode == 0 and "Done" in done.stdout, done.stdout + done.stderr
    after = {path: path.read_bytes() for path in job.cache.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    new = {str(path.relative_to(samples)) for path in after.keys() - before.keys()}
    assert {f"{shard:05d}.tar.idx" for shard in (0, 2, 3)} <= new
    assert all(name.endswith(".tar.idx") or name.startswith(".nv-meta/") for name in new)
    assert json.loads((samples / ".nv-meta/.info.json").read_text())["shard_counts"] == {
        f"{shard:05d}.tar": count for shard, count in Counter(r.row["shard"] for r in opened).items()
    }
    return samples


def test_energon_cooks_every_sample_once(prepared, opened):
    import megatron.energon as energon

    @energon.edataclass
    class Cooked(energon.Sample):
        conversation: dict
        images: list
        arrow: bytes

    @energon.stateless
    def cook(sample: dict) -> Cooked:
        return Cooked(
            **energon.basic_sample_keys(sample),
            conversation=sample["json"], images=pictures(sample), arrow=sample["answer.arrow"],
        )  # fmt: skip

    class Encoder(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="pil")
        cookers = [energon.Cooker(cook, has_subflavors={"cache": "int8"})]

        @energon.stateless
        def batch(self, samples):
            return samples

    with (prepared / ".nv-meta/dataset.yaml").open("a") as file:
        file.write("subflavors: {cache: int8}\n")
    for batch_size, sizes in ((2, [2, 2, 2, 2]), (3, [3, 3, 2])):
        dataset = energon.get_train_dataset(
            prepared, worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0), batch_size=batch_size,
            shuffle_buffer_size=4, max_samples_per_sequence=2, task_encoder=Encoder(), repeat=False,
        )  # fmt: skip
        batches = list(energon.get_loader(dataset))
        assert [len(batch) for batch in batches] == sizes
        samples = [sample for batch in batches for sample in batch]
        assert sorted(sample.__key__.split("/")[-1] for sample in samples) == [record.key for record in opened]
        for sample in samples:
            record = opened.by_key(sample.__key__.split("/")[-1])
            check_sample(record, sample.conversation, sample.images, sample.arrow)


def test_a_prepared_cache_is_whole_and_resumed(prepared, job, opened):
    """Energon's files are not ours: verify and the job pass them by, and a redone shard leaves them fitting."""
    assert verify_cache(job.cache, deep=True).whole
    report = job.run()
    assert (report.shards_found, report.shards_done) == (4, 0)
    tar = (prepared / "00002.tar").read_bytes()
    (prepared / "00002.tar").unlink()
    report = job.run()
    assert (report.shards_found, report.shards_done) == (3, 1)
    assert (prepared / "00002.tar").read_bytes() == tar  # so Energon's offsets still hold
    assert verify_cache(job.cache).whole
    assert [record.key for record in open_cache(job.cache)] == [record.key for record in opened]


# ------------------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def features(job):
    """From the manifest: samples with other numbers of pictures have other members, which datasets must be told of."""
    import datasets

    member = "SELECT unnest(members, recursive := true) FROM read_parquet(?)"
    query = f"SELECT DISTINCT split_part(name, '.', 2) || '.' || split_part(name, '.', 3) FROM ({member})"
    names = [name for (name,) in duckdb.execute(query, [f"{job.cache}/manifest/*.parquet"]).fetchall()]
    text = datasets.Value("string")
    images = {name: datasets.Image() for name in sorted(names) if name[0].isdigit()}
    return datasets.Features(
        {"__key__": text, "__url__": text, "json": datasets.Json(), "answer.arrow": datasets.Value("binary")} | images
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_loads_the_tars(job, opened, features, streaming, tmp_path):
    import datasets

    arguments = dict(data_files=job.tars, split="train", streaming=streaming, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="the same types"):
        datasets.load_dataset("webdataset", **arguments)
    found = list(datasets.load_dataset("webdataset", **arguments, features=features))
    assert [sample["__key__"] for sample in found] == [record.key for record in opened]
    for sample, record in zip(found, opened, strict=True):
        check_sample(record, sample["json"], pictures(sample), sample["answer.arrow"])


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_loads_manifests_and_index(job, opened, streaming, tmp_path):
    import datasets

    def load(files):
        arguments = dict(data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path))
        return list(datasets.load_dataset("parquet", **arguments))

    assert load(f"{job.cache}/manifest/*.parquet") == opened.manifest().to_pylist()
    rows = load(f"{job.cache}/{INDEX_FILE}")
    assert [row["shard"] for row in rows if row["cached"]] == [record.row["shard"] for record in opened]
    assert [row["category"] for row in rows] == opened.manifest().column("category").to_pylist()


# ------------------------------------------------------------------------------------------- pyarrow.dataset and DuckDB


def test_pyarrow_dataset_reads_manifests_and_index(job, opened):
    manifest = pyarrow.dataset.dataset(f"{job.cache}/manifest")
    assert manifest.to_table().to_pylist() == opened.manifest().to_pylist()
    cached = manifest.to_table(filter=pa.compute.field("status") == "cached", columns=["key", "members"])
    assert cached.to_pylist() == [{"key": record.key, "members": record.row["members"]} for record in opened]
    index = pyarrow.dataset.dataset(f"{job.cache}/{INDEX_FILE}")
    assert index.schema.names == INDEX_SCHEMA.names
    kept = index.to_table(filter=(pa.compute.field("category") == "test") & pa.compute.field("cached"))
    assert kept.column("answer_tokens").to_pylist() == [record.row["answer_tokens"] for record in opened]


def test_duckdb_reads_manifests_and_index(job, opened):
    manifest, index = f"read_parquet('{job.cache}/manifest/*.parquet')", f"'{job.cache}/{INDEX_FILE}'"
    assert duckdb.sql(f"FROM {manifest}").to_arrow_table().to_pylist() == opened.manifest().to_pylist()
    members = duckdb.sql(
        f"SELECT m.name, m.tier, shard, m.offset, m.size, m.xxh3 FROM {manifest}, unnest(members) AS u(m) ORDER BY ALL"
    ).fetchall()
    expected = [(r.row["shard"], m) for r in opened for m in r.row["members"]]
    assert members == sorted((m["name"], m["tier"], s, m["offset"], m["size"], m["xxh3"]) for s, m in expected)
    for source in (manifest, index):
        kept = "cached" if source == index else "status = 'cached'"
        (found,) = duckdb.sql(f"SELECT sum(answer_tokens), count(*) FROM {source} WHERE {kept}").fetchall()
        assert found == (sum(record.row["answer_tokens"] for record in opened), 8)


def test_duckdb_finds_the_bytes(job, opened):
    """Offsets and sizes are enough to read a member with nothing else."""
    query = f"SELECT shard, m FROM '{job.cache}/manifest/*.parquet', unnest(members) AS u(m) WHERE m.name LIKE '%.webp'"
    ((shard, member),) = duckdb.sql(query).fetchall()
    with open(job.tars[shard], "rb") as tar:
        tar.seek(member["offset"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(tar.read(member["size"]))).convert("RGB")), picture(7))
