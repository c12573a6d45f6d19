"""`genrecal report`: a page of runs, of a comparison and of answers. It leads with the result; losses come after."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genrecal.errors import UsageError
from genrecal.report.alignment import (
    GROUPS,
    PAIRING_WORDS,
    POOLING_WORDS,
    matrices,
    neighbour_rows,
    own_rows,
    scatter,
    similarity_rows,
)
from genrecal.report.answers import Model, comparable, examples, open_local, read_answers, result_table, verdict
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
    at,
    comparison_rows,
    cost_rows,
    different_settings,
    loss_lines,
    own_lines,
    path_names,
    read_run,
    term_rows,
)
from genrecal.run_folder import COMPARE_FILE, EVALUATION, EVALUATIONS, REPORT_FILE
from genrecal.samples import SampleSet

CATEGORIES = 12  # that have a chart; the table has all
BASELINES = ("sft", "seqkd")  # objectives that other runs are compared with


def write_run_report(paths: Sequence[Path], out: Path) -> None:
    """Read folders and files, and write one HTML file.

    Args:
        paths: runs (finished or not), folders of `genrecal compare`, and answers as `genrecal evaluate --out` writes them.
            A file named teacher.jsonl has the teacher's answers, before.jsonl or student-before.jsonl those of the student
            before training.

    Raises UsageError for a folder that is no run, or a file that cannot be written; DataError for a file of no answers.
    """
    runs, models, data = _read(paths)
    result = None
    if models:
        same, others = comparable(models)
        head, rows = result_table(same)
        result = {
            "verdict": verdict(same),
            "head": head,
            "rows": rows,
            "others": others,
            "examples": examples(same, data),
        }
    names = [run.name for run in runs] or [model.name for model in models]
    scatters = [(run.name, [scatter(snapshot) for snapshot in run.snapshots if snapshot.tokens]) for run in runs]
    write_page(
        out,
        "run.html",
        option="--out",
        groups=GROUPS,
        title=f"GenRecal: {', '.join(names)}",
        result=result,
        names=names,
        comparison=comparison_rows(runs) if runs else [],
        different=different_settings(runs) if len(runs) > 1 else [],
        stages=[_stage(runs, stage) for stage in STAGES if any(stage in run.steps for run in runs)],
        alone=own_rows(runs),
        similarity=_similarity(runs),
        similarity_rows=similarity_rows(runs),
        samples=_samples(runs),
        scatters=[(name, drawn) for name, drawn in scatters if drawn],
        neighbours=neighbour_rows(runs),
        accuracy=_accuracy(runs),
        accuracy_rows=accuracy_rows(runs),
        cost=cost_rows(runs) if runs else [],
        no_facts=[run.name for run in runs if not run.cache],
    )


def _read(paths: Sequence[Path]) -> tuple[list[RunFigures], list[Model], list[SampleSet]]:
    """The runs, the models that answered questions, and the data of these questions as far as they are here."""
    folders: list[Path] = []
    models: list[Model] = []
    data: list[SampleSet] = []
    named: dict[Path, str] = {}
    for path in paths:
        if path.is_file():
            name = path.stem.replace("-", " ")
            kind = {"teacher": "teacher", "before": "before", "student before": "before"}.get(name, "student")
            models.append(Model(name=name, seeds=[read_answers(path)], kind=kind))
        elif (path / COMPARE_FILE).exists():
            facts = _comparison(path)
            for name, folder in facts["variants"].items():
                files = [path / "predictions" / folder / f"seed{seed}.jsonl" for seed in facts["seeds"]]
                kind = "student" if any(model.kind == "baseline" for model in models) else "baseline"
                models.append(Model(name=name, seeds=[read_answers(file) for file in files], kind=kind))
                run = path / "runs" / folder / f"seed{facts['seeds'][0]}"
                if run.exists():
                    folders.append(run)
                    named[run] = name
            data += open_local(*(facts.get(name) for name in ("data", "image_root", "fields", "roles")))
        else:
            folders.append(path)
    names = path_names([path for path in folders if path not in named]) if len(named) < len(folders) else []
    rest = iter(names)
    runs = [read_run(path, named.get(path) or next(rest)) for path in folders]
    for run in runs:
        if run.path not in named and (answers := _answer_files(run)):
            kind = "baseline" if run.setting("objective") in BASELINES else "student"
            if run.evaluations[0][EVALUATION].get("done") == 0 and all(model.kind != "before" for model in models):
                models.append(Model(name="student before", seeds=[read_answers(answers[0])], kind="before"))
            models.append(Model(name=run.name, seeds=[read_answers(answers[-1])], kind=kind))
            data += open_local(at(run.run, "config.evaluate.data"), at(run.run, "config.evaluate.image_root"))
    return runs, sorted(models, key=lambda model: ("teacher", "before", "baseline", "student").index(model.kind)), data


def _comparison(path: Path) -> dict[str, Any]:
    try:
        facts = dict(json.loads((path / REPORT_FILE).read_text()))
        facts["variants"] = {str(name): Path(str(folder)).name for name, folder in facts["variants"].items()}
        facts["seeds"] = [int(seed) for seed in facts["seeds"]]
        return facts
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path / REPORT_FILE}: {error}; run the same `genrecal compare` again to write it") from None


def _answer_files(run: RunFigures) -> list[Path]:
    """Files of a run's evaluations that exist, oldest first."""
    names = [f"stage{line['stage']}-step{line['step']:08d}.jsonl" for line in run.evaluations]
    return [path for name in names if (path := run.path / EVALUATIONS / name).exists()]


def _stage(runs: Sequence[RunFigures], stage: int) -> dict[str, object]:
    """Rows of panels, (title, panels), and the same in numbers."""
    rows: list[tuple[str, list[Panel | None]]] = []
    for title, terms in QUANTITIES.items():
        panels = []
        for part, words in PARTS.items():
            lines = loss_lines(runs, stage, terms, part)
            if lines and "ce" in terms:
                lines += own_lines([run for run in runs if any(run.curve(stage, t + part)[1] for t in terms)], part)
            panels.append(panel(words, lines, x_label="step"))
        rows.append((title, panels))
    others = [panel(words, loss_lines(runs, stage, {name: ""}, ""), x_label="step") for name, words in OTHERS.items()]
    rows.append(("The training itself", others))
    drawn = [(title, [found for found in panels if found]) for title, panels in rows if any(panels)]
    return {"number": stage, "rows": drawn, "table": term_rows(runs, stage)}


def _similarity(runs: Sequence[RunFigures]) -> list[tuple[str, list[tuple[str, list[dict[str, Any]], float, float]]]]:
    """For each way to compare: its words and, for each choice of tokens, (words, matrices, ends of their scale)."""
    found = [
        (words, [(tokens, *matrices(runs, pairing, pooling)) for pooling, tokens in POOLING_WORDS.items()])
        for pairing, words in PAIRING_WORDS.items()
    ]
    return [(words, drawn) for words, drawn in found if any(item[1] for item in drawn)]


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
