"""Single tensors of a checkpoint, read without building its model: the head and the final norm of a teacher run elsewhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrecal.errors import ModelError
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.vlm.config_file import read_json
from genrecal.vlm.loading import file_digest, is_weight_file, model_folder, processor_files

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What checkpoints call them: transformers' own layouts, and InternLM2's.
HEAD_NAME = "lm_head.weight"
EMBEDDING_NAMES = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight")
INTERNLM_EMBEDDING, INTERNLM_HEAD = "model.tok_embeddings.weight", "output.weight"  # one level up
NORM_NAMES = ("norm", "final_layernorm", "ln_f")


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """The norm between a text model's last layer and its head: weight `[D]`, bias `[D]` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


SAMPLED_BLOCKS, BLOCK_BYTES = 16, 4096  # of each file of weights, for its digest


def model_digests(path: str | Path) -> dict[str, str]:
    """What identifies a model wherever it is: sha256 of config.json, of each tokenizer and processor file, and of the
    weights (names, shapes, sizes and some blocks of each file: all of a large model would take minutes)."""
    folder = model_folder(path)
    files = [folder / "config.json", *processor_files(folder)]
    weights = hashlib.sha256()
    for file in _weight_files(path, folder):
        size = file.stat().st_size
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little") if file.suffix == ".safetensors" else 0
            starts = [8 + min(header, size), *np.linspace(0, max(0, size - BLOCK_BYTES), SAMPLED_BLOCKS).astype(int)]
            opened.seek(0)
            weights.update(f"{file.name} {size} ".encode() + opened.read(starts[0]))
            for start in starts[1:]:
                opened.seek(start)
                weights.update(opened.read(BLOCK_BYTES))
    return {file.name: file_digest(file) for file in files} | {"weights": weights.hexdigest()}


