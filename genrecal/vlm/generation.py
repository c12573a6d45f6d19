"""Generating with transformers, for any model: prompts padded on the left, settings that are whole."""

from collections.abc import Sequence
from typing import Any

import torch

from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Encoded, Renderer


def stop_tokens(settings: Any, renderer: Renderer) -> list[int]:
    """The ids that end an answer: those of a generation config, and the template's end of turn."""
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return sorted({int(stop) for stop in stops if stop is not None} | {renderer.marks.end_of_turn_id})


@torch.inference_mode()
def generate_ids(
    model: VLM,
    prompts: Sequence[Encoded | dict[str, torch.Tensor]],
    settings: Any,
    *,
    logits_processor: Any = None,
) -> torch.Tensor:
    """New ids `[B, n]` of prompts; what follows an answer's end is padding.

    Args:
        settings: a GenerationConfig, and all there is: transformers itself would fill what it leaves open from the model's
            own (a repetition penalty, say).
        logits_processor: transformers' LogitsProcessorList.
    """
    from transformers import GenerationConfig

    if model.renderer.writes_alone and len(prompts) > 1:
        each = [generate_ids(model, [prompt], settings, logits_processor=logits_processor)[0] for prompt in prompts]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=settings.pad_token_id)
    inputs = model.on_device(model.renderer.collate(prompts, padding_side="left"))
    own = model.model.generation_config
    model.model.generation_config = GenerationConfig()
    try:
        ids: torch.Tensor = model.model.generate(
            **inputs, generation_config=settings, logits_processor=logits_processor
        )
    finally:
        model.model.generation_config = own
    return ids[:, inputs["input_ids"].shape[1] :]
