"""What a run writes down: a line of JSON for each step and evaluation, and the same to TensorBoard and Weights & Biases."""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from genrecal.errors import UsageError
from genrecal.evaluate.evaluate import Evaluation, Prediction, Score, save_evaluation
from genrecal.files import write_whole
from genrecal.run_folder import EVALUATION, EVALUATIONS, METRICS_FILE, read_evaluations, read_lines, read_metrics
from genrecal.shards.layout import TIERS
from genrecal.shards.mixture import Mixture
from genrecal.train.stages import StepOutput
from genrecal.vlm.loading import first_line

__all__ = ["MACHINE", "RunLog", "Wandb", "cache_facts", "read_evaluations", "read_metrics", "term_means", "term_sums"]

MACHINE = (
    "seconds",
    "data_wait",
    "tokens_per_second",
    "memory_gb",
)  # of a step: what its computing took, not what it gave
WANDB_FILE = "wandb-id"

TermSums = dict[str, tuple[float, int]]  # of each term: its sum over rows, and their number


def term_sums(outputs: Iterable[StepOutput]) -> TermSums:
    """Sums of every term over one rank's micro-steps."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for output in outputs:
        for name, value in output.sums.items():
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + output.counts[name]
    return {name: (sums[name].item(), counts[name]) for name in sums}


def term_means(ranks: Sequence[TermSums]) -> dict[str, float]:
    """Means of every term over the rows of a whole global batch, from the sums of each rank."""
    names = dict.fromkeys(name for sums in ranks for name in sums)
    total = {
        name: [sum(column) for column in zip(*(s[name] for s in ranks if name in s), strict=True)] for name in names
    }
    return {name: value / count for name, (value, count) in total.items() if count}


def cache_facts(cache: Mixture) -> dict[str, Any]:
    """What a run's report says of its caches: counts, bytes by tier, and how well the teacher knows the answers (nats, the
    mean log-probability of a given answer token). Taken from the index and the names of files alone."""
    tokens = cache.column("answer_tokens").astype(np.float64)
    sizes = {
        tier: sum(size for each in cache.caches for size in each.store.sizes(tier).values())
        for tier in (*TIERS, "manifest")
    }
    codecs = {
        tier: ", ".join(sorted({each.description[f"{tier}_codec"] for each in cache.caches}))
        for tier in ("answer", "question")
    }
    return {
        "teacher": cache.teachers,
        "samples": len(cache),
        "with_question": int(cache.column("has_question").sum()),
        "question_tokens": int(cache.column("question_tokens").sum()),
        "answer_tokens": int(tokens.sum()),
        "log_prob": float(np.average(cache.column("log_prob"), weights=tokens)) if tokens.any() else None,
        "codecs": codecs,
        "bytes": sizes,
    }


class RunLog:
    """Appends metrics of one stage. Steps that a resumed run does again are taken out first.

    Args:
        writes: False keeps it silent: of several processes, one writes.
        wandb: Weights & Biases, if metrics go there too.
    """

    def __init__(self, run: Path, stage: int, *, first_step: int, writes: bool = True, wandb: "Wandb | None" = None):
        self.run, self.stage, self.writes, self.wandb = run, stage, writes, wandb if writes else None
        self.left_out = {"skipped": 0, "damaged": 0}
        self.evaluations: set[int] = set()  # steps after which there was one
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [
            line
            for line in read_lines(run)
            if line["stage"] < stage or (line["stage"] == stage and line["step"] < first_step + (EVALUATION in line))
        ]
        self.evaluations = {line["step"] for line in kept if line["stage"] == stage and EVALUATION in line}
        write_whole(run / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.left_out = {
            name: sum(len(line.get(name, ())) for line in kept if line["stage"] == stage)
            for name in ("skipped", "damaged")
        }
        self._file = (run / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(run / "tensorboard" / f"stage{stage}"), purge_step=first_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A step's values: numbers, and lists of samples that were left out, of which the boards show the number."""
        if not self.writes:
            return
        self._append({"stage": self.stage, "step": step, **values})
        self._show(step, {name: len(value) if isinstance(value, list) else value for name, value in values.items()})

    def evaluated(self, step: int, evaluation: Evaluation, *, done: float, shown: int) -> None:
        """An evaluation: its scores as a line of its own kind, all answers in a file, some on the boards.

        Args:
            step: how many were done. done: share of the stage that was trained; shown: answers on the boards.
        """
        if not self.writes:
            return
        scores = {"": evaluation.overall, **evaluation.by_category}
        content = {
            "done": done,
            "overall": _plain(evaluation.overall),
            "by_category": {name: _plain(score) for name, score in evaluation.by_category.items()},
            "skipped": len(evaluation.skipped),
        }
        self._append({"stage": self.stage, "step": step, EVALUATION: content})
        save_evaluation(evaluation, self.run / EVALUATIONS / f"stage{self.stage}-step{step:08d}.jsonl")
        last = max(0, step - 1)  # on the boards with the step it came after: what is done again begins with the next
        self._show(
            last,
            {
                "/".join(part for part in (EVALUATION, name, category) if part): getattr(score, name)
                for category, score in scores.items()
                for name in ("accuracy", "log_loss")
            },
        )
        answers = evaluation.predictions[:shown]
        self._board.add_text(f"{EVALUATION}/answers", _as_markdown(answers), last)
        if self.wandb is not None:
            self.wandb.show_answers(self.stage, last, answers)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.show(self.stage, step, values)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self._file.close()
            self._board.close()


def _plain(score: Score) -> dict[str, Any]:
    """For JSON, which has no NaN: the error of a single conversation is null."""
    return {name: None if value != value else value for name, value in asdict(score).items()}


def _as_markdown(predictions: Sequence[Prediction]) -> str:
    """Questions, right answers and the student's, as a table."""
    rows = [("question", "answer", "the student's", "score"), ("---",) * 4]
    rows += [(p.question, p.answer, p.prediction, f"{p.score:.2f}") for p in predictions]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows
    )


class Wandb:
    """A run on Weights & Biases: the same values as on TensorBoard, with a step axis for each stage.

    The run's id is kept in its folder, so that a resumed run continues there. WANDB_MODE and the other variables
    of wandb hold: offline, nothing leaves the machine.

    Raises UsageError if wandb is not installed or refuses to start.
    """

    def __init__(self, project: str, run: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UsageError(
                f'wandb = {project!r} needs Weights & Biases: pip install "genrecal[wandb]", or leave the setting out'
            ) from None
        file = run / WANDB_FILE
        if not file.exists():
            write_whole(file, secrets.token_hex(4).encode())
        try:
            self._run = wandb.init(
                project=project, id=file.read_text(), name=run.name, dir=str(run), resume="allow", config=config
            )
        except (wandb.Error, OSError) as error:
            raise UsageError(f"wandb = {project!r}: {first_line(error)}; WANDB_MODE=offline keeps it here") from None
        self._table = wandb.Table
        for stage in (1, 2, 3):
            self._run.define_metric(f"stage{stage}/step")
            self._run.define_metric(f"stage{stage}/*", step_metric=f"stage{stage}/step")

    def show(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"stage{stage}/{name}": value for name, value in {"step": step, **values}.items()})

    def show_answers(self, stage: int, step: int, predictions: Sequence[Prediction]) -> None:
        rows = [[p.key, p.question, p.answer, p.prediction, p.score] for p in predictions]
        table = self._table(columns=["key", "question", "answer", "prediction", "score"], data=rows)
        self._run.log({f"stage{stage}/step": step, f"stage{stage}/{EVALUATION}/answers": table})

    def __enter__(self) -> "Wandb":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=int(error is not None))
