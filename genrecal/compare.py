"""`genrecal compare`: several trainings of one student at equal steps, each with several seeds, and one table.

OUT/compare.json                    what the students are asked, and how
OUT/runs/VARIANT/seedN/             a run's folder, as `genrecal train` writes it, with output.txt where several run at once
OUT/predictions/VARIANT/seedN.jsonl the answers of that run's student; once this file exists, the run is finished
OUT/table.md                        the table
OUT/report.json                     variants, seeds and data, for `genrecal report OUT`
"""

import contextlib
import json
import multiprocessing
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from genrecal.errors import DataError, GenrecalError, SampleError, TrainingError, UsageError
from genrecal.evaluate.evaluate import evaluate, read_predictions, save_evaluation
from genrecal.evaluate.scores import check_metric
from genrecal.files import write_whole
from genrecal.folders import refuse_other_content
from genrecal.report.answers import Answers, Mean, mean_of, signed
from genrecal.report.summary import markdown_table, plus_minus
from genrecal.run_folder import COMPARE_FILE, OUTPUT_FILE, REPORT_FILE
from genrecal.samples import BadRecord, SampleSet, decode_image
from genrecal.shards.mixture import Mixture
from genrecal.train.config import TrainConfig, config_from, read_settings
from genrecal.train.loop import check_stages, open_for, plan_stage, train
from genrecal.train.ranks import world_size
from genrecal.train.run import Run, flat
from genrecal.vlm.checkpoint import model_digests
from genrecal.vlm.loading import load_renderer, model_folder, resolve_device

TABLE_FILE = "table.md"
PROBED = 64  # records among which one must be a question that the student can be asked


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """One way to train: a name for the table, the caches it learns from, and its settings (their seed is not used)."""

    name: str
    caches: tuple[str, ...]
    config: TrainConfig

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.")

    def run_path(self, out: Path, seed: int) -> Path:
        """The folder of its run with a seed."""
        return out / "runs" / self.folder / f"seed{seed}"

    def predictions_path(self, out: Path, seed: int) -> Path:
        """The file of what the student of that run answers."""
        return out / "predictions" / self.folder / f"seed{seed}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the students are asked, as for `genrecal evaluate`; `dtype` is torch's name, or "auto", the student's own."""

    metric: str = "auto"
    batch_size: int = 8
    max_new_tokens: int | None = None
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant's scores, and how they differ from the first variant's, pair by pair; None for the first itself."""

    name: str
    accuracy: Mean
    log_loss: Mean
    accuracy_gain: Mean | None
    log_loss_gain: Mean | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out.

    Args:
        questions: held-out questions that every student was asked.
        steps: optimizer steps of the student in each of its stages (stage 1 leaves it as it is).
    """

    rows: list[Row]
    questions: int
    seeds: list[int]
    steps: dict[int, int]


# ----------------------------------------------------------------------------------------------------------- variants


