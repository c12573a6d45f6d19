"""The command line as a user meets it: exit status, one line for an error, and what `inspect` says."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from conftest import conversation, mixed_samples, write_llava

import genrecal
from genrecal.cli import main
from genrecal.shards.reader import open_cache

COMMAND = [sys.executable, "-m", "genrecal"]


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
    options = "--samples-per-shard 3 --top-k 8 --max-skip 0.5 --question-fraction 0.5 --dtype float32".split()
    return ["cache", "--teacher", str(teacher), "--data", str(data), "--out", str(out), *options, *more]


# -------------------------------------------------------------------------------------------------------------- processes


def test_version() -> None:
    assert process("--version") == Ended(0, f"genrecal {genrecal.__version__}\n", "")


def test_a_real_process_prints_one_line_and_with_debug_a_traceback(tmp_path: Path) -> None:
    args = ("train", "--cache", tmp_path / "no", "--student", "no", "--out", tmp_path / "run", "--stages", "1,4")
    assert_one_line(process(*args), 2, "--stages '1,4'", "expected numbers from 1 to 3")
    debugged = process("--debug", *args)
    assert debugged.err.startswith("Traceback") and "UsageError: --stages '1,4'" in debugged.err
    assert debugged.status == 2
    assert not (tmp_path / "run").exists()


def test_ctrl_c_says_what_to_do_and_ends_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "settings.toml"
    os.mkfifo(pipe)
    command = [*COMMAND, "train", "--cache", "c", "--student", "s", "--out", str(tmp_path / "o"), "--config", str(pipe)]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    with pipe.open("w"):  # opens once the command reads its settings, and keeps it waiting for them
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=600)
    assert child.returncode == 130
    assert err.strip().splitlines()[-1].startswith("genrecal: interrupted; run the same command again")
    assert "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------------- errors


CONFIG_JSON = str(Path(genrecal.__file__).parent / "demo/assets/student/config.json")
TRAIN = ["train", "--cache", "gone", "--student", "gone", "--out", "run"]
CACHE = ["cache", "--teacher", "gone", "--data", "gone.json", "--out", "out"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([*TRAIN, "--stages", "0"], 2, ["--stages '0'", "1 to 3"]),
        ([*TRAIN, "--stages", "one"], 2, ["--stages 'one'"]),
        ([*TRAIN, "--stages", ""], 2, ["--stages ''"]),
        ([*TRAIN, "--set", "stage1.lrr=1"], 2, ["unknown setting stage1.lrr", "nearest one is stage1.lr"]),
        ([*TRAIN, "--set", "seed=x"], 2, ["setting seed: expected int, got 'x'"]),
        ([*TRAIN, "--set", "objective=\n\n"], 2, ["objective"]),
        ([*TRAIN, "--objective", "kd"], 2, ["objective 'kd'", "genrecal, genrecal-aligned, sft"]),
        ([*TRAIN, "--config", "gone.toml"], 2, ["--config gone.toml", "No such file"]),
        ([*TRAIN, "--config", CONFIG_JSON], 2, [f"--config {CONFIG_JSON}: expected TOML"]),
        ([*TRAIN, "--teacher", "gone"], 2, ["--teacher 'gone'", "expected live:MODEL"]),
        (TRAIN, 1, ["gone: not a cache", "genrecal cache"]),
        (["inspect", "gone"], 1, ["gone: not a cache: there is nothing at this path"]),
        (["inspect", __file__], 1, [f"{__file__}: not a cache: it has no cache.json"]),
        (["export", "gone", "--out", "x"], 2, ["gone: not a run", "run.json"]),
        (CACHE, 1, ["gone.json: No such file"]),
        ([*CACHE, "--answer-codec", "nonsense"], 2, ["--answer-codec 'nonsense'", "expected one of bf16"]),
        ([*CACHE, "--question-codec", "int2"], 2, ["--question-codec 'int2'"]),
        ([*CACHE, "--top-k", "0"], 2, ["--top-k 0: expected at least 1"]),
        ([*CACHE, "--max-skip", "2"], 2, ["--max-skip 2.0", "share from 0 to 1"]),
        (["evaluate", "--model", "gone", "--data", "gone.csv"], 1, ["gone.csv: No such file"]),
        (
            ["evaluate", "--model", "gone", "--data", "gone.csv", "--out", f"{__file__}/x.jsonl"],
            2,
            [f"--out {__file__}/x.jsonl: cannot be written: {__file__} is a file"],
        ),
        (["evaluate", "--model", "gone"], 2, ["--data: expected data files, or --harness lmms-eval --tasks"]),
        (["evaluate", "--model", "gone", "--tasks", "ai2d"], 2, ["--tasks: expected --harness lmms-eval with it"]),
        (["evaluate", "--model", "m", "--harness", "x", "--tasks", "t"], 2, ["--harness 'x': expected lmms-eval"]),
        (["evaluate", "--model", "m", "--harness", "lmms-eval"], 2, ["--tasks '': expected names", "ai2d,mmstar"]),
        (
            ["evaluate", "--model", "m", "--harness", "lmms-eval", "--tasks", "t", "--split", "0:0.5"],
            2,
            ["--split: expected no --harness with it"],
        ),
        ([*CACHE, "--split", "0.5"], 2, ["--split '0.5'", "expected two shares such as 0.0:0.95"]),
        ([*CACHE, "--split", "0.9:0.1"], 2, ["--split 0.9:0.1", "the first below the second"]),
        ([*CACHE[:3], "--data", "gone-{0..9}.tar", "--out", "out"], 1, ["gone-0.tar: No such file"]),
    ],
    ids=lambda value: " ".join(value[-2:]).replace("\n", " ") if isinstance(value, list) else str(value),
)
def test_a_users_mistake_is_one_line(run: Run, args: list[str], status: int, words: list[str]) -> None:
    assert_one_line(run(*args), status, *words)


def test_a_folder_that_is_no_model_is_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = run(*cache_args(tmp_path / "empty", data, tmp_path / "out"))
    assert_one_line(ended, 1, f"{tmp_path / 'empty'}: expected a model folder, found no config.json")
    assert not (tmp_path / "out").exists()
    ended = run(*cache_args("models/gone", data, tmp_path / "out"))
    assert_one_line(ended, 1, "models/gone: neither a model folder nor a reachable hub model")


def test_a_cache_in_a_folder_of_something_else_is_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    """Before the teacher is loaded; a folder that a killed job left before its cache.json is taken."""
    for name, found in (("config.json", "a model"), ("run.json", "a run"), ("thesis.txt", "other files")):
        (tmp_path / name).write_text("{}")
        assert_one_line(
            run(*cache_args("gone", data, tmp_path)), 2, f"expected a cache or an empty folder, found {found}"
        )
        (tmp_path / name).unlink()
    (tmp_path / "teacher").mkdir()
    assert "gone" in run(*cache_args("gone", data, tmp_path)).err
    with fsspec.open("memory://place/config.json", "w") as file:
        file.write("{}")
    assert_one_line(run(*cache_args("gone", data, "memory://place")), 2, "expected a cache or nothing, found a model")


@pytest.mark.parametrize("name", ["fp32", "float32"])
def test_number_formats_have_two_names(
    run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    assert run(*cache_args(tiny("qwen2_vl"), data, tmp_path / "out", "--dtype", name, "--limit", "1")).status == 0
    assert open_cache(tmp_path / "out").description["teacher"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--dtype", "float8", "expected one of auto, float32"),
        ("--device", "gpu", "expected auto, cpu, cuda"),
        ("--device", "cuda:99", "CUDA devices"),
    ],
)
def test_a_wrong_dtype_or_device_is_one_line(
    run: Run, data: Path, tmp_path: Path, option: str, value: str, reason: str
) -> None:
    ended = run(*cache_args("gone", data, tmp_path / "out", option, value))
    assert_one_line(ended, 2, f"{option.strip('-')} '{value}'", reason)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--targets", "topk"], "expected topk:K, sample:K or both, such as topk:64,sample:50"),
        (["--targets", "sample:0"], "expected topk:K"),
        (["--targets", "sample:-3"], "expected topk:K"),
        (["--targets", "sample:5,sample:6"], "expected topk:K"),
        (["--targets", ""], "expected topk:K"),
        (["--targets", "topk:4"], "--targets topk:4 and --top-k 8: expected the same k; leave one out"),
        (["--targets", "sample:65536"], "expected 1 to 65535 draws"),
    ],
)
def test_wrong_targets_are_one_line(run: Run, data: Path, tmp_path: Path, options: list[str], reason: str) -> None:
    assert_one_line(run(*cache_args("gone", data, tmp_path / "out", *options)), 2, "--targets", reason)


def test_targets_say_what_is_kept(run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    common = ["cache", "--teacher", tiny("qwen2_vl"), "--data", data, "--limit", "2", "--targets"]
    assert run(*common, "topk:3,sample:7", "--out", tmp_path / "both").status == 0
    assert run(*common, "sample:7", "--out", tmp_path / "sample", "--top-k", "3").status == 0
    assert run(*common, "topk:3", "--out", tmp_path / "topk").status == 0
    found = [open_cache(tmp_path / name).description for name in ("both", "sample", "topk")]
    assert [(each["top_k"], each["sampled_targets"]) for each in found] == [(3, 7), (3, 7), (3, 0)]
    assert "top-3 logits, 7 draws a row" in run("inspect", tmp_path / "both").out


def test_what_is_selected_is_cached_and_measured(run: Run, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_llava(tmp_path / "data", mixed_samples(8))
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"category": "ab"[i % 2]} for i, record in enumerate(records)]))
    common = ["--data", path, "--limit", "3", "--json"]
    plan = json.loads(run("plan", "--teacher", "qwen2-vl-72b", *common, "--include-category", "a").out)
    assert (plan["num_samples"], plan["skipped"]) == (3, 0)
    args = ["cache", "--teacher", tiny("qwen2_vl"), "--data", path, "--out", tmp_path / "c", "--exclude-category", "b"]
    split = ["--split", "0:0.5", "--split-seed", "1"]
    assert run(*args, *split).status == 0
    rest = ["--include-category", "a", "--split", "0.5:1", "--split-seed", "1"]
    rest = [*rest, "--max-new-tokens", "1", "--out", tmp_path / "p.jsonl"]
    assert run("evaluate", "--model", tiny("qwen2_vl"), "--data", path, *rest).status == 0
    cached = {row["sample_id"] for row in open_cache(tmp_path / "c").manifest().to_pylist()}
    asked = {json.loads(line)["key"].partition("-")[2] for line in (tmp_path / "p.jsonl").read_text().splitlines()}
    assert cached and asked and not cached & asked and cached | asked == {"s0", "s2", "s4", "s6"}
    assert_one_line(run(*args, "--exclude-category", "c"), 2, "--exclude-category 'c': no record has it")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], ["Missing option"]),
        (["train", "--nope"], ["No such option"]),
        (["nope"], ["No such command"]),
        (["cache", "--teacher", "t", "--data", "d", "--out", "o", "--top-k", "x"], ["--top-k", "valid integer"]),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(run: Run, args: list[str], words: list[str]) -> None:
    assert_one_line(run(*args), 2, *words)


def test_too_many_skipped_samples_are_an_error_that_says_why(
    run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    ended = run(*cache_args(tiny("qwen2_vl"), data, tmp_path / "out", "--max-skip", "0.01"))
    assert_one_line(ended, 1, "1 of 8 samples cannot be used", "--max-skip", "turn 4: empty answer")


def test_another_job_in_the_same_folder_is_refused(
    run: Run, tiny: Callable[[str], Path], data: Path, cache: Path
) -> None:
    ended = run(*cache_args(tiny("qwen2_vl"), data, cache, "--top-k", "4"))
    assert_one_line(ended, 2, "made by another job", "top_k was 8, now 4")


# ---------------------------------------------------------------------------------------------------------------- commands


def test_help_lists_every_command(run: Run) -> None:
    ended = run("-h")
    assert ended.status == 0
    for command in ("cache", "inspect", "pair", "train", "export", "evaluate", "demo"):
        assert f" {command} " in ended.out


def test_a_finished_cache_is_found_again(run: Run, tiny: Callable[[str], Path], data: Path, cache: Path) -> None:
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    ended = run(*cache_args(tiny("qwen2_vl"), data, cache))
    assert ended.status == 0
    assert ": turn 4: empty answer" in ended.out  # by an earlier run, and still true
    assert "7 samples cached, 1 skipped; 0 shards written, 3 found" in ended.out
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_inspect_counts_what_the_manifest_counts(run: Run, cache: Path) -> None:
    ended = run("inspect", cache, "--json")
    summary = json.loads(ended.out)
    rows = open_cache(cache).manifest().to_pylist()
    cached = [row for row in rows if row["status"] == "cached"]
    assert (ended.status, ended.err) == (0, "")
    assert (summary["cached"], summary["skipped"], summary["shards"]) == (len(cached), 1, [3, 3]) == (7, 1, [3, 3])
    for name in ("turns", "images", "question_tokens", "answer_tokens"):
        assert summary[name] == sum(row[name] for row in cached) > 0
    assert summary["with_question"] == sum(row["has_question"] for row in cached)
    assert summary["categories"] == Counter(row["category"] for row in cached)
    assert summary["skip_reasons"] == {"turn …: empty answer": 1}
    tokens = summary["answer_tokens"]
    mean = sum(row["log_prob"] * row["answer_tokens"] for row in cached) / tokens
    assert summary["log_prob"] == pytest.approx(mean, rel=1e-5)
    for tier in ("samples", "questions"):
        assert summary["bytes"][f"{tier} tars"] == sum(file.stat().st_size for file in (cache / tier).glob("*.tar"))
    answers = [m["size"] for row in cached for m in row["members"] if m["name"].endswith(".answer.arrow")]
    assert summary["bytes"]["answer states"] == sum(answers) > 0 and len(answers) == 7


def test_inspect_says_the_same_in_words(run: Run, cache: Path) -> None:
    summary, ended = json.loads(run("inspect", cache, "--json").out), run("inspect", cache)
    words = " ".join(ended.out.split())
    assert ended.status == 0
    assert "shards 3 of 3, complete samples 7 cached, 1 skipped" in words
    assert f"tokens {summary['question_tokens']} question, {summary['answer_tokens']} answer" in words
    assert f"({summary['with_question']} of 7 samples), top-8 logits" in words


def test_evaluate_prints_scores_and_names_what_it_skipped(
    run: Run, tiny: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    args = [
        "evaluate",
        "--model",
        tiny("qwen2_vl"),
        "--data",
        data,
        "--max-new-tokens",
        "2",
        "--out",
        tmp_path / "p.jsonl",
    ]
    ended = run(*args, "--json")
    scores = json.loads(ended.out)
    assert ended.status == 0 and list(scores) == ["overall", "test"]
    assert scores["overall"] == scores["test"] and sum(scores["test"]["rules"].values()) == 12
    assert scores["overall"]["n"] == len((tmp_path / "p.jsonl").read_text().splitlines()) == 12
    [skipped] = [line for line in ended.err.splitlines() if line.startswith("skipped")]
    assert "data.json:" in skipped and skipped.endswith("turn 4: empty answer")


def test_evaluate_says_which_rule_scored_how_many(run: Run, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Of one conversation there is no standard error."""
    data = write_llava(tmp_path / "d", [conversation(("How many?", "RM 9.00"), ("Which?", "a cat"), ("And?", "7"))])
    ended = run("evaluate", "--model", tiny("qwen2_vl"), "--data", data, "--max-new-tokens", "2")
    row = next(line for line in ended.out.splitlines() if line.startswith("overall"))
    assert ended.status == 0 and row.split()[1:5] == ["3", "0.0%", "±", "-"] and row.endswith("number 2, exact 1")
    assert "nan" not in ended.out


@pytest.mark.parametrize("out", [".", "file/p.jsonl", "/dev/null"])
def test_evaluate_checks_out_before_it_asks(run: Run, data: Path, tmp_path: Path, out: str) -> None:
    """And before it loads the model: there is none here."""
    (tmp_path / "file").write_text("")
    ended = run("evaluate", "--model", "gone", "--data", data, "--out", tmp_path / out)
    assert_one_line(ended, 2, f"--out {tmp_path / out}: cannot be written: ")


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
        assert_one_line(
            dataclasses.replace(ended, err=ended.err.splitlines(keepends=True)[-1]), 1, "No space left", "printed above"
        )
        assert list(disk.iterdir()) == []
        (disk / "full").write_bytes(bytes(4096))
        assert_one_line(run("evaluate", "--model", "gone", *words), 2, "cannot be written: No space left")
    finally:
        subprocess.run(["umount", disk], check=True)
