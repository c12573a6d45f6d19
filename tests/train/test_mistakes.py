"""What a beginner does wrong: one line that says what, where and what to do, before anything is trained or written."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.errors import TrainingError
from genrecal.samples import open_samples
from genrecal.train.config import TrainConfig
from genrecal.train.engine import TorchEngine
from genrecal.train.loop import too_few_samples
from genrecal.train.run import Run
from genrecal.vlm.loading import PROCESSOR_FILES

FEW = [word for stage in (1, 2, 3) for word in ("--set", f"stage{stage}.accumulation=2")]


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    """A cache of twelve samples whose questions are not kept."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = write_llava(folder / "d", mixed_samples(12))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(question_codec="none"))
    return folder / "c"


@pytest.fixture
def told(tiny, made, tmp_path, capsys):
    """The line and exit status of a `genrecal train`; nothing may be written but what `kept` names."""

    def make(*words, student=None, cache=made, kept=()):
        command = ["train", "--cache", str(cache), "--student", str(student or tiny("internvl_qwen2"))]
        settings = ("data.workers=0", "measure.samples=0", "loss.reg_weight=0")
        command += ["--out", str(tmp_path / "r"), *(word for setting in settings for word in ("--set", setting))]
        with pytest.raises(SystemExit) as stop:
            main([*command, *words])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genrecal: error: ")]
        assert sorted(path.name for path in (tmp_path / "r").glob("*")) == sorted(kept)
        return stop.value.code, line

    return make


def test_fewer_samples_than_a_global_batch_is_said_once_for_all_stages(told, monkeypatch):
    """With the defaults; following the advice, no stage is refused any more, under a launcher either."""
    status, line = told()
    assert (
        status == 2 and "stage 1 has 12 samples in all its epochs, its global batch 64; stage 2 has 12 samples" in line
    )
    advice = re.search(r"add (--set .*), or train more epochs", line)[1].split()
    assert advice[1::2] == ["stage1.accumulation=3", "stage2.accumulation=6", "stage3.accumulation=3"]
    status, line = told(*advice, "--set", "stage2.batch_size=40")
    assert status == 2 and "stage 1" not in line
    assert "--set stage2.batch_size=12 --set stage2.accumulation=1, or" in line
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "micro_step", lambda *_, **__: (_ for _ in ()).throw(TrainingError("stopped")))
        begun = ["cache-facts.json", "run.json", "metrics.jsonl", "tensorboard"]
        assert told(*advice, kept=begun) == (1, "genrecal: error: stopped")
    plan = SimpleNamespace(num_samples=3, global_batch=64)
    assert "4 processes takes at least one: start fewer processes" in too_few_samples(
        {1: plan}, TrainConfig(), processes=4
    )


def test_a_later_stage_is_looked_at_before_the_first_is_trained(told):
    status, line = told(*FEW, "--set", 'stage3.exclude_categories=["General VQA"]')
    assert status == 2 and "no sample has the category 'General VQA'; the cache has test" in line


def test_a_folder_beside_the_runs_is_not_deleted_for_a_profile(told, tmp_path):
    kept = tmp_path / "r.profile" / "precious"
    kept.parent.mkdir()
    kept.touch()
    status, line = told(*FEW, "--profile", "1")
    assert status == 2 and "r.profile: --profile writes there and deletes it; move it away" in line and kept.exists()


@pytest.mark.parametrize("stages, missing", [("2", 1), ("3", 2), ("1,3", 2)])
def test_stages_in_a_wrong_order(told, stages, missing):
    status, line = told(*FEW, "--stages", stages)
    assert status == 1 and f"stage {missing + 1} begins from stage {missing}'s result" in line
    assert f"--stages that include {missing} first" in line


def test_a_student_with_the_processor_of_another_family(told, tiny, tmp_path):
    student = shutil.copytree(tiny("internvl_qwen2"), tmp_path / "s")
    for name in PROCESSOR_FILES:
        (student / name).unlink(missing_ok=True)
        if (tiny("qwen2_vl") / name).exists():
            shutil.copy(tiny("qwen2_vl") / name, student)
    status, line = told(*FEW, "--stages", "1", student=student, kept=["cache-facts.json", "run.json"])
    assert status == 1 and "files of this model, got those of a Qwen2VLProcessor" in line


