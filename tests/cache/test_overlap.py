"""Rendering, coding and writing in other threads than the teacher: the same bytes, bounded memory, right counts."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from conftest import conversation, mixed_samples, write_llava
from made_cache import tree

from genrecal import progress
from genrecal.cache import job, shard, watch, windows
from genrecal.cache.batching import batches_by_length
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.errors import ModelError, SampleError, StorageError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

OPTIONS = CacheOptions(samples_per_shard=6, batch_tokens=300, top_k=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("overlap") / "d", mixed_samples(40))


class Watched:
    """A teacher that notes how it is used, and works after `delay()` seconds."""

    def __init__(self, teacher, delay=lambda: 0.0):
        self.teacher, self.delay = teacher, delay
        self.threads, self.batches, self.alive, self.most_alive = set(), [], 0, 0
        self._lock = threading.Lock()

    def _count(self, more):
        with self._lock:
            self.alive += more
            self.most_alive = max(self.alive, self.most_alive)

    def encode(self, sample, *, max_tokens):
        time.sleep(self.delay())
        encoded = self.teacher.encode(sample, max_tokens=max_tokens)
        self._count(1)
        weakref.finalize(encoded, self._count, -1)
        return encoded

    def states(self, batch, **options):
        time.sleep(self.delay())
        self.threads.add(threading.current_thread())
        if options["top_k"] == OPTIONS.top_k:  # not the proof's
            self.batches.append([item.key for item in batch])
        return self.teacher.states(batch, **options)

    def evidence(self, encoded):
        self.threads.add(threading.current_thread())
        return self.teacher.evidence(encoded)

    def __getattr__(self, name):
        return getattr(self.teacher, name)


def test_bytes_do_not_depend_on_the_speed_of_any_thread(teacher, data, tmp_path, monkeypatch):
    """Every step takes a random time, so that threads overtake each other in every way."""
    run_cache_job(teacher, open_samples([data]), tmp_path / "plain", OPTIONS, WorkOptions(threads=1))
    rng = random.Random(0)
    for method in ("code", "append"):
        plain = getattr(shard.ShardWriter, method)

        def slow(writer, *args, plain=plain):
            time.sleep(rng.random() / 50)
            return plain(writer, *args)

        monkeypatch.setattr(shard.ShardWriter, method, slow)
    watched = Watched(teacher, lambda: rng.random() / 50)
    run_cache_job(watched, open_samples([data]), tmp_path / "cache", OPTIONS, WorkOptions(threads=4))
    assert tree(tmp_path / "cache") == tree(tmp_path / "plain")
    assert watched.threads == {threading.current_thread()}  # the teacher itself sees no other


def test_batches_are_of_a_whole_shard(teacher, data, tmp_path):
    """And of one shard only: what stands in the others changes nothing."""
    watched = Watched(teacher)
    run_cache_job(watched, open_samples([data]), tmp_path / "cache", OPTIONS)
    samples = open_samples([data])
    lengths = {sample.key: len(teacher.encode(sample)) for sample in samples}
    keys = [sample.key for sample in samples]
    expected = []
    for start in range(0, len(keys), 6):
        of_shard = keys[start : start + 6]
        for batch in batches_by_length({i: lengths[key] for i, key in enumerate(of_shard)}, 300):
            expected.append([of_shard[i] for i in batch])
    assert sorted(watched.batches) == sorted(expected)


def test_records_in_memory_are_bounded(teacher, data, tmp_path, monkeypatch):
    """A slow teacher does not let the renderers fill the memory."""
    monkeypatch.setattr(windows, "WINDOW_SAMPLES", 4)
    watched, threads = Watched(teacher), 2
    plain = watched.states
    watched.states = lambda *words, **options: (time.sleep(0.05), plain(*words, **options))[1]
    options = dataclasses.replace(OPTIONS, samples_per_shard=20)
    run_cache_job(watched, open_samples([data]), tmp_path / "cache", options, WorkOptions(threads=threads))
    bound = 2 * 4 + 2 * threads + 1  # a window that the teacher runs over, one ahead of it, and what is rendered
    assert watched.most_alive <= bound < 40


def test_a_window_closes_when_its_tensors_are_large(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1)
    watched = Watched(teacher)
    run_cache_job(watched, open_samples([data]), tmp_path / "cache", OPTIONS)
    assert [len(batch) for batch in watched.batches] == [1] * 40
    assert verify_cache(tmp_path / "cache").whole


def test_rendering_and_the_teacher_overlap(teacher, data, tmp_path):
    """The teacher's first batch, of shard 0, waits until a sample of shard 1 is rendered: without overlap it would hang."""
    watched, rendered = Watched(teacher), threading.Event()
    plain_encode, plain_states = watched.encode, watched.states

    def encode(sample, **options):
        encoded = plain_encode(sample, **options)
        if sample.sample_id == "s4":
            rendered.set()
        return encoded

    def states(batch, **options):
        assert rendered.wait(600), "no sample of the next shard was rendered meanwhile"
        return plain_states(batch, **options)

    watched.encode, watched.states = encode, states
    options = dataclasses.replace(OPTIONS, samples_per_shard=4)
    run_cache_job(watched, open_samples([data]), tmp_path / "cache", options, WorkOptions(threads=1))
    assert verify_cache(tmp_path / "cache").whole


