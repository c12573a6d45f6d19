"""The teachers that are known by name: their sizes, and how their images become tokens.

The sizes are those of their published configs.
"""

import math
from pathlib import Path

from genrecal.errors import ModelError
from genrecal.vlm.shape import ImageRule, ModelShape, shape_of


def qwen2_vl_tokens(width: int, height: int) -> tuple[int, list[int]]:
    """Qwen2-VL: sides rounded to 28 pixels, 3,136 to 12,845,056 pixels an image; a token is 28 x 28, four patches."""
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


def tiles(max_tiles: int, marks_per_tile: int = 0) -> ImageRule:
    """InternVL and NVLM-D: the grid of up to `max_tiles` tiles of 448 pixels that is nearest in shape, and a thumbnail."""

    def rule(width: int, height: int) -> tuple[int, list[int]]:
        grids = sorted({(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)}, key=math.prod)
        best, nearest = (1, 1), math.inf
        for columns, rows in grids:
            distance = abs(width / height - columns / rows)
            larger = width * height > 0.5 * 448 * 448 * columns * rows
            if distance < nearest or (distance == nearest and larger):
                best, nearest = (columns, rows), distance
        count = math.prod(best) + (math.prod(best) > 1)
        # A patch is 14 x 14; one more is the class token.
        return 256 * count + 2 + marks_per_tile * count, [1025] * count

    return rule


def _decoder_parameters(width: int, intermediate: int, kv_width: int, *, bias: bool, layers: int) -> int:
    attention = 2 * width * width + 2 * width * kv_width + (width + 2 * kv_width if bias else 0)
    return layers * (attention + 3 * width * intermediate + 2 * width) + width


def _of_72b(
    name: str, *, rows: int, intermediate: int, vision: int, vision_layers: int, vision_width: int, rule: ImageRule
) -> ModelShape:
    """A decoder of 80 layers, 8,192 wide, 64 heads of which 8 are keys' and values', whoever trained it."""
    text = _decoder_parameters(8192, intermediate, 1024, bias=intermediate == 29568, layers=80)
    return ModelShape(
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


def teacher_shape(path: str | Path, *, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of a teacher's folder or hub name. Raises ModelError, naming those that need none."""
    try:
        return shape_of(path, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{error}; known without a config: {', '.join(KNOWN)}") from None
