"""What a report shows of runs, as numbers: read from their folders alone, without a model or a cache."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from genrecal.errors import UsageError
from genrecal.inspect.text import size
from genrecal.report.chart import Line, thinned
from genrecal.run_folder import CACHE_FACTS, EVALUATION, Snapshot, read_lines, read_run_file, read_snapshots

STAGES = (1, 2, 3)
SHARE = 0.1  # of a stage's steps: its beginning and its end in tables
PARTS = {"": "all answer tokens", "_first": "first tokens", "_later": "later tokens"}  # of a term's name
# For each quantity: its title, and the terms with what they are of.
QUANTITIES = {
    "Cross-entropy through the Recalibrator, nats": {
        "ce": "student's question",
        "reg_ce": "teacher's question",
        "aligned_ce": "student's question and answer",
    },
    "KL from the teacher, nats": {
        "kl": "student's question",
        "reg_kl": "teacher's question",
        "aligned_kl": "student's question and answer",
    },
    "The student's own cross-entropy, nats": {"sft": "student"},
}
OTHERS = {"loss": "Loss, nats", "grad_norm": "Norm of the gradient", "lr": "Learning rate"}


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """A run as its folder has it.

    Args:
        name: what the report calls it; run: run.json; lines: steps and evaluations, oldest first.
        cache: what the cache held (`genrecal.train.logs.cache_facts`); empty for runs of an earlier version.
        snapshots: how student and teacher were aligned, in order of training.
    """

    name: str
    path: Path
    run: dict[str, Any]
    lines: list[dict[str, Any]]
    cache: dict[str, Any]
    snapshots: list[Snapshot]

    @cached_property
    def steps(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of metrics of each stage that was begun."""
        lines = [line for line in self.lines if EVALUATION not in line]
        return {stage: found for stage in STAGES if (found := [line for line in lines if line["stage"] == stage])}

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if isinstance(line.get(EVALUATION), dict)]

    def setting(self, name: str) -> Any:
        """A value of the run's configuration, such as `loss.reg_weight`; None if it has none of that name."""
        return at(self.run, f"config.{name}")

    def values(self, stage: int, name: str) -> np.ndarray:
        """A quantity at every line of a stage, float64; NaN at lines that have no such number."""
        return np.array([number(line.get(name)) for line in self.steps.get(stage, [])])

    def curve(self, stage: int, term: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a term in a stage, at the lines that have it."""
        steps, values = self.values(stage, "step"), self.values(stage, term)
        return steps[np.isfinite(values)].tolist(), values[np.isfinite(values)].tolist()

    def ends(self, stage: int, term: str) -> tuple[float, float]:
        """A term's means over the first and the last tenth of a stage's steps; NaN if it has none there."""
        values = self.values(stage, term)
        some = max(1, round(len(values) * SHARE))
        return mean(values[:some]), mean(values[-some:])

    @property
    def teacher_own(self) -> float:
        """The teacher's own cross-entropy on the cached answers, nats per teacher token."""
        return -number(self.cache.get("log_prob"))

    # ------------------------------------------------------------------------------------------------------------- cost

    def num_steps(self, stage: int) -> int:
        """Steps that were done; not each of them need have a line."""
        lines = self.steps.get(stage)
        return lines[-1]["step"] + 1 if lines else 0

    def total(self, stage: int, name: str) -> float:
        """A quantity of steps (`samples`, `seconds`, `student_tokens`) summed over a stage.

        With `log_every` above 1 the lines stand for the steps between them too.
        """
        return mean(self.values(stage, name)) * self.num_steps(stage)

    def data_wait(self, stage: int) -> float:
        """Share of a stage's seconds that the slowest rank waited for data."""
        seconds = self.values(stage, "seconds")
        waited = seconds * self.values(stage, "data_wait")
        known = np.isfinite(waited)
        return float(waited[known].sum() / (seconds[known].sum() or math.nan))

    def peak_memory(self, stage: int) -> float:
        """GB, the most of any rank."""
        values = self.values(stage, "memory_gb")
        return float(np.max(values[np.isfinite(values)], initial=-math.inf))


def number(value: Any) -> float:
    """A line's value as a float; NaN for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else math.nan


def mean(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def at(tree: Any, name: str) -> Any:
    """The value at `a.b.c` of nested tables; None where there is none."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def path_names(paths: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that tell them apart, without those at the end that all have in common.

    `runs/SFT/seed0` and `runs/GenRecal/seed0` are SFT and GenRecal.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UsageError(f"{max(paths, key=lambda path: parts.count(path.resolve().parts))}: given twice")
    depth = next(
        depth for depth in range(1, 1 + max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)
    )
    ends = [list(each[-depth:]) for each in parts]
    while len({tuple(end[-1:]) for end in ends}) == 1 and min(map(len, ends)) > 1:
        ends = [end[:-1] for end in ends]
    return ["/".join(end) for end in ends]


def read_run(path: Path, name: str) -> RunFigures:
    """A run's folder. Raises UsageError for a folder that is no run, or whose run has not begun."""
    run = read_run_file(path)
    lines = [line for line in read_lines(path) if isinstance(line, dict)]
    lines = [line for line in lines if line.get("stage") in STAGES and type(line.get("step")) is int]
    if not lines:
        raise UsageError(f"{path}: the run has done no step yet; train it first")
    try:
        facts = dict(json.loads((path / CACHE_FACTS).read_text()))
    except (OSError, ValueError, TypeError):
        facts = {}  # of an earlier version
    return RunFigures(name=name, path=path, run=run, lines=lines, cache=facts, snapshots=read_snapshots(path))


# ----------------------------------------------------------------------------------------------------------------- curves


def loss_lines(runs: Sequence[RunFigures], stage: int, terms: Mapping[str, str], part: str) -> list[Line]:
    """Curves of terms in a stage. For one run, a colour is a term; for several, a colour is a run and a dash a term."""
    several = len(runs) > 1
    lines = []
    for place, run in enumerate(runs):
        for dash, (term, words) in enumerate(terms.items()):
            xs, ys = thinned(*run.curve(stage, term + part))
            label = ", ".join(filter(None, (run.name, words))) if several or not words else words
            if ys:
                lines.append(Line(label=label, xs=xs, ys=ys, colour=place if several else dash, dash=dash))
    return lines


def own_lines(runs: Sequence[RunFigures], part: str) -> list[Line]:
    """Constants to compare the Recalibrator's cross-entropy with (paper, Figure 9): those of teacher and student alone.

    Both as they were before training, over the same samples; the teacher's over the whole cache where there is no snapshot.
    """
    found: dict[tuple[str, float], str] = {}
    for run in runs:
        own = run.snapshots[0].own if run.snapshots else {"teacher": {"": run.teacher_own}}
        for who, parts in own.items():
            if math.isfinite(value := parts.get(part, math.nan)):
                found.setdefault((who, value), run.name)
    several = len(found) > len({who for who, _ in found})
    return [
        Line(
            label=f"{who} alone" + (f" ({name})" if several else ""),
            xs=(0.0,), ys=(value,), colour=6 if who == "teacher" else 7, dash=2, reference=True,
        )
        for (who, value), name in found.items()
    ]  # fmt: skip


def term_rows(runs: Sequence[RunFigures], stage: int) -> list[list[str]]:
    """Run, term, its means over the first and the last tenth of the steps, its least value, and the steps that have it."""
    names = [term + part for terms in QUANTITIES.values() for term in terms for part in PARTS] + list(OTHERS)
    return [
        [run.name, name, *map(figure, (*run.ends(stage, name), min(values))), str(len(values))]
        for run in runs
        for name in names
        if (values := run.curve(stage, name)[1])
    ]


# --------------------------------------------------------------------------------------------------------------- accuracy


OVERALL = "all questions"


def accuracy_lines(runs: Sequence[RunFigures], name: str = "accuracy") -> dict[str, list[Line]]:
    """Per category, "all questions" first: a score of each run at each measured share of each stage (paper, Figure 10).

    x is the stages one after another, each of length 1: 1.4 is after 40 % of stage 2.
    """
    found: dict[str, list[Line]] = {OVERALL: []}
    for place, run in enumerate(runs):
        points: dict[str, list[tuple[float, float, float]]] = {}
        for line in run.evaluations:
            x = line["stage"] - 1 + number(line[EVALUATION].get("done"))
            for category, score in _scores(line[EVALUATION]):
                if math.isfinite(x):
                    values = number(score.get(name)), number(score.get(f"{name}_error"))
                    points.setdefault(category, []).append((x, *values))
        for category, measured in points.items():
            xs, ys, errors = ([point[i] for point in measured] for i in range(3))
            drawn = Line(label=run.name, xs=xs, ys=ys, errors=errors, colour=place, dots=True)
            found.setdefault(category, []).append(drawn)
    return found


def _scores(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(category, score) of an evaluation, the overall one first, and categories if there are several."""
    by_category = evaluation.get("by_category")
    named = by_category if isinstance(by_category, dict) and len(by_category) > 1 else {}
    found = {OVERALL: evaluation.get("overall")} | {name or "(no category)": score for name, score in named.items()}
    return [(name, score) for name, score in found.items() if isinstance(score, dict)]


def accuracy_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, stage, share of it, category, questions, accuracy and log-loss with their errors: every measured point."""
    rows = []
    for run in runs:
        for line in run.evaluations:
            for category, score in _scores(line[EVALUATION]):
                accuracy, error, loss, loss_error = (
                    number(score.get(name)) for name in ("accuracy", "accuracy_error", "log_loss", "log_loss_error")
                )
                rows.append([
                    run.name, str(line["stage"]), percent(number(line[EVALUATION].get("done"))), category,
                    str(score.get("n", "-")), f"{percent(accuracy, 1)} ± {percent(error, 1)}",
                    f"{figure(loss)} ± {figure(loss_error)}",
                ])  # fmt: skip
    return rows


# -------------------------------------------------------------------------------------------------------------- in words


def figure(value: float) -> str:
    """Four digits; a dash for what was not measured."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def percent(value: float, digits: int = 0) -> str:
    """A share; a dash for what was not measured."""
    return f"{value:.{digits}%}" if math.isfinite(value) else "-"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}" if math.isfinite(seconds) else "-"


def _bytes(value: float) -> str:
    return size(int(value)) if math.isfinite(value) else "-"


def _caches(run: RunFigures) -> str:
    paths = run.run.get("caches")
    return ", ".join(map(str, paths)) if isinstance(paths, list) else ""


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# ------------------------------------------------------------------------------------------------- comparison and cost


Row = tuple[str, list[str]]  # a name and a value for each run


def comparison_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """The runs side by side: their models and data, and how each stage ended."""
    states = ["shards" if run.run.get("teacher") == "cache" else run.run.get("teacher") for run in runs]
    rows = [
        _row("student", (run.run.get("student") for run in runs)),
        _row("teacher", (run.cache.get("teacher") for run in runs)),
        _row("its states from", states),
        _row("caches", map(_caches, runs)),
        _row("objective", (run.setting("objective") for run in runs)),
        _row("teacher's own cross-entropy, whole cache", (run.teacher_own for run in runs), figure),
        _row("regularisation's weight", (run.setting("loss.reg_weight") for run in runs)),
        _row("seed", (run.setting("seed") for run in runs)),
    ]
    for stage in _stages(runs):
        rows.append(_row(f"stage {stage}: steps", (run.num_steps(stage) or None for run in runs)))
        for term in ("ce", "kl_first", "kl_later", "reg_kl", "aligned_kl", "sft"):
            values = [run.ends(stage, term)[1] for run in runs]
            if any(map(math.isfinite, values)):
                rows.append(_row(f"stage {stage}: {term}, last tenth", values, figure))
    return rows


def different_settings(runs: Sequence[RunFigures]) -> list[Row]:
    """Settings in which the runs differ, their caches among them."""
    flat = [{"cache": _caches(run)} | _leaves(run.run.get("config")) for run in runs]
    names = dict.fromkeys(name for leaves in flat for name in leaves)
    rows = [(name, [_text(leaves.get(name)) for leaves in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def cost_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """What the runs took. Teacher passes are forward passes over one conversation."""
    stages = _stages(runs)
    live = [0.0 if run.run.get("teacher") == "cache" else _with_teacher(run) for run in runs]
    hours = [_seconds(run) * number(run.run.get("processes")) for run in runs]
    cached = [number(run.cache.get("samples")) for run in runs]
    rows = [_row(f"stage {n}: samples seen", (run.total(n, "samples") for run in runs), _count) for n in stages]
    rows += [
        _row("teacher passes of this run", live, _count),
        _row("teacher passes of the cache, once for all its runs", cached, _count),
        _row("teacher passes with the teacher beside the student", map(_with_teacher, runs), _count),
    ]
    tiers = {"samples": "answers and images", "questions": "question states", "manifest": "manifests"}
    for tier, words in tiers.items():
        rows.append(_row(f"cache: bytes of {words}", (number(at(run.cache, f"bytes.{tier}")) for run in runs), _bytes))
    rows += [_row(f"stage {n}: hours", (run.total(n, "seconds") for run in runs), _hours) for n in stages]
    rows.append(_row("processes", (run.run.get("processes") for run in runs)))
    rows.append(_row("hours of all processes", hours, _hours))
    for n in stages:
        rates = [run.total(n, "student_tokens") / (run.total(n, "seconds") or math.nan) for run in runs]
        rows.append(_row(f"stage {n}: student tokens per second", rates, _count))
        rows.append(_row(f"stage {n}: peak memory, GB", (run.peak_memory(n) for run in runs), figure))
        rows.append(_row(f"stage {n}: waiting for data", (run.data_wait(n) for run in runs), lambda v: percent(v, 1)))
    return rows


def _row(name: str, values: Iterable[Any], show: Callable[[Any], str] | None = None) -> Row:
    return name, [(show or _text)(value) for value in values]


def _stages(runs: Sequence[RunFigures]) -> list[int]:
    return [stage for stage in STAGES if any(stage in run.steps for run in runs)]


def _with_teacher(run: RunFigures) -> float:
    """The samples of stages 1 and 2: there the paper's trainer runs the teacher over each."""
    if run.setting("objective") == "sft":
        return 0.0
    return sum(value for stage in (1, 2) if math.isfinite(value := run.total(stage, "samples")))


def _seconds(run: RunFigures) -> float:
    return sum(value for stage in STAGES if math.isfinite(value := run.total(stage, "seconds")))
