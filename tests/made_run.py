"""Runs' folders with made curves and made snapshots: nothing was trained."""

import json
import math

import numpy as np
import pytest
from html_page import HOSTILE

from genrecal.errors import TrainingError
from genrecal.run_folder import PAIRINGS, POOLINGS, Snapshot
from genrecal.train import loop

GROUPS = ["student before", "student after", "teacher before", "teacher after"]


def write_run(folder, *, steps=(40, 40, 40), category="numbers", **content):
    """A run's folder with made curves; returns its lines of steps."""
    folder.mkdir(parents=True)
    config = {"objective": "genrecal", "seed": 0, "loss": {"reg_weight": 1.0}}
    run = {"config": config, "student": "a student", "teacher": "cache", "caches": ["/c"], "processes": 2} | content
    (folder / "run.json").write_text(json.dumps(run))
    rng, lines, evaluations = np.random.default_rng(0), [], []
    for stage, count in enumerate(steps, 1):
        names = [["ce", "kl", "reg_ce", "reg_kl"], ["ce", "kl", "sft"], ["sft"]][stage - 1]
        for step in range(count):
            terms = {
                n + part: 5 * math.exp(-step / 9) + rng.random() for n in names for part in ("", "_first", "_later")
            }
            machine = {
                "samples": 6,
                "student_tokens": 600,
                "seconds": 0.5,
                "data_wait": 0.1,
                "memory_gb": 1 + step / 100,
            }
            lines.append({"stage": stage, "step": step, "loss": sum(terms.values()), "lr": 1e-4, **terms, **machine})
        for done in [0.0] if stage == 1 else [0.2, 0.4, 0.6, 0.8, 1.0]:
            score = {
                "n": 30,
                "accuracy": (stage + done) / 5,
                "accuracy_error": 0.05,
                "log_loss": 3 - done,
                "log_loss_error": None,
            }
            by_category = {category: score, "": score | {"accuracy": 0.25}}
            content = {"done": done, "overall": score, "by_category": by_category, "skipped": 0}
            evaluations.append({"stage": stage, "step": round(done * count), "evaluation": content})
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *evaluations])
    (folder / "metrics.jsonl").write_text(text + '{"stage": 3, "st')
    return lines


def train_until(run, step, *, stage=1):
    """Train a run up to a step of a stage, where an error stops it: its checkpoints are there, the stage's result is not."""
    plain = loop.learning_rate

    def stop(settings, at, num_steps):
        if at == step:
            raise TrainingError("stopped by the test")
        return plain(settings, at, num_steps)

    loop.train(run, stages=range(1, stage))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="stopped by the test"):
        patch.setattr(loop, "learning_rate", stop)
        loop.train(run, stages=range(1, stage + 1))


def made_snapshot(stage=1, moment="end", *, samples=4, seed=0, distance=50.0, key="k"):
    """Cosines of random numbers; four clouds of tokens, the student's after the Recalibrator on the teacher's after it."""
    rng = np.random.default_rng(seed)
    centres = distance * np.array([[1, 0], [0, 1], [-1, 0], [0, 1]])
    tokens = {
        group: (np.pad(centre, (0, 3)) + rng.normal(size=(12, 5))).astype(np.float32)
        for group, centre in zip(GROUPS, centres, strict=True)
    }
    cosines = {
        f"{p}.{q}": rng.uniform(-0.2, 1, (samples, samples)).astype(np.float32) for p in PAIRINGS for q in POOLINGS
    }
    return Snapshot(
        stage=stage,
        moment=moment,
        samples=64,
        own={"student": {"": 2.5, "_first": 3.5}, "teacher": {"": 0.5, "_later": 0.25}},
        keys=tuple(f"{key}{i}" for i in range(samples)),
        categories=(HOSTILE.replace("\ud800", ""), *[""] * (samples - 1)),
        similarity=cosines,
        tokens=tokens,
        token_is_answer={who: np.arange(12) % 2 == 0 for who in ("student", "teacher")},
    )
