"""A teacher proves itself on the first conversations, before GPU hours are spent on it; the same checks for every backend.

What is checked, and which silent mistake of caches it finds:

- the head's output is the model's own logits (a wrong head, something after the head, another layer's states);
- states are what the checkpoint's final norm leaves (states taken before the norm), where logits do not prove it;
- the records' rows are the states of their positions and their logits the model's own there (rows shifted or mixed up);
- the tokens that the rows predict spell the answers (a wrong span);
- the ids are those of the model's own `apply_chat_template(tokenize=True)` (two BOS tokens, another prompt);
- as many placeholder tokens as visual embeddings, and other pictures give other states (pictures dropped).
"""

import dataclasses
import io
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from genrecal.cache.extract import States
from genrecal.cache.teacher import Evidence, Teacher
from genrecal.errors import ModelError, SampleError
from genrecal.samples import BadRecord, ImageSource, Sample, decode_image
from genrecal.shards.record import AnswerRows
from genrecal.vlm.batch_proof import check_own_ids, off_share
from genrecal.vlm.checkpoint import FinalNorm
from genrecal.vlm.rendering import Encoded

TOP_K = 8  # logits of a row that are compared
# The limits below stand between rounding and mistakes, as measured on Gemma 3 270M in bfloat16, whose states have outliers
# (docs/decisions.md, 2026-11-30). Distances are shares of a state's length.
NORM_AGREE = (
    0.05  # how far the root mean square of normalised states may be from 1. Rounding 0.003; before the norm 5,000
)
# A row may be farther from its own position's state (of another forward pass) than from another's by this. Two passes over the
# same prompt: 0; neighbours, which an error by one position takes: 0.9 at the median, 0.1 where a token is repeated.
ROWS_AGREE = 0.03
ROWS_RELATED = 0.5  # the largest distance from its own position's state at all. Other backends: up to 0.06
# Logits from the same states by two programs: the largest difference as a share of a row's largest logit. Rounding to bfloat16:
# 0.004; a cap of 30 left out: 0.2.
LOGITS_AGREE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 0.02}
# Logits by two forward passes. Other backends, which round otherwise all the way: 0.04; those of the next position: 1.
PASSES_AGREE = 0.2
GREY = (127, 127, 127)


class Proof:
    """The checks of one run: on the shortest conversation of the first ones, again on the first with an image, and on a batch
    of unequal ones."""

    def __init__(self) -> None:
        self.text = self.pictures = self.batch = False

    def check(self, teacher: Teacher, items: Sequence[tuple[Sample, Encoded]], *, batch_tokens: int = 0) -> None:
        """Check the teacher on some of these conversations, if it has to be. Raises ModelError with the reason."""
        with_pictures = [item for item in items if item[1].num_images]
        if with_pictures and not self.pictures:
            self.text = self.pictures = prove(teacher, *min(with_pictures, key=lambda item: len(item[1])))
        elif items and not self.text:
            self.text = prove(teacher, *min(items, key=lambda item: len(item[1])))
        if not self.batch:
            self.batch = prove_batch(teacher, [encoded for _, encoded in items], batch_tokens)


def prove(teacher: Teacher, sample: Sample, encoded: Encoded) -> bool:
    """Check one conversation. Raises ModelError that says what is wrong with this teacher.

    Returns:
        False if this conversation's states cannot be used: the job skips it, and another one will prove the teacher.
    """
    (states,) = teacher.states([encoded], questions=[True], top_k=TOP_K)
    if isinstance(states, SampleError):
        return False
    try:
        _check_spans(teacher, sample, encoded, states)
        _check_ids(teacher, sample, encoded)
        evidence = teacher.evidence(encoded)
        _check_norm(evidence)
        _check_rows(encoded, states, evidence)
        _check_logits(states.answer, evidence)
        if encoded.num_images:
            _check_pictures(teacher, sample, encoded, states.answer, evidence)
    except _WrongError as error:
        raise ModelError(
            f"{teacher.path} ({teacher.backend} backend): on sample {encoded.key} {error}; nothing was cached"
        ) from None
    return True


