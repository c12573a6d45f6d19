"""The real Gemma as a teacher of code: answers that it is given and that it writes, and a student that is the teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

pytestmark = pytest.mark.real

CODE = "class Line:\n    def __init__(self, a, b):\n        self.a = a\n        self.b = b\n\n    def length{}(self):\n"
ANSWERS = [
    "if x:\n        return 1  # two\n",
    "One.  Two.\n\n  - a\n    - b",
    "<table>\n\t\t<tr>",
    "e\u0301  👩‍🔬  مرحبا",
]
BLANK_LINES = [108, 109, 110]  # two line breaks and more: a base model ends a piece of code so, and no turn
WRITES = AnswerSource(kind="greedy", max_tokens=100)


def write_data(path: Path, answers: list[str]) -> Path:
    turns = [
        ({"role": "user", "content": CODE.format(i)}, {"role": "assistant", "content": a})
        for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


@pytest.fixture(scope="module")
def folder(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, told to end an answer at a blank line."""
    folder = tmp_path_factory.mktemp("gemma") / "model"
    shutil.copytree(real / "gemma3-270m", folder, copy_function=lambda source, to: Path(to).symlink_to(source))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, *BLANK_LINES]}))
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> HFTeacher:
    return HFTeacher.load(folder, dtype=torch.bfloat16)


def test_written_answers_are_what_transformers_writes(teacher: HFTeacher, folder: Path, tmp_path: Path) -> None:
    samples = open_samples([write_data(tmp_path / "data.jsonl", ["pass"] * 3)])
    run_cache_job(teacher, samples, tmp_path / "cache", CacheOptions(answers=WRITES, batch_tokens=1, max_skip=1.0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    lines = (tmp_path / "cache/answers/00000.jsonl").read_text().splitlines()
    found, expected = [json.loads(line).get("answers") for line in lines], []
    for number in range(3):
        chat = [{"role": "user", "content": CODE.format(number)}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :].tolist()
        ends = ids[-1] in (1, 106, *BLANK_LINES)
        expected.append([tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)] if ends else None)
    assert found == expected
    written = [answer for answers in found if answers for answer in answers]
    assert written and any("    " in answer for answer in written) and not any("▁" in answer for answer in written)
    assert verify_cache(tmp_path / "cache", deep=True).whole


def test_code_is_cached_and_a_student_that_is_the_teacher_learns_nothing(
    teacher: HFTeacher, folder: Path, tmp_path: Path
) -> None:
    samples = open_samples([write_data(tmp_path / "data.jsonl", ANSWERS)])
    report = run_cache_job(teacher, samples, tmp_path / "cache", CacheOptions(answer_codec="bf16"))
    assert (report.cached, report.skipped) == (len(ANSWERS), 0)
    assert [record.sample.answers[0] for record in open_cache(tmp_path / "cache")] == ANSWERS
    assert verify_cache(tmp_path / "cache", deep=True).whole
    words = [
        "train",
        "--cache",
        tmp_path / "cache",
        "--student",
        folder,
        "--out",
        tmp_path / "run",
        "--objective",
        "kl",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--stages", "2", "--set", "stage2.batch_size=4", "--set", "stage2.accumulation=1"])
    assert not stop.value.code
    (step,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert abs(step["kl"]) < 2e-3 < 1 < step["sft"]  # bfloat16's rounding of states and logits
