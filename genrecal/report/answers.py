"""What several models answered to the same questions: scores with errors, gains, and questions to look at.

Everything comes from files of predictions as `genrecal evaluate --out` writes them; no model is needed.
"""

import io
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from genrecal.errors import DataError, GenrecalError
from genrecal.evaluate.evaluate import Prediction, clustered_mean, read_predictions
from genrecal.report.page import image_uri
from genrecal.report.summary import plus_minus
from genrecal.samples import FieldMap, Sample, SampleSet, open_samples

EXAMPLES = 10  # questions that are shown
IMAGES, SIDE = 2, 480  # of a shown question: images, and the longest side of one made small
Answers = Sequence[Sequence[Prediction]]  # a model's predictions with each of its seeds


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float


def mean_of(seeds: Answers, field: str, baseline: Answers | None = None, category: str | None = None) -> Mean:
    """The mean of a field of predictions, less the baseline's of the same question and seed.

    The error is over seeds; with one seed it is over conversations. A baseline of one seed is compared with every seed.
    Raises DataError if the baseline was asked other questions.
    """
    beside = [None] * len(seeds) if baseline is None else list(baseline) * (len(seeds) if len(baseline) == 1 else 1)
    means = [clustered_mean(_values(own, field, other, category)) for own, other in zip(seeds, beside, strict=True)]
    if len(means) == 1:
        return Mean(*means[0])
    values = np.array([mean for mean, _ in means])
    return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _values(
    own: Sequence[Prediction], field: str, baseline: Sequence[Prediction] | None, category: str | None
) -> list[list[float]]:
    """The field of every question (of a category), less the baseline's, grouped by conversation."""
    less = {(p.key, p.turn): getattr(p, field) for p in baseline} if baseline is not None else {}
    if less and less.keys() != questions(own):
        raise DataError("the models were not asked the same questions, so their answers cannot be compared")
    groups: dict[str, list[float]] = defaultdict(list)
    for p in own:
        if category in (None, p.category):
            groups[p.key].append(getattr(p, field) - less.get((p.key, p.turn), 0.0))
    return list(groups.values())


def questions(predictions: Sequence[Prediction]) -> set[tuple[str, int]]:
    """Sample keys and turns."""
    return {(p.key, p.turn) for p in predictions}


def signed(gain: Mean | None, scale: float, digits: int) -> str:
    """A difference with its sign and error; empty for None."""
    if gain is None:
        return ""
    return f"{gain.value * scale:+.{digits}f} ± {'-' if math.isnan(gain.error) else f'{gain.error * scale:.{digits}f}'}"


def read_answers(path: Path) -> list[Prediction]:
    """A file of predictions, from anywhere. Raises DataError for anything else."""
    found = read_predictions(path)
    for p in found:
        numbers = all(isinstance(value, int | float) for value in (p.score, p.log_loss, p.turn))
        if not numbers or not all(
            isinstance(text, str) for text in (p.key, p.category, p.question, p.answer, p.prediction)
        ):
            raise DataError(
                f"{path}: not a file of predictions: sample {p.key}: expected texts, a score and a log-loss"
            )
    if not found:
        raise DataError(f"{path}: it holds no predictions")
    return found


# --------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's answers. `kind`: student, baseline (trained another way), before (the untrained student) or teacher."""

    name: str
    seeds: Answers
    kind: str = "student"


def comparable(models: Sequence[Model]) -> tuple[list[Model], list[str]]:
    """Models that answered the questions of the first trained one, and the names of the others."""
    first = next((model for model in models if model.kind in ("student", "baseline")), *models[:1])
    asked = questions(first.seeds[0])
    same = [model for model in models if all(questions(answers) == asked for answers in model.seeds)]
    return same, [model.name for model in models if model not in same]


def best_and_others(models: Sequence[Model]) -> tuple[Model, list[Model]]:
    """The most accurate student, and what its accuracy is compared with: baselines, then the student before training."""
    trained = [model for kind in ("student", "baseline") for model in models if model.kind == kind] or list(models)
    candidates = [model for model in trained if model.kind == trained[0].kind]
    best = max(candidates, key=lambda model: mean_of(model.seeds, "score").value)
    return best, [m for kind in ("baseline", "before") for m in models if m.kind == kind and m is not best]