def prove_batch(teacher: Teacher, items: Sequence[Encoded], batch_tokens: int) -> bool:
    """Check that the shortest conversation, the longest that fits and the one with most images have the same states in one
    batch as each alone. A teacher of the hf backend for which they have not runs each conversation alone from then on.

    Returns False if these conversations do not tell. Raises ModelError for a teacher of another backend.
    """
    fitting = sorted((item for item in items if 3 * len(item) <= batch_tokens), key=len)
    chosen = {
        item.key: item for item in (*fitting[:1], *fitting[-1:], *sorted(fitting, key=lambda i: i.num_images)[-1:])
    }
    batch = list(chosen.values())
    if len(batch) < 2 or len(batch[0]) == len(batch[1]) or teacher.renderer.alone:
        return bool(teacher.renderer.alone)
    together = _all_states(teacher, batch)
    alone = [state for item in batch for state in _all_states(teacher, [item])]
    for item, states, expected in zip(batch, together, alone, strict=True):
        if states is None or expected is None:
            return False
        if share := off_share(states, expected.to(teacher.head.weight.dtype)):
            reason = f"a batch changes {share:.0%} of the states of sample {item.key} ({len(item)} tokens)"
            if teacher.backend != "hf":
                raise ModelError(f"{teacher.path} ({teacher.backend} backend): {reason}; use --backend hf")
            teacher.renderer.alone = teacher.renderer.writes_alone = reason
            sys.stderr.write(f"genrecal: {teacher.path}: each conversation runs alone, which is slower: {reason}\n")
            return True
    return True


def _all_states(teacher: Teacher, batch: Sequence[Encoded]) -> list[torch.Tensor | None]:
    """Every stored state of each conversation `[R, D]`; None for one whose states cannot be used."""
    found = teacher.states(batch, questions=[True] * len(batch), top_k=1)
    rows = [(s.answer.hidden, s.question.hidden) if isinstance(s, States) and s.question else None for s in found]
    return [None if pair is None else torch.from_numpy(np.concatenate(pair)) for pair in rows]


class _WrongError(Exception):
    """What a check found."""


def _check_ids(teacher: Teacher, sample: Sample, encoded: Encoded) -> None:
    images = [decode_image(image.read()) for image in sample.images]
    try:
        check_own_ids(teacher.renderer, sample.messages, images, encoded)
    except ModelError as error:
        raise _WrongError(str(error)) from None


def _check_spans(teacher: Teacher, sample: Sample, encoded: Encoded, states: States) -> None:
    """The tokens after the answer rows' positions spell the answers."""
    rows = states.answer
    following = encoded.input_ids[np.minimum(rows.position[rows.predicts] + 1, len(encoded) - 1)]
    if not np.array_equal(following, rows.target_id[rows.predicts]):
        place = int(np.flatnonzero(following != rows.target_id[rows.predicts])[0])
        raise _WrongError(
            f"the answer rows do not stand before the tokens that they predict (token {place} of the answers): the answer "
            "span is wrong"
        )
    for turn, answer in enumerate(sample.answers):
        ids = rows.target_id[rows.predicts & (rows.turn == turn)][:-1]  # the last one closes the turn
        text = str(teacher.renderer.tokenizer.decode(ids.tolist()))
        # A model that thinks has its thinking before an answer.
        before = _letters(text).removesuffix(_letters(answer))
        if before and not (teacher.renderer.marks.answer_prefix.strip() and _letters(text) != before):
            raise _WrongError(
                f"the answer span of turn {turn + 1} decodes to {text[:60]!r}, expected {answer[:60]!r}: the span is wrong"
            )


def _letters(text: str) -> str:
    """A text without what tokenizers may change of it: white space and the form of composed characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _check_norm(evidence: Evidence) -> None:
    """Whatever a norm was given, its output less the bias and over the weight has the root mean square 1 over all channels.

    No channel may be left out, however small its weight: one of them may hold nearly all of a state's energy.
    """
    norm: FinalNorm | None = evidence.norm
    if norm is None:
        return
    states = evidence.hidden.float().cpu()
    bias = torch.zeros(states.shape[-1]) if norm.bias is None else norm.bias.float()
    kind = torch.finfo(evidence.hidden.dtype)
    unsure = kind.eps * (states.abs() + bias.abs()) + kind.smallest_normal * kind.eps  # what rounding has left open
    found = []
    for scale in (norm.weight.float(), 1 + norm.weight.float()):  # Gemma's norms multiply by 1 + weight
        used = scale != 0
        rms, slack = (
            ((value[:, used] / scale[used]).square().sum(-1) / len(scale)).sqrt().median().item()
            for value in (states - bias, unsure)
        )
        # Channels of weight 0 hold the bias alone, and what they held before is not known. A row of tiny states stays below
        # 1 by the norm's epsilon; the median row is not tiny.
        whole = bool(used.all()) or bool((states - bias)[:, ~used].abs().max() == 0)
        if whole and rms <= 1 + NORM_AGREE + slack and (rms >= 1 - NORM_AGREE - slack or not used.all()):
            return
        found.append(rms)
    raise _WrongError(
        f"the states are not what its final norm leaves (root mean square {min(found, key=lambda rms: abs(rms - 1)):.3g} over "
        "the norm's weight, expected 1): they were taken before the norm, or from another layer"
    )


def _check_rows(encoded: Encoded, states: States, evidence: Evidence) -> None:
    """The records' rows are the states of the positions that they name: no other position's state is nearer."""
    hidden = evidence.hidden.float().cpu()
    if len(hidden) != len(encoded):
        raise _WrongError(f"it gave {len(hidden)} states for {len(encoded)} tokens")
    assert states.question is not None
    for name, rows in (("answer", states.answer), ("question", states.question)):
        given, expected = torch.from_numpy(rows.hidden), hidden[rows.position]
        size = expected.norm(dim=1).clamp(min=1e-6)
        own = (given - expected).norm(dim=1) / size
        nearest = torch.cdist(given, hidden).amin(1) / size
        off = (own > nearest + ROWS_AGREE) | (own > ROWS_RELATED)
        if off.any():
            worst = int((own * off).argmax())
            raise _WrongError(
                f"the {name} row of position {rows.position[worst]} is not that position's state (off by {own[worst]:.0%} of "
                f"its length; {off.float().mean():.0%} of the rows are off)"
            )


def logits_agree(ours: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways from the same states to logits `[R, V]` differ by no more than rounding in `dtype` explains."""
    scale = others.float().abs().amax(-1)
    return bool(((ours.float() - others.float()).abs().amax(-1) <= LOGITS_AGREE[dtype] * scale).all())


