"""`genrecal demo`: the main job at toy scale, through the same functions as every other command.

Data: genrecal.demo.data, where three in ten of the given training answers are wrong and the held-out ones are right: there
a teacher has something to give. Teacher and student: genrecal/demo/assets, trained once by scripts/make_demo_assets.py.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.compare import Asking, Comparison, Variant, compare
from genrecal.errors import UsageError
from genrecal.evaluate.evaluate import Evaluation, evaluate, evaluation_of, read_predictions, save_evaluation
from genrecal.files import write_whole
from genrecal.folders import refuse_other_content
from genrecal.inspect import summarize
from genrecal.report.answers import signed
from genrecal.report.cache_page import write_cache_page
from genrecal.report.run_page import write_run_report
from genrecal.report.summary import markdown_table, plus_minus
from genrecal.samples import open_samples
from genrecal.shards.answer_source import GREEDY, AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.train.config import load_config
from genrecal.train.export import export
from genrecal.train.run import Run
from genrecal.vlm.loading import load_vlm

TRAIN_SAMPLES, TEST_SAMPLES = 768, 360
WRONG_ANSWERS = 0.3
MAX_ANSWER_TOKENS = 48
ASSETS = Path(str(files("genrecal.demo") / "assets"))
ASKING = Asking(batch_size=60, dtype="float32")

# A tiny student learns at rates that would ruin a pretrained one, and its batches are small. Three passes over 768
# conversations, and one in stage 3; counted in steps, since a few of the teacher's own answers may be left out.
STEPS = {"stage1": 144, "stage2": 144, "stage3": 48}
SETTINGS = (
    "gradient_checkpointing=false", "data.workers=0", "data.window=4",
    "stage1.lr=3e-3", "stage1.lr_end=3e-4", "stage2.lr=2e-3", "stage2.lr_end=2e-4", "stage3.lr=5e-4", "stage3.lr_end=5e-5",
    *(f"{stage}.{setting}" for stage, steps in STEPS.items()
      for setting in ("batch_size=16", "accumulation=1", "epochs=4", f"max_steps={steps}")),
)  # fmt: skip


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], Any]) -> None:
    """Data, caches, students trained in five ways at equal steps, export, evaluation, and a table of what came out.

    torch is set to one thread: at this size two are slower (20 s against 15 s for 80 training steps on two cores), and far
    slower beside other work; two students are trained side by side instead. Run again into the same folder, it resumes.
    Raises UsageError if the cache or a run there was made with other settings or assets, or if matplotlib or scikit-learn
    are missing.
    """
    _check_imports()
    if not (out / "data").is_dir():
        refuse_other_content(out, "a demo")
    torch.set_num_threads(1)
    timings: dict[str, float] = {}
    compared = out / "compared"
    with _timed(timings, "all"):
        train_data, test_data = _write_data(out, seed)
        with _timed(timings, "cache"):
            _write_caches(out, train_data)
        for folder in ("cache", "cache-own"):
            summary = summarize(open_cache(out / folder))
            size = sum(summary.bytes[f"{tier} tars"] for tier in ("samples", "questions")) / 1e6
            say(f"{folder}: {summary.cached} conversations, {summary.answer_tokens} answer tokens, {size:.1f} MB")
        variants = demo_variants(out)
        load_test = partial(open_samples, [test_data])
        student, jobs = str(ASSETS / "student"), min(2, os.cpu_count() or 1)
        with _timed(timings, "train and ask students"):
            found = compare(variants, student, load_test, compared, seeds=[seed], asking=ASKING, jobs=jobs, say=say)
        with _timed(timings, "ask teacher and student before"):
            results = {name: _ask(out, name, load_test()) for name in ("teacher", "student before")}
        with _timed(timings, "export"):
            students = [_export(out, variant, seed) for variant in variants]
    for variant in variants:
        results[variant.name] = evaluation_of(read_predictions(variant.predictions_path(compared, seed)), [])
    table = _table(results, found)
    report, run_page, cache_page = out / "report.md", out / "report.html", out / "cache.html"
    seconds = markdown_table(["part", "seconds"], [[part, f"{value:.0f}"] for part, value in timings.items()])
    write_whole(report, f"# genrecal demo\n\n{table}\n\n{_table_note(found)}\n\n{seconds}\n".encode())
    answers = [out / "predictions" / f"{name}.jsonl" for name in ("teacher", "student-before")]
    write_run_report([compared, *answers], run_page)
    write_cache_page(open_cache(out / "cache"), cache_page)
    say(table)
    say(_table_note(found))
    say(f"cache {out / 'cache'}\ncache {out / 'cache-own'}\nruns {compared / 'runs'}")
    say(f"students {', '.join(map(str, students))}\nreport {report}")
    say(f"page of the runs {run_page}\npage of the cache {cache_page}")


def demo_variants(out: Path) -> list[Variant]:
    """What is compared, the baseline first: from the given answers, or from those that the teacher wrote."""
    tries = (
        ("SFT", "sft", "cache"),
        ("GenRecal", "genrecal", "cache"),
        ("byte-kl alone", "byte-kl", "cache", "loss.ce_weight=0"),
        ("SFT on the teacher's answers", "sft", "cache-own"),
        ("byte-kl on the teacher's answers", "byte-kl", "cache-own"),
    )
    return [
        Variant(
            name=name,
            caches=(str(out / cache),),
            config=load_config(None, [*SETTINGS, f"objective={objective}", *more]),
        )
        for name, objective, cache, *more in tries
    ]


def _write_data(out: Path, seed: int) -> tuple[Path, Path]:
    from genrecal.demo.data import Flaws, write_dataset

    flaws, data = Flaws(wrong_answers=WRONG_ANSWERS), out / "data"
    return (
        write_dataset(data / "train", num_samples=TRAIN_SAMPLES, split="train", seed=seed, flaws=flaws),
        write_dataset(data / "test", num_samples=TEST_SAMPLES, split="test", seed=seed),
    )


def _write_caches(out: Path, data: Path) -> None:
    """The teacher's states over the given answers, and over those that it writes itself."""
    teacher = HFTeacher.load(ASSETS / "teacher", dtype=torch.float32)
    own = AnswerSource(kind=GREEDY, max_tokens=MAX_ANSWER_TOKENS)
    for folder, answers in (("cache", AnswerSource()), ("cache-own", own)):
        run_cache_job(teacher, open_samples([data]), out / folder, CacheOptions(samples_per_shard=128, answers=answers))