def verdict(models: Sequence[Model]) -> str:
    """One sentence: the best student's accuracy, its gains over each baseline and over the start, and the teacher's."""
    best, others = best_and_others(models)
    rivals = sum(model.kind == best.kind for model in models)
    accuracy = plus_minus(*mean_of(best.seeds, "score"), percent=True)
    seeds = f", mean of {len(best.seeds)} seeds" if len(best.seeds) > 1 else ""
    text = f"{best.name} answers {accuracy} of {len(best.seeds[0])} held-out questions right{seeds}"
    gains = []
    for other in others:
        gain = mean_of(best.seeds, "score", other.seeds) if len(other.seeds) in (1, len(best.seeds)) else None
        if gain is not None:
            unclear = "" if abs(gain.value) > 2 * gain.error else " (no clear difference)"
            gains.append(f"{signed(gain, 100, 1)} points compared with {other.name}{unclear}")
    text += f": {', '.join(gains)}" if gains else ""
    for model in models:
        if model.kind == "teacher":
            text += f"; the teacher answers {plus_minus(*mean_of(model.seeds, 'score'), percent=True)}"
    return f"{text}. It is the best of {rivals}." if rivals > 1 else f"{text}."


def result_table(models: Sequence[Model]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each model's accuracy, gains over baselines and the start in points, log-loss, and categories."""
    best, others = best_and_others(models)
    counts = {p.category: 0 for p in sorted(best.seeds[0], key=lambda p: p.category)}
    for p in best.seeds[0]:
        counts[p.category] += 1
    categories = {name: count for name, count in counts.items() if len(counts) > 1}
    head = [
        "model",
        "accuracy",
        *(f"compared with {other.name}, points" for other in others),
        "log-loss per answer, nats",
    ]
    head += [f"{name or '(no category)'} (n = {count})" for name, count in categories.items()]
    rows = []
    for model in models:
        gains = [
            signed(mean_of(model.seeds, "score", other.seeds), 100, 1)
            if model is not other and len(other.seeds) in (1, len(model.seeds))
            else ""
            for other in others
        ]
        rows.append([
            model.name, plus_minus(*mean_of(model.seeds, "score"), percent=True), *gains,
            plus_minus(*mean_of(model.seeds, "log_loss")),
            *(plus_minus(*mean_of(model.seeds, "score", category=name), percent=True) for name in categories),
        ])  # fmt: skip
    return head, rows


# --------------------------------------------------------------------------------------------------------- examples


def examples(models: Sequence[Model], data: Sequence[SampleSet]) -> list[dict[str, Any]]:
    """Ten questions with their images and every model's answer (of its first seed): in turn one that the best student
    gained over what it is compared with, one that it lost, and one where both score alike, each drawn at random."""
    best, others = best_and_others(models)
    before = {(p.key, p.turn): p.score for p in others[0].seeds[0]} if others else {}
    kinds: dict[str, list[Prediction]] = {"gained": [], "lost": [], "alike": []}
    for p in sorted(best.seeds[0], key=lambda p: (p.key, p.turn)):
        difference = p.score - before.get((p.key, p.turn), p.score)
        kinds["gained" if difference > 0 else "lost" if difference < 0 else "alike"].append(p)
    for found in kinds.values():
        random.Random(0).shuffle(found)
    answers = {model.name: {(p.key, p.turn): p for p in model.seeds[0]} for model in models}
    chosen = [p for turn in itertools.zip_longest(*kinds.values()) for p in turn if p is not None]
    return [
        {
            "prediction": p,
            "images": _images(p.key, data),
            "answers": [(name, found[p.key, p.turn]) for name, found in answers.items()],
        }
        for p in chosen[:EXAMPLES]
    ]


def open_local(paths: Any, image_root: Any = None, fields: Any = None, roles: Any = None) -> list[SampleSet]:
    """The data that a folder names, for their images, if they are files of this machine; nothing is fetched for a page."""
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        return []
    if not all(Path(path).is_file() or Path(path).is_dir() for path in paths):
        return []
    try:
        names = FieldMap(fields=dict(fields or {}), roles=dict(roles or {}))
        return [open_samples(paths, image_root=image_root or None, fields=names)]
    except (GenrecalError, OSError, ValueError, TypeError):
        return []


def _images(key: str, data: Sequence[SampleSet]) -> list[str]:
    """Data URIs of a sample's first images; none where the data are not here or cannot be read."""
    place = int(key[:8]) if key[:8].isdecimal() else -1
    uris = []
    try:
        found = [samples[place] for samples in data if 0 <= place < len(samples)]
        sample = next(sample for sample in found if isinstance(sample, Sample) and sample.key == key)
        for source in [source for source in sample.images if source.url is None][:IMAGES]:
            content = source.read()
            with Image.open(io.BytesIO(content)) as image:
                pixels = image.width * image.height
            uris.append(image_uri(content, image.format, pixels, SIDE)[0])
    except (StopIteration, GenrecalError, OSError, ValueError, Image.DecompressionBombError):
        pass
    return uris
