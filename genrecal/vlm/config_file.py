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
