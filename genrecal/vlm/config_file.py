"""A model's config.json as it is, without building anything of it."""

import json
from pathlib import Path
from typing import Any

from genrecal.errors import ModelError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ModelError if it cannot be read, or is no table."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected a table, got {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}; expected a model folder") from None


def layer_config(text_config: Any) -> Any:
    """The config of the first decoder layer: itself, but for families whose layers differ in their sizes (Gemma 4)."""
    layers = getattr(text_config, "per_layer_config", None)
    return layers[0] if layers else text_config


def first_field(config: Any, *names: str) -> Any:
    """The first of these fields that is set; of one value for each layer, the first layer's."""
    values = [value for name in names if (value := getattr(config, name, None))]
    return next((value[0] if isinstance(value, list | tuple) else value for value in values), None)


def experts_of(text_config: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token meets; (0, 0) for a dense decoder."""
    count = first_field(text_config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    used = first_field(text_config, "num_experts_per_tok", "moe_k", "top_k_experts", "experts_per_token")
    return (int(count), int(used)) if count and used else (0, 0)
