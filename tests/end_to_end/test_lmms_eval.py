"""Exported students in lmms-eval, with the real package and a task in its own format over pictures made here.

`make test-eval` runs these in an environment of their own (scripts/make_eval_env).
"""

import json
import os

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval: `make test-eval` runs these in an environment of their own")
os.environ |= {"HF_DATASETS_OFFLINE": "1"}

from conftest import conversation, write_llava
from exported import exported_student

from genrecal.cli import main

pytestmark = pytest.mark.eval

QUESTIONS = ["What color is the shape?", "What digit is shown?", "How many shapes are there?", "What is the title?"]
TOKENS = 12
TASK = """task: made_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def run(capfd, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Makes the task, with a right answer for each question; gives the task's folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "task"
    samples = [conversation((question, "?"), images={0: 1}) for question in QUESTIONS]
    write_llava(folder / "data", samples)

    def make(answers):
        rows = [
            {"question": question, "answer": answer, "image": str(folder / f"data/images/{number}-0.png")}
            for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "made_here.yaml").write_text(TASK.format(data=folder / "rows.jsonl", tokens=TOKENS))
        (folder / "utils.py").write_text(UTILS)
        return folder

    return make


def own_answers(student, folder, tmp_path):
    """What genrecal's own evaluation has of the student, in the dtype that lmms-eval takes."""
    words = ["--data", folder / "data/data.json", "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", TOKENS]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", str(student), "--out", str(tmp_path / "own.jsonl"), *map(str, words)])
    assert not stop.value.code
    return [json.loads(line)["prediction"].strip() for line in (tmp_path / "own.jsonl").read_text().splitlines()]


def test_an_internvl_student_is_asked_and_scored(task, tmp_path, capfd):
    """The score is the share of its answers that are the task's; what it answers is in the folder that --out names."""
    student = exported_student("student", tmp_path)
    folder = task(["a", "b", "c", "d"])
    given = ["--tasks", "made_here", "--task-folder", folder, "--device", "cpu", "--out", tmp_path / "out", "--json"]
    status, out, err = run(capfd, "evaluate", "--model", student, "--harness", "lmms-eval", *given)
    assert status == 0, err
    [row] = json.loads(out)
    assert (row["task"], row["metric"], row["n"]) == ("made_here", "exact_match", 4)
    [file] = (tmp_path / "out").rglob("*_samples_made_here.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [line["filtered_resps"].strip() for line in lines]
    assert len(set(answers)) > 1 and all(answers)
    assert row["value"] == sum(answer == line["target"] for answer, line in zip(answers, lines, strict=True)) / 4
    assert "genrecal: python -m lmms_eval --model internvl_hf" in err
    assert answers == own_answers(student, folder, tmp_path)


def test_a_qwen2_vl_student_and_a_table(task, tmp_path, capfd):
    student = exported_student("teacher", tmp_path)
    given = ["--tasks", "made_here", "--task-folder", task(["a", "b", "c", "d"]), "--device", "cpu", "--limit", "2"]
    status, out, err = run(
        capfd, "evaluate", "--model", student, "--harness", "lmms-eval", *given, "--harness-arg", "max_pixels=50176"
    )
    assert status == 0, err
    head, row = out.splitlines()
    assert head.split() == ["task", "metric", "value", "standard", "error", "questions"]
    assert row.split()[:2] == ["made_here", "exact_match"] and row.split()[-1] == "2"
    assert "--model qwen2_vl" in err and "max_pixels=50176" in err


def test_a_task_that_is_not_there_is_an_error(task, tmp_path, capfd):
    given = ["--tasks", "made_her", "--task-folder", task(["a", "b", "c", "d"]), "--device", "cpu"]
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text('{"model_type": "internvl"}')
    status, out, err = run(capfd, "evaluate", "--model", student, "--harness", "lmms-eval", *given)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(
        "genrecal: error: lmms-eval ended without results (ValueError: Tasks not found: made_her"
    )
