"""Processors for layouts that transformers has no class for: the original InternVL (`internvl_chat`: InternVL 1.5, 2, 2.5,
3) and NVLM-D. Both ship a tokenizer only.

They do to a prompt what the checkpoint's own `chat` method does: a picture's placeholder becomes as many context tokens as
its tiles have, and what the layout puts around them. They prepare no pixels: vLLM prepares them itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from genrecal.vlm.config_file import read_json

PLACEHOLDER = "<image>"


class InternVLChatProcessor:
    """Text and pictures -> token ids, in the way of a transformers processor.

    Args:
        tokenizer: the checkpoint's.
        config: its config.json.
    """

    model_type: ClassVar[str] = "internvl_chat"
    context: ClassVar[str] = "<IMG_CONTEXT>"  # the token that a visual embedding takes the place of
    replaced: ClassVar[str] = PLACEHOLDER  # what vLLM looks for in a prompt
    instead: ClassVar[str] = (
        "run `genrecal convert MODEL --processor OpenGVLab/InternVL3-1B-hf --out DIR` (docs/models.md)"
    )

    def __init__(self, tokenizer: Any, config: dict[str, Any]):
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        vision = config["vision_config"]
        self.tile = int(config.get("force_image_size") or vision["image_size"])
        self.tokens_a_tile = int((self.tile // vision["patch_size"]) ** 2 * config["downsample_ratio"] ** 2)
        dynamic = config.get("dynamic_image_size", True)
        self.min_tiles = int(config["min_dynamic_patch"]) if dynamic else 1
        self.max_tiles = int(config["max_dynamic_patch"]) if dynamic else 1
        self.use_thumbnail = bool(config.get("use_thumbnail", True))
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self.context))
        self.image_processor = self  # a sign that pictures are taken

    def run_of(self, tiles: int) -> str:
        """What stands in a prompt for a picture of so many tiles."""
        return f"<img>{self.context * (self.tokens_a_tile * tiles)}</img>"

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The tokenizer's template takes strings alone: a picture is "<image>" and a line break, as in training."""
        flat = []
        for message in messages:
            parts = [PLACEHOLDER + "\n" if part["type"] == "image" else part["text"] for part in message["content"]]
            flat.append({"role": message["role"], "content": "".join(parts)})
        return str(self.tokenizer.apply_chat_template(flat, **options))

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        add_special_tokens: bool = True,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """One text and its pictures -> `input_ids` and `attention_mask`, int64 `[1, L]`.

        Raises ValueError if the text holds another number of "<image>".
        """
        pictures = list(images[0]) if images else []
        if (count := text[0].count(PLACEHOLDER)) != len(pictures):
            raise ValueError(f"the text holds {count} times {PLACEHOLDER}, expected {len(pictures)}")
        runs = [self._expanded(self.num_tiles(*image.size)) for image in pictures]
        ids = torch.tensor([self._ids(text[0], runs, add_special_tokens)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def raw_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text whose every placeholder is tokenised by itself, as vLLM looks for it.

        A byte-level BPE would join its ">" with a line break, and vLLM then tokenises the whole conversation anew.
        """
        return self._ids(text, [self._plain(self.replaced)] * text.count(PLACEHOLDER), add_special_tokens)

    def _ids(self, text: str, pictures: Sequence[list[int]], add_special_tokens: bool) -> list[int]:
        """The ids of a text with these in place of its pictures. A context token, which no tokenizer joins with its
        neighbours, holds their places meanwhile."""
        waiting = iter(pictures)
        ids: list[int] = []
        text = text.replace(self.replaced, self.context)
        for token in self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]:
            ids += next(waiting) if token == self.image_token_id else [token]
        return ids

    def _expanded(self, tiles: int) -> list[int]:
        return self._plain(self.run_of(tiles))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles of a picture: those of the grid nearest to its aspect ratio, and a thumbnail if they are several."""
        grids = sorted(
            {
                (columns, rows)
                for columns in range(1, self.max_tiles + 1)
                for rows in range(1, self.max_tiles + 1)
                if self.min_tiles <= columns * rows <= self.max_tiles
            },
            key=lambda grid: grid[0] * grid[1],
        )
        best, least = (1, 1), float("inf")
        for columns, rows in grids:
            difference = abs(width / height - columns / rows)
            # Of equally near grids a later, larger one is taken if the picture fills more than half of it.
            larger = difference == least and width * height > 0.5 * self.tile**2 * columns * rows
            if difference < least or larger:
                best, least = (columns, rows), difference
        tiles = best[0] * best[1]
        return tiles + 1 if self.use_thumbnail and tiles > 1 else tiles


class NVLMProcessor(InternVLChatProcessor):
    """NVLM-D: every tile has a tag before its context tokens, in plain text ("<tile_1>", or that of the thumbnail).

    vLLM tokenises a picture's run and the line break after it each by itself, and so do we.
    """

    model_type = "NVLM_D"
    context = "<|vision_pad|>"
    replaced = PLACEHOLDER + "\n"
    instead = "take another student"

    def run_of(self, tiles: int) -> str:
        tags = [f"<tile_{number}>" for number in range(1, tiles)] + ["<tile_global_thumbnail>"]
        return f"<Image>{''.join(tag + self.context * self.tokens_a_tile for tag in tags)}</Image>"

    def _expanded(self, tiles: int) -> list[int]:
        return super()._expanded(tiles) + self._plain("\n")


LAYOUTS = {layout.model_type: layout for layout in (InternVLChatProcessor, NVLMProcessor)}


def original_layout(path: str | Path) -> type[InternVLChatProcessor] | None:
    """The processor of a model folder's or hub model's layout; None if transformers knows the layout itself."""
    return LAYOUTS.get(str(_config(path).get("model_type")))


def load_original_processor(path: str | Path, *, trust_remote_code: bool) -> InternVLChatProcessor:
    """The processor of a checkpoint of such a layout."""
    from transformers import AutoTokenizer

    layout = original_layout(path)
    assert layout is not None
    return layout(AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code), _config(path))


def _config(path: str | Path) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        file = cached_file(str(path), "config.json")
    except OSError:  # no model at all, say; whoever loads it says so better
        return {}
    return read_json(Path(file)) if file is not None else {}
