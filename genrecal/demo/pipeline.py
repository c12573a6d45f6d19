"""`genrecal demo`: the main job at toy scale, through the same functions as every other command.

Data: genrecal.demo.data. Teacher and student: genrecal/demo/assets, made once by scripts/make_demo_assets.py.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import UsageError
from genrecal.report.summary import markdown_table, plus_minus, terms_by_stage, write_report
from genrecal.samples import SampleSet, open_samples
from genrecal.shards.inspect import summarize
from genrecal.shards.reader import open_cache
from genrecal.train.config import TrainConfig, load_config
from genrecal.train.evaluate import Evaluation, evaluate, save_evaluation
from genrecal.train.export import export
from genrecal.train.logs import read_metrics
from genrecal.train.loop import train
from genrecal.train.run import Run
from genrecal.vlm.loading import load_vlm

TRAIN_SAMPLES, TEST_SAMPLES = 768, 360
ASSETS = Path(str(files("genrecal.demo") / "assets"))

# A tiny student learns at rates that would ruin a pretrained one, and its batches are small.
SETTINGS = (
    "gradient_checkpointing=false", "data.workers=1", "data.window=4",
    "stage1.batch_size=16", "stage1.accumulation=1", "stage1.lr=3e-3", "stage1.lr_end=3e-4", "stage1.epochs=3",
    "stage2.batch_size=16", "stage2.accumulation=1", "stage2.lr=2e-3", "stage2.lr_end=2e-4", "stage2.epochs=3",
    "stage3.batch_size=16", "stage3.accumulation=1", "stage3.lr=5e-4", "stage3.lr_end=5e-5", "stage3.epochs=1",
)  # fmt: skip


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], Any]) -> None:
    """Data, cache, three stages, the SFT baseline, export, evaluation, and a table of what came out.

    torch is set to one thread: at this size two are slower (20 s against 15 s for 80 training steps on two cores), and
    far slower beside other work. Run again into the same folder, it goes on from what is finished. Raises UsageError if
    the cache or a run there was made with other settings or assets, or if matplotlib or scikit-learn are missing.
    """
    _check_imports()
    torch.set_num_threads(1)
    began = time.monotonic()
    train_data, test_data = _write_data(out, seed)
    timings: dict[str, float] = {}
    with _timed(timings, "cache"):
        teacher_run = HFTeacher.load(ASSETS / "teacher", dtype=torch.float32)
        run_cache_job(
            teacher_run,
            open_samples([train_data]),
            out / "cache",
            CacheOptions(samples_per_shard=128),
        )
    summary = summarize(open_cache(out / "cache"))
    say(
        f"cached {summary.cached} conversations, {summary.answer_tokens} answer tokens, "
        f"{sum(summary.bytes[f'{tier} tars'] for tier in ('samples', 'questions')) / 1e6:.1f} MB"
    )
    models = {"teacher": ASSETS / "teacher", "student before": ASSETS / "student"}
    for objective, name in (("sft", "student after SFT"), ("genrecal", "student after GenRecal")):
        with _timed(timings, f"train {objective}"):
            models[name] = _train_and_export(out, objective, seed)
    results: dict[str, Evaluation] = {}
    with _timed(timings, "evaluate"):
        for name, folder in models.items():
            results[name] = _evaluate(folder, open_samples([test_data]), name)
            save_evaluation(results[name], out / "predictions" / f"{name.replace(' ', '-')}.jsonl")
    timings["all"] = time.monotonic() - began
    table = _table(results)
    report = out / "report.md"
    metrics = read_metrics(out / "run-genrecal")
    write_report(
        report,
        "genrecal demo",
        [
            ("Held-out questions", f"{table}\n\n{_table_note(results)}"),
            ("Loss terms, first and last tenth of each stage", markdown_table(
                ["stage", "term", "first", "last"], terms_by_stage(metrics))),
            ("Seconds", markdown_table(["part", "seconds"], [[k, f"{v:.0f}"] for k, v in timings.items()])),
        ],
    )  # fmt: skip
    say(table)
    say(_table_note(results))
    say(f"cache {out / 'cache'}\nruns {out / 'run-genrecal'}, {out / 'run-sft'}")
    say(f"students {models['student after GenRecal']}, {models['student after SFT']}\nreport {report}")


def demo_config(objective: str, seed: int) -> TrainConfig:
    """The demo's settings; both objectives take the same steps of stages 2 and 3 over the same samples."""
    return load_config(None, [*SETTINGS, f"objective={objective}", f"seed={seed}"])


def _write_data(out: Path, seed: int) -> tuple[Path, Path]:
    from genrecal.demo.data import write_dataset

    return (
        write_dataset(out / "data" / "train", num_samples=TRAIN_SAMPLES, split="train", seed=seed),
        write_dataset(out / "data" / "test", num_samples=TEST_SAMPLES, split="test", seed=seed),
    )


def _train_and_export(out: Path, objective: str, seed: int) -> Path:
    run = Run(
        path=out / f"run-{objective}",
        config=demo_config(objective, seed),
        student=str(ASSETS / "student"),
        cache=str(out / "cache"),
    )
    train(run)
    folder = out / f"student-{objective}"
    shutil.rmtree(folder, ignore_errors=True)
    export(run, folder)
    return folder


def _evaluate(folder: Path, samples: SampleSet, name: str) -> Evaluation:
    return evaluate(load_vlm(folder, dtype=torch.float32), samples, batch_size=60, title=f"evaluate {name}")


def _table(results: dict[str, Evaluation]) -> str:
    categories = next(iter(results.values())).by_category
    rows = []
    for name, result in results.items():
        score = result.overall
        rows.append(
            [
                name,
                plus_minus(score.accuracy, score.accuracy_error, percent=True),
                plus_minus(score.log_loss, score.log_loss_error),
                *(f"{result.by_category[category].accuracy:.1%}" for category in categories),
            ]
        )
    return markdown_table(["model", "accuracy", "answer log-loss", *categories], rows)


def _table_note(results: dict[str, Evaluation]) -> str:
    n = next(iter(results.values())).overall.n
    return (
        f"n = {n} held-out questions; ± one standard error over conversations, one seed. Log-loss: nats an answer, end of "
        "turn included. SFT took the same steps of stages 2 and 3 on the same samples."
    )


def _check_imports() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the demo draws its data with {error.name}, which is not installed; it comes with the extra `report`"
        ) from None


@contextmanager
def _timed(timings: dict[str, float], part: str) -> Any:
    start = time.monotonic()
    yield
    timings[part] = time.monotonic() - start
