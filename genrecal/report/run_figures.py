"""What a report shows of runs, as numbers: read from their folders alone, without a model, a cache or torch."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from genrecal.errors import UsageError
from genrecal.inspect.text import size
from genrecal.report.chart import Line, mean, thinned
from genrecal.run_folder import CACHE_FACTS, EVALUATION, Snapshot, read_lines, read_run_file, read_snapshots

STAGES = (1, 2, 3)
SHARE = 0.1  # of a stage's steps: its beginning and its end in tables
PARTS = {"": "all answer tokens", "_first": "first tokens", "_later": "later tokens"}  # of a term's name
# Per quantity: its title, and the terms with what they are of.
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
        """Of each stage that was begun, its lines of metrics."""
        found: dict[int, list[dict[str, Any]]] = {}
        for line in self.lines:
            if EVALUATION not in line:
                found.setdefault(line["stage"], []).append(line)
        return dict(sorted(found.items()))

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if isinstance(line.get(EVALUATION), dict)]

    def setting(self, name: str) -> Any:
        """Of the run's configuration, such as `loss.reg_weight`; None if it has none of that name."""
        return at(self.run, f"config.{name}")

    def curve(self, stage: int, term: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a term in a stage, those lines that have it."""
        lines = [(line["step"], number(line.get(term))) for line in self.steps.get(stage, [])]
        kept = [(float(step), value) for step, value in lines if math.isfinite(value)]
        return [step for step, _ in kept], [value for _, value in kept]

    def ends(self, stage: int, term: str) -> tuple[float, float]:
        """A term's means over the first and the last tenth of a stage's steps; NaN if it has none there."""
        lines = self.steps.get(stage, [])
        some = max(1, round(len(lines) * SHARE))
        first, last = ([number(line.get(term)) for line in part] for part in (lines[:some], lines[-some:]))
        return mean(filter(math.isfinite, first)), mean(filter(math.isfinite, last))

    @property
    def teacher_own(self) -> float:
        """The teacher's own cross-entropy on the cached answers, nats a token of its own."""
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
        values = [value for line in self.steps.get(stage, []) if math.isfinite(value := number(line.get(name)))]
        return mean(values) * self.num_steps(stage) if values else math.nan

    def data_wait(self, stage: int) -> float:
        """Share of a stage's seconds that the slowest rank waited for data."""
        pairs = [(number(line.get("seconds")), number(line.get("data_wait"))) for line in self.steps.get(stage, [])]
        pairs = [(seconds, wait) for seconds, wait in pairs if math.isfinite(seconds) and math.isfinite(wait)]
        seconds = sum(s for s, _ in pairs)
        return sum(s * wait for s, wait in pairs) / seconds if seconds else math.nan

    def peak_memory(self, stage: int) -> float:
        """GB, the most of any rank."""
        values = [number(line.get("memory_gb")) for line in self.steps.get(stage, [])]
        return max(filter(math.isfinite, values), default=math.nan)


def number(value: Any) -> float:
    """A line's value as a float; NaN for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else math.nan


def at(tree: Any, name: str) -> Any:
    """The value at `a.b.c` of nested tables; None where there is none."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def read_runs(paths: Sequence[Path]) -> list[RunFigures]:
    """Runs with names that tell them apart. Raises UsageError for a folder that is no run, or whose run has not begun."""
    return [_read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
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


def _read_run(path: Path, name: str) -> RunFigures:
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
    """Curves of terms in a stage. Of one run, a colour is a term; of several, a colour is a run and a dash a term."""
    several = len(runs) > 1
    lines = []
    for place, run in enumerate(runs):
        for dash, (term, words) in enumerate(terms.items()):
            steps, values = run.curve(stage, term + part)
            if values:
                lines.append(
                    Line(
                        label=", ".join(filter(None, (run.name, words))) if several or not words else words,
                        xs=(curve := thinned(steps, values))[0],
                        ys=curve[1],
                        colour=place if several else dash,
                        dash=dash,
                    )
                )
    return lines


def own_lines(runs: Sequence[RunFigures], part: str) -> list[Line]:
    """Constants to set beside the Recalibrator's cross-entropy (paper, Figure 9): what teacher and student have alone.

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
    rows = []
    for run in runs:
        for name in names:
            _, values = run.curve(stage, name)
            if values:
                first, last = run.ends(stage, name)
                rows.append([run.name, name, *map(figure, (first, last, min(values))), str(len(values))])
    return rows


# --------------------------------------------------------------------------------------------------------------- accuracy


OVERALL = "all questions"


def accuracy_lines(runs: Sequence[RunFigures], name: str = "accuracy") -> dict[str, list[Line]]:
    """Per category, "all questions" first: a score of each run at each measured share of each stage (paper, Figure 10).

    x is the stages one after another, each of length 1: 1.4 is after 40 % of stage 2.
    """
    found: dict[str, list[Line]] = {}
    for place, run in enumerate(runs):
        points: dict[str, list[tuple[float, float, float]]] = {}
        for line in run.evaluations:
            x = line["stage"] - 1 + number(line[EVALUATION].get("done"))
            for category, score in _scores(line[EVALUATION]):
                points.setdefault(category, []).append((x, number(score.get(name)), number(score.get(f"{name}_error"))))
        for category, values in points.items():
            values = [point for point in values if math.isfinite(point[0])]
            found.setdefault(category, []).append(
                Line(
                    label=run.name,
                    xs=[x for x, *_ in values],
                    ys=[y for _, y, _ in values],
                    errors=[error for *_, error in values],
                    colour=place,
                    dash=place % 3,
                    dots=True,
                )
            )
    return found


def _scores(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    overall, by_category = evaluation.get("overall"), evaluation.get("by_category")
    if isinstance(overall, dict):
        yield OVERALL, overall
    if isinstance(by_category, dict):
        for name, score in by_category.items():
            if isinstance(score, dict) and len(by_category) > 1:
                yield name or "(no category)", score


def accuracy_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, stage, share of it, category, questions, accuracy and log-loss with their errors: every measured point."""
    rows = []
    for run in runs:
        for line in run.evaluations:
            done = number(line[EVALUATION].get("done"))
            for category, score in _scores(line[EVALUATION]):
                values = (
                    number(score.get(name)) for name in ("accuracy", "accuracy_error", "log_loss", "log_loss_error")
                )
                accuracy, accuracy_error, loss, loss_error = values
                rows.append([
                    run.name, str(line["stage"]), percent(done), category, str(score.get("n", "-")),
                    f"{percent(accuracy, 1)} ± {percent(accuracy_error, 1)}", f"{figure(loss)} ± {figure(loss_error)}",
                ])  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------- comparison and cost


Row = tuple[str, list[str]]  # a name and a value for each run


def comparison_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """The runs side by side: what they are of, and how each stage ended."""
    rows: list[Row] = [
        ("student", [_text(run.run.get("student")) for run in runs]),
        ("teacher", [_text(run.cache.get("teacher")) for run in runs]),
        ("its states from", [
            "shards" if run.run.get("teacher") == "cache" else _text(run.run.get("teacher")) for run in runs
        ]),
        ("caches", [_caches(run) for run in runs]),
        ("objective", [_text(run.setting("objective")) for run in runs]),
        ("teacher's own cross-entropy, whole cache", [figure(run.teacher_own) for run in runs]),
        ("regularisation's weight", [_text(run.setting("loss.reg_weight")) for run in runs]),
        ("seed", [_text(run.setting("seed")) for run in runs]),
    ]  # fmt: skip
    for stage in STAGES:
        if any(stage in run.steps for run in runs):
            rows.append((f"stage {stage}: steps", [str(run.num_steps(stage) or "-") for run in runs]))
            for term in ("ce", "kl_first", "kl_later", "reg_kl", "aligned_kl", "sft"):
                values = [run.ends(stage, term)[1] for run in runs]
                if any(map(math.isfinite, values)):
                    rows.append((f"stage {stage}: {term}, last tenth", list(map(figure, values))))
    for name, words, show in (
        ("accuracy", "last evaluation: accuracy", lambda v: percent(v, 1)),
        ("log_loss", "last evaluation: answer log-loss, nats", figure),
    ):
        if any(run.evaluations for run in runs):
            rows.append((words, [_last_score(run, name, show) for run in runs]))
    return rows


def _last_score(run: RunFigures, name: str, show: Any) -> str:
    for line in reversed(run.evaluations):
        for category, score in _scores(line[EVALUATION]):
            if category == OVERALL:
                return f"{show(number(score.get(name)))} ± {show(number(score.get(f'{name}_error')))} (stage {line['stage']})"
    return "-"


def different_settings(runs: Sequence[RunFigures]) -> list[Row]:
    """Settings in which the runs differ."""
    flat = [_leaves(run.run.get("config")) for run in runs]
    names = dict.fromkeys(name for leaves in flat for name in leaves)
    rows = [(name, [_text(leaves.get(name)) for leaves in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def cost_rows(runs: Sequence[RunFigures]) -> list[Row]:
    """What the runs took. Teacher passes are forward passes over one conversation."""
    rows: list[Row] = []

    def add(name: str, values: Iterable[str]) -> None:
        rows.append((name, list(values)))

    for stage in STAGES:
        if any(stage in run.steps for run in runs):
            add(f"stage {stage}: samples seen", (_count(run.total(stage, "samples")) for run in runs))
    add("teacher passes of this run", (_count(_live_passes(run)) for run in runs))
    add(
        "teacher passes of the cache, once for all its runs", (_count(number(run.cache.get("samples"))) for run in runs)
    )
    add("teacher passes with the teacher beside the student", (_count(_with_teacher(run)) for run in runs))
    for tier, words in (
        ("samples", "answers and pictures"),
        ("questions", "question states"),
        ("manifest", "manifests"),
    ):
        sizes = [number(at(run.cache, f"bytes.{tier}")) for run in runs]
        add(f"cache: bytes of {words}", ("-" if math.isnan(v) else size(int(v)) for v in sizes))
    for stage in STAGES:
        if any(stage in run.steps for run in runs):
            add(f"stage {stage}: hours", (_hours(run.total(stage, "seconds")) for run in runs))
    add("processes", (_text(run.run.get("processes")) for run in runs))
    add("hours of all processes", (_hours(_seconds(run) * number(run.run.get("processes"))) for run in runs))
    for stage in STAGES:
        if any(stage in run.steps for run in runs):
            rates = [run.total(stage, "student_tokens") / (run.total(stage, "seconds") or math.nan) for run in runs]
            add(f"stage {stage}: student tokens a second", map(_count, rates))
            add(f"stage {stage}: peak memory, GB", (figure(run.peak_memory(stage)) for run in runs))
            add(f"stage {stage}: waiting for data", (percent(run.data_wait(stage), 1) for run in runs))
    return rows


def _live_passes(run: RunFigures) -> float:
    return 0.0 if run.run.get("teacher") == "cache" else _with_teacher(run)


def _with_teacher(run: RunFigures) -> float:
    """The samples of stages 1 and 2: there the paper's trainer runs the teacher over each."""
    if run.setting("objective") == "sft":
        return 0.0
    return sum(value for stage in (1, 2) if math.isfinite(value := run.total(stage, "samples")))


def _seconds(run: RunFigures) -> float:
    return sum(value for stage in STAGES if math.isfinite(value := run.total(stage, "seconds")))


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
    return "-" if not math.isfinite(seconds) else f"{seconds / 3600:.3g}"


def _caches(run: RunFigures) -> str:
    paths = run.run.get("caches")
    return ", ".join(map(str, paths)) if isinstance(paths, list) and paths else "-"


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
