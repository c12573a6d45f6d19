"""A model's sizes, from its config alone: what a forward pass costs, and how wide what it leaves behind is.

Formulas are the usual ones: two FLOPs a parameter and token, and the attention's own products, causal in the text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal.errors import ModelError
from genrecal.vlm.config_file import experts_of, layer_config

ImageRule = Callable[[int, int], tuple[int, list[int]]]  # width, height -> tokens, patches of each tile


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a vision-language model.

    Args:
        hidden_size: D, the width of a state. head_rows: V, rows of the head.
        layers, attention_width: decoder layers, and heads x head width.
        text_parameters: that a token meets in the decoder's layers (of experts, those chosen); no embeddings, no head.
        vision_parameters: of the image encoder and its projector. vision_layers, vision_width: of the encoder.
        parameters: all of them, embeddings, head and experts too.
        value_bytes: of a weight.
        image_rule: how a picture becomes tokens, where no processor says so; None where one does.
    """

    name: str
    hidden_size: int
    head_rows: int
    layers: int
    attention_width: int
    text_parameters: int
    vision_parameters: int
    vision_layers: int
    vision_width: int
    parameters: int
    value_bytes: int = 2
    image_rule: ImageRule | None = None

    def flops(self, tokens: int, targets: int, patches: Sequence[int]) -> float:
        """Of one sample's forward pass: floating-point operations, a multiply-add being two.

        Args:
            tokens: L, of the whole conversation. targets: rows that run through the head.
            patches: of each picture, or of each tile where the encoder sees tiles.
        """
        return self.text_flops(tokens) + self.head_flops(targets) + self.vision_flops(patches)

    def text_flops(self, tokens: float) -> float:
        """Of the decoder's layers over one sequence."""
        return 2.0 * self.text_parameters * tokens + 2.0 * self.layers * self.attention_width * tokens**2

    def head_flops(self, rows: float) -> float:
        """Of the head over some rows."""
        return 2.0 * self.head_rows * self.hidden_size * rows

    def vision_flops(self, patches: Sequence[int]) -> float:
        """Of the image encoder and its projector."""
        within = 4.0 * self.vision_layers * self.vision_width * sum(count**2 for count in patches)
        return 2.0 * self.vision_parameters * sum(patches) + within


# --------------------------------------------------------------------------------------------------------- from a folder


def meta_model(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A model folder or hub name built on torch's meta device from its config: shapes and names without memory or weights.

    Raises ModelError if transformers cannot build it, or it has no decoder apart from its vision.
    """
    import torch
    from transformers import AutoConfig

    from genrecal.vlm.loading import auto_class

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"{path}: its sizes cannot be told from its config: {str(error).strip().splitlines()[0]}"
        ) from None
    if model.get_decoder() is None or model.get_output_embeddings() is None:
        raise ModelError(f"{path}: {type(model).__name__} has no decoder and head of its own")
    return model


def shape_of(path: str | Path, *, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of a model folder or hub name, from its config alone. Raises ModelError as `meta_model` does."""
    return shape_of_model(meta_model(path, trust_remote_code=trust_remote_code), name=str(path))


def shape_of_model(model: Any, *, name: str) -> ModelShape:
    """The sizes of a model that stands built, on whichever device."""
    config = model.config
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layer, (experts, used) = layer_config(text), experts_of(text)
    share = used / experts if experts else 1.0  # of a decoder's experts, what a token meets
    in_decoder = {id(p) for p in decoder.parameters()} | {id(p) for p in head.parameters()}
    return ModelShape(
        name=name,
        hidden_size=head.weight.shape[1],
        head_rows=head.weight.shape[0],
        layers=text.num_hidden_layers,
        attention_width=layer.num_attention_heads
        * (getattr(layer, "head_dim", None) or text.hidden_size // layer.num_attention_heads),
        text_parameters=sum(
            round(p.numel() * (share if ".experts." in name else 1))
            for name, p in decoder.named_parameters()
            if "embed_tokens" not in name
        ),
        vision_parameters=sum(p.numel() for p in model.parameters() if id(p) not in in_decoder),
        vision_layers=_first(vision, "depth", "num_hidden_layers"),
        vision_width=_first(vision, "embed_dim", "hidden_size"),
        parameters=sum(p.numel() for p in model.parameters()),
        value_bytes=getattr(config.dtype, "itemsize", 2),
    )


def _first(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def patches_of(inputs: dict[str, Any], processor: Any) -> tuple[int, ...]:
    """Patches of each picture (`pixel_values` `[patches, ...]` with a grid each) or tile (`[..., C, H, W]`)."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return ()
    if (grid := inputs.get("image_grid_thw")) is not None:
        return tuple(int(count) for count in grid.prod(-1))
    size = getattr(getattr(processor, "image_processor", None), "patch_size", None) or 14
    side = size if isinstance(size, int) else int(next(iter(dict(size).values())))
    *leading, _, height, width = pixels.shape
    return ((height // side) * (width // side),) * math.prod(leading)
