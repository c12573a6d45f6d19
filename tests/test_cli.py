"""The command line as a user meets it: exit status, one line for an error, what commands print."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import typer
from conftest import conversation, mixed_samples, write_llava

import genrecal
from genrecal.cli import app, main
from genrecal.shards.reader import open_cache

COMMAND = [sys.executable, "-m", "genrecal"]
COMMANDS = typer.main.get_command(app).commands


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the entry point in this process: torch is imported already."""

    def call(*args: str | Path) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Ended(int(stop.value.code or 0), out, err)

    return call


def process(*args: str | Path) -> Ended:
    """Run the command in a process of its own."""
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=600)
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_one_line(ended: Ended, status: int, *words: str) -> None:
    assert ended.err.startswith("genrecal: error: ") and ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n") and "Traceback" not in ended.err + ended.out
    assert [word for word in words if word not in ended.err] == [], ended.err
    assert ended.status == status


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven good records and one with an empty answer."""
    path = write_llava(tmp_path_factory.mktemp("data") / "data", mixed_samples(8))
    records = json.loads(path.read_text())
    records[5]["conversations"][-1]["value"] = " "
    path.write_text(json.dumps(records, indent=1))
    return path


@pytest.fixture(scope="module")
def cache(tiny: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.raises(SystemExit) as stop:
        main(cache_args(tiny("qwen2_vl"), data, out))
    assert stop.value.code == 0
    return out


def cache_args(teacher: str | Path, data: Path, out: str | Path, *more: str) -> list[str]:
    options = "--samples-per-shard 3 --top-k 8 --max-skip 0.5 --question-fraction 0.5 --dtype fp32".split()
    return ["cache", "--teacher", str(teacher), "--data", str(data), "--out", str(out), *options, *more]


# ----------------------------------------------------------------------------------------------------------------- errors


def test_a_real_process_prints_one_line_and_with_debug_a_traceback(tmp_path: Path) -> None:
    args = ("train", "--cache", tmp_path / "no", "--student", "no", "--out", tmp_path / "run", "--stages", "1,4")
    assert process("--version") == Ended(0, f"genrecal {genrecal.__version__}\n", "")
    assert_one_line(process(*args), 2, "--stages '1,4'", "expected numbers from 1 to 3")
    debugged = process("--debug", *args)
    assert debugged.err.startswith("Traceback") and "UsageError: --stages '1,4'" in debugged.err
    assert debugged.status == 2 and not (tmp_path / "run").exists()


def test_ctrl_c_says_what_to_do_and_ends_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "settings.toml"
    os.mkfifo(pipe)
    command = [*COMMAND, "train", "--cache", "c", "--student", "s", "--out", str(tmp_path / "o"), "--config", str(pipe)]
    default = signal.SIG_DFL  # a shell's background job would ignore it
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, default)
    )
    with pipe.open("w"):  # opens once the command reads its settings, and keeps it waiting for them
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=600)
    assert child.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "genrecal: interrupted; run the same command again to resume"


HERE = __file__
CONFIG_JSON = str(Path(genrecal.__file__).parent / "demo/assets/student/config.json")
TRAIN, CACHE = "train --cache gone --student gone --out run", "cache --teacher gone --data gone.json --out out"
DATA_CACHE = "cache --teacher gone --data {data} --out out"
EVALUATE = "evaluate --model gone"
MISTAKES = [
    ("nope", 2, "No such command"),
    ("train", 2, "Missing option"),
    (f"{TRAIN} --nope", 2, "No such option"),
    (f"{CACHE} --top-k x", 2, "--top-k' / valid integer"),
    (f"{TRAIN} --stages 0", 2, "--stages '0' / 1 to 3"),
    (f"{TRAIN} --stages one", 2, "--stages 'one'"),
    (f"{TRAIN} --stages ", 2, "--stages ''"),
    (f"{TRAIN} --set stage1.lrr=1", 2, "unknown setting stage1.lrr / nearest one is stage1.lr"),
    (f"{TRAIN} --set seed=x", 2, "setting seed: expected int, got 'x'"),
    (f"{TRAIN} --set objective=\n\n", 2, "objective"),
    (f"{TRAIN} --objective kd", 2, "objective 'kd' / genrecal, genrecal-aligned, sft"),
    (f"{TRAIN} --config gone.toml", 2, "--config gone.toml / No such file"),
    (f"{TRAIN} --config {CONFIG_JSON}", 2, f"--config {CONFIG_JSON}: expected TOML"),
    (f"{TRAIN} --teacher gone", 2, "--teacher 'gone' / expected live:MODEL"),
    (TRAIN, 1, "gone: not a cache / genrecal cache"),
    ("inspect gone", 1, "gone: not a cache: there is nothing at this path"),
    (f"inspect {HERE}", 1, f"{HERE}: not a cache: it has no cache.json"),
    ("inspect c --key k --sql q", 2, "--key, --sql and --least-likely: expected one of them"),
    ("inspect c --save-images d", 2, "--save-images: expected --key KEY"),
    ("inspect c --html h --json", 2, "--html: expected no --sql"),
    ("verify c --max-kl -1", 2, "--max-kl -1.0: expected nats"),
    ("export gone --out x", 2, "gone: not a run / run.json"),
    ("compare --cache c --student s --data d --out o --try sft --seeds a", 2, "--seeds 'a': expected numbers"),
    ("doctor --out gone", 2, "--out gone: expected a folder"),
    (CACHE, 1, "gone.json: No such file"),
    (f"{CACHE} --answer-codec nonsense", 2, "--answer-codec 'nonsense' / expected one of bf16"),
    (f"{CACHE} --question-codec int2", 2, "--question-codec 'int2'"),
    (f"{CACHE} --top-k 0", 2, "--top-k 0: expected at least 1"),
    (f"{CACHE} --max-skip 2", 2, "--max-skip 2.0 / share from 0 to 1"),
    (f"{CACHE} --split 0.5", 2, "--split '0.5' / expected two shares such as 0.0:0.95"),
    (f"{CACHE} --split 0.9:0.1", 2, "--split 0.9:0.1 / the first below the second"),
    ("cache --teacher t --out out --data gone-{{0..9}}.tar", 1, "gone-0.tar: No such file"),
    (f"{CACHE} --targets topk", 2, "--targets 'topk': expected topk:K, sample:K or both, such as topk:64,sample:50"),
    (f"{CACHE} --targets sample:0", 2, "--targets / expected topk:K"),
    (f"{CACHE} --targets sample:5,sample:6", 2, "--targets / expected topk:K"),
    (f"{CACHE} --targets ", 2, "--targets / expected topk:K"),
    (f"{CACHE} --targets topk:4 --top-k 8", 2, "--targets topk:4 and --top-k 8: expected the same k; leave one out"),
    (f"{CACHE} --targets sample:65536", 2, "expected 1 to 65535 draws"),
    (f"{CACHE} --generate-seed 3", 2, "--generate-seed 3: expected --generate"),
    (f"{CACHE} --compare-hf 2", 2, "--compare-hf: expected --backend vllm"),
    (
        f"{CACHE} --tensor-parallel 2",
        2,
        "--tensor-parallel, --pipeline-parallel and --engine-arg: expected --backend vllm",
    ),
    (f"{CACHE} --backend tpu", 2, "--backend 'tpu': expected hf or vllm"),
    (f"{CACHE} --ray-actors 2", 2, "expected --ray ADDRESS"),
    (f"{CACHE} --dtype float8", 2, "dtype 'float8' / expected one of auto, float32"),
    (f"{DATA_CACHE} --max-skip 0.5 --device gpu", 2, "device 'gpu' / expected auto, cpu, cuda"),
    (f"{DATA_CACHE} --max-skip 0.5 --device cuda:99", 2, "device 'cuda:99' / CUDA devices"),
    (f"{DATA_CACHE} --exclude-category x", 2, "--exclude-category 'x': no record has it"),
    (f"{DATA_CACHE} --max-skip 0.01", 1, "1 of 8 samples cannot be used / --max-skip / turn 4: empty answer"),
    (f"{EVALUATE} --data gone.csv", 1, "gone.csv: No such file"),
    (
        f"{EVALUATE} --data gone.csv --out {HERE}/x.jsonl",
        2,
        f"--out {HERE}/x.jsonl: cannot be written: {HERE} is a file",
    ),
    (f"{EVALUATE} --data gone.csv --out /dev/null", 2, "--out /dev/null: cannot be written"),
    (EVALUATE, 2, "--data: expected data files, or --harness lmms-eval --tasks"),
    (f"{EVALUATE} --tasks ai2d", 2, "--tasks: expected --harness lmms-eval with it"),
    (f"{EVALUATE} --harness x --tasks t", 2, "--harness 'x': expected lmms-eval"),
    (f"{EVALUATE} --harness lmms-eval", 2, "--tasks '': expected names / ai2d,mmstar"),
    (f"{EVALUATE} --harness lmms-eval --tasks t --split 0:0.5", 2, "--split: expected no --harness with it"),
]


@pytest.mark.parametrize(("line", "status", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_users_mistake_is_one_line(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, status: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(run(*line.format(data=data).split(" ")), status, *words.split(" / "))


def test_a_place_that_holds_something_else_is_one_line(run: Run, data: Path, cache: Path, tmp_path: Path) -> None:
    """Before the teacher is loaded; a folder that a killed job left before its cache.json is taken."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert_one_line(run(*cache_args(empty, data, out)), 1, f"{empty}: expected a model folder, found no config.json")
    assert_one_line(
        run(*cache_args("models/gone", data, out)), 1, "models/gone: neither a model folder nor a reachable"
    )
    out.mkdir()
    for name, found in (("config.json", "a model"), ("run.json", "a run"), ("thesis.txt", "other files")):
        (out / name).write_text("{}")
        assert_one_line(run(*cache_args("gone", data, out)), 2, f"expected a cache or an empty folder, found {found}")
        (out / name).unlink()
    (out / "teacher").mkdir()
    assert "gone" in run(*cache_args("gone", data, out)).err
    with fsspec.open("memory://place/config.json", "w") as file:
        file.write("{}")
    assert_one_line(run(*cache_args("gone", data, "memory://place")), 2, "expected a cache or nothing, found a model")


