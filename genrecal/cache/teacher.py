"""Teacher backends, one interface, the same records. `hf` (transformers) is the reference and runs anywhere."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from genrecal.cache.batching import batches_by_length
from genrecal.cache.extract import (
    States,
    answer_positions,
    answer_targets,
    head_targets,
    question_positions,
    states_of,
)
from genrecal.cache.generate import write_batch
from genrecal.errors import ModelError, SampleError
from genrecal.samples import Sample
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import Record
from genrecal.vlm.checkpoint import FinalNorm
from genrecal.vlm.loading import VLM, image_token_id, load_vlm
from genrecal.vlm.rendering import Encoded, Renderer

UNCOUNTED = -1  # visual embeddings of a layout that is not known


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the records of one conversation are checked against.

    Args:
        hidden: `[L, D]`, the state of every position, from a forward pass of its own.
        logits: `[R, V]`, the model's own logits at the answer rows.
        image_tokens: placeholders in the prompt; None if it is not known which token they are.
        visual_embeddings: embeddings that the vision encoder made for them; None if they cannot be counted.
        norm: the final norm by the checkpoint, whose output `hidden` must be; None where `logits` prove that already.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    image_tokens: int | None
    visual_embeddings: int | None
    norm: FinalNorm | None = None


class Teacher(Protocol):
    """What the cache job and the live teacher need of a backend."""

    path: str
    backend: str
    versions: dict[str, str]  # of what runs it, besides torch and transformers
    renderer: Renderer

    @property
    def head(self) -> FrozenHead:
        """The frozen head and what follows it."""

    def encode(self, sample: Sample, *, max_tokens: int | None) -> Encoded:
        """Render a sample, in any thread. Raises SampleError if this teacher cannot take it."""

    def states(
        self, batch: Sequence[Encoded], *, questions: Sequence[bool], top_k: int, draws: int = 0
    ) -> list[States | SampleError]:
        """Run the body over a batch; a sample whose states cannot be used gives its error instead.

        Args:
            top_k: logits kept a row.
            draws: K of the sampled targets, 0 for none.
        """

    def write(
        self,
        batch: Sequence[Encoded],
        *,
        turn: int,
        how: AnswerSource,
        batch_tokens: int,
        wrote: Callable[[int], None] | None = None,
    ) -> list[str | SampleError]:
        """Write the last answer of each conversation anew; one that cannot be used gives its error instead.

        Args:
            batch: conversations of turns 0 to `turn`; the last answer of each is left out.
            batch_tokens: at most so many at a time, padding and the longest answers included.
            wrote: is told how many more are written, whenever some are.
        """

    def evidence(self, encoded: Encoded) -> "Evidence":
        """One conversation's states and logits by another way than its records; see genrecal/cache/proof.py.

        Raises ModelError if the head's output is not the model's logits.
        """


class HFTeacher:
    """A teacher run by transformers, teacher-forced, right-padded."""

    backend = "hf"

    def __init__(self, vlm: VLM):
        self.vlm = vlm
        self.path = vlm.path
        self.renderer = vlm.renderer
        self.renderer.refuse_unsaid_thinking(self.path)
        self.versions: dict[str, str] = {}
        self.head = vlm.frozen_head()

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "HFTeacher":
        """Load through `genrecal.vlm.loading.load_vlm`, whose options these are."""
        return cls(load_vlm(path, **options))

    def encode(self, sample: Sample, *, max_tokens: int | None = None) -> Encoded:
        encoded = self.vlm.renderer.encode(sample, max_tokens=max_tokens)
        positions = getattr(self.vlm.text_config, "max_position_embeddings", None)
        if positions is not None and len(encoded) > positions:
            raise SampleError(f"{len(encoded)} tokens, over the {positions} positions that this teacher has")
        return encoded

    def states(
        self, batch: Sequence[Encoded], *, questions: Sequence[bool], top_k: int, draws: int = 0
    ) -> list[States | SampleError]:
        """See `Teacher`. Raises ModelError if a batch of several does not fit into memory; one sample alone is skipped."""
        try:
            return self._states(batch, questions, top_k, draws)
        except torch.OutOfMemoryError:
            return [self._too_long(batch)]

    def write(
        self,
        batch: Sequence[Encoded],
        *,
        turn: int,
        how: AnswerSource,
        batch_tokens: int,
        wrote: Callable[[int], None] | None = None,
    ) -> list[str | SampleError]:
        """See `Teacher.write`. Raises ModelError as `states` does."""
        results: list[str | SampleError] = [SampleError("")] * len(batch)
        lengths = {number: len(encoded) + how.max_tokens for number, encoded in enumerate(batch)}
        for numbers in batches_by_length(lengths, 0 if self.renderer.writes_alone else batch_tokens):
            together = [batch[number] for number in numbers]
            try:
                written = write_batch(self.vlm, together, turn=turn, how=how)
            except torch.OutOfMemoryError:
                written = [self._too_long(together)]
            for number, answer in zip(numbers, written, strict=True):
                results[number] = answer
            if wrote is not None:
                wrote(len(numbers))
        return results

    def _too_long(self, batch: Sequence[Encoded]) -> SampleError:
        """Why one sample alone is skipped. Raises ModelError for several, which fewer tokens a batch would help."""
        longest = max(map(len, batch))
        if len(batch) == 1:
            return SampleError(f"{longest} tokens do not fit into the teacher's memory")
        raise ModelError(
            f"{self.path}: {len(batch)} samples of up to {longest} tokens do not fit into its memory; "
            "use a smaller --batch-tokens, in a new --out"
        ) from None

    @torch.inference_mode()
    def _states(
        self, batch: Sequence[Encoded], questions: Sequence[bool], top_k: int, draws: int
    ) -> list[States | SampleError]:
        hidden = self.vlm.states(batch)
        answers = [rows[answer_positions(encoded)[0]] for encoded, rows in zip(batch, hidden, strict=True)]
        items = [
            (encoded.key, states, answer_targets(encoded)["target_id"])
            for encoded, states in zip(batch, answers, strict=True)
        ]
        found = head_targets(items, self.head, top_k=top_k, draws=draws)
        return [
            states_of(encoded, answer, targets, rows[question_positions(encoded)[0]] if wanted else None)
            for encoded, rows, answer, targets, wanted in zip(batch, hidden, answers, found, questions, strict=True)
        ]

    @torch.inference_mode()
    def evidence(self, encoded: Encoded) -> Evidence:
        """See `Teacher.evidence`. Here the head's output must be the model's logits bit for bit."""
        inputs = self.vlm.renderer.collate([encoded])
        counted: list[int] = []
        with _counting_images(self.vlm.body, counted):
            hidden = self.vlm.hidden(inputs)
        logits = self.vlm.model(**self.vlm.on_device(inputs), use_cache=False).logits
        ours = self.vlm.transform(self.vlm.head(hidden))
        if not torch.equal(ours, logits):
            worst = (ours.float() - logits.float()).abs().max().item()
            raise ModelError(
                f"{self.path}: on sample {encoded.key} its head's output differs from its logits by up to {worst:.3g}; "
                "its hidden states would not reproduce this teacher"
            )
        token = image_token_id(self.vlm.model.config)
        countable = hasattr(self.vlm.body, "get_image_features") and UNCOUNTED not in counted
        return Evidence(
            hidden=hidden[0],
            logits=logits[0, torch.from_numpy(answer_positions(encoded)[0]).to(logits.device)],
            image_tokens=None if token is None else int((encoded.input_ids == token).sum()),
            visual_embeddings=sum(counted) if countable else None,
        )


@contextlib.contextmanager
def _counting_images(body: Any, counted: list[int]) -> Iterator[None]:
    """Note the visual embeddings that the body makes, where its family has transformers' usual method for it."""
    original = getattr(body, "get_image_features", None)
    if original is None:
        yield
        return

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        features = getattr(output, "pooler_output", output)
        tensors = features if isinstance(features, (list, tuple)) else [features]
        # Granite 4 gives a list for each of several layers, so that nothing can be counted.
        counted.extend(t.numel() // t.shape[-1] if isinstance(t, torch.Tensor) else UNCOUNTED for t in tensors)
        return output

    body.get_image_features = counting
    try:
        yield
    finally:
        del body.get_image_features


class LiveTeacher:
    """The paper's co-resident setting: the same records as a cache's, made when they are asked for.

    Exists for parity and for measuring; `genrecal train --teacher live:MODEL` uses it in place of the shards.

    Args:
        top_k, draws: of the cache whose records these stand for; `draws` 0 for no sampled targets.
    """

    def __init__(self, teacher: Teacher, *, top_k: int, draws: int = 0):
        self.teacher, self.top_k, self.draws = teacher, top_k, draws

    def records(self, samples: Sequence[Sample], *, questions: Sequence[bool]) -> list[Record]:
        """Records of samples that the cache holds (so none of them should fail). Raises SampleError if one does."""
        encoded = [self.teacher.encode(sample, max_tokens=None) for sample in samples]
        found = self.teacher.states(encoded, questions=questions, top_k=self.top_k, draws=self.draws)
        records = []
        for sample, states in zip(samples, found, strict=True):
            if isinstance(states, SampleError):
                raise SampleError(f"{sample.key}: {states}")
            records.append(Record(sample=sample, answer=states.answer, question=states.question))
        return records
