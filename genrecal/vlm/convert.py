"""The original InternVL layout -> transformers' own, so that such a checkpoint can be a student (or a teacher of `hf`).

Weights and config are converted, shard by shard. Tokenizer, chat template and processor are those of a checkpoint that is
in transformers' layout already and has the same vocabulary; that it has is checked, token by token.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from genrecal.errors import ModelError, UsageError
from genrecal.files import temporary_path
from genrecal.folders import refuse_other_content
from genrecal.vlm.checkpoint import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from genrecal.vlm.config_file import read_json
from genrecal.vlm.internvl_chat import InternVLChatProcessor, original_layout
from genrecal.vlm.loading import first_line, load_processor, model_folder, processor_files
from genrecal.vlm.rendering import Renderer

# Patterns of tensor names, original -> transformers'. Text models that are transformers' own keep theirs.
VISION_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.embeddings\.position_embedding", "vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
)
INTERNLM2_NAMES = (
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"^language_model\.output\.", "language_model.lm_head."),
)
TEXT_MODELS = {"qwen2": "qwen2", "llama": "llama", "internlm2": "llama"}  # InternLM2 is a Llama by other names


def convert_internvl(path: str | Path, out: Path, *, processor: str | Path) -> None:
    """Write a checkpoint of the original InternVL layout to the folder `out` in transformers' layout.

    Args:
        path: a folder, or a hub model whose files are fetched.
        processor: a folder or hub model in transformers' layout with the same vocabulary; its tokenizer, template and
            processor files are copied byte for byte.

    Raises:
        UsageError: `out` exists, or the model is of another layout.
        ModelError: a text model that is none of Qwen2, Llama and InternLM2, or another vocabulary, tile size or tensor than
            expected. The message says which.
    """
    from transformers import InternVLConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_other_content(out, "nothing")
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another folder or delete it")
    if original_layout(path) is not InternVLChatProcessor:
        raise UsageError(f"{path}: expected a model of the original InternVL layout (model_type internvl_chat)")
    checkpoint = Checkpoint(path)
    loaded = load_processor(processor)
    if original_layout(processor) is not None or getattr(loaded, "image_seq_length", None) is None:
        raise UsageError(
            f"--processor {processor}: expected an InternVL in transformers' layout, such as InternVL3-1B-hf"
        )
    _check_vocabulary(model_folder(path), loaded.tokenizer, str(processor))
    original = InternVLChatProcessor(loaded.tokenizer, checkpoint.config)
    if original.tokens_a_tile != loaded.image_seq_length:
        raise ModelError(
            f"--processor {processor}: has {loaded.image_seq_length} tokens a tile, {path} has {original.tokens_a_tile}"
        )
    config = InternVLConfig(**_converted_config(checkpoint, original))
    config.architectures = ["InternVLForConditionalGeneration"]
    config.dtype = checkpoint.dtype()
    temporary = temporary_path(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        config.save_pretrained(temporary)
        _write_weights(checkpoint, config, temporary)
        for file in processor_files(model_folder(processor)):
            shutil.copyfile(file, temporary / file.name)
        generation = {"eos_token_id": Renderer(loaded).marks.end_of_turn_id}
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        _check_names(temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"--out {out}: cannot be written: {first_line(error)}; make room and convert again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _converted_config(checkpoint: Checkpoint, original: InternVLChatProcessor) -> dict[str, Any]:
    """transformers' config of the same model."""
    from transformers import CONFIG_MAPPING, InternVLVisionConfig

    config, text, vision = checkpoint.config, dict(checkpoint.text_config), dict(checkpoint.config["vision_config"])
    if config.get("ps_version", "v1") != "v2":
        raise ModelError(f"{checkpoint.path}: ps_version is {config.get('ps_version')!r}; transformers has v2 alone")
    kind = text.pop("model_type", None)
    if kind not in TEXT_MODELS:
        raise ModelError(f"{checkpoint.path}: its text model is {kind!r}; expected one of {', '.join(TEXT_MODELS)}")
    text["attention_bias"] = bool(text.pop("bias", text.get("attention_bias", False)))
    if kind == "qwen2":
        del text["attention_bias"]
    text_class = CONFIG_MAPPING[TEXT_MODELS[kind]]
    if scaling := text.get("rope_scaling"):
        text["rope_scaling"] = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    for old, new in (("qkv_bias", "attention_bias"), ("qk_normalization", "use_qk_norm")):
        vision[new] = bool(vision.pop(old, False))
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return dict(
        text_config=_known(text, text_class(), "rope_theta", "rope_scaling") | {"model_type": TEXT_MODELS[kind]},
        vision_config=_known(vision, InternVLVisionConfig()),
        image_token_id=original.image_token_id,
        image_seq_length=original.tokens_a_tile,
        downsample_ratio=config["downsample_ratio"],
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=bool(tied),
    )


