"""Every message that advises a setting is raised, its advice is followed word by word, and the run resumes and finishes."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import mixed_samples, write_llava

import genrecal
import genrecal.train.advice
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.errors import TrainingError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.train import batches, loop, midway
from genrecal.train.config import TrainConfig, load_config
from genrecal.train.engine import TorchEngine
from genrecal.train.logs import read_metrics
from genrecal.train.run import IDENTITY, Run, flat
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

STEPS = 4  # of two micro-batches of 4 samples
SETTINGS = [
    "data.workers=0", "measure.samples=0", "stage1.batch_size=4", "stage1.accumulation=2", "stage1.epochs=9",
    f"stage1.max_steps={STEPS}", "stage1.checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    run_cache_job(teacher, open_samples([write_llava(folder / "d", mixed_samples(20))]), folder / "c", CacheOptions())
    return folder / "c"


class Trainer:
    """`genrecal train` of stage 1, by its command line, in this process."""

    def __init__(self, cache, student, out, capsys):
        self.cache, self.student, self.out, self.capsys = cache, student, out, capsys

    def words(self, *options):
        words = ["train", "--cache", str(self.cache), "--student", str(self.student), "--out", str(self.out)]
        return [*words, "--stages", "1", *(word for setting in SETTINGS for word in ("--set", setting)), *options]

    def __call__(self, *options):
        """The exit status, and the line of the error."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(self.words(*options))
        err = self.capsys.readouterr().err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("genrecal: error: ")]
        assert len(lines) == (stop.value.code != 0), err
        return stop.value.code, lines[0] if lines else ""

    @property
    def steps(self):
        return [line["step"] for line in read_metrics(self.out)]


@pytest.fixture
def trainer(tiny, cache, tmp_path, capsys):
    return Trainer(shutil.copytree(cache, tmp_path / "c"), tiny("internvl_qwen2"), tmp_path / "r", capsys)


def ways(line):
    """What a message advises: of each way, the options of a command."""
    found = re.findall(r"--set \S+=[\w.\[\]]+(?: --set \S+=[\w.]+)*", line)
    return [way.split() for way in found]


# ------------------------------------------------------------------------------------- what goes wrong, until it is avoided


def out_of_memory(patch, trainer):
    """An allocation that the machine really refuses, in step 3, unless a micro-step is made smaller or cheaper."""
    plain = TorchEngine.micro_step

    def micro_step(self, batch, denominators, *, last):
        config = json.loads((trainer.out / "run.json").read_text())
        changed = config["resumed"][-1] if "resumed" in config else {}
        if self.updates == 3 and not changed.keys() - {"time", "command"}:
            torch.empty(2**50)
        return plain(self, batch, denominators, last=last)

    patch.setattr(TorchEngine, "micro_step", micro_step)


