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
COMPARE_FILE, REPORT_FILE = (
    "compare.json",
    "report.json",
)  # of a comparison: what is asked; its variants, seeds and data
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
    path, lines = run / METRICS_FILE, []
    if not path.exists():
        return []
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
MAX_SNAPSHOT_BYTES = 2**26
TENSORS = {
    "similarity": "similarity",
    "tokens": "tokens",
    "is_answer": "token_is_answer",
}  # in its file KIND/NAME, by field


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
        """Write it into the run's folder."""
        facts = {name: getattr(self, name) for name in ("stage", "moment", "samples", "own", "keys", "categories")}
        tensors = {
            f"{kind}/{name}": np.ascontiguousarray(value)
            for kind, field_name in TENSORS.items()
            for name, value in getattr(self, field_name).items()
        }
        data = safetensors.numpy.save(tensors, {"genrecal": json.dumps(facts)})
        write_whole(run / SNAPSHOTS / f"stage{self.stage}-{self.moment}.safetensors", data)


def read_snapshots(run: Path) -> list[Snapshot]:
    """A run's snapshots, in order. Raises UsageError for a file that is none."""
    paths = [run / SNAPSHOTS / f"stage{stage}-{moment}.safetensors" for stage in (1, 2) for moment in MOMENTS]
    return [_read_snapshot(path) for path in paths if path.exists()]


def _read_snapshot(path: Path) -> Snapshot:
    try:
        if path.stat().st_size > MAX_SNAPSHOT_BYTES:
            raise ValueError(f"it has more than {MAX_SNAPSHOT_BYTES} bytes")
        tensors: dict[str, dict[str, np.ndarray]] = {field_name: {} for field_name in TENSORS.values()}
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = dict(json.loads(file.metadata()["genrecal"]))
            for name in file.keys():
                kind, _, rest = name.partition("/")
                tensors[TENSORS[kind]][rest] = file.get_tensor(name)
        snapshot = Snapshot(
            stage=int(facts["stage"]),
            moment=str(facts["moment"]),
            samples=int(facts["samples"]),
            own={str(who): {str(k): float(v) for k, v in parts.items()} for who, parts in facts["own"].items()},
            keys=tuple(map(str, facts["keys"])),
            categories=tuple(map(str, facts["categories"])),
            **tensors,
        )
        if not _fits(snapshot):
            raise ValueError("its tensors do not fit each other")
        return snapshot
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a snapshot of a run: {error}; delete it, the report works without it") from None


def _fits(snapshot: Snapshot) -> bool:
    """Whether matrices are those of the keys, and tokens those of their marks."""
    size = len(snapshot.keys)
    names = {f"{pairing}.{pooling}" for pairing in PAIRINGS for pooling in POOLINGS}
    groups = {f"{who} {when}" for who in ("student", "teacher") for when in ("before", "after")}
    return (
        size == len(snapshot.categories) <= 100
        and snapshot.similarity.keys() in (set(), names)
        and all(m.shape == (size, size) and m.dtype == np.float32 for m in snapshot.similarity.values())
        and snapshot.tokens.keys() in (set(), groups)
        and len({states.shape[1:] for states in snapshot.tokens.values()}) <= 1
        and all(
            states.ndim == 2
            and 1 <= len(states) <= 5000
            and 1 <= states.shape[1] <= 1000
            and np.isfinite(states).all()
            and snapshot.token_is_answer[group.split()[0]].shape == states.shape[:1]
            for group, states in snapshot.tokens.items()
        )
    )
