"""Caches on an S3 server in a process of its own, and at file:// and memory:// URLs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import uuid
from pathlib import Path

import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import description, has_question, make_cache, make_head, make_record, make_sample, tree
from made_cache import write_shard as write_made_shard
from s3_server import BUCKET, environment, proxy_to, s3_server

import genrecal
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.errors import DamageError, FormatError, StorageError, UsageError
from genrecal.files import machine_name
from genrecal.samples import open_samples
from genrecal.shards import storage
from genrecal.shards.storage import open_store
from genrecal.shards.verify import quarantine, verify_cache


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    import fsspec

    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)  # its own, with pauses that nothing shortens
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 1}}})
    with proxy_to(server) as proxy, environment(proxy.environment()):
        storage._file_system.cache_clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # its connections lead to another test's proxy
        yield proxy
        storage._file_system.cache_clear()


@pytest.fixture
def url():
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/cache"


def put(folder: Path, url: str) -> None:
    """Copy a local cache to a URL, file by file."""
    store = open_store(url)
    for name, data in tree(folder).items():
        store.write(name, data)


def names(url: str) -> set[str]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(f"{root}/") for name in fs.find(root)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("made") / "cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("data") / "d", mixed_samples(12))


OPTIONS = CacheOptions(samples_per_shard=5)


@pytest.fixture(scope="module")
def local(teacher, data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("local") / "cache"
    run_cache_job(teacher, open_samples([data]), cache, OPTIONS)
    return tree(cache)


@pytest.mark.parametrize("kind", ["s3", "file", "memory"])
def test_the_job_writes_the_same_bytes_everywhere(teacher, data, local, proxy, url, tmp_path, kind):
    url = {"s3": url, "file": f"file://{tmp_path}/cache", "memory": f"memory://{tmp_path}/cache"}[kind]
    run_cache_job(teacher, open_samples([data]), url, OPTIONS)
    store = open_store(url)
    assert {name: store.read(name) for name in names(url)} == local
    report = run_cache_job(teacher, open_samples([data]), url, OPTIONS)
    assert (report.shards_done, report.shards_found) == (0, 3)
    assert verify_cache(url, deep=True).whole
    cache = genrecal.open_cache(url)
    assert [record.sample.answers for record in cache] == [sample.answers for sample in mixed_samples(12)]
    assert cache.is_complete and cache.manifest().num_rows == 12


def test_a_record_is_read_by_ranges_and_nothing_else_is(made, proxy, url):
    put(made, url)
    cache = genrecal.open_cache(url)
    local = genrecal.open_cache(made)
    proxy.requests.clear()
    record = cache[7]
    got = record.record(question=False)
    assert got.sample.answers == local[7].sample.answers
    assert (got.answer.hidden == local[7].hidden()).all()
    tars = [request for request in proxy.requests if request.path.endswith(".tar")]
    assert [request.path.split("/")[-2] for request in tars] == ["samples"]  # one range, and not of the questions
    assert tars[0].range is not None and "versions" not in tars[0].path
    (whole,) = (len(data) for name, data in tree(made).items() if name == f"samples/0000{record.row['shard']}.tar")
    sizes = [member["size"] for member in record.row["members"] if member["tier"] == "samples"]
    assert sum(sizes) <= tars[0].sent < whole / 2


@pytest.mark.parametrize("verdict", ["refuse", "cut"])
def test_what_fails_for_a_moment_is_tried_again(made, proxy, url, verdict):
    """Every third request fails, of those that read and those that write."""
    count = iter(range(10**6))
    proxy.judge = lambda request: verdict if next(count) % 3 == 1 and request.method in ("GET", "PUT") else "pass"
    put(made, url)
    cache = genrecal.open_cache(url)
    assert [r.hidden().tobytes() for r in cache] == [r.hidden().tobytes() for r in genrecal.open_cache(made)]
    assert next(count) > 30


def test_a_store_that_goes_on_failing_is_said_in_one_line(made, proxy, url):
    put(made, url)
    record = genrecal.open_cache(url)[5]
    proxy.judge = lambda request: "refuse"
    with pytest.raises(
        StorageError, match=rf"{url}/samples/00001\.tar: cannot read it, after 4 attempts: OSError: .*test"
    ):
        record.hidden()
    with pytest.raises(StorageError, match="cannot write it, after 4 attempts"):
        open_store(url).write("x", b"y")
    proxy.judge = lambda request: "deny"
    with pytest.raises(PermissionError):
        open_store(url).write("x", b"y")


def test_wrong_places_are_named(proxy, url, teacher, data, made):
    with pytest.raises(FormatError, match=rf"{url}: not a cache: there is nothing at this path"):
        genrecal.open_cache(url)
    with pytest.raises(FormatError, match="not a cache"):
        genrecal.open_cache("s3://no-such-bucket/cache")
    with pytest.raises(UsageError, match="nosuch://a/b: not a URL that fsspec knows"):
        genrecal.open_cache("nosuch://a/b")
    with pytest.raises(UsageError, match="--out s3://no-such-bucket/cache: cannot be written"):
        run_cache_job(teacher, open_samples([data]), "s3://no-such-bucket/cache", OPTIONS)
    put(made, url)
    proxy.judge = lambda request: "deny"
    with pytest.raises(FormatError, match=r"cache\.json: cannot be read: .*made by the test"):
        genrecal.open_cache(url)


@pytest.mark.parametrize("kind", [pytest.param("s3", marks=pytest.mark.slow), "memory"])
def test_damage_is_found_set_aside_and_mended(made, proxy, url, tmp_path, kind):
    url = {"s3": url, "memory": f"memory://{tmp_path}/cache"}[kind]
    put(made, url)
    store = open_store(url)
    data = bytearray(store.read("samples/00001.tar"))
    hurt = genrecal.open_cache(url)[5].row["members"][-1 if not has_question(make_sample(6).key) else -2]
    data[hurt["offset"] + 1] ^= 4
    store.write("samples/00001.tar", bytes(data))
    with pytest.raises(DamageError, match=r"samples/00001\.tar: member 00000006"):
        genrecal.open_cache(url)[5].hidden()
    store.write("samples/00002.tar", store.read("samples/00002.tar")[:700])
    found = verify_cache(url)
    assert found.damaged_shards == [1, 2]
    assert quarantine(found) == [f"{url}/quarantine/00001.0", f"{url}/quarantine/00002.0"]
    assert "manifest/00001.parquet" not in names(url) and "quarantine/00001.0/samples.tar" in names(url)
    for shard in (1, 2):
        write_made_shard(url, shard, make_head())
    assert verify_cache(url).whole
    assert store.read("samples/00001.tar") == (made / "samples/00001.tar").read_bytes()


WRITE = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    from made_cache import make_head, write_shard
    torch.set_num_threads(1)  # as in the tests: sums in the same order
    write_shard({url!r}, 1, make_head())
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["samples/00001.tar", "questions/00001.tar", "manifest/00001.parquet"])
def test_a_kill_in_the_middle_of_an_upload_leaves_nothing_that_looks_whole(made, proxy, url, where, tmp_path):
    put(made, url)
    store = open_store(url)
    for name in ("samples/00001.tar", "questions/00001.tar", "manifest/00001.parquet"):
        store.move(name, f"gone/{name}")
    before = names(url)
    proxy.judge = lambda request: "stall" if request.method == "PUT" and where in request.path else "pass"
    script = textwrap.dedent(WRITE.format(tests=str(Path(__file__).parents[1]), url=url))
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE
    )
    assert proxy.stalled.wait(600), child.communicate(timeout=60)
    assert list(tmp_path.glob(f"genrecal-{machine_name()}-{child.pid}-*"))  # the tars on their way
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    there = names(url) - before
    assert where not in there and "manifest/00001.parquet" not in there
    for name in there:  # what was uploaded before is whole
        assert store.read(name) == (made / name).read_bytes()
    proxy.judge = lambda request: "pass"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0
    assert {name: store.read(name) for name in tree(made)} == tree(made)
    assert verify_cache(url).whole
    assert not list(tmp_path.glob("genrecal-*"))  # nor does the killed one's scratch folder stay


def test_workers_forked_from_a_reader_read_for_themselves(made, proxy, url):
    """Connections do not survive a fork; torch's loaders fork."""
    put(made, url)
    cache = genrecal.open_cache(url)
    expected = [record.hidden().sum() for record in cache]
    loader = torch.utils.data.DataLoader(_Sums(cache), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == pytest.approx(expected)


class _Sums(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, index):
        return self.cache[index].hidden().sum()


def test_records_written_by_hand_to_memory_come_back(made):
    url = f"memory://{uuid.uuid4().hex}/cache"
    head = make_head()
    write_made_shard(url, 0, head)
    content = description(made, "bf16") | {"num_shards": 1, "num_samples": 4}
    open_store(url).write("cache.json", json.dumps(content).encode())
    cache = genrecal.open_cache(url)
    for index, record in enumerate(cache):
        expected = make_record(index, head, question=has_question(record.key))
        assert (record.hidden() == expected.answer.hidden).all()
    assert len(cache) == 4


def test_the_head_is_downloaded_once_for_all_who_ask(made, url, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    put(made, url)
    asked = []
    proxy.judge = lambda request: asked.append(request) or "pass"
    heads = [genrecal.open_cache(url).head() for _ in range(3)]
    assert all(torch.equal(head.weight, make_head().weight) for head in heads)
    assert sum(request.method == "GET" and "head.safetensors" in request.path for request in asked) == 1
    asked.clear()
    open_store(url).write("head.safetensors", b"x" * 100)
    content = json.loads(open_store(url).read("cache.json"))
    content["teacher"]["head_sha256"] = "0" * 64  # another head's: the copy that was kept is not its
    open_store(url).write("cache.json", json.dumps(content).encode())
    with pytest.raises(DamageError, match="expected sha256 0000"):
        genrecal.open_cache(url).head()


@pytest.mark.parametrize("done", [True, False])
def test_a_move_that_was_cut_off_is_finished(monkeypatch, done):
    """The store deletes the old file, or not, and its answer is lost."""
    store = open_store(f"memory://{uuid.uuid4().hex}/cache")
    store.write("a", b"content")
    delete, lost = store._fs.rm_file, []

    def rm_file(path):
        if done or lost:
            delete(path)
        if not lost:
            lost.append(path)
            raise ConnectionError("lost")

    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(type(store._fs), "rm_file", lambda self, path: rm_file(path))
    store.move("a", "b/a")
    assert lost and store.read("b/a") == b"content" and not store.exists("a")
    with pytest.raises(FileNotFoundError):
        store.move("a", "c/a")