def test_a_live_teacher_with_another_chat_template(told, made, tiny, tmp_path):
    changed = shutil.copytree(tiny("qwen2_vl"), tmp_path / "t")
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    status, line = told(*FEW, "--teacher", f"live:{changed}")
    assert status == 2 and "its chat_template.jinja is not the one that the cache" in line


@pytest.mark.slow
def test_an_error_ends_the_processes_that_read(made, tiny, tmp_path):
    """They ignore the signal by which the interpreter would end them, so a command that left them to it never ended."""
    words = [
        "train",
        "--cache",
        str(made),
        "--student",
        str(tiny("internvl_qwen2")),
        "--out",
        str(tmp_path / "r"),
        *FEW,
    ]
    settings = ["stage1.lr=1e30", "stage1.batch_size=1", "loss.reg_weight=0", "measure.samples=0"]
    words += ["--stages", "1", *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run([sys.executable, "-m", "genrecal", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "the loss is nan on samples" in done.stderr


def test_caches_of_two_teachers(told, made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made, other)
    content = json.loads((other / "cache.json").read_text())
    content["teacher"]["head_xxh3"] = "0" * 32
    (other / "cache.json").write_text(json.dumps(content))
    status, line = told(*FEW, "--cache", str(other))
    assert status == 2 and f"--cache {other}: the teacher's head" in line and "only caches of one teacher" in line
    status, line = told(*FEW, "--cache", str(other), "--dry-run")
    assert status == 2 and "only caches of one teacher" in line


def test_weights_of_caches(told):
    status, line = told(*FEW, "--set", "data.weights=[1, 2]")
    assert (
        status == 2 and "data.weights: expected a number for each of 1 caches, in the order of --cache, got 2" in line
    )
    status, line = told(*FEW, "--set", "data.weights=[0]")
    assert status == 2 and "data.weights [0.0]: expected numbers above 0" in line
    status, line = told(*FEW, "--set", 'data.weights=["a"]')
    assert status == 2 and "setting data.weights: expected a list of numbers, got ['a']" in line


def test_two_trainings_in_one_folder(told, monkeypatch):
    """The second is refused while the first trains, which goes on undisturbed."""
    refused, plain = [], TorchEngine.micro_step

    def micro_step(self, *words, **named):
        if not refused:
            refused.append("")
            kept = ["cache-facts.json", "lock.json", "metrics.jsonl", "run.json", "tensorboard"]
            refused[0] = told(*FEW, "--stages", "1", kept=kept)
            raise TrainingError("stopped")
        return plain(self, *words, **named)

    monkeypatch.setattr(TorchEngine, "micro_step", micro_step)
    kept = ["cache-facts.json", "metrics.jsonl", "run.json", "tensorboard"]
    assert told(*FEW, "--stages", "1", kept=kept) == (1, "genrecal: error: stopped")
    ((status, line),) = refused
    assert status == 2 and f"lock.json: process {os.getpid()} on " in line and "is training in this folder" in line


def test_a_folder_that_holds_something_else(told, made, tiny, tmp_path):
    for found, source in (("a model", tiny("internvl_qwen2")), ("a cache", made)):
        names = [path.name for path in shutil.copytree(source, tmp_path / "r").iterdir()]
        status, line = told(*FEW, "--stages", "1", kept=names)
        assert status == 2 and f"expected a run or an empty folder, found {found} (" in line
        shutil.rmtree(tmp_path / "r")


def test_a_disk_that_is_full_at_a_stages_result(told, monkeypatch, tmp_path):
    """Then with room again the same command finishes; nothing is left of the half that was written."""
    folder = tmp_path / "r"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", folder]).returncode:
        pytest.skip("needs the right to mount")
    plain, begun = Run.save_result, ["cache-facts.json", "metrics.jsonl", "run.json", "stage1", "tensorboard"]

    def on_a_full_disk(self, stage, weights):
        (folder / "stage1").mkdir(exist_ok=True)
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        plain(self, stage, weights)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "save_result", on_a_full_disk)
            status, line = told(*FEW, "--stages", "1", kept=[*begun, "filler"])
        assert status == 1 and "stage1/trained.safetensors: the result of stage 1 cannot be written" in line
        assert "make room" in line and not list((folder / "stage1").iterdir())
        (folder / "filler").unlink()
        with pytest.raises(ValueError, match="not enough values"):  # no error line
            told(*FEW, "--stages", "1", kept=begun)
        assert [path.name for path in (folder / "stage1").iterdir()] == ["trained.safetensors"]
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