def dead_loader(patch, trainer):
    """A loader process is killed at the first sample of step 3, as the kernel does it."""
    plain, parent = batches.BatchBuilder._load, os.getpid()

    def load(self, indices, **words):
        if os.getpid() != parent and (trainer.out / "checkpoints/stage1-step00000002/state.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, indices, **words)

    patch.setattr(batches.BatchBuilder, "_load", load)


def damaged_sample(patch, trainer):
    path = trainer.cache / "samples" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[open_cache(trainer.cache)[7].row["members"][0]["offset"] + 3] ^= 1
    path.write_bytes(data)


def not_a_number(patch, trainer):
    """In bfloat16 alone."""
    plain = TorchEngine.micro_step

    def micro_step(self, batch, denominators, *, last):
        output = plain(self, batch, denominators, last=last)
        broken = self.updates == 3 and self.compute_dtype == torch.bfloat16
        return output._replace(loss=output.loss * float("nan")) if broken else output

    patch.setattr(TorchEngine, "micro_step", micro_step)


def evaluation_out_of_memory(patch, trainer):
    """As long as there are so many prompts, or such long answers, at a time."""
    plain = midway.ask

    def ask(*words, batch_size, max_new_tokens, **named):
        if batch_size == 8 and max_new_tokens is None:
            torch.empty(2**50)
        return plain(*words, batch_size=batch_size, max_new_tokens=max_new_tokens, **named)

    patch.setattr(midway, "ask", ask)


CASES = {
    "explain_failures": (out_of_memory, ["--set", "gradient_checkpointing=false"], "stage 1: out of memory: .*can't allocate"),
    "explain_loading, LoaderError": (dead_loader, ["--set", "data.workers=1"], "stage 1: a loader process died"),
    "explain_loading, DamageError": (damaged_sample, [], r"samples/00000\.tar: member .* expected \d+ bytes"),
    "too_many_left_out, damaged": (damaged_sample, ["--set", "data.on_damage=skip"], r"over the limit of 1\.00%"),
    "too_many_left_out, skipped": (None, ["--set", "max_tokens=LIMIT"], r"student cannot take \d+ of 32 samples"),
    "evaluation_ways": (evaluation_out_of_memory, ["--set", "evaluate.data=DATA"], "evaluation is out of memory: .*can't"),
    "not_finite": (not_a_number, ["--set", "precision=bf16"], "the loss is nan on samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_following_the_advice_resumes(trainer, monkeypatch, name):
    spoil, options, message = CASES[name]
    renderer = Renderer(load_processor(trainer.student))
    lengths = sorted(len(renderer.encode(record.sample)) for record in open_cache(trainer.cache))
    if spoil is not None:
        spoil(monkeypatch, trainer)
    for name, value in (
        ("LIMIT", lengths[9]),
        ("DATA", write_llava(trainer.out.with_name("asked"), mixed_samples(2))),
    ):
        options = [option.replace(name, str(value)) for option in options]
    status, line = trainer(*options)
    assert status == 1 and re.search(message, line), line
    begun = shutil.copytree(trainer.out, trainer.out.with_name("begun"))
    assert ways(line), f"no advice: {line}"
    for way in ways(line):
        if any(option.startswith("engine=zero") for option in way):
            continue  # in a process of its own, tests/train/test_distributed.py
        shutil.rmtree(trainer.out)
        shutil.copytree(begun, trainer.out)
        given = [*options, *way]
        for _ in range(4):  # one thing avoided, another may come, such as more samples left out than may be
            status, line = trainer(*given)
            if status == 0:
                break
            given += ways(line)[0]
        assert (status, trainer.steps) == (0, [*range(STEPS)]), (way, line)


def test_each_message_with_advice_is_followed_here():
    """Who adds a message that advises a setting puts it into genrecal/train/advice.py and into CASES."""
    tree = ast.parse(Path(genrecal.train.advice.__file__).read_text())
    advising = {
        function.name
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Name) and node.id == "RESUME" for node in ast.walk(function))
    }
    assert advising == {name.split(",")[0] for name in CASES}


def strings(tree):
    """The texts of a module's raised errors, an f-string's values left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
            yield "".join(
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )


# Raised before a run is begun, so that there is nothing to resume.
BEFORE_A_RUN = (
    "loss.splice_weight 0 leaves", "engine ddp trains in several", "engine none trains in",
    ": stage  of objective  reads the teacher's question",
    ": stage 1's regularisation needs", "--cache : loss.target sample needs", "evaluate.data with engine zero3",
    ": stage  cannot train", ": engine zero3 needs as many",
)  # fmt: skip


def test_no_other_message_of_a_begun_run_advises_a_setting():
    names = "|".join(re.escape(name) for name in flat(dataclasses.asdict(TrainConfig())))
    advising = [
        f"{path.name}: {text}"
        for path in Path(genrecal.__file__).parent.glob("*/*.py")
        if path.parent.name in ("train", "objectives")
        for text in strings(ast.parse(path.read_text()))
        if re.search(rf"(set|lower|leave|use|with) [^;]*\b({names})\b(=| to )", text) and path.name != "advice.py"
    ]
    assert len(advising) > 3
    assert [text for text in advising if not text.split(": ", 1)[1].startswith(BEFORE_A_RUN)] == []


# ------------------------------------------------------------------------------------------------------ what identifies a run

OTHER_VALUES = {
    "precision": "bf16", "device": "cpu", "engine": "ddp", "offload": True, "attention": "eager", "max_tokens": 500,
    "gradient_checkpointing": False, "log_every": 2, "keep_checkpoints": 3, "wandb": "x", "loss.chunk_rows": 7,
    "data.workers": 1, "data.on_damage": "skip", "data.max_skip": 0.5, "measure.samples": 1,
}  # fmt: skip


def test_what_may_change_and_what_identifies_a_run(tiny, cache, tmp_path):
    """Every setting is one or the other; who adds one decides."""
    opened = loop.open_for(Run(path=tmp_path, config=TrainConfig(), student="", caches=(str(cache),)), ())
    settings = flat(dataclasses.asdict(TrainConfig()))
    changeable = {name for name in settings if not IDENTITY.fullmatch(name)}
    shape = {f"stage{n}.{name}" for n in (1, 2, 3) for name in ("batch_size", "accumulation", "checkpoint_every")}
    evaluation = {name for name in settings if name.startswith(("evaluate.", "measure."))}
    assert changeable == {*OTHER_VALUES} | shape | evaluation
    run = Run(path=tmp_path / "run", config=TrainConfig(), student=str(tiny("internvl_qwen2")), caches=(str(cache),))
    begun = run.begin(opened)
    for stage in (1, 2, 3):
        (run.checkpoints / f"stage{stage}-step00000001").mkdir(parents=True)
        (run.checkpoints / f"stage{stage}-step00000001" / "state.json").touch()
    for name, old in settings.items():
        now = json.loads(json.dumps(begun))
        *tables, leaf = name.split(".")
        place = now["config"]
        for table in tables:
            place = place[table]
        place[leaf] = OTHER_VALUES.get(name, "another")
        different = [] if name in changeable else [f"{name} was {json.loads(json.dumps(old))!r}, now 'another'"]
        assert run.differences(begun, now) == different
    other = load_config(None, ["seed=1"])
    with pytest.raises(UsageError, match="holds another run: seed was 0, now 1. Use another --out"):
        dataclasses.replace(run, config=other).check(opened)


def test_what_was_changed_is_said_and_written_down(trainer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update", lambda *_: (_ for _ in ()).throw(TrainingError("stopped")))
        assert trainer()[0] == 1
    assert trainer("--set", "loss.chunk_rows=9", "--set", "data.workers=1")[0] == 0
    run = json.loads((trainer.out / "run.json").read_text())
    (resumed,) = run["resumed"]
    assert {name: value for name, value in resumed.items() if name not in ("time", "command")} == {
        "loss.chunk_rows": 9, "data.workers": 1,
    }  # fmt: skip
    assert run["config"]["loss"]["chunk_rows"] == 0


def test_a_cache_and_a_student_that_moved_are_recognised_and_others_are_not(trainer, tiny, tmp_path):
    trainer.student = shutil.copytree(trainer.student, tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update", lambda *_: (_ for _ in ()).throw(TrainingError("stopped")))
        assert trainer()[0] == 1
    trainer.cache, trainer.student = trainer.cache.rename(tmp_path / "c2"), trainer.student.rename(tmp_path / "s2")
    weights = trainer.student / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # another fine-tune of the same shapes
    status, line = trainer()
    assert status == 2 and line.endswith(
        f"student was {tmp_path}/s, now {tmp_path}/s2 with other weights. Use another --out"
    )
    weights.write_bytes(whole)
    template = trainer.student / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + " ")
    assert "s2 with other chat_template.jinja" in trainer()[1]
    template.write_text(text)
    assert trainer() == (0, "")
    assert Run.open(trainer.out).caches == (str(trainer.cache),) and Run.open(trainer.out).student == str(
        trainer.student
    )


@pytest.mark.slow
def test_shared_memory_that_is_full_is_advised_about_too(trainer):
    """64 kB of it, in a namespace of its own; following the advice trains there."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")

    def ended(*options):
        command = [*small, sys.executable, "-m", "genrecal", *trainer.words("--set", "data.workers=1", *options)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    first = ended()
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("genrecal: error: ")]
    assert first.returncode == 1 and "shared memory" in line
    assert ended(*ways(line)[0]).returncode == 0 and trainer.steps == [*range(STEPS)]
