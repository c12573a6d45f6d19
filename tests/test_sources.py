"""What `--data` names: the same samples from local files, from URLs, from S3 and from data sets as the hub lays them out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq
import pytest
from conftest import mixed_samples, png
from hub_server import commit_of, hub_server
from s3_server import BUCKET, environment, proxy_to, s3_server
from test_containers import content, make_dataset, records, write_tar

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.errors import DataError, GenrecalError, SampleError, StorageError, UsageError
from genrecal.samples import open_samples
from genrecal.samples.data_files import find_sources

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set laid out as on the hub, of Parquet files of two splits; and the same records as tars and as JSON."""
    folder = tmp_path_factory.mktemp("made")
    whole = make_dataset(records())
    (folder / "repo/data").mkdir(parents=True)
    (folder / "repo/README.md").write_text("# A data set\n")
    for split, part in (("train", whole.select(range(8))), ("test", whole.select(range(8, 12)))):
        half = len(part) // 2
        for i, rows in enumerate((range(half), range(half, len(part)))):
            part.select(rows).to_parquet(folder / f"repo/data/{split}-0000{i}-of-00002.parquet")
    write_tar(folder / "tars/000.tar", records()[:4])
    write_tar(folder / "tars/001.tar", records()[4:8])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg/genrecal"


def contents(*data: Any, **options: Any) -> list[Any]:
    return [content(sample) for sample in open_samples(list(data), **options)]


@pytest.fixture
def train(made: Path) -> list[Any]:
    found = contents(*sorted((made / "repo/data").glob("train-*")))
    assert len(found) == 8
    return found


# ------------------------------------------------------------------------------------------- folders, as the hub's


def test_a_split_of_a_folder(made: Path, train: list[Any]) -> None:
    repo = made / "repo"
    assert contents(f"{repo}:train") == train
    assert contents(f"{repo}:default:train") == train
    assert len(contents(f"{repo}:test")) == 4
    assert contents(f"file://{repo}/data/train-*") == train
    for text in (repo, f"{repo}:dev"):
        with pytest.raises(DataError, match=r"expected one of its splits, train, test.*; give .*/repo:train"):
            open_samples([text])


def test_a_saved_split(made: Path, tmp_path: Path, train: list[Any]) -> None:
    datasets.DatasetDict(train=make_dataset(records()[:8])).save_to_disk(tmp_path / "saved")
    assert contents(f"{tmp_path / 'saved'}:train") == contents(tmp_path / "saved/train") == train


CONFIGS = """---
configs:
- config_name: chart
  data_files:
  - split: train
    path: chart/*.jsonl
- config_name: doc
  data_files: doc/*.tar
- config_name: mixed
  data_files: mixed/*
---
"""


