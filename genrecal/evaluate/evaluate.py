"""Generate answers with a model's own generation settings, and score them: accuracy by category, and answer log-loss."""

import contextlib
import copy
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from genrecal.errors import DataError, ModelError, SampleError
from genrecal.evaluate.scores import check_metric, metric_for, score
from genrecal.files import write_whole
from genrecal.progress import Progress
from genrecal.samples import BadRecord, Sample, SampleSet, decode_image
from genrecal.vlm.generation import generate_ids, stop_tokens
from genrecal.vlm.loading import VLM, first_line

NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
LOGIT_ROWS = 256  # of one answer at a time: a long answer's logits over a large vocabulary take gigabytes


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One question's outcome. `log_loss`: -log p(answer and end of turn), nats, teacher-forced on the turns before."""

    key: str
    turn: int
    category: str
    question: str
    answer: str
    prediction: str
    metric: str
    score: float
    log_loss: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over `n` questions with its standard error."""

    n: int
    accuracy: float
    accuracy_error: float
    log_loss: float
    log_loss_error: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All predictions, and scores overall and by category; `skipped`: (location, reason) of records not asked."""

    predictions: list[Prediction]
    overall: Score
    by_category: dict[str, Score]
    skipped: list[tuple[str, str]]

    def rules(self, category: str | None = None) -> dict[str, int]:
        """How many questions each rule of `genrecal.evaluate.scores` scored, in all or in one category; most first."""
        return dict(Counter(p.metric for p in self.predictions if category in (None, p.category)).most_common())


def evaluate(
    model: VLM,
    samples: SampleSet | Sequence[Sample | BadRecord],
    *,
    metric: str = "auto",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    title: str = "evaluate",
) -> Evaluation:
    """Ask every user turn with the right answers of the turns before it, and score what is generated.

    Args:
        metric: a name in `genrecal.evaluate.scores.METRICS`, or "auto": `metric_for` of each question.
        batch_size: prompts that are answered at a time; each turn of a conversation is one.
        max_new_tokens: longest answer; None takes the model's generation config, or 256 where that sets none.

    Raises:
        UsageError: no such metric. DataError: no sample can be used. ModelError: out of memory.
    """
    check_metric(metric, "--metric")
    smaller = f"a lower --batch-size than {batch_size}, " if batch_size > 1 else ""
    advice = f"{smaller}a lower --max-new-tokens, --dtype bfloat16 and --device split (over several GPUs) take less"
    predictions: list[Prediction] = []
    skipped: list[tuple[str, str]] = []
    with Progress(title, len(samples), "samples") as progress, explain_oom(advice):
        for start in range(0, len(samples), batch_size):
            batch = [samples[number] for number in range(start, min(start + batch_size, len(samples)))]
            found, left_out = ask(model, batch, metric=metric, batch_size=batch_size, max_new_tokens=max_new_tokens)
            predictions += found
            skipped += left_out
            progress.advance(len(batch))
    return evaluation_of(predictions, skipped)


def ask(
    model: VLM, samples: Sequence[Sample | BadRecord], *, metric: str, batch_size: int, max_new_tokens: int | None
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """One batch's predictions, and (location, reason) of records that cannot be asked.

    Args:
        samples: `batch_size` at most. Their prompts, one a turn, are answered `batch_size` at a time too.
    """
    batch: list[_Asked] = []
    skipped: list[tuple[str, str]] = []
    for sample in samples:
        if isinstance(sample, BadRecord):
            skipped.append((sample.location, sample.reason))
            continue
        try:
            batch.append(_Asked.prepare(model, sample))
        except SampleError as error:
            skipped.append((sample.location or sample.key, str(error)))
    return (_answer(model, batch, metric, batch_size, max_new_tokens) if batch else []), skipped


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU; allocators also raise plain RuntimeErrors and OSErrors."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextlib.contextmanager
def explain_oom(advice: str) -> Iterator[None]:
    """Turn an allocation that failed, on a GPU or a CPU, into one line (ModelError) that ends with `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"evaluation is out of memory: {first_line(error)}; {advice}") from None


def evaluation_of(predictions: list[Prediction], skipped: list[tuple[str, str]]) -> Evaluation:
    """Scores of predictions. Raises DataError if there are none."""
    if not predictions:
        where, why = skipped[0] if skipped else ("the data", "it holds no samples")
        raise DataError(f"nothing to evaluate: {where}: {why}")
    categories = dict.fromkeys(prediction.category for prediction in predictions)
    return Evaluation(
        predictions=predictions,
        overall=_score(predictions),
        by_category={c: _score([p for p in predictions if p.category == c]) for c in sorted(categories)},
        skipped=skipped,
    )


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write predictions as jsonl, one question a line."""
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in evaluation.predictions]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ("\n".join(lines) + "\n").encode())