# ------------------------------------------------------------------------------------------------------------------ help


def test_help_fits_80_columns_and_lists_every_command_and_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pages = {name: run(*name.split(), "-h") for name in ("", *COMMANDS)}
    assert {page.status for page in pages.values()} == {0}
    assert max(len(line) for page in pages.values() for line in page.out.splitlines()) <= 80
    for name, command in COMMANDS.items():
        assert f" {name} " in pages[""].out
        assert [o for p in command.params for o in p.opts if o.startswith("--") and o not in pages[name].out] == []
    for title in ("Data", "Teacher", "Storage", "Answers", "Many machines"):
        assert re.search(rf"─ {title} ─", pages["cache"].out), title


# ---------------------------------------------------------------------------------------------------------------- commands


def test_a_finished_cache_is_found_again(run: Run, tiny: Callable[[str], Path], data: Path, cache: Path) -> None:
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    ended = run(*cache_args(tiny("qwen2_vl"), data, cache))
    assert ended.status == 0
    assert ": turn 4: empty answer" in ended.out  # by an earlier run, and still true
    assert "7 samples cached, 1 skipped; 0 shards written, 3 found" in ended.out
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    assert open_cache(cache).description["teacher"]["dtype"] == "float32"
    ended = run(*cache_args(tiny("qwen2_vl"), data, cache, "--top-k", "4"))
    assert_one_line(ended, 2, "made by another job", "top_k was 8, now 4")


