"""A run's folder as files: the names in it and how they are read. The trainer writes them, `genrecal report` reads them;
no model library is needed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from genrecal.errors import UsageError
from genrecal.files import write_whole

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "lock.json"  # while a training writes to the folder
OUTPUT_FILE = "output.txt"  # what a run of a comparison printed
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


# -------------------------------------------------------------------------------------------------------------- snapshots

SNAPSHOTS = "snapshots"
MOMENTS = ("start", "end")
POOLINGS = ("question", "answer", "all")  # tokens whose recalibrated states are averaged
PAIRINGS = ("own", "splice")  # what of the student is compared with the teacher; see genrecal.train.snapshot
MOST_SNAPSHOT_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What `genrecal.train.snapshot.take_snapshot` measured at one moment of a run. S samples, P tokens, C components.

    Args:
        samples: on how many the cross-entropies were measured.
        own: mean cross-entropy, nats a token of one's own, of "student" and "teacher" by part of the answer: "", "_first",
            "_later".
        keys, categories: of the S samples that are compared.
        similarity: float32 `[S, S]` by "PAIRING.POOLING", cosines between student (rows) and teacher (columns).
        tokens: float32 `[P, C]` by group, "student before" and so on; token_is_answer: bool `[P]` by "student", "teacher".
    """

    stage: int
    moment: str
    samples: int
    own: dict[str, dict[str, float]]
    keys: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    similarity: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    token_is_answer: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, run: Path) -> None:
        """Into the run's folder."""
        tensors = {f"similarity/{name}": value for name, value in self.similarity.items()}
        tensors |= {f"tokens/{name}": value for name, value in self.tokens.items()}
        tensors |= {f"is_answer/{name}": value for name, value in self.token_is_answer.items()}
        facts = {name: getattr(self, name) for name in ("stage", "moment", "samples", "own", "keys", "categories")}
        data = safetensors.numpy.save(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, {"genrecal": json.dumps(facts)}
        )
        write_whole(run / SNAPSHOTS / f"stage{self.stage}-{self.moment}.safetensors", data)


def read_snapshots(run: Path) -> list[Snapshot]:
    """A run's, in order. Raises UsageError for a file that is none."""
    paths = [run / SNAPSHOTS / f"stage{stage}-{moment}.safetensors" for stage in (1, 2) for moment in MOMENTS]
    return [_read_snapshot(path) for path in paths if path.exists()]


def _read_snapshot(path: Path) -> Snapshot:
    try:
        if path.stat().st_size > MOST_SNAPSHOT_BYTES:
            raise ValueError(f"it has more than {MOST_SNAPSHOT_BYTES} bytes")
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = dict(json.loads(file.metadata()["genrecal"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}

        def kind(prefix: str) -> dict[str, np.ndarray]:
            return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}

        snapshot = Snapshot(
            stage=int(facts["stage"]),
            moment=str(facts["moment"]),
            samples=int(facts["samples"]),
            own={str(who): {str(k): float(v) for k, v in parts.items()} for who, parts in facts["own"].items()},
            keys=tuple(map(str, facts["keys"])),
            categories=tuple(map(str, facts["categories"])),
            similarity=kind("similarity/"),
            tokens=kind("tokens/"),
            token_is_answer=kind("is_answer/"),
        )
        _check_shapes(snapshot)
        return snapshot
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a snapshot of a run: {error}; delete it, the report does without") from None


def _check_shapes(snapshot: Snapshot) -> None:
    """Raises ValueError where tensors do not fit each other."""
    samples = len(snapshot.keys)
    if samples != len(snapshot.categories) or samples > 100:
        raise ValueError(f"it compares {samples} samples of {len(snapshot.categories)} categories")
    if snapshot.similarity and set(snapshot.similarity) != {f"{p}.{q}" for p in PAIRINGS for q in POOLINGS}:
        raise ValueError(f"it has the matrices {', '.join(sorted(snapshot.similarity))}")
    for name, matrix in snapshot.similarity.items():
        if matrix.shape != (samples, samples) or matrix.dtype != np.float32:
            raise ValueError(f"{name} is {matrix.dtype} {matrix.shape}, expected float32 ({samples}, {samples})")
    groups = {f"{who} {when}" for who in ("student", "teacher") for when in ("before", "after")}
    if snapshot.tokens and set(snapshot.tokens) != groups:
        raise ValueError(f"it has the tokens {', '.join(sorted(snapshot.tokens))}")
    widths = {value.shape[1:] for value in snapshot.tokens.values()}
    for name, value in snapshot.tokens.items():
        marks = snapshot.token_is_answer.get(name.split()[0], np.empty(0))
        if value.ndim != 2 or len(widths) != 1 or value.dtype != np.float32 or marks.shape != value.shape[:1]:
            raise ValueError(f"{name} is {value.dtype} {value.shape}, with {marks.shape} marks")
        if not 1 <= len(value) <= 5000 or not 1 <= value.shape[1] <= 1000 or not np.isfinite(value).all():
            raise ValueError(f"{name} is {value.shape}, expected finite values of 1 to 5000 tokens")
