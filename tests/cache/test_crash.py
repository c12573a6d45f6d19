"""The cache job killed, run twice over, and without room or permission: the finished cache is always the same bytes."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FULL, mixed_samples, write_llava
from made_cache import tree

from genrecal.demo.data import write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache

RUNNER = Path(__file__).with_name("job_runner.py")
OPTIONS = {"samples_per_shard": 2, "top_k": 5}
SHARDS = 6
KILLS, IN_A_ROW = 200 if FULL else 20, 5  # kills in all, and of one cache before a run is left to finish


class Runner:
    """The process of tests/cache/job_runner.py, which has a tiny teacher loaded."""

    def __init__(self, model, data, whole, **options):
        self.options = OPTIONS | options
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER), str(model), str(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask({"whole": str(whole), "options": self.options})
        self.whole = tree(whole)

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *jobs):
        """What becomes of jobs that run side by side."""
        return self._ask({"jobs": [{"options": self.options} | job | {"out": str(job["out"])} for job in jobs]})

    def stop(self):
        self.process.stdin.close()
        self.process.wait()

    def finish(self, out):
        """Run the job undisturbed; what it did, its bytes checked to be those of an undisturbed cache."""
        (result,) = self.run({"out": out})
        assert "error" not in result, result
        assert tree(out) == self.whole
        return result


@pytest.fixture(scope="module")
def runner(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    data = write_llava(folder / "d", mixed_samples(2 * SHARDS))
    runner = Runner(tiny("qwen2_vl"), data, folder / "whole")
    yield runner
    runner.stop()


def finished_files(out):
    """The files of each shard that has a manifest, with what would change if they were written again."""
    done = {path.stem for path in (out / "manifest").glob("*.parquet")} if out.exists() else set()
    files = [path for path in out.glob("*/*") if path.stem in done]
    return done, {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def check_kept(before):
    for path, identity in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == identity, path


def interrupt(runner, out, kills):
    """Kill one job again and again, then let it finish; how many of the kills hit.

    Args:
        kills: where, as ("at" or "seconds", of how many in a whole job, at what share of what is left of it).
    """
    hits = 0
    for kind, whole, share in kills:
        done, before = finished_files(out)
        (result,) = runner.run({"out": out, kind: type(whole)(whole * share * (1 - 0.8 * len(done) / SHARDS))})
        hits += result["killed"]
        check_kept(before)
    done, before = finished_files(out)
    result = runner.finish(out)
    assert (result["shards_found"], result["shards_done"]) == (len(done), SHARDS - len(done))
    check_kept(before)
    return hits


def calls_and_seconds(runner, out, *, times=1):
    """File-system calls of an undisturbed job, and the least time it took."""
    seconds = []
    for number in range(times):
        start = time.monotonic()
        calls = runner.finish(out / str(number))["calls"]
        seconds.append(time.monotonic() - start)
    return calls, min(seconds)


@pytest.mark.slow
def test_killed_at_many_instants(runner, tmp_path):
    """Half of them in the middle of a file-system call, half by the clock."""
    calls, seconds = calls_and_seconds(runner, tmp_path / "timed", times=5)
    rng = random.Random(0)
    hits = number = 0
    while hits < KILLS:
        assert number < 20 * KILLS, f"only {hits} of {number} kills came before the job's end"
        kills = [rng.choice([("at", calls), ("seconds", seconds)]) for _ in range(IN_A_ROW)]
        hit = interrupt(runner, tmp_path / str(number), [(*kill, rng.random()) for kill in kills])
        if hit < IN_A_ROW - 1:
            seconds *= 0.9  # the machine has become faster: somebody else's work ended
        hits, number = hits + hit, number + IN_A_ROW


def test_killed_in_the_middle_of_calls(runner, tmp_path):
    """Six points spread over the whole job, each on a cache of its own."""
    calls, _ = calls_and_seconds(runner, tmp_path / "timed")
    hits = [
        interrupt(runner, tmp_path / str(i), [("at", calls, (i + random.Random(i).random()) / 6)]) for i in range(6)
    ]
    assert sum(hits) >= 5


@pytest.mark.slow
def test_killed_while_the_teacher_writes_its_answers(tmp_path):
    """What it draws for a conversation follows from the seed and the key, so a run that goes on draws the same."""
    data = write_dataset(tmp_path / "d", num_samples=2 * SHARDS, split="train", seed=0)
    answers = {"kind": "sampled", "max_tokens": 48, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    writing = Runner(ASSETS / "teacher", data, tmp_path / "whole", answers=answers, max_skip=0.5)
    calls, seconds = calls_and_seconds(writing, tmp_path / "timed")
    hits = 0
    for i in range(6):
        kills = [("at", calls, (i + 0.5) / 6), ("seconds", seconds, (i + 0.5) / 6)]
        hits += interrupt(writing, tmp_path / str(i), kills)
    assert hits >= 6  # those in the middle of a call; the clock's may come too late
    texts = [message for record in open_cache(tmp_path / "whole") for message in record.sample.answers]
    given = [message for sample in open_samples([data]) for message in sample.answers]
    assert len(texts) > SHARDS and texts != given
    writing.stop()


@pytest.mark.parametrize("together", [1, 2])
def test_workers_share_a_cache(runner, tmp_path, together):
    """Three workers at once (or each of them twice) make the cache; one of them at least completes it."""
    jobs = [{"out": tmp_path / "cache", "work": {"workers": 3, "worker": i}} for i in range(3)] * together
    results = runner.run(*jobs)
    assert not any("error" in result or result["killed"] for result in results), results
    assert tree(tmp_path / "cache") == runner.whole
    assert 0 in [result["shards_missing"] for result in results]
    assert sum(result["shards_done"] for result in results) >= SHARDS


def test_a_worker_that_is_not_the_last_says_what_is_missing(runner, tmp_path):
    out = tmp_path / "cache"
    (first,) = runner.run({"out": out, "work": {"workers": 2, "worker": 1}})
    assert (first["shards_done"], first["shards_missing"]) == (SHARDS // 2, SHARDS // 2)
    assert "totals" not in json.loads((out / "cache.json").read_text()) and not (out / "index.parquet").exists()
    (last,) = runner.run({"out": out, "work": {"workers": 2, "worker": 0}})
    assert (last["shards_done"], last["shards_missing"]) == (SHARDS // 2, 0)
    assert tree(out) == runner.whole


@pytest.mark.slow
def test_two_workers_on_the_same_shards_one_of_them_killed(runner, tmp_path):
    calls, _ = calls_and_seconds(runner, tmp_path / "timed")
    rng = random.Random(2)
    for number in range(15):
        out = tmp_path / str(number)
        runner.run({"out": out, "at": rng.randrange(calls)}, {"out": out, "at": rng.randrange(calls)})
        _, other = runner.run({"out": out, "at": rng.randrange(calls)}, {"out": out})
        assert "error" not in other
        runner.finish(out)


def test_files_left_by_a_lost_machine_go_when_the_cache_is_finished(runner, tmp_path):
    out = tmp_path / "cache"
    runner.run({"out": out, "work": {"workers": 2, "worker": 1}})
    for tier in ("samples", "questions"):
        (out / tier / ".00000.tar.lost-node-4026531836.77.tmp").write_bytes(b"part")
    runner.run({"out": out, "work": {"workers": 2, "worker": 1}})
    assert len(list(out.glob("*/.*.tmp"))) == 2  # that machine may still be at work
    runner.finish(out)


def failed(result, *words):
    """An error for users, with these words in it."""
    assert result["kind"] in ("StorageError", "UsageError"), result
    for word in words:
        assert word in result["error"], result["error"]


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EROFS"])
def test_a_disk_that_fills_up_anywhere(runner, tmp_path, error):
    """Every call fails from some point on; what is finished is whole, and nothing unfinished stays."""
    calls, _ = calls_and_seconds(runner, tmp_path / "timed")
    for point in random.Random(error).sample(range(5, calls - 5), 3):
        out = tmp_path / str(point)
        (result,) = runner.run({"out": out, "at": point, "error": error})
        failed(result, str(out))
        done, before = finished_files(out)
        assert runner.finish(out)["shards_found"] == len(done)
        check_kept(before)


def test_a_file_size_limit(runner, tmp_path):
    """A quota of the shell's: the write itself is cut."""
    out = tmp_path / "cache"
    (result,) = runner.run({"out": out, "largest_file": 60_000})
    failed(result, "shard", "File too large", "run the same command again")
    assert not list(out.glob("*/.*.tmp"))
    runner.finish(out)


def test_a_real_disk_that_is_too_small(runner, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (result,) = runner.run({"out": disk / "cache"})
        failed(result, "No space left on device", "make room", "run the same command again")
        assert not list((disk / "cache").glob("*/.*.tmp"))
        done, before = finished_files(disk / "cache")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert runner.finish(disk / "cache")["shards_found"] == len(done)
        check_kept(before)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("folder", [".", "samples", "manifest"])
def test_a_folder_that_may_not_be_written(runner, tmp_path, folder):
    out = tmp_path / "cache"
    runner.run({"out": out, "work": {"workers": 2, "worker": 1}})
    before = tree(out)
    (out / folder).chmod(0o500)
    try:
        (result,) = runner.run({"out": out, "obey_permissions": True})
        failed(result, str(out), "Permission denied")
    finally:
        (out / folder).chmod(0o700)
    assert {name: data for name, data in tree(out).items() if name in before} == before
    runner.finish(out)


def test_a_parent_that_may_not_be_written(runner, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    (result,) = runner.run({"out": tmp_path / "closed" / "cache", "obey_permissions": True})
    failed(result, "--out", "closed cannot be written; choose another --out")