@pytest.mark.parametrize("broken", ["states", "encode", "head"])
def test_an_error_in_one_shard_ends_the_job(teacher, data, tmp_path, broken):
    """At once, with its own words, and without anything unfinished left."""
    watched = Watched(teacher)
    if broken == "states":
        watched.states = lambda *_, **__: (_ for _ in ()).throw(ModelError("the GPU fell off the bus"))
        expected = pytest.raises(ModelError, match="fell off")
    elif broken == "encode":
        watched.encode = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        expected = pytest.raises(KeyboardInterrupt)
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "samples").write_bytes(b"no folder")
        expected = pytest.raises(StorageError, match="shard 0 cannot be written|shard . cannot be written")
    with expected:
        run_cache_job(watched, open_samples([data]), tmp_path / "cache", OPTIONS)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".tmp")]
    names = ("render", "prefetch", "code", "write")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_what_a_processor_raises_and_a_codec_cannot_hold_are_reasons(teacher, data, tmp_path, monkeypatch):
    watched = Watched(teacher)
    plain, plain_code = watched.encode, shard.ShardWriter.code

    def encode(sample, *, max_tokens):
        if sample.sample_id == "s7":
            raise AttributeError(f"<Broken object at {hex(id(sample))}> has no shape")
        return plain(sample, max_tokens=max_tokens)

    def code(writer, record):
        if record.sample.sample_id == "s3":
            raise SampleError("a hidden state reaches 1e9")
        return plain_code(writer, record)

    watched.encode = encode
    monkeypatch.setattr(shard.ShardWriter, "code", code)
    options = dataclasses.replace(OPTIONS, max_skip=0.1)
    report = run_cache_job(watched, open_samples([data]), tmp_path / "cache", options)
    assert dict(report.reasons) == {
        "cannot be rendered: AttributeError: <Broken object> has no shape": 1,
        "a hidden state reaches 1e9": 1,
    }
    assert (report.cached, report.skipped) == (38, 2)
    assert [record.sample.sample_id for record in open_cache(tmp_path / "cache")] == [
        f"s{i}" for i in range(40) if i not in (3, 7)
    ]


# ---------------------------------------------------------------------------------------------------------- the status


