"""How a teacher writes an answer: token by token, greedily or by draws that depend on nothing but the seed, key and turn.

Letters: b conversations of a batch, V head rows.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from genrecal.cache.draws import draw, uniforms
from genrecal.errors import SampleError
from genrecal.shards.answer_source import SAMPLED, AnswerSource
from genrecal.vlm.generation import generate_ids, stop_tokens
from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Encoded, Renderer


def answer_numbers(key: str, turn: int, how: AnswerSource) -> np.ndarray:
    """The random numbers of one answer, a token each, float64 `[max_tokens]` in [0, 1): of its own Philox stream."""
    return uniforms(f"answer:{how.seed}:{turn}:{key}", how.max_tokens, 1)[:, 0]


def choose(logits: torch.Tensor, numbers: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Next tokens int64 `[b]`, drawn from softmax(logits / temperature) over its nucleus.

    The nucleus (arXiv 1904.09751) is the fewest most probable tokens whose probabilities add up to `top_p` or more.

    Args:
        logits: float32 `[b, V]`.
        numbers: float64 `[b]` in [0, 1); see `genrecal.cache.draws.draw`.
    """
    logits = logits.double() / temperature
    if top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # those before it have enough already
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), -torch.inf)
    return draw(logits, numbers[:, None])[0][:, 0]


class _Choice:
    """A logits processor that leaves one token of each row: the one that is drawn."""

    def __init__(self, keys: Sequence[str], turn: int, how: AnswerSource):
        self.numbers = torch.from_numpy(np.stack([answer_numbers(key, turn, how) for key in keys]))
        self.how, self.step = how, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = self.numbers[:, self.step].to(scores.device)
        self.step += 1
        chosen = choose(scores, numbers, temperature=self.how.temperature, top_p=self.how.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


def write_batch(vlm: VLM, batch: Sequence[Encoded], *, turn: int, how: AnswerSource) -> list[str | SampleError]:
    """Write the last answer of each conversation, with transformers; see `Teacher.write`."""
    from transformers import GenerationConfig, LogitsProcessorList

    renderer = vlm.renderer
    stops = stop_tokens(vlm.model.generation_config, renderer)
    settings: Any = GenerationConfig(
        do_sample=False,
        max_new_tokens=how.max_tokens,
        eos_token_id=stops,
        pad_token_id=renderer.tokenizer.pad_token_id or stops[0],
    )
    choice = [_Choice([encoded.key for encoded in batch], turn, how)] if how.kind == SAMPLED else []
    prompts = [renderer.without_last_answer(encoded) for encoded in batch]
    ids = generate_ids(vlm, prompts, settings, logits_processor=LogitsProcessorList(choice))
    return [answer_text(renderer, row, stops, turn, how) for row in ids.tolist()]


def answer_text(
    renderer: Renderer, ids: Sequence[int], stops: Collection[int], turn: int, how: AnswerSource
) -> str | SampleError:
    """Generated ids, with their end and what may follow it, as text; or why they are no answer.

    An answer that reaches the limit is none: cut off, it would teach a student to stop in the middle of a sentence.
    """
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    if end is None:
        limit = f"{how.max_tokens} tokens (--max-answer-tokens)"
        return SampleError(f"turn {turn + 1}: the teacher's answer does not end within {limit}")
    try:
        text = renderer.answer_text(ids[:end])
    except SampleError as error:
        return SampleError(f"turn {turn + 1}: the teacher's answer {error}")
    return text if text.strip() else SampleError(f"turn {turn + 1}: the teacher's answer is empty")