def variants_of(
    tries: Sequence[str],
    file: Path | None,
    *,
    caches: Sequence[str],
    config: Path | None = None,
    settings: Sequence[str] = (),
) -> list[Variant]:
    """What the command line asks for, in its order: `--try` first, then the tables of a TOML file.

    Args:
        tries: "NAME=SETTINGS", the settings as for `--set` with spaces between them, `cache=...` one of them for another
            cache than the others', or a list of several; or the name of an objective alone.
        file: TOML with a table of settings for each variant.
        caches, config, settings: of all variants, where they say nothing else.

    Raises UsageError for settings that do not exist, names that are given twice, and a seed.
    """
    common = read_settings(config, settings)
    tables: list[tuple[str, dict[str, Any]]] = []
    for text in tries:
        name, equals, words = text.partition("=")
        given = shlex.split(words) if equals else [f"objective={name}"]
        tables.append((name.strip(), read_settings(None, given, option=f"--try {name.strip()}")))
    try:
        tables += tomllib.loads(file.read_text()).items() if file is not None else []
    except (OSError, ValueError) as error:
        raise UsageError(f"--tries {file}: {error}") from None
    if not tables:
        raise UsageError("nothing to compare: expected --try NAME=SETTINGS, or --tries FILE")
    variants = []
    for name, table in tables:
        if not isinstance(table, dict):
            raise UsageError(f"--tries {file}: {name} is in no table; expected a table of settings for each variant")
        values = _merged(common, table)
        own = values.pop("cache", list(caches))
        own = [own] if isinstance(own, str) else own
        if "seed" in values:
            raise UsageError(f"{name}: seed is set by --seeds, which are the same for all variants; leave it out")
        if not isinstance(own, list) or not own or not all(isinstance(path, str) for path in own):
            raise UsageError(f"{name}: cache: expected a directory or URL, or a list of them, got {own!r}")
        with named(name):
            variants.append(Variant(name=name, caches=tuple(own), config=config_from(values)))
    return variants


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of what failed before an error's message."""
    try:
        yield
    except GenrecalError as error:
        raise type(error)(f"{name}: {error}") from None


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Nested tables over nested tables."""
    tables = {name for name, value in own.items() if isinstance(value, dict) and isinstance(common.get(name), dict)}
    return common | own | {name: _merged(common[name], own[name]) for name in tables}


# ----------------------------------------------------------------------------------------------------------- the job


Key = tuple[int, Variant]  # a run: its seed and its variant


def compare(
    variants: Sequence[Variant],
    student: str,
    load_samples: Callable[[], SampleSet],
    out: Path,
    *,
    seeds: Sequence[int],
    stages: Sequence[int] = (1, 2, 3),
    asking: Asking | None = None,
    jobs: int = 1,
    trust_remote_code: bool = False,
    say: Callable[[str], Any] = print,
) -> Comparison:
    """Train every variant with every seed, ask each student the same questions, write the table and return it.

    What an earlier call finished is found again. Runs come seed by seed, so that the variants stay level.

    Args:
        variants: the first is the baseline.
        load_samples: opens the held-out questions; for several jobs it must be picklable, such as a partial of
            `open_samples`.
        jobs: runs side by side, each in a process of its own; CUDA devices are dealt out to them in turn.
        say: is told a line after each run.

    Raises:
        UsageError, DataError: before anything is trained: settings, data or models that cannot serve, variants that take
            unequal steps of the student, or a folder that holds something else.
        TrainingError: a run failed; others that had begun are finished.
    """
    asking = asking or Asking()
    if world_size():
        raise UsageError("compare starts its own processes: expected no launcher; --jobs says how many")
    _check_names(variants, seeds)
    check_metric(asking.metric, "--metric")
    samples = load_samples()
    runs = {
        (seed, variant): Run(
            path=variant.run_path(out, seed),
            config=replace(variant.config, seed=seed),
            student=student,
            caches=variant.caches,
            trust_remote_code=trust_remote_code,
        )
        for seed in seeds
        for variant in variants
    }
    steps = _check_runs(runs, stages)
    _check_questions(next(iter(runs.values())), samples)
    _begin(out, student, samples, asking)
    left = [key for key in runs if not key[1].predictions_path(out, key[0]).exists()]
    done = len(runs) - len(left)
    if done:
        say(f"{out}: {done} of {len(runs)} runs are finished already")

    def tasks(apart: bool) -> dict[Key, Callable[[], None]]:
        return {
            (seed, variant): partial(
                _train_and_ask, f"{variant.name}, seed {seed}", runs[seed, variant], stages, load_samples, asking,
                variant.predictions_path(out, seed), apart,
            )
            for seed, variant in left
        }  # fmt: skip

    for seed, variant in _carry_out(tasks(jobs > 1 and len(left) > 1), jobs):
        done += 1
        accuracy = mean_of([read_predictions(variant.predictions_path(out, seed))], "score").value
        say(f"{variant.name}, seed {seed}: accuracy {accuracy:.1%}; {done} of {len(runs)} runs")
    found = {v.name: [read_predictions(v.predictions_path(out, seed)) for seed in seeds] for v in variants}
    questions = len(found[variants[0].name][0])
    comparison = Comparison(rows=rows_of(found), questions=questions, seeds=list(seeds), steps=steps)
    write_whole(out / TABLE_FILE, f"{comparison_text(comparison)}\n".encode())
    facts = {
        "variants": {variant.name: variant.folder for variant in variants},
        "seeds": list(seeds),
        "data": [_absolute(name) for name in samples.names],
        "image_root": samples.image_root and _absolute(str(samples.image_root)),
        "fields": dict(samples.fields.fields),
        "roles": dict(samples.fields.roles),
    }
    write_whole(out / REPORT_FILE, (json.dumps(facts, indent=2) + "\n").encode())
    return comparison


def _absolute(name: str) -> str:
    """A path from the root; a URL as it is."""
    return name if "://" in name else str(Path(name).absolute())


def _check_names(variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    folders = [variant.folder for variant in variants]
    for variant in variants:
        if not variant.folder or "|" in variant.name or folders.count(variant.folder) > 1:
            raise UsageError(f"variant {variant.name!r}: expected a name with letters, and no other variant's")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {','.join(map(str, seeds))}: expected different numbers, such as 0,1,2")


def _check_runs(runs: dict[Key, Run], stages: Sequence[int]) -> dict[int, int]:
    """The student's optimizer steps in each of its stages, which all runs have in common.

    Raises UsageError for whatever would stop one of the runs, and for unequal steps or samples.
    """
    caches: dict[str, Mixture] = {}  # of each variant
    taken: dict[str, dict[int, tuple[int, int]]] = {}  # likewise, in each stage: steps, samples
    for (_, variant), run in runs.items():
        name = variant.name
        with named(name):
            if name not in caches:
                resolve_device(run.config.device)
                caches[name] = open_for(run, stages)
            batches = run.check(caches[name])["global_batch"]
            check_stages(run, caches[name], stages, batches)
        plans = {
            stage: plan_stage(run.config.stage(stage), caches[name], global_batch=batches[f"stage{stage}"])
            for stage in sorted(set(stages) - {1})
        }
        taken[name] = {stage: (plan.num_steps, plan.num_samples) for stage, plan in plans.items()}
    (baseline, first), *others = taken.items()
    for name, own in others:
        for stage, (steps, samples) in own.items():
            if (steps, samples) != first[stage]:
                raise UsageError(
                    f"stage {stage} takes {steps} steps over {samples} samples in {name}, and {first[stage][0]} over "
                    f"{first[stage][1]} in {baseline}; a comparison is at equal steps: give stage{stage}.max_steps, "
                    "batch_size and accumulation that all can reach"
                )
    return {stage: steps for stage, (steps, _) in first.items()}


def _check_questions(run: Run, samples: SampleSet) -> None:
    """Raises DataError if the run's student can be asked none of the first records."""
    renderer = load_renderer(model_folder(run.student), run.prompt, trust_remote_code=run.trust_remote_code)
    reasons = []
    for sample in islice(samples, PROBED):
        if isinstance(sample, BadRecord):
            reasons.append(f"{sample.location}: {sample.reason}")
            continue
        try:
            images = [decode_image(image.read()) for image in sample.images]
            renderer.encode_messages(sample.messages, images, key=sample.key)
            return
        except SampleError as error:
            reasons.append(f"{sample.location or sample.key}: {error}")
    raise DataError(f"--data: the student can be asked none of the first {len(reasons)} records: {reasons[0]}")