def test_targets_say_what_is_kept(run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    common = ["cache", "--teacher", tiny("qwen2_vl"), "--data", data, "--limit", "1", "--targets"]
    for name, words in (("both", ["topk:3,sample:7"]), ("sample", ["sample:7", "--top-k", "3"])):
        ended = run(*common, *words, "--out", tmp_path / name)
        assert ended.status == 0 and "1 shard written, 0 found" in ended.out
        found = open_cache(tmp_path / name).description
        assert (found["top_k"], found["sampled_targets"]) == (3, 7)
    assert "top-3 logits, 7 draws per row" in run("inspect", tmp_path / "both").out


def test_what_is_selected_is_cached_and_measured(run: Run, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_llava(tmp_path / "data", mixed_samples(8))
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"category": "ab"[i % 2]} for i, record in enumerate(records)]))
    common = ["--data", path, "--limit", "3", "--json"]
    plan = json.loads(run("plan", "--teacher", "qwen2-vl-72b", *common, "--include-category", "a").out)
    assert (plan["num_samples"], plan["skipped"]) == (3, 0)
    args = ["cache", "--teacher", tiny("qwen2_vl"), "--data", path, "--out", tmp_path / "c", "--exclude-category", "b"]
    assert run(*args, "--split", "0:0.5", "--split-seed", "1").status == 0
    rest = ["--include-category", "a", "--split", "0.5:1", "--split-seed", "1", "--max-new-tokens", "1"]
    out = tmp_path / "p.jsonl"
    assert run("evaluate", "--model", tiny("qwen2_vl"), "--data", path, *rest, "--out", out).status == 0
    cached = {row["sample_id"] for row in open_cache(tmp_path / "c").manifest().to_pylist()}
    asked = {json.loads(line)["key"].partition("-")[2] for line in out.read_text().splitlines()}
    assert cached and asked and not cached & asked and cached | asked == {"s0", "s2", "s4", "s6"}