def test_the_status_file_says_what_was_done(teacher, data, tmp_path, capfd):
    status = tmp_path / "status" / "0.json"
    work = WorkOptions(status_file=status, workers=2, worker=1)
    run_cache_job(teacher, open_samples([data]), tmp_path / "cache", OPTIONS, work)
    said = json.loads(status.read_text())
    assert (said["state"], said["worker"], said["workers"]) == ("waiting", 1, 2)
    capfd.readouterr()
    report = run_cache_job(teacher, open_samples([data]), tmp_path / "cache", OPTIONS, WorkOptions(status_file=status))
    said = json.loads(status.read_text())
    assert (said["state"], said["records"], said["records_total"], said["skipped"]) == ("finished", 40, 40, 0)
    encoded = [teacher.encode(sample) for sample in open_samples([data])]
    mine = [item for i, item in enumerate(encoded) if i // 6 % 2 == 0]
    assert (said["samples"], said["tokens"]) == (len(mine), sum(map(len, mine)))
    assert said["bytes"] == report.counts["bytes"] > 0
    [warning] = said["warnings"]  # a teacher of random weights; said once a run, whatever the number of shards
    assert warning.startswith("the teacher does not know these answers")
    assert capfd.readouterr().err.count(f"warning: {warning}") == 1
    assert said["seconds_left"] == 0
    assert verify_cache(tmp_path / "cache").whole


def test_the_status_file_is_written_while_a_batch_runs(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "STATUS_EVERY_SECONDS", 0.01)
    status, said = tmp_path / "s.json", []

    def wait_for_another():
        before, end = status.read_bytes(), time.monotonic() + 600
        while status.read_bytes() == before and time.monotonic() < end:
            time.sleep(0.01)
        said.append((before, status.read_bytes()))
        return 0.0

    watched = Watched(teacher, wait_for_another)
    watched.encode = teacher.encode
    work = WorkOptions(status_file=status)
    run_cache_job(watched, open_samples([data], limit=2), tmp_path / "cache", OPTIONS, work)
    assert said and all(before != after for before, after in said)
    assert {json.loads(after)["state"] for _, after in said} == {"running"}


@pytest.mark.parametrize("samples_per_shard", [6, 100])
def test_the_time_left_is_by_samples_that_the_teacher_is_through(
    teacher, data, tmp_path, monkeypatch, samples_per_shard
):
    """On a clock that goes by one second a sample, and by an hour while the teacher proves itself."""
    records = json.loads(data.read_text())
    records[30]["conversations"][1]["value"] = " "  # skipped
    (path := tmp_path / "data.json").write_text(json.dumps(records))
    clock, seen, watches = [0.0], [], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Kept(job.Watch):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            watches.append(self)

    class Timed(Watched):
        def states(self, batch, *, top_k, **options):
            own = top_k != OPTIONS.top_k
            if not own:
                status = watches[0].status()
                seen.append((status["samples"], status["skipped"], status["seconds_left"]))
            clock[0] += 3600 if own else len(batch)
            return super().states(batch, top_k=top_k, **options)

    monkeypatch.setattr(job, "Watch", Kept)
    options = dataclasses.replace(OPTIONS, samples_per_shard=samples_per_shard, max_skip=0.1)
    samples = open_samples([path], image_root=data.parent)
    run_cache_job(Timed(teacher), samples, tmp_path / "cache", options, WorkOptions(threads=1))
    assert [left for _, _, left in seen[:2]] == [None, None]  # nothing yet, and one batch, which has no pace
    for samples, skipped, left in seen[2:]:
        # The skipped record takes no time, and is counted as skipped only when it is written.
        assert left == pytest.approx(40 - samples - skipped, rel=0.1, abs=2.01), seen
    assert watches[0].status()["seconds_left"] == 0


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_leaves_interrupted_in_the_status_and_the_same_command_resumes(
    tiny, data, tmp_path, monkeypatch, capfd, number
):
    states, batches, before = HFTeacher.states, [], signal.getsignal(number)

    def struck(self, batch, **options):
        batches.append(batch)
        if len(batches) == 6:
            os.kill(os.getpid(), number)
        return states(self, batch, **options)

    status = tmp_path / "s.json"
    words = ["cache", "--teacher", str(tiny("qwen2_vl")), "--data", str(data), "--out", str(tmp_path / "cache")]
    words += ["--samples-per-shard", "6", "--batch-tokens", "300", "--status-file", str(status)]
    monkeypatch.setattr(HFTeacher, "states", struck)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said, err = json.loads(status.read_text()), capfd.readouterr().err
    assert stopped.value.code == STOPS[number], err
    assert said["state"] == "interrupted" and said["records"] < 40
    assert said["error"] == (number.name if number != signal.SIGINT else "KeyboardInterrupt")
    assert err.splitlines()[-1].startswith("genrecal: ") and "run the same command again" in err.splitlines()[-1]
    assert "Traceback" not in err and signal.getsignal(number) == before
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0 and json.loads(status.read_text())["state"] == "finished"
    assert verify_cache(tmp_path / "cache").whole


def test_the_status_file_of_a_job_that_failed_says_why(teacher, tmp_path):
    path = write_llava(tmp_path / "d", [conversation(("q", "a"), key="0")])
    records = json.loads(path.read_text())
    records[0]["conversations"][1]["value"] = " "
    path.write_text(json.dumps(records))
    status = tmp_path / "s.json"
    with pytest.raises(Exception, match="--max-skip"):
        run_cache_job(teacher, open_samples([path]), tmp_path / "c", OPTIONS, WorkOptions(status_file=status))
    said = json.loads(status.read_text())
    assert said["state"] == "failed" and "empty answer" in said["error"]


def test_progress_shows_samples_until_a_shard_is_finished():
    counts = watch.Watch(10, num_samples=10)
    counts.count(samples=2, tokens=50, through=2)
    assert "samples/s" in counts._note() and "MB/s" not in counts._note()
    counts.count(bytes=10**6)
    assert "samples/s" not in counts._note() and "MB/s" in counts._note()


def test_a_reason_is_printed_once(teacher, data, tmp_path, capsys):
    """What the look over the data has printed is not printed again after the job; what only rendering finds is."""
    records = json.loads(data.read_text())[:4]
    records[0]["conversations"][1]["value"] = " "
    records[1]["conversations"][0]["value"] += "<|im_end|>"
    (path := tmp_path / "data.json").write_text(json.dumps(records))
    words = ["cache", "--teacher", teacher.path, "--data", str(path), "--out", str(tmp_path / "c"), "--max-skip", "0.9"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--image-root", str(data.parent)])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "2 samples cached, 2 skipped" in out
    assert out.count("empty answer") == 1 and out.count("special token") == 1


def test_no_status_file_in_the_cache(teacher, data, tmp_path):
    work = WorkOptions(status_file=tmp_path / "cache" / "status.json")
    with pytest.raises(UsageError, match="--status-file .*outside the cache"):
        run_cache_job(teacher, open_samples([data]), tmp_path / "cache", OPTIONS, work)
    (tmp_path / "file").write_text("")
    work = WorkOptions(status_file=tmp_path / "file" / "status.json")
    with pytest.raises(UsageError, match="--status-file"):
        run_cache_job(teacher, open_samples([data]), tmp_path / "cache", OPTIONS, work)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(workers=0), "--workers 0: expected at least 1"),
        (dict(workers=2, worker=2), "--worker 2: expected 0 to 1 with --workers 2"),
        (dict(worker=-1), "--worker -1: expected 0 to 0"),
        (dict(threads=-1), "--threads -1: expected at least 1"),
    ],
)
def test_wrong_work_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        WorkOptions(**options)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_every_shard_is_one_workers(workers):
    shares = [WorkOptions(workers=workers, worker=i).shards(20) for i in range(workers)]
    assert sorted(number for share in shares for number in share) == list(range(20))


def test_workers_at_the_command_line(teacher, data, tmp_path, capsys):
    """The first says what is missing and exits with 0; the second completes the cache."""
    words = [
        "cache",
        "--teacher",
        teacher.path,
        "--data",
        str(data),
        "--out",
        str(tmp_path / "c"),
        "--dtype",
        "float32",
    ]
    said = []
    for worker in ("1", "0"):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--samples-per-shard", "6", "--workers", "2", "--worker", worker])
        assert stop.value.code == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "worker 1 of 2 is done: 18 samples cached, 0 skipped; 3 shards written, 0 found" in said[0]
    assert "Other workers still have 4 shards to finish" in said[0]
    assert "the last worker completes the cache" in said[0]
    assert said[1].endswith("40 samples cached, 0 skipped; 4 shards written, 0 found")
    assert open_cache(tmp_path / "c").is_complete
