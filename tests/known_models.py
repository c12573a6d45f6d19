"""Published configs of the paper's students, without weights: sizes as on the hub, in transformers' own layout."""

import json
from pathlib import Path
from typing import Any

QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen2_vl(
    width: int, intermediate: int, heads: int, key_heads: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    text = {
        "model_type": "qwen2_vl_text", "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": 28,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 32768, "rope_parameters": QWEN_ROPE, "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {"model_type": "qwen2_vl_vision", "depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16}
    return {
        "model_type": "qwen2_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }  # fmt: skip


def _internvl(
    kind: str, width: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> Any:
    text = {
        "model_type": kind, "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
    }  # fmt: skip
    return {
        "model_type": "internvl", "text_config": text, "vision_config": vision, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip


# Name -> config, and the billions of parameters that the hub shows.
STUDENTS: dict[str, tuple[dict[str, Any], float]] = {
    "qwen2-vl-2b": (_qwen2_vl(1536, 8960, 12, 2, 151_936, tied=True), 2.21),
    "qwen2-vl-7b": (_qwen2_vl(3584, 18_944, 28, 4, 152_064, tied=False), 8.29),
    "internvl2.5-1b": (_internvl("qwen2", 896, 4864, 24, 14, 2, 151_674), 0.938),
    "internvl2.5-2b": (_internvl("llama", 2048, 8192, 24, 16, 8, 92_553), 2.21),
    "internvl2.5-4b": (_internvl("qwen2", 2048, 11_008, 36, 16, 2, 151_674), 3.71),
    "internvl2.5-8b": (_internvl("llama", 4096, 14_336, 32, 32, 8, 92_553), 8.08),
}


def make_known(name: str, folder: Path) -> Path:
    """A folder that holds config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STUDENTS[name][0]))
    return folder
