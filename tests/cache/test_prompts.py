"""Template arguments and allowed tokens on their way: `cache`, `cache.json`, the student's side, a finished run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import conversation, write_llava

from genrecal.cli import main
from genrecal.shards.reader import open_cache
from genrecal.train.run import Run
from genrecal.vlm.cached_teacher import teacher_renderer

BOXES = ["<|box_start|>", "<|box_end|>"]
OFF = ["--template-arg", "enable_thinking=false"]
ALLOW = [word for token in BOXES for word in ("--allow-token", token)]


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations of two turns, the last with a box."""
    box = "<|box_start|>(1,2),(3,4)<|box_end|>"
    samples = [conversation(("One?", "1"), (f"Where is {n}?", f"at {box}"), key=f"{n:08d}") for n in range(8)]
    return write_llava(tmp_path_factory.mktemp("boxes") / "data", samples)


@pytest.fixture
def run(capsys):
    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def cache(tiny, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "cache"
    command = ["cache", "--teacher", tiny("qwen3"), "--data", data, "--out", out, "--dtype", "float32", *OFF, *ALLOW]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert stop.value.code == 0
    return out


def test_the_teacher_is_to_be_told_whether_it_thinks(tiny, data, tmp_path, run):
    command = ["cache", "--teacher", tiny("qwen3"), "--data", data, "--out", tmp_path / "c", "--max-skip", "1"]
    status, _, err = run(*command)
    assert status == 1 and "--template-arg enable_thinking=false" in err and str(tiny("qwen3")) in err
    status, out, _ = run(*command, *OFF)
    assert status == 0 and "0 samples cached, 8 skipped" in out
    assert "a special token of this model; --allow-token '<|box_start|>' lets texts hold it" in " ".join(out.split())
    status, _, err = run(*command, "--template-arg", "enable_thoughts=false")
    assert status == 2 and "enable_thoughts: the chat template has no such variable" in err and "enable_thinking" in err


def test_the_cache_records_them(cache, tiny, data, run):
    opened = open_cache(cache)
    assert opened.description["template_args"] == {"enable_thinking": False}
    assert opened.description["allowed_tokens"] == sorted(BOXES)
    renderer = teacher_renderer(opened)
    assert (renderer.template_args, list(renderer.allowed_tokens)) == ({"enable_thinking": False}, sorted(BOXES))
    for number, record in enumerate(opened):
        assert record.sample.answers == ("at <|box_start|>(1,2),(3,4)<|box_end|>",)  # the earlier answer is context
        assert [message.is_target for message in record.sample.messages] == [False, False, False, True]
        rows = record.record().answer
        ids = renderer.encode(record.sample).answers[0].ids
        assert rows.target_id[rows.predicts].tolist() == ids.tolist()
        assert f"Where is {number}?" in record.sample.messages[2].text
    status, out, _ = run("verify", cache, "--deep")
    assert status == 0, out
    command = ["cache", "--teacher", tiny("qwen3"), "--data", data, "--out", cache, "--dtype", "float32", *ALLOW]
    status, _, err = run(*command, "--template-arg", "enable_thinking=true")
    assert status == 2 and "template_args" in err


def test_a_student_with_the_same_template_takes_them(cache, tiny, tmp_path, run):
    few = sets("stage2.accumulation=2", "stage2.max_steps=1", "measure.samples=0", "lora.rank=0")
    command = ["train", "--cache", cache, "--student", tiny("qwen3"), "--objective", "kl", "--stages", "2"]
    command += [*sets("data.workers=0", "precision=fp32"), *few]
    status, _, err = run(*command, "--out", tmp_path / "r")
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [4]
    assert abs(lines[0]["kl"]) < 1e-5  # the teacher is its own student
    student = Run.open(tmp_path / "r").load_student(torch.float32).renderer
    assert student.template_args == {"enable_thinking": False} and list(student.allowed_tokens) == sorted(BOXES)
    content = json.loads((tmp_path / "r" / "run.json").read_text())
    assert content["cache_prompt"] == {"template_args": {"enable_thinking": False}, "allowed_tokens": sorted(BOXES)}
    status, _, err = run("export", tmp_path / "r", "--out", tmp_path / "e")
    assert status == 0, err


def test_a_student_that_thinks_is_to_be_told_too(tiny, data, tmp_path, run):
    command = ["cache", "--teacher", tiny("qwen2"), "--data", data, "--out", tmp_path / "c", "--dtype", "float32"]
    assert run(*command)[0] == 0  # the boxes are plain text to it
    command = ["train", "--cache", tmp_path / "c", "--student", tiny("qwen3"), "--objective", "sft", "--stages", "2"]
    command += sets("stage2.max_steps=1", "data.workers=0", "stage2.accumulation=2")
    status, _, err = run(*command, "--out", tmp_path / "r")
    assert status == 1 and "--set prompt.template_args.enable_thinking=false" in err
    allowed = 'prompt.allowed_tokens=["<|box_start|>", "<|box_end|>"]'
    told = sets("prompt.template_args.enable_thinking=false", allowed, "measure.samples=0")
    status, _, err = run(*command, "--out", tmp_path / "told", *told)
    assert status == 0, err


def test_reasoning_that_the_template_does_not_write_is_counted(tiny, tmp_path, run):
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "It is."},
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"id": str(n), "messages": messages}) + "\n" for n in range(3)))
    status, out, err = run("cache", "--teacher", tiny("qwen2"), "--data", data, "--out", tmp_path / "c")
    assert status == 0, err
    assert "3 records with reasoning_content, which this model's chat template does not write" in " ".join(out.split())
    on = ["--template-arg", "enable_thinking=true"]
    status, out, err = run("cache", "--teacher", tiny("qwen3"), "--data", data, "--out", tmp_path / "on", *on)
    assert status == 0 and "reasoning_content" not in out, err
    record = open_cache(tmp_path / "on")[0]
    rows = record.record().answer
    text = teacher_renderer(open_cache(tmp_path / "on")).tokenizer.decode(rows.target_id[rows.predicts].tolist())
    assert text == "<think>\nIt is.\n</think>\n\nSo.<|im_end|>"