def _check_logits(rows: AnswerRows, evidence: Evidence) -> None:
    """The logits of the records are the model's own at their rows."""
    own = evidence.logits.float().cpu()
    ids = torch.from_numpy(np.concatenate([rows.topk_ids, np.maximum(rows.target_id, 0)[:, None]], axis=1)).long()
    expected = torch.cat([own.gather(1, ids), own.logsumexp(-1, keepdim=True)], dim=1)
    got = np.concatenate([rows.topk_logits, rows.target_logit[:, None], rows.logsumexp[:, None]], axis=1)
    worst = (torch.from_numpy(got) - expected).abs().max()
    if worst > PASSES_AGREE * own.abs().max():
        raise _WrongError(
            f"the logits of its head are not the model's own (they differ by up to {worst.item():.3g}): the states are not "
            "what its head is given"
        )


def _check_pictures(teacher: Teacher, sample: Sample, encoded: Encoded, rows: AnswerRows, evidence: Evidence) -> None:
    """The pictures have places in the prompt, fill them, and matter."""
    if evidence.image_tokens == 0:
        raise _WrongError(
            f"no image token is in the prompt of {encoded.num_images} pictures: the template drops pictures"
        )
    if None not in (evidence.image_tokens, evidence.visual_embeddings):
        if evidence.image_tokens != evidence.visual_embeddings:
            raise _WrongError(
                f"{evidence.image_tokens} placeholder tokens but {evidence.visual_embeddings} visual embeddings: pictures are "
                "dropped or misplaced"
            )
    negative = dataclasses.replace(
        sample, images=tuple(_png(ImageOps.invert(decode_image(image.read()))) for image in sample.images)
    )
    (others,) = teacher.states([teacher.encode(negative, max_tokens=None)], questions=[False], top_k=TOP_K)
    # Both run alone, so that equal inputs give equal bits.
    if isinstance(others, States) and np.array_equal(others.answer.hidden, rows.hidden):
        raise _WrongError(
            "the negatives of its pictures give the very same answer states: pictures do not reach the model"
        )


def _png(picture: Image.Image) -> ImageSource:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return ImageSource(data=stream.getvalue(), suffix="png")


# ------------------------------------------------------------------------------------------------------ blank pictures


@dataclass(frozen=True, kw_only=True)
class BlankCheck:
    """What grey pictures cost the answers.

    samples: conversations compared; log_prob, blank_log_prob: nats an answer token, mean over the samples' means, with
    their own pictures and with grey ones; error: standard error of the mean fall.
    """

    samples: int
    log_prob: float
    blank_log_prob: float
    error: float

    @property
    def fall(self) -> float:
        """Nats an answer token by which the log-probability falls."""
        return self.log_prob - self.blank_log_prob

    def __str__(self) -> str:
        return (
            f"with grey pictures the log-probability of an answer token falls from {self.log_prob:.3f} to "
            f"{self.blank_log_prob:.3f} nats, by {self.fall:.3f} ± {self.error:.3f} ({self.samples} samples)"
        )