def checkpoint_names(model: Any, names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """What a model's class makes of a checkpoint's tensor names.

    Args:
        model: as transformers loaded it from that checkpoint, on the device "meta" perhaps.
        names: the checkpoint's tensors.

    Returns:
        reads: of each tensor that the class reads, its name in the model (of several that become one, that one's).
        writes: the names that `save_pretrained` gives to the model's tensors.
    """
    from transformers import core_model_loading as loading

    state, transforms = model.state_dict(), list(getattr(model, "_weight_conversions", None) or [])
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    reads = {}
    for name in names:
        for ways in ((renamings, converters), ([], [])):
            own, _ = loading.rename_source_key(name, *ways, model.base_model_prefix, state)
            if own in state:
                reads[name] = own
                break
    kept = {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}
    return reads, set(loading.revert_weight_conversion(model, kept))


def _weight_files(path: str | Path, folder: Path) -> list[Path]:
    """A model's safetensors, fetched if they are a hub model's; without any, the other weights in its folder."""
    try:
        return Checkpoint(path).paths()
    except ModelError:
        return sorted(file for file in folder.iterdir() if is_weight_file(file))


class Checkpoint:
    """A model folder's or a hub model's safetensors, opened by tensor name.

    Raises ModelError if there are none: other formats would have to be unpickled.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        index = self._file(WEIGHTS_INDEX)
        if index is not None:
            self._file_of: dict[str, str] = read_json(index)["weight_map"]
        elif self._file(WEIGHTS) is not None:
            self._file_of = dict.fromkeys(self._names_in(WEIGHTS), WEIGHTS)
        else:
            raise ModelError(
                f"{path}: expected {WEIGHTS} or {WEIGHTS_INDEX}, found neither; its head cannot be read. "
                "Save the model as safetensors first"
            )
        self.config: dict[str, Any] = read_json(self._needed("config.json"))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype of the file, on the CPU."""
        from safetensors import safe_open

        with safe_open(self._needed(self._file_of[name]), "pt") as file:
            return file.get_tensor(name)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._file_of)

    def shapes(self) -> dict[str, list[int]]:
        """Of all tensors, from the files' headers."""
        from safetensors import safe_open

        found: dict[str, list[int]] = {}
        for file, names in self.files().items():
            with safe_open(self._needed(file), "pt") as opened:
                found |= {name: list(opened.get_slice(name).get_shape()) for name in names}
        return found

    def paths(self) -> list[Path]:
        """Its files of weights on this machine."""
        return [self._needed(file) for file in sorted(set(self._file_of.values()))]

    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        names: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            names.setdefault(file, []).append(name)
        return names

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the text model."""
        names = ("text_config", "llm_config", "language_config")
        return next((self.config[name] for name in names if isinstance(self.config.get(name), dict)), self.config)

    def dtype(self) -> torch.dtype:
        """The dtype that config.json says the weights are in; float32 if it says nothing."""
        for config in (self.config, self.text_config):
            name = config.get("dtype") or config.get("torch_dtype")
            if isinstance(getattr(torch, str(name), None), torch.dtype):
                return getattr(torch, str(name))
        return torch.float32

    def head(self, *, dtype: torch.dtype, vocab_size: int, transform: LogitTransform) -> FrozenHead:
        """The language-model head, which may be the input embedding.

        Args:
            dtype: what the teacher runs in.
            vocab_size: ids that the tokenizer knows.
            transform: what follows the head; a checkpoint does not say.

        Raises:
            ModelError: it cannot be told which tensor is the head.
        """
        heads, embeddings = self._ending((HEAD_NAME,)), self._ending(EMBEDDING_NAMES)
        if not heads:
            named = [name.removesuffix(INTERNLM_EMBEDDING) + INTERNLM_HEAD for name in embeddings]
            heads = [name for name in named if name in self._file_of]
        tied = bool(self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings", False)))
        candidates = heads or embeddings
        if len(candidates) != 1:
            raise ModelError(
                f"{self.path}: expected one tensor named like {HEAD_NAME}, found {', '.join(candidates) or 'none'}; "
                "the head cannot be read"
            )
        weight = self.tensor(candidates[0])
        if heads and tied and len(embeddings) == 1 and not torch.equal(weight, self.tensor(embeddings[0])):
            raise ModelError(
                f"{self.path}: config.json says that head and embedding are one (tie_word_embeddings), but {heads[0]} and "
                f"{embeddings[0]} differ; correct the config"
            )
        bias_name = candidates[0].removesuffix("weight") + "bias"
        bias = self.tensor(bias_name).to(dtype) if heads and bias_name in self._file_of else None
        weight = weight.to(dtype)
        return FrozenHead(weight=weight, bias=bias, transform=transform, vocab_size=min(vocab_size, weight.shape[0]))

    def final_norm(self) -> FinalNorm | None:
        """The text model's final norm: it stands beside the input embedding. None if it is called otherwise."""
        for embedding in self._ending(EMBEDDING_NAMES):
            stem = embedding.removesuffix("weight").rpartition(".")[0].rpartition(".")[0]
            for name in (f"{stem}.{norm}" if stem else norm for norm in NORM_NAMES):
                if f"{name}.weight" in self._file_of:
                    bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self._file_of else None
                    return FinalNorm(weight=self.tensor(f"{name}.weight"), bias=bias)
        return None

    def _ending(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in self._file_of if any(name == n or name.endswith(f".{n}") for n in names)]

    def _names_in(self, file: str) -> list[str]:
        from safetensors import safe_open

        with safe_open(self._needed(file), "pt") as opened:
            return list(opened.keys())

    def _needed(self, name: str) -> Path:
        file = self._file(name)
        if file is None:
            raise ModelError(f"{self.path}: expected {name}, found none")
        return file

    def _file(self, name: str) -> Path | None:
        if Path(self.path).is_dir():
            file = Path(self.path) / name
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.path, name))
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise ModelError(f"{self.path}: {name} cannot be downloaded: {error}") from None
