"""Teacher backends, one interface, the same records. `hf` (transformers) is the reference and runs anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from genrecal.cache.extract import extract_answer, extract_question
from genrecal.errors import ModelError, SampleError
from genrecal.samples import Sample
from genrecal.shards.head import FrozenHead
from genrecal.shards.record import AnswerRows, QuestionRows, Record
from genrecal.vlm.loading import VLM, load_vlm
from genrecal.vlm.rendering import Encoded


@dataclass(frozen=True, kw_only=True)
class States:
    """A teacher's states over one sample; `question` is None unless it was asked for."""

    answer: AnswerRows
    question: QuestionRows | None


class Teacher(Protocol):
    """What the cache job and the live teacher need of a backend."""

    path: str

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

    def prove(self, encoded: Encoded) -> None:
        """Check on a real sample that the states are what they are taken for. Raises ModelError otherwise."""


class HFTeacher:
    """A teacher run by transformers, teacher-forced, right-padded."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm
        self.path = vlm.path
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
            longest = max(map(len, batch))
            if len(batch) == 1:
                return [SampleError(f"{longest} tokens do not fit into the teacher's memory")]
            raise ModelError(
                f"{self.path}: {len(batch)} samples of up to {longest} tokens do not fit into its memory; "
                "use a smaller --batch-tokens, in a new --out"
            ) from None

    @torch.inference_mode()
    def _states(
        self, batch: Sequence[Encoded], questions: Sequence[bool], top_k: int, draws: int
    ) -> list[States | SampleError]:
        hidden = self.vlm.hidden(self.vlm.renderer.collate(batch))
        results: list[States | SampleError] = []
        for encoded, rows, wants_question in zip(batch, hidden, questions, strict=True):
            try:
                answer = extract_answer(encoded, rows, self.head, top_k=top_k, draws=draws)
                question = extract_question(encoded, rows) if wants_question else None
                results.append(States(answer=answer, question=question))
            except SampleError as error:
                results.append(error)
        return results

    @torch.inference_mode()
    def prove(self, encoded: Encoded) -> None:
        """On one sample: the head's output is the model's logits, bit for bit, and its pictures are in the prompt.

        (That there are as many image tokens as visual embeddings transformers checks itself, in every forward; that
        answers decode to their text is checked when they are rendered.)
        """
        inputs = self.vlm.renderer.collate([encoded])
        logits = self.vlm.model(**self.vlm.on_device(inputs), use_cache=False).logits
        ours = self.vlm.transform(self.vlm.head(self.vlm.hidden(inputs)))
        if not torch.equal(ours, logits):
            worst = (ours.float() - logits.float()).abs().max().item()
            raise ModelError(
                f"{self.path}: on sample {encoded.key} its head's output differs from its logits by up to {worst:.3g}; "
                "its hidden states would not reproduce this teacher"
            )
        image_token = getattr(self.vlm.model.config, "image_token_id", None)
        if encoded.num_images and image_token is not None and not (inputs["input_ids"] == image_token).any():
            raise ModelError(
                f"{self.path}: sample {encoded.key} has {encoded.num_images} pictures, but no image token {image_token} "
                "is in its prompt: the chat template drops pictures"
            )


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