def read_predictions(path: Path) -> list[Prediction]:
    """What `save_evaluation` wrote. Raises DataError for anything else."""
    try:
        return [Prediction(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of predictions: {error}") from None


@dataclass(frozen=True)
class _Asked:
    """A sample with its prompts, one a turn, and its teacher-forced rendering."""

    sample: Sample
    prompts: list[dict[str, torch.Tensor]]
    encoded: Any

    @classmethod
    def prepare(cls, model: VLM, sample: Sample) -> "_Asked":
        images = [decode_image(image.read()) for image in sample.images]
        encoded = model.renderer.encode_messages(sample.messages, images, key=sample.key)
        return cls(sample, prompts_of(model, sample, images), encoded)


def prompts_of(model: VLM, sample: Sample, images: Sequence[Image.Image]) -> list[dict[str, torch.Tensor]]:
    """The prompt of each turn: everything before it, with the right answers of the turns before."""
    prompts = []
    for place in sample.target_places:
        before = sample.messages[:place]
        count = sum(not isinstance(part, str) for m in before for part in m.parts)
        prompts.append(model.renderer.encode_prompt(before, images[:count]))
    return prompts


@torch.inference_mode()
def _answer(
    model: VLM, batch: Sequence[_Asked], metric: str, batch_size: int, max_new_tokens: int | None
) -> list[Prediction]:
    prompts = [prompt for asked in batch for prompt in asked.prompts]
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        texts += generate(model, prompts[start : start + batch_size], max_new_tokens=max_new_tokens)
    losses = answer_log_losses(model, [asked.encoded for asked in batch])
    predictions = []
    for asked, sample_losses in zip(batch, losses, strict=True):
        questions = [asked.sample.messages[place - 1].text for place in asked.sample.target_places]
        for turn, (question, answer) in enumerate(zip(questions, asked.sample.answers, strict=True)):
            text, names = texts.pop(0), (asked.sample.category, asked.sample.source)
            rule = metric_for(question, answer, *names) if metric == "auto" else metric
            predictions.append(
                Prediction(
                    key=asked.sample.key,
                    turn=turn,
                    category=asked.sample.category,
                    question=question,
                    answer=answer,
                    prediction=text,
                    metric=rule,
                    score=score(rule, text, answer, question),
                    log_loss=sample_losses[turn],
                )
            )
    return predictions


def generate(model: VLM, prompts: Sequence[dict[str, torch.Tensor]], *, max_new_tokens: int | None = None) -> list[str]:
    """Answers to prompts, by the model's own generation config; the template's end of turn always ends one."""
    renderer = model.renderer
    settings = copy.deepcopy(model.model.generation_config)
    settings.eos_token_id = stop_tokens(settings, renderer)
    settings.pad_token_id = renderer.tokenizer.pad_token_id or settings.eos_token_id[0]
    if max_new_tokens is not None:
        settings.max_new_tokens = max_new_tokens
    elif settings.max_new_tokens is None:
        settings.max_new_tokens = 256
    new = generate_ids(model, prompts, settings)
    return [text.strip() for text in renderer.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def answer_log_losses(model: VLM, batch: Sequence[Any]) -> list[list[float]]:
    """-log p of each turn's answer with its end of turn, nats, teacher-forced.

    Summed over the answer, so that models with other tokenizers can be compared.
    """
    hidden = model.states(batch)
    losses = []
    for encoded, states in zip(batch, hidden, strict=True):
        turns = []
        for start, end, is_answer in encoded.segments():
            if is_answer:
                loss = 0.0
                for first in range(start, end, LOGIT_ROWS):
                    last = min(first + LOGIT_ROWS, end)
                    logits = model.transform(model.head(states[first - 1 : last - 1])).float()
                    ids = torch.from_numpy(encoded.input_ids[first:last]).to(logits.device)
                    loss += F.cross_entropy(logits, ids, reduction="sum").item()
                turns.append(loss)
        losses.append(turns)
    return losses


def _score(predictions: Sequence[Prediction]) -> Score:
    """Means and standard errors; turns of one conversation share an image, so errors are taken over conversations."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.key].append(prediction)
    accuracy, accuracy_error = clustered_mean([[p.score for p in group] for group in groups.values()])
    log_loss, log_loss_error = clustered_mean([[p.log_loss for p in group] for group in groups.values()])
    return Score(
        n=len(predictions),
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        log_loss=log_loss,
        log_loss_error=log_loss_error,
    )


def clustered_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over all values, and its standard error with values of one group (a conversation) taken as dependent."""
    count = sum(len(group) for group in groups)
    mean = sum(map(sum, groups)) / count
    residuals = np.array([sum(value - mean for value in group) for group in groups])
    if len(groups) < 2:
        return mean, math.nan
    return mean, float(np.sqrt((residuals**2).sum() * len(groups) / (len(groups) - 1)) / count)