def _ask(out: Path, name: str, samples: Any) -> Evaluation:
    """The answers of a model as it is shipped."""
    model = load_vlm(ASSETS / name.split()[0], dtype=torch.float32)
    result = evaluate(model, samples, batch_size=ASKING.batch_size, title=f"ask {name}")
    save_evaluation(result, out / "predictions" / f"{name.replace(' ', '-')}.jsonl")
    return result


def _export(out: Path, variant: Variant, seed: int) -> Path:
    folder = out / "students" / variant.folder
    shutil.rmtree(folder, ignore_errors=True)
    export(Run.open(variant.run_path(out / "compared", seed)), folder)
    return folder


def _table(results: dict[str, Evaluation], found: Comparison) -> str:
    categories = next(iter(results.values())).by_category
    gains = {row.name: row.accuracy_gain for row in found.rows}
    rows = [
        [
            name,
            plus_minus(result.overall.accuracy, result.overall.accuracy_error, percent=True),
            signed(gains.get(name), 100, 1),
            plus_minus(result.overall.log_loss, result.overall.log_loss_error),
            *(f"{result.by_category[category].accuracy:.1%}" for category in categories),
        ]
        for name, result in results.items()
    ]
    return markdown_table(["model", "accuracy", "more than SFT", "answer log-loss", *categories], rows)


def _table_note(found: Comparison) -> str:
    return (
        f"n = {found.questions} held-out questions, whose answers are right; {WRONG_ANSWERS:.0%} of the given training "
        'answers are wrong. ± one standard error over conversations, one seed; "more than SFT": points, question by question. '
        "Log-loss: nats an answer, end of turn included. The students took the same steps of stages 2 and 3 over the "
        "same images and questions."
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
