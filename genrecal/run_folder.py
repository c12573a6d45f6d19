"""A run's folder as files: the names in it and how they are read. The trainer writes them, `genrecal report` reads them;
no model library is needed."""

import json
from pathlib import Path
from typing import Any

from genrecal.errors import UsageError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CACHE_FACTS = "cache-facts.json"  # what the cache was when the run began
EVALUATION, EVALUATIONS = "evaluation", "evaluations"  # of a line of metrics, and the folder of all answers


def read_run_file(run: Path) -> dict[str, Any]:
    """What the run is of. Raises UsageError if the folder is no run."""
    path = run / RUN_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{run}: not a run: {RUN_FILE}: {error}; `genrecal train --out {run}` makes one") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, oldest first; a last line that a kill cut short is left out."""
    return [line for line in read_lines(run) if EVALUATION not in line]


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first: stage, step, and under "evaluation" what `RunLog.evaluated` wrote."""
    return [line for line in read_lines(run) if EVALUATION in line]


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Steps and evaluations as they were written."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
