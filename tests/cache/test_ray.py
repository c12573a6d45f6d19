"""The cache job on a real Ray cluster of two nodes on this machine: same bytes, nodes lost, errors told."""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import tree

import genrecal.demo
from genrecal.cache import ray_job
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, RayOptions, WorkOptions
from genrecal.cache.ray_job import run_ray_job
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.errors import DataError, ModelError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.xdist_group("ray")]  # one cluster for all
OPTIONS = CacheOptions(samples_per_shard=2, top_k=5)
SHARDS = 6


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("qwen2_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("data") / "d", mixed_samples(2 * SHARDS))


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The bytes of the cache that one process makes."""
    out = tmp_path_factory.mktemp("whole")
    run_cache_job(HFTeacher.load(model, dtype=torch.float32), open_samples([data]), out, OPTIONS)
    return tree(out)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with room for one task each; tests may take the second away, and get it back."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    if "PYTEST_XDIST_WORKER" in os.environ:
        assert "@ray" in os.environ["PYTEST_CURRENT_TEST"], "two clusters at once; give pytest `--dist loadgroup`"
    memory = 100 * 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[2]}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        head = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": memory}
        head["_system_config"] = {
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 20,
        }  # a loaded machine is late
        cluster = Cluster(True, head_node_args=head)
        cluster.second = lambda: cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=memory)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def run(cluster, model, data, tmp_path):
    """Run the job with two teachers; its report. `tmp_path / "calls"` says which node worked when."""
    if len(cluster.list_all_nodes()) < 2:
        cluster.second()
    (tmp_path / "calls").mkdir()
    sys.path.insert(0, str(Path(__file__).parent))
    import ray_teachers

    def run(options=OPTIONS, work=WorkOptions(threads=1), actors=2, model=model, **fault):  # noqa: B008
        load = functools.partial(ray_teachers.load, str(model), str(tmp_path / "calls"), **fault)
        ray = RayOptions(address=cluster.address, actors=actors)
        return run_ray_job(load, functools.partial(open_samples, [data]), tmp_path / "cache", options, work, ray)

    yield run
    sys.path.remove(str(Path(__file__).parent))


def nodes_of(folder):
    return {path.name.split("-")[0] for path in folder.iterdir()}


def words_of(data, model, out, *more):
    return ["cache", "--teacher", str(model), "--data", str(data), "--out", str(out), *more]


def test_without_ray(data, model, tmp_path):
    code = "import sys; sys.modules['ray'] = None; from genrecal.cli import main; main()"
    words = words_of(data, model, tmp_path / "c", "--ray", "local")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "genrecal[ray]"' in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no Ray cluster can be reached there"),
        (["--ray", "here"], "expected auto, local or host:port"),
        (["--ray", "local", "--workers", "2"], "--workers 2 with --ray: expected one of the two"),
        (["--ray-actors", "2"], "expected --ray ADDRESS with them"),
        (["--ray", "local", "--ray-gpus", "1.5"], "a share of a GPU from 0 to 1, or a whole number"),
    ],
)
def test_wrong_use(data, model, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words_of(data, model, tmp_path / "c", *words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_two_nodes_make_the_same_bytes(run, whole, tmp_path):
    report = run()
    assert (report.shards_done, report.shards_found, report.cached) == (SHARDS, 0, 2 * SHARDS)
    assert tree(tmp_path / "cache") == whole
    assert len(nodes_of(tmp_path / "calls")) == 2
    (tmp_path / "cache/manifest/00003.parquet").unlink()
    report = run()
    assert (report.shards_done, report.shards_found) == (1, SHARDS - 1)
    assert tree(tmp_path / "cache") == whole
    with pytest.raises(UsageError, match="top_k was 5, now 6"):
        run(CacheOptions(samples_per_shard=2, top_k=6))


def test_answers_that_tasks_write_are_the_same_bytes(run, data, tmp_path):
    """All answers first, then all shards, each in any task."""
    model = Path(genrecal.demo.__file__).parent / "assets" / "teacher"
    how = AnswerSource(kind="sampled", max_tokens=64, temperature=1.0, seed=1)
    options = CacheOptions(samples_per_shard=2, top_k=5, max_skip=1.0, answers=how)
    run_cache_job(HFTeacher.load(model, dtype=torch.float32), open_samples([data]), tmp_path / "whole", options)
    report = run(options, model=model)
    assert report.shards_done == SHARDS and report.cached > 0 and report.counts["answers"] >= report.cached
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_a_node_is_lost(cluster, run, whole, tmp_path):
    (second,) = [node for node in cluster.list_all_nodes() if not node.head]
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run()))
    (tmp_path / "calls.wait").touch()  # every call waits, so that the node is lost in the middle of one
    thread.start()
    end = time.monotonic() + 600
    while second.node_id not in nodes_of(tmp_path / "calls") and time.monotonic() < end:
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)
    (tmp_path / "calls.wait").unlink()
    thread.join(600)
    assert reports and reports[0].shards_done == SHARDS
    assert tree(tmp_path / "cache") == whole


def test_what_fails_says_why(run):
    with pytest.raises(ModelError, match="nowhere: neither a model folder nor .*on node"):
        run(actors=1, model="nowhere")
    with pytest.raises(DataError, match=r"shard \d: answer states as int4 cost a mean KL .*on node"):
        run(CacheOptions(samples_per_shard=2, top_k=5, answer_codec="int4", kl_budget=1e-9), actors=1)


@pytest.mark.parametrize("fault", ["a device-side assert", "killed"])
def test_a_shard_that_always_fails(run, tmp_path, monkeypatch, fault):
    """The others are made; then the job fails, with the reason."""
    monkeypatch.setattr(ray_job, "MAX_RETRIES", 0)
    words = "its process or node was lost" if fault == "killed" else f"RuntimeError: {fault}.*on node"
    with pytest.raises(ModelError, match=rf"1 shard \(3\) cannot be made: {words}.*run the same command again"):
        run(actors=2, fault=fault, key="00000006")
    assert len(list((tmp_path / "cache/manifest").glob("*.parquet"))) == SHARDS - 1
