"""`genrecal cache` from every kind of data that holds the same: the same shards; resumed wherever the same content lies."""

import csv
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png
from s3_server import BUCKET, environment, proxy_to, s3_server
from test_containers import tar

from genrecal.cli import main
from genrecal.demo.pipeline import ASSETS
from genrecal.shards.layout import read_cache_json
from genrecal.shards.storage import open_store

ROWS = [
    {
        "nr": f"s{i}",
        "q": f"How many, {i}?",
        "gold": "one\ntwo" if i % 3 else "three",
        "pic": f"{i}.png" if i % 2 else None,
    }
    for i in range(8)
]
NAMES = ["--field", "question=q", "--field", "answer=gold", "--field", "image=pic", "--field", "id=nr"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same eight records as everything that people have, and the cache of the plainest."""
    folder = tmp_path_factory.mktemp("made")
    images = {row["pic"]: png(i) for i, row in enumerate(ROWS) if row["pic"]}
    for name, data in images.items():
        (folder / str(name)).write_bytes(data)
    lines = "\n".join(map(json.dumps, ROWS))
    (folder / "d.jsonl").write_text(lines)
    (folder / "D.JSON").write_text("\ufeff" + json.dumps({"data": ROWS}, indent=1))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (folder / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    inside = [row | {"pic": {"bytes": images.get(row["pic"]), "path": row["pic"]}} for row in ROWS]
    (folder / "repo/data").mkdir(parents=True)
    (folder / "repo/README.md").write_text("# Receipts\n")
    for i, part in enumerate((inside[:5], inside[5:])):
        pq.write_table(
            pa.Table.from_pylist(part), folder / f"repo/data/train-0000{i}-of-00002.parquet", row_group_size=2
        )
    pq.write_table(pa.Table.from_pylist(inside[:1]), folder / "repo/data/test-00000-of-00001.parquet")
    datasets.Dataset.from_list(inside).save_to_disk(folder / "saved", num_shards=2)
    members: list[tuple[str, Any]] = []
    for row in ROWS:
        members.append((f"{row['nr']}.json", json.dumps(row | {"pic": None})))
        members += [(f"{row['nr']}.png", images[row["pic"]])] if row["pic"] else []
    tar(folder / "d.TAR", *members)
    fs = fsspec.filesystem("memory")
    fs.put(str(folder / "repo"), "/end_to_end", recursive=True)
    assert cache(folder, folder / "d.jsonl", folder / "expected") == 0
    yield folder
    fs.rm("/end_to_end", recursive=True)


def cache(folder: Path, data: Any, out: Path, *more: Any) -> int:
    words = ["cache", "--teacher", ASSETS / "teacher", "--device", "cpu", "--data", data, "--out", out]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--samples-per-shard", "3", *NAMES, *map(str, more)])
    return int(ended.value.code or 0)


def tars(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.glob("*/*.tar"))}


@pytest.mark.parametrize(
    "name", ["D.JSON", "d.jsonl.gz", "d.csv", "d.TAR", "saved", "repo:train", "memory://end_to_end/data/train-*"]
)
def test_a_cache_is_the_same_from_everything(
    made: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = name if "://" in name else made / name
    assert cache(made, data, tmp_path / "c") == 0
    assert capfd.readouterr().out.startswith("4 of 8 samples have images (4 images)\n")
    assert tars(tmp_path / "c") == tars(made / "expected") and len(tars(tmp_path / "c")) == 6
    assert read_cache_json(open_store(tmp_path / "c"))["fields"] == {
        "q": "question",
        "gold": "answer",
        "pic": "image",
        "nr": "id",
    }


def test_a_cache_of_data_in_s3_is_resumed_where_the_same_lies(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with s3_server() as port, proxy_to(port) as proxy, environment(proxy.environment()):
        s3 = fsspec.filesystem("s3")
        s3.put(str(made / "repo/data"), f"{BUCKET}/data", recursive=True)
        url = f"s3://{BUCKET}/data/train-{{00000..00001}}-of-00002.parquet"
        assert cache(made, url, tmp_path / "c") == 0
        assert tars(tmp_path / "c") == tars(made / "expected")
        assert [file["url"] for file in read_cache_json(open_store(tmp_path / "c"))["data"]] == [
            f"s3://{BUCKET}/data/train-0000{i}-of-00002.parquet" for i in range(2)
        ]
        for data in (url, f"{made}/repo:train"):  # fetched before, and at another place
            capfd.readouterr()
            assert cache(made, data, tmp_path / "c") == 0
            assert "0 shards written, 3 found" in capfd.readouterr().out
        changed = pq.read_table(made / "repo/data/train-00001-of-00002.parquet").to_pylist()
        pq.write_table(
            pa.Table.from_pylist([*changed[:-1], changed[-1] | {"gold": "four"}]), tmp_path / "changed.parquet"
        )
        s3.put(str(tmp_path / "changed.parquet"), f"{BUCKET}/data/train-00001-of-00002.parquet")
        assert cache(made, url, tmp_path / "c") == 2
        assert f"data file s3://{BUCKET}/data/train-00001-of-00002.parquet is not the s3://" in capfd.readouterr().err
    s3.clear_instance_cache()


def test_names_are_part_of_what_a_cache_is(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "expected", tmp_path / "c")
    assert cache(made, made / "d.jsonl", tmp_path / "c", "--field", "ignore=notes") == 2
    assert "fields was" in capfd.readouterr().err
    assert cache(made, made / "d.jsonl", tmp_path / "d", "--field", "quest=q2") == 2
    assert "--field quest=q2: no field 'quest' is read; expected one of messages," in capfd.readouterr().err
    assert cache(made, made / "d.jsonl", tmp_path / "d", "--role", "Human") == 2
    assert "--role 'Human': expected two names, as in --role Human=user" in capfd.readouterr().err


def test_evaluate_knows_the_names_too(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", ASSETS / "teacher", "--data", made / "d.csv", "--limit", "2", "--json", *NAMES]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert not ended.value.code
    assert {score["n"] for score in json.loads(capfd.readouterr().out).values()} == {2}