def _known(values: dict[str, Any], config: Any, *legacy: str) -> dict[str, Any]:
    """Those of a config that transformers' class has too; how the model is run or was made is left out."""
    known = {*config.to_dict(), *legacy} - {"_name_or_path", "architectures", "dtype", "model_type", "use_cache"}
    return {
        name: value
        for name, value in values.items()
        if name in known and (value is not None or name.endswith("_token_id"))
    }


def converted_tensors(
    name: str, tensor: torch.Tensor, *, kind: str, heads: int, kv_heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor of the original layout -> those that it is in transformers'.

    Args:
        kind: the text model's `model_type`. heads, kv_heads: of its attention, and of its keys and values.
    """
    if match := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)", name):
        stem = f"vision_tower.encoder.layer.{match[1]}.attention"
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{stem}.{letter}_proj.{match[2]}", part
    elif kind == "internlm2" and (match := re.fullmatch(r"(.*)\.attention\.wqkv\.(weight|bias)", name)):
        # Of every head of the keys: the queries that share it, the key, the value.
        queries = heads // kv_heads
        grouped = tensor.unflatten(0, (kv_heads, queries + 2, -1))
        parts = {"q": grouped[:, :queries], "k": grouped[:, queries], "v": grouped[:, queries + 1]}
        for letter, part in parts.items():
            yield f"{match[1]}.self_attn.{letter}_proj.{match[2]}", part.reshape(-1, *tensor.shape[1:])
    else:
        if not name.startswith("language_model."):
            name = _renamed(name, VISION_NAMES)
        elif kind == "internlm2":
            name = _renamed(name, INTERNLM2_NAMES)
        yield name, tensor


def _renamed(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    for old, new in patterns:
        name = re.sub(old, new, name)
    return name


def _write_weights(checkpoint: Checkpoint, config: Any, folder: Path) -> None:
    """File by file, so that no more than one is in memory."""
    from safetensors.torch import save_file

    kind, text = checkpoint.text_config["model_type"], config.text_config
    files = checkpoint.files()
    weight_map: dict[str, str] = {}
    size = 0
    for number, names in enumerate(files.values(), start=1):
        tensors = {
            new: part.contiguous()
            for name in names
            for new, part in converted_tensors(
                name,
                checkpoint.tensor(name),
                kind=kind,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
            )
        }
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_vocabulary(folder: Path, tokenizer: Any, name: str) -> None:
    """Every token of the original's files has the same id. Raises ModelError naming one that has not."""
    wanted: dict[str, int] = {}
    if (file := folder / "tokenizer.model").is_file():
        from transformers.convert_slow_tokenizer import import_protobuf

        model = import_protobuf().ModelProto.FromString(file.read_bytes())
        wanted |= {piece.piece: number for number, piece in enumerate(model.pieces)}
    if (file := folder / "tokenizer.json").is_file():
        content = read_json(file)
        wanted |= content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    for vocabulary in ("vocab.json", "added_tokens.json"):
        if (file := folder / vocabulary).is_file():
            wanted |= read_json(file)
    if not wanted:
        raise ModelError(f"{folder}: no tokenizer files were found to compare with those of --processor")
    found = tokenizer.get_vocab()
    if wrong := [token for token, number in wanted.items() if found.get(token) != number]:
        raise ModelError(
            f"--processor {name}: has another vocabulary: {len(wrong)} of {len(wanted)} tokens differ, the first "
            f"{wrong[0]!r}: expected id {wanted[wrong[0]]}, got {found.get(wrong[0])}; take one of the same text model"
        )


def _check_names(folder: Path) -> None:
    """transformers finds every tensor in the folder, in the right shape, and no other. No memory is taken for them."""
    from transformers import InternVLForConditionalGeneration

    _, info = InternVLForConditionalGeneration.from_pretrained(folder, device_map="meta", output_loading_info=True)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]):
        raise ModelError(f"{folder}: {len(wrong)} tensors are missing or not expected, the first {wrong[0]}")