def test_configurations_of_a_folder(made: Path, tmp_path: Path, train: list[Any]) -> None:
    """The README says what belongs together; files are read as they are, not by the datasets library."""
    for name in ("chart", "doc", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text(CONFIGS)
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    lines = [
        json.dumps(record | extra) for extra in ({"id": 1}, {"id": "x", "more": {"a": 1}}, {"id": [1], "more": 1.5})
    ]
    (tmp_path / "chart/a.jsonl").write_text("\n".join(lines))  # with columns of no one type
    for tar in (made / "tars").iterdir():
        shutil.copy(tar, tmp_path / "doc")
    for name in ("a.jsonl", "b.json"):
        (tmp_path / "mixed" / name).write_text(lines[0])
    assert len(contents(f"{tmp_path}:chart:train")) == 3
    assert contents(f"{tmp_path}:doc:train") == contents(made / "tars")
    with pytest.raises(
        DataError, match=r"available configs: \['chart', 'doc', 'mixed'\]; give NAME:CONFIGURATION:SPLIT"
    ):
        open_samples([f"{tmp_path}:train"])
    with pytest.raises(DataError, match=r"expected files of one kind.*; got \.json, \.jsonl"):
        open_samples([f"{tmp_path}:mixed:train"])


def test_a_folder_of_images_with_their_questions(tmp_path: Path) -> None:
    """As an image folder of the datasets library: the table is read, the images are found beside it."""
    folder = tmp_path / "images/train"
    folder.mkdir(parents=True)
    rows = []
    for i, sample in enumerate(mixed_samples(4)):
        for image in sample.images[:1]:
            (folder / f"{i}.png").write_bytes(image.read())
            turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
            rows.append({"file_name": f"{i}.png", "image": f"{i}.png", "conversations": turns})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = open_samples([f"{tmp_path / 'images'}:train"])
    assert [len(sample.images) for sample in samples] == [1] * len(rows) and len(rows) > 1


# ---------------------------------------------------------------------------------------------------------------- URLs


@pytest.fixture
def memory(made: Path) -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.put(str(made), "/made", recursive=True)
    yield fs
    fs.rm("/made", recursive=True)


def test_files_folders_and_patterns_of_a_url(made: Path, memory: Any, own_cache: Path, train: list[Any]) -> None:
    for url in ("memory://made/repo/data/train-*", "memory://made/repo/data/train-{00000..00001}-of-00002.parquet"):
        assert contents(url) == train
    assert contents("memory://made/tars") == contents("memory://made/tars/*.tar") == contents(made / "tars")
    assert len(list(own_cache.glob("*/*"))) == 4  # each is copied once
    samples = open_samples(["memory://made/tars"])
    assert samples[0].location == "memory:///made/tars/000.tar:part/00000"
    assert samples.describe_files()[1] == {
        "name": "001.tar",
        "sha256": open_samples([made / "tars"]).files[1].sha256(),
        "url": "memory:///made/tars/001.tar",
    }
    with pytest.raises(DataError, match=r"memory://made/repo/data: holds several splits \(test, train\)"):
        open_samples(["memory://made/repo/data"])
    with pytest.raises(DataError, match=r"memory:///made/gone\.tar: no such file"):
        open_samples(["memory://made/gone.tar"])
    with pytest.raises(DataError, match=r"memory://made/\*\.zip: no file matches"):
        open_samples(["memory://made/*.zip"])
    with pytest.raises(DataError, match="expected one of .json, .jsonl"):
        open_samples(["memory://made/repo/README.md"])


def test_a_file_that_changed_is_copied_again(memory: Any) -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    memory.pipe("/made/d.jsonl", json.dumps(record).encode())
    assert len(open_samples(["memory://made/d.jsonl"])) == 1
    memory.pipe("/made/d.jsonl", f"{json.dumps(record)}\n{json.dumps(record)}".encode())
    assert len(open_samples(["memory://made/d.jsonl"])) == 2


def test_only_the_files_that_a_limit_needs_are_fetched(made: Path, memory: Any, own_cache: Path) -> None:
    for i in range(20):
        memory.pipe(f"/made/many/{i:02d}.jsonl", b'{"a": 1}\n{"a": 1}\n')
    assert len(open_samples(["memory://made/many/*.jsonl"], limit=3)) == 3
    assert len(list(own_cache.glob("*/*"))) == 8  # of those that are fetched side by side
    assert len(open_samples(["memory://made/many/*.jsonl"], limit=17)) == 17
    assert len(list(own_cache.glob("*/*"))) == 16


def test_s3(made: Path, train: list[Any]) -> None:
    with s3_server() as port, proxy_to(port) as proxy, environment(proxy.environment()):
        fsspec.filesystem("s3").put(str(made / "repo"), f"{BUCKET}/repo", recursive=True)
        assert contents(f"s3://{BUCKET}/repo/data/train-*") == train
        with pytest.raises(DataError, match="no such file"):
            open_samples([f"s3://{BUCKET}/gone.jsonl"])
        proxy.judge = lambda request: "deny"
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/repo/data/train-.*: cannot be") as raised:
            open_samples([f"s3://{BUCKET}/repo/data/train-00000-of-00002.parquet"])
        assert "\n" not in str(raised.value)
    fsspec.filesystem("s3").clear_instance_cache()


def test_images_beside_remote_data_are_read_where_they_lie(
    made: Path, memory: Any, tmp_path: Path, teacher: Any
) -> None:
    """Not before they are rendered; one that is not there costs its record, a store that fails ends the job."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"id": f"r{i}", "image": f"../images/{i}.png", "messages": turns} for i in range(4)]
    for i in range(3):
        memory.pipe(f"/made/images/{i}.png", png(i))
    text = "\n".join(map(json.dumps, lines))
    memory.pipe("/made/json/d.jsonl", text.encode())
    (tmp_path / "local.jsonl").write_text(text)
    for data, root in (("memory://made/json/d.jsonl", None), (tmp_path / "local.jsonl", "memory://made/json")):
        samples = open_samples([data], image_root=root)
        assert [image.read() for sample in samples[:3] for image in sample.images] == [png(i) for i in range(3)]
        with pytest.raises(SampleError, match=r"image memory://+made/images/3\.png does not exist"):
            samples[3].images[0].read()
    report = run_cache_job(teacher, samples, tmp_path / "c", CacheOptions(max_skip=0.3))
    assert (report.cached, report.skipped) == (3, 1)


def test_a_store_of_images_that_fails_ends_the_job(tmp_path: Path, teacher: Any) -> None:
    record = {"image": "a.png", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    with s3_server() as port, proxy_to(port) as proxy, environment(proxy.environment()):
        proxy.judge = lambda request: "deny"
        samples = open_samples([tmp_path / "d.jsonl"], image_root=f"s3://{BUCKET}/images")
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/images/a.png: cannot be read: PermissionError"):
            run_cache_job(teacher, samples, tmp_path / "c", CacheOptions(max_skip=1.0))
        proxy.judge = lambda request: "pass"
        fsspec.filesystem("s3").pipe(f"{BUCKET}/images/a.png", png())
        assert run_cache_job(teacher, samples, tmp_path / "c", CacheOptions()).cached == 1
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_protocol_that_is_not_known_or_not_installed() -> None:
    with pytest.raises(UsageError, match="nonsense://a.tar: not a URL that fsspec knows"):
        open_samples(["nonsense://a.tar"])
    with pytest.raises(UsageError, match="adlfs, which is not installed"):
        open_samples(["az://container/a.tar"])


# ----------------------------------------------------------------------------------------------------------------- hub

OPEN = """
import json, sys
from genrecal.errors import GenrecalError
from genrecal.samples import data_files, open_samples
data_files.HUB_SECONDS = 600
for text in json.loads(sys.argv[1]):
    try:
        samples = open_samples([text])
        found = [len(samples), [file.get("url") for file in samples.describe_files()], samples[0].location]
    except GenrecalError as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
"""


def in_a_process(endpoint: str, home: Path, *data: str) -> list[Any]:
    """The hub's address is read when its library is imported."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(data)],
        env={name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
        | {"HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600"},  # a busy machine's server is slow, not gone
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()] + [done.stderr]


def test_data_sets_of_the_hub(made: Path, tmp_path: Path) -> None:
    """Its HTTP API is played by a small server; the client is the real one."""
    one, two = commit_of("one"), commit_of("two")
    heads = {"me/vqa": two}
    shutil.copytree(made / "repo", tmp_path / "hub/me/vqa" / one)
    shutil.copytree(made / "repo", tmp_path / "hub/me/vqa" / two)
    pq.write_table(
        make_dataset(records()[:5]).data.table, tmp_path / "hub/me/vqa" / two / "data/train-00000-of-00002.parquet"
    )
    home = tmp_path / "home"
    with hub_server(tmp_path / "hub", heads) as (endpoint, requests):
        newest, older, test, pattern, several, gone, revision, _ = in_a_process(
            endpoint, home, "me/vqa:train", f"me/vqa@{one}:train", f"hf://datasets/me/vqa@{one}/data/test-*",
            "hf://datasets/me/vqa/data/train-{00000..00001}-of-00002.parquet", "me/vqa", "me/gone:train", "me/vqa@x:train",
        )  # fmt: skip
    files = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert (
        newest
        == pattern
        == [9, [f"hf://datasets/me/vqa@{two}/{f}" for f in files], f"hf://datasets/me/vqa@{two}/{files[0]} row 0"]
    )
    assert older[:2] == [8, [f"hf://datasets/me/vqa@{one}/{file}" for file in files]]
    assert test[0] == 4 and len(test[1]) == 2
    assert several.startswith("DataError: me/vqa: expected one of its splits, train, test; give me/vqa:train")
    assert gone.startswith("DataError: me/gone:train: no file or folder here, and no data set of the hub: Repository")
    assert revision.startswith(
        "DataError: me/vqa@x:train: no file or folder here, and no data set of the hub: Revision"
    )
    # The server is gone: what was fetched is found again, at the commit that the name stood for.
    again, missing, unknown, said = in_a_process(endpoint, home, "me/vqa:train", "me/vqa:test", "me/other:train")
    assert again == newest
    assert f"me/vqa:train: the hub cannot be asked; taking the files of {two} that were fetched before" in said
    assert missing == "DataError: me/vqa:test: expected one of its splits, train, got 'test'; give me/vqa:train"
    assert unknown.startswith(
        "DataError: me/other:train: no file or folder here, and the Hugging Face hub cannot be asked"
    )
    assert said.count("Retrying") == 0
    (home / "hub/datasets--me--vqa/snapshots" / two / files[1]).unlink()
    incomplete, _ = in_a_process(endpoint, home, "me/vqa:train")
    assert (
        incomplete
        == "DataError: me/vqa:train: 1 of 00002 files are here, and the hub cannot be asked for the others; fetch them"
    )


@pytest.mark.parametrize(
    "text", ["gone.jsonl", "gone/data.jsonl", "a/b/gone", "./gone", "../gone/x", "gone", "gone/x.json.gz", "/gone/x"]
)
def test_a_local_name_is_never_looked_for_on_the_hub(text: str) -> None:
    """Whatever ends like a data file, starts like a path or has no or two slashes."""
    [source] = find_sources(text)
    assert Path(source.name) == Path(text) and not source.remote
    with pytest.raises(GenrecalError, match="No such file|expected one of"):
        open_samples([text])