def test_inspect_counts_what_the_manifest_counts(run: Run, cache: Path) -> None:
    ended = run("inspect", cache, "--json")
    summary = json.loads(ended.out)
    cached = [row for row in open_cache(cache).manifest().to_pylist() if row["status"] == "cached"]
    assert (ended.status, ended.err) == (0, "")
    assert (summary["cached"], summary["skipped"], summary["shards"]) == (len(cached), 1, [3, 3]) == (7, 1, [3, 3])
    for name in ("turns", "images", "question_tokens", "answer_tokens"):
        assert summary[name] == sum(row[name] for row in cached) > 0
    assert summary["categories"] == Counter(row["category"] for row in cached)
    for tier in ("samples", "questions"):
        assert summary["bytes"][f"{tier} tars"] == sum(file.stat().st_size for file in (cache / tier).glob("*.tar"))
    words = " ".join(run("inspect", cache).out.split())
    assert "shards 3 of 3, complete samples 7 cached, 1 skipped" in words
    assert f"tokens {summary['question_tokens']} question, {summary['answer_tokens']} answer" in words


def test_evaluate_prints_scores_rules_and_what_it_skipped(
    run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    common = ("evaluate", "--model", tiny("qwen2_vl"), "--max-new-tokens", "2")
    ended = run(*common, "--data", data, "--out", tmp_path / "p.jsonl", "--json")
    scores = json.loads(ended.out)
    assert ended.status == 0 and list(scores) == ["overall", "test"]
    assert scores["overall"] == scores["test"] and sum(scores["test"]["rules"].values()) == 12
    assert scores["overall"]["n"] == len((tmp_path / "p.jsonl").read_text().splitlines()) == 12
    [skipped] = [line for line in ended.err.splitlines() if line.startswith("skipped")]
    assert "data.json:" in skipped and skipped.endswith("turn 4: empty answer")
    turns = conversation(("How many?", "RM 9.00"), ("Which?", "a cat"), ("And?", "7"))
    ended = run(*common, "--data", write_llava(tmp_path / "d", [turns]))  # one conversation has no standard error
    row = next(line for line in ended.out.splitlines() if line.startswith("overall"))
    assert ended.status == 0 and row.split()[1:5] == ["3", "0.0%", "±", "-"] and row.endswith("number 2, exact 1")


def test_a_disk_that_is_full_before_evaluate_asks_or_after(
    run: Run, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        data = write_llava(tmp_path / "d", mixed_samples(24))
        words = ("--data", data, "--max-new-tokens", "1", "--out", disk / "p.jsonl")
        ended = run("evaluate", "--model", tiny("qwen2_vl"), *words)
        assert ended.out.splitlines()[1].split()[:2] == ["overall", "42"]
        last = dataclasses.replace(ended, err=ended.err.splitlines(keepends=True)[-1])
        assert_one_line(last, 1, "No space left", "printed above")
        assert list(disk.iterdir()) == []
        (disk / "full").write_bytes(bytes(4096))
        assert_one_line(run("evaluate", "--model", "gone", *words), 2, "cannot be written: No space left")
    finally:
        subprocess.run(["umount", disk], check=True)