def _begin(out: Path, student: str, samples: SampleSet, asking: Asking) -> None:
    """Write compare.json. Raises UsageError if the one there is of other questions, or the folder holds something else."""
    path = out / COMPARE_FILE
    now = {
        "student": model_digests(student),  # wherever it lies
        "data": [f"{file.path.name} {file.sha256()}" for file in samples.files],
        "records": len(samples),
        "selection": samples.selection.to_json(),
        "fields": [f"{name}={field}" for field, name in samples.fields.fields.items()],
        "roles": [f"{role}={name}" for role, name in samples.fields.roles.items()],
        "asking": {name: value for name, value in asdict(asking).items() if name != "batch_size"},
    }
    if not path.exists():
        refuse_other_content(out, "a comparison")
        write_whole(path, (json.dumps(now, indent=2, sort_keys=True) + "\n").encode())
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: {error}; use another --out") from None
    old, new = flat(before), flat(now)
    different = [f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    if different:
        raise UsageError(f"--out {out} holds another comparison: {'; '.join(different)}. Use another --out")


# ---------------------------------------------------------------------------------------------------------- the runs


def _carry_out(tasks: dict[Key, Callable[[], None]], jobs: int) -> Iterator[Key]:
    """Run the tasks, several in processes of their own; give each as it is finished."""
    if jobs == 1 or len(tasks) < 2:
        for key, task in tasks.items():
            task()
            yield key
        return
    context = multiprocessing.get_context("spawn")  # CUDA and thread pools do not survive a fork
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    pool = ProcessPoolExecutor(jobs, context, _start_process, (numbers, max(1, torch.get_num_threads() // jobs)))
    try:
        futures = {pool.submit(task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise TrainingError(
            "a process of the comparison was killed (out of memory?); run the same command to resume, with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_number = 0  # of this process, among those that run side by side


def _start_process(numbers: Any, threads: int) -> None:
    global _number
    _number = numbers.get()
    torch.set_num_threads(threads)


def _train_and_ask(
    title: str,
    run: Run,
    stages: Sequence[int],
    load_samples: Callable[[], SampleSet],
    asking: Asking,
    predictions: Path,
    apart: bool,
) -> None:
    """Train a run, or resume it, and write its student's answers. `apart`: what it prints goes to a file in its folder."""
    with contextlib.ExitStack() as stack:
        if apart:
            run.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run.path / OUTPUT_FILE).open("a", buffering=1))
            stack.enter_context(contextlib.redirect_stderr(file))
            if run.config.device in ("auto", "cuda") and torch.cuda.is_available():
                device = f"cuda:{_number % torch.cuda.device_count()}"
                run = replace(run, config=replace(run.config, device=device))
        with named(title):
            train(run, stages=stages)
            dtype = asking.dtype if asking.dtype == "auto" else getattr(torch, asking.dtype)
            student = run.student_after(run.last_finished_stage(), dtype, resolve_device(run.config.device))
            options = {name: getattr(asking, name) for name in ("metric", "batch_size", "max_new_tokens")}
            save_evaluation(evaluate(student, load_samples(), title=f"ask {title}", **options), predictions)


# ---------------------------------------------------------------------------------------------------------- the table


def rows_of(found: Mapping[str, Answers]) -> list[Row]:
    """Means and standard errors of every variant's predictions, a list for each seed; the first is the baseline.

    The error is that of a mean over seeds, and of a gain that of the differences seed by seed. With one seed it is taken
    over conversations instead, and of a gain over the differences question by question.
    """
    baseline = next(iter(found.values()))
    return [
        Row(
            name=name,
            accuracy=mean_of(runs, "score"),
            log_loss=mean_of(runs, "log_loss"),
            accuracy_gain=None if runs is baseline else mean_of(runs, "score", baseline),
            log_loss_gain=None if runs is baseline else mean_of(runs, "log_loss", baseline),
        )
        for name, runs in found.items()
    ]


def comparison_text(comparison: Comparison) -> str:
    """The table as Markdown, and a line that explains its numbers."""
    first = comparison.rows[0].name
    header = ["variant", "accuracy", "answer log-loss", f"accuracy gain over {first}, points", "log-loss difference"]
    table = [
        [
            row.name,
            plus_minus(*row.accuracy, percent=True),
            plus_minus(*row.log_loss),
            signed(row.accuracy_gain, 100, 1),
            signed(row.log_loss_gain, 1, 3),
        ]
        for row in comparison.rows
    ]
    one = len(comparison.seeds) == 1
    steps = " and ".join(f"{steps} in stage {stage}" for stage, steps in comparison.steps.items())
    return (
        f"{markdown_table(header, table)}\n\n"
        f"n = {comparison.questions} held-out questions; seed{'' if one else 's'} {', '.join(map(str, comparison.seeds))}; "
        f"± one standard error over {'conversations' if one else 'seeds'}. Differences are to {first}, "
        f"{'question by question' if one else 'seed by seed'}. Steps of the student, the same for all: {steps}. Log-loss: "
        "nats per answer, end of turn included."
    )
