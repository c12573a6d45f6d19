"""`genrecal report`: a page of one or several runs."""

from collections.abc import Sequence
from pathlib import Path

from genrecal.errors import UsageError
from genrecal.report.alignment import (
    GROUPS,
    PAIRING_WORDS,
    POOLING_WORDS,
    Matrix,
    Scatter,
    matrices,
    neighbour_rows,
    own_rows,
    scatter,
    similarity_rows,
)
from genrecal.report.chart import Panel, panel
from genrecal.report.page import write_page
from genrecal.report.run_figures import (
    OTHERS,
    PARTS,
    QUANTITIES,
    STAGES,
    RunFigures,
    accuracy_lines,
    accuracy_rows,
    comparison_rows,
    cost_rows,
    different_settings,
    loss_lines,
    own_lines,
    read_runs,
    term_rows,
)

CATEGORIES = 12  # that have a chart; the table has all


def write_run_report(runs: Sequence[Path], out: Path) -> None:
    """Read runs' folders and write one HTML file. The runs may be unfinished.

    Raises UsageError for a folder that is no run, or a file that cannot be written.
    """
    figures = read_runs(runs)
    try:
        write_page(
            out,
            "run.html",
            groups=GROUPS,
            title=f"GenRecal: {', '.join(run.name for run in figures)}",
            names=[run.name for run in figures],
            comparison=comparison_rows(figures),
            different=different_settings(figures) if len(figures) > 1 else [],
            stages=[_stage(figures, stage) for stage in STAGES if any(stage in run.steps for run in figures)],
            alone=own_rows(figures),
            similarity=_similarity(figures),
            similarity_rows=similarity_rows(figures),
            samples=_samples(figures),
            scatters=_scatters(figures),
            neighbours=neighbour_rows(figures),
            accuracy=_accuracy(figures),
            accuracy_rows=accuracy_rows(figures),
            cost=cost_rows(figures),
            no_facts=[run.name for run in figures if not run.cache],
        )
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _stage(runs: Sequence[RunFigures], stage: int) -> dict[str, object]:
    """Rows of panels, (title, panels), and the same in numbers."""
    rows: list[tuple[str, list[Panel]]] = []
    for title, terms in QUANTITIES.items():
        panels = []
        for part, words in PARTS.items():
            lines = loss_lines(runs, stage, terms, part)
            if lines and "ce" in terms:
                lines += own_lines(
                    [run for run in runs if any(run.curve(stage, term + part)[1] for term in terms)], part
                )
            panels.append(panel(words, lines, x_label="step"))
        if drawn := [found for found in panels if found]:
            rows.append((title, drawn))
    others = [panel(words, loss_lines(runs, stage, {name: ""}, ""), x_label="step") for name, words in OTHERS.items()]
    rows.append(("The training itself", [found for found in others if found]))
    return {"number": stage, "rows": rows, "table": term_rows(runs, stage)}


def _similarity(runs: Sequence[RunFigures]) -> list[tuple[str, list[tuple[str, list[Matrix], float, float]]]]:
    """For each way to compare: its words and, for each choice of tokens, (words, matrices, ends of their scale)."""
    found = []
    for pairing, words in PAIRING_WORDS.items():
        drawn = [(POOLING_WORDS[pooling], *matrices(runs, pairing, pooling)) for pooling in POOLING_WORDS]
        if any(item[1] for item in drawn):
            found.append((words, drawn))
    return found


def _samples(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Number, key and category of the samples that are compared; with the run's name where runs differ in them."""
    chosen = {
        snapshot.keys: (run.name, snapshot) for run in reversed(runs) for snapshot in run.snapshots if snapshot.keys
    }
    return [
        [str(number), key, category or "(no category)", name]
        for name, snapshot in chosen.values()
        for number, (key, category) in enumerate(zip(snapshot.keys, snapshot.categories, strict=True))
    ]


def _scatters(runs: Sequence[RunFigures]) -> list[tuple[str, list[Scatter]]]:
    """Of each run that has them."""
    found = [(run.name, [scatter(snapshot) for snapshot in run.snapshots if snapshot.tokens]) for run in runs]
    return [(name, drawn) for name, drawn in found if drawn]


def _accuracy(runs: Sequence[RunFigures]) -> dict[str, list[Panel]]:
    """A panel for each category, by name of score."""
    ticks = [(stage - 0.5, f"stage {stage}") for stage in STAGES]
    found = {}
    for name, percent in (("accuracy", True), ("log_loss", False)):
        panels = [
            panel(category, lines, x_label="", percent=percent, x_ticks=ticks, rules=(1.0, 2.0))
            for category, lines in list(accuracy_lines(runs, name).items())[: CATEGORIES + 1]
        ]
        found[name] = [drawn for drawn in panels if drawn]
    return found
