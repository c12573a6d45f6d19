"""A teacher's sizes, from its config alone: what a forward pass costs, and how wide what it leaves behind is.

Formulas are the usual ones: two FLOPs a parameter and token, and the attention's own products, causal in the text. The
known teachers' sizes are those of their published configs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal.errors import ModelError

ImageRule = Callable[[int, int], tuple[int, list[int]]]  # width, height -> tokens, patches of each tile


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
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
        text = 2.0 * self.text_parameters * tokens + 2.0 * self.layers * self.attention_width * tokens**2
        head = 2.0 * self.head_rows * self.hidden_size * targets
        vision = 2.0 * self.vision_parameters * sum(patches)
        vision += 4.0 * self.vision_layers * self.vision_width * sum(count**2 for count in patches)
        return text + head + vision


# ------------------------------------------------------------------------------------------------------- known teachers


def qwen2_vl_tokens(width: int, height: int) -> tuple[int, list[int]]:
    """Qwen2-VL: sides rounded to 28 pixels, 3,136 to 12,845,056 pixels a picture; a token is 28 x 28, four patches."""
    side, least, most = 28, 56 * 56, 28 * 28 * 16384
    rows, columns = (max(side, round(length / side) * side) for length in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(side, math.floor(length / shrink / side) * side) for length in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(length * grow / side) * side for length in (height, width))
    tokens = rows * columns // side**2
    return tokens + 2, [4 * tokens]  # and a token before and one after


def tiles(most: int, marks_per_tile: int = 0) -> ImageRule:
    """InternVL and NVLM-D: the grid of up to `most` tiles of 448 pixels that is nearest in shape, and a thumbnail."""

    def rule(width: int, height: int) -> tuple[int, list[int]]:
        grids = sorted({(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)}, key=math.prod)
        best, nearest = (1, 1), math.inf
        for columns, rows in grids:
            distance = abs(width / height - columns / rows)
            larger = width * height > 0.5 * 448 * 448 * columns * rows
            if distance < nearest or (distance == nearest and larger):
                best, nearest = (columns, rows), distance
        count = math.prod(best) + (math.prod(best) > 1)
        return 256 * count + 2 + marks_per_tile * count, [
            1025
        ] * count  # a patch is 14 x 14; one more is the class token

    return rule


def _decoder_parameters(width: int, intermediate: int, kv_width: int, *, bias: bool, layers: int) -> int:
    attention = 2 * width * width + 2 * width * kv_width + (width + 2 * kv_width if bias else 0)
    return layers * (attention + 3 * width * intermediate + 2 * width) + width


def _of_72b(
    name: str, *, rows: int, intermediate: int, vision: int, vision_layers: int, vision_width: int, rule: ImageRule
) -> TeacherShape:
    """A decoder of 80 layers, 8,192 wide, 64 heads of which 8 are keys' and values', whoever trained it."""
    text = _decoder_parameters(8192, intermediate, 1024, bias=intermediate == 29568, layers=80)
    return TeacherShape(
        name=name,
        hidden_size=8192,
        head_rows=rows,
        layers=80,
        attention_width=8192,
        text_parameters=text,
        vision_parameters=vision,
        vision_layers=vision_layers,
        vision_width=vision_width,
        parameters=text + vision + 2 * rows * 8192,
        image_rule=rule,
    )


INTERN_VIT_6B = 45 * (4 * 3200 * 3200 + 2 * 3200 * 12800) + 3200 * (14 * 14 * 3 + 1025)  # 45 of its 48 layers are used
QWEN_VIT = 32 * 12 * 1280 * 1280 + 1280 * 1176 + 5120 * (5120 + 8192)  # and the merger of four patches
KNOWN = {
    shape.name: shape
    for shape in (
        _of_72b(
            "qwen2-vl-72b", rows=152_064, intermediate=29_568, vision=QWEN_VIT, vision_layers=32, vision_width=1280,
            rule=qwen2_vl_tokens,
        ),
        _of_72b(
            "internvl2-76b", rows=128_265, intermediate=28_672, vision=INTERN_VIT_6B + 12_800 * 8192 + 8192 * 8192,
            vision_layers=45, vision_width=3200, rule=tiles(12),
        ),
        _of_72b(
            "internvl2.5-78b", rows=151_674, intermediate=29_568, vision=INTERN_VIT_6B + 12_800 * 8192 + 8192 * 8192,
            vision_layers=45, vision_width=3200, rule=tiles(12),
        ),
        _of_72b(
            "nvlm-d-72b", rows=152_064, intermediate=29_568, vision=INTERN_VIT_6B + 12_800 * 29_568 + 29_568 * 8192,
            vision_layers=45, vision_width=3200, rule=tiles(6, marks_per_tile=5),
        ),
    )
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- from a folder


def shape_of(path: str | Path, *, trust_remote_code: bool = False) -> TeacherShape:
    """The sizes of a model folder or hub name: built without memory from its config, no weights are read.

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
            f"{path}: its sizes cannot be told from its config: {str(error).strip().splitlines()[0]}; "
            f"known without one: {', '.join(KNOWN)}"
        ) from None
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or head is None:
        raise ModelError(f"{path}: {type(model).__name__} has no decoder and head of its own")
    share = _experts_used(text)
    in_decoder = {id(p) for p in decoder.parameters()} | {id(p) for p in head.parameters()}
    return TeacherShape(
        name=str(path),
        hidden_size=head.weight.shape[1],
        head_rows=head.weight.shape[0],
        layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
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


def _experts_used(text: Any) -> float:
    """The share of a decoder's experts that a token meets; 1 for a dense one."""
    count = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
    return min(1.0, _first(text, "num_experts_per_tok") / count) if count else 1.0


def _first(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)
