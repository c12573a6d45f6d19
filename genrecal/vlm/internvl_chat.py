"""A processor for the original InternVL layout (`internvl_chat`: InternVL 1.5, 2, 2.5, 3), which ships a tokenizer only.

It does to a prompt what the checkpoint's own `chat` method does: "<image>" becomes `<img>`, 256 times `<IMG_CONTEXT>` for
each tile, `</img>`. It prepares no pixels: transformers has no class for this layout, and vLLM prepares them itself.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

MODEL_TYPE = "internvl_chat"
PLACEHOLDER = "<image>"
START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"


class InternVLChatProcessor:
    """Text and pictures -> token ids, in the way of a transformers processor.

    Args:
        tokenizer: the checkpoint's.
        config: its config.json.
    """

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
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(CONTEXT))
        self.image_processor = self  # a sign that pictures are taken

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The tokenizer's template takes strings alone: a picture is "<image>" and a line break, as in training."""
        flat = []
        for message in messages:
            parts = [PLACEHOLDER + "\n" if part["type"] == "image" else part["text"] for part in message["content"]]
            flat.append({"role": message["role"], "content": "".join(parts)})
        return str(self.tokenizer.apply_chat_template(flat, **options))

    def __call__(
        self, text: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """One text and its pictures -> `input_ids` and `attention_mask`, int64 `[1, L]`.

        Raises ValueError if the text holds another number of "<image>".
        """
        pictures = list(images[0]) if images else []
        pieces = text[0].split(PLACEHOLDER)
        if len(pieces) - 1 != len(pictures):
            raise ValueError(f"the text holds {len(pieces) - 1} times {PLACEHOLDER}, expected {len(pictures)}")
        runs = [START + CONTEXT * (self.tokens_a_tile * self.num_tiles(*image.size)) + END for image in pictures]
        whole = pieces[0] + "".join(run + piece for run, piece in zip(runs, pieces[1:], strict=True))
        ids = torch.tensor([self.tokenizer(whole)["input_ids"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def raw_ids(self, text: str) -> list[int]:
        """The ids of a text whose every "<image>" is tokenised by itself, as vLLM looks for it.

        A byte-level BPE would join its ">" with a line break, and vLLM then tokenises the whole conversation anew.
        """
        start, end = (self.tokenizer.convert_tokens_to_ids(token) for token in (START, END))
        placeholder = self.tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        for token in self.tokenizer(text.replace(PLACEHOLDER, START + END))["input_ids"]:
            if token == end and ids and ids[-1] == start:
                ids[-1:] = placeholder
            else:
                ids.append(token)
        return ids

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


def is_internvl_chat(path: str | Path) -> bool:
    """Whether a model folder or hub model is of this layout."""
    return bool(_config(path).get("model_type") == MODEL_TYPE)


def load_internvl_chat_processor(path: str | Path, *, trust_remote_code: bool) -> InternVLChatProcessor:
    """The processor of a checkpoint of this layout."""
    from transformers import AutoTokenizer

    return InternVLChatProcessor(
        AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code), _config(path)
    )


def _config(path: str | Path) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        file = cached_file(str(path), "config.json")
    except OSError:  # no model at all, say; whoever loads it says so better
        return {}
    return dict(json.loads(Path(file).read_text()))