def blank_check(teacher: Teacher, samples: Iterable[Sample | BadRecord], count: int) -> BlankCheck | None:
    """Run the first `count` samples with pictures again with grey ones of the same size; None if no sample has any.

    Raises ModelError if not one answer state changes: the teacher does not see its pictures.
    """
    seen: list[float] = []
    blank: list[float] = []
    changed = False
    for sample in samples:
        if len(seen) == count:
            break
        if isinstance(sample, BadRecord) or not sample.images:
            continue
        try:
            sizes = [decode_image(image.read()).size for image in sample.images]
            grey = dataclasses.replace(sample, images=tuple(_png(Image.new("RGB", size, GREY)) for size in sizes))
            pair = [teacher.encode(sample, max_tokens=None), teacher.encode(grey, max_tokens=None)]
        except SampleError:
            continue
        own, other = teacher.states(pair, questions=[False, False], top_k=1)
        if isinstance(own, States) and isinstance(other, States):
            seen.append(_mean_log_prob(own.answer))
            blank.append(_mean_log_prob(other.answer))
            changed |= not np.array_equal(own.answer.hidden, other.answer.hidden)
    if not seen:
        return None
    if not changed:
        raise ModelError(
            f"{teacher.path} ({teacher.backend} backend): --blank-check: grey pictures in place of those of {len(seen)} "
            "samples change no state at all: pictures do not reach the model"
        )
    falls = np.subtract(seen, blank)
    error = float(falls.std(ddof=1) / math.sqrt(len(falls))) if len(falls) > 1 else math.nan
    return BlankCheck(
        samples=len(seen), log_prob=float(np.mean(seen)), blank_log_prob=float(np.mean(blank)), error=error
    )


def _mean_log_prob(rows: AnswerRows) -> float:
    return float(rows.target_log_prob[rows.predicts].mean())


# --------------------------------------------------------------------------------------------------- backends compared

# Mean distance of answer states, as a share of their length, that two backends may have in a dtype. Measured on Gemma 3 270M in
# bfloat16: 0.02 (0.016 from float32); the states of the layer before the last, through the norm: 0.57.
BACKENDS_AGREE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True, kw_only=True)
class BackendDifference:
    """How far two backends' answer rows are apart.

    samples, rows: compared; hidden: mean over rows of the states' distance as a share of their length; log_prob: largest
    difference of an answer token's log-probability, nats; top1: share of rows with the same most probable token.
    """

    samples: int
    rows: int
    hidden: float
    log_prob: float
    top1: float

    def __str__(self) -> str:
        return (
            f"{self.samples} samples, {self.rows} answer rows: states differ by {self.hidden:.2g} of their length, "
            f"log-probabilities by at most {self.log_prob:.2g} nats, the same top token in {self.top1:.2%}"
        )


def compare_backends(
    teacher: Teacher, reference: Teacher, samples: Sequence[Sample | BadRecord], count: int
) -> BackendDifference:
    """Run the first `count` usable samples through both. Raises ModelError if their tokens or their rows differ."""
    compared, hidden, log_prob, top1 = 0, [np.empty(0)], [0.0], [np.empty(0, bool)]
    for index in range(len(samples)):
        sample = samples[index]
        if compared == count:
            break
        if isinstance(sample, BadRecord):
            continue
        try:
            pair = [side.encode(sample, max_tokens=None) for side in (teacher, reference)]
        except SampleError:
            continue
        if not np.array_equal(pair[0].input_ids, pair[1].input_ids):
            raise ModelError(f"{teacher.path}: sample {sample.key} has other tokens in the two backends")
        one, other = (
            side.states([encoded], questions=[False], top_k=1)[0]
            for side, encoded in zip((teacher, reference), pair, strict=True)
        )
        if isinstance(one, States) and isinstance(other, States):
            compared += 1
            size = np.linalg.norm(other.answer.hidden, axis=1)
            hidden.append(np.linalg.norm(one.answer.hidden - other.answer.hidden, axis=1) / np.maximum(size, 1e-6))
            keep = other.answer.predicts
            log_prob.append(float(np.abs(one.answer.target_log_prob - other.answer.target_log_prob)[keep].max()))
            top1.append(one.answer.topk_ids[:, 0] == other.answer.topk_ids[:, 0])
    if not compared:
        raise ModelError(f"{teacher.path}: no sample can be compared")
    distances, same = np.concatenate(hidden), np.concatenate(top1)
    found = BackendDifference(
        samples=compared,
        rows=len(distances),
        hidden=float(distances.mean()),
        log_prob=max(log_prob),
        top1=float(same.mean()),
    )
    if found.hidden > BACKENDS_AGREE[teacher.head.weight.dtype]:
        raise ModelError(
            f"{teacher.path}: the {teacher.backend} backend does not give the states of {reference.backend} ({found}); use "
            f"--backend {reference.backend}"
        )
    return found
