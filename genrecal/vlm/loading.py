"""Load any vision-language model that transformers' AutoModelForImageTextToText knows, or a language model, split as body
and head."""

import contextlib
import hashlib
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import ImageRef, Message
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.vlm.batch_proof import why_alone
from genrecal.vlm.internvl_chat import load_original_processor, original_layout
from genrecal.vlm.rendering import Encoded, PromptOptions, Renderer

# What families call the numbers that follow their head, by what is done with them.
SOFTCAP_NAMES = ("final_logit_softcapping", "final_logit_softcap", "logits_soft_cap")
SCALE_NAMES = ("logit_scale", "output_multiplier", "output_multiplier_scale", "lm_head_multiplier")
DIVISOR_NAMES = ("logits_scaling", "logits_scale")


@contextlib.contextmanager
def without_video_processors() -> Iterator[None]:
    """Where torchvision is absent, build and load processors without their video half.

    Every video processor of transformers 5 needs torchvision, and the processors of most families contain one, so that
    without torchvision they can neither be built nor loaded. Images and text do not need it.
    """
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        yield
        return
    original = ProcessorMixin.__dict__["get_attributes"]

    def get_attributes(cls: type) -> list[str]:
        return [name for name in original.__get__(None, cls)() if name != "video_processor"]

    ProcessorMixin.get_attributes = classmethod(get_attributes)
    try:
        yield
    finally:
        ProcessorMixin.get_attributes = original


def image_backend() -> str:
    """The library that resizes pictures here: PIL and torchvision give pixels that differ by up to 0.18 normalised."""
    from transformers.utils import is_torchvision_available

    return "torchvision" if is_torchvision_available() else "pil"


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model's own processor; a language model's tokenizer, whatever processor its files name.

    Raises ModelError if it cannot be loaded. One loaded without its video half refuses to be saved: its folder would not
    load where torchvision exists. Export copies the base model's files instead.
    """
    from transformers import AutoProcessor, AutoTokenizer

    model_folder(path)  # asks once whether there is such a model; transformers would ask for each file, again and again
    try:
        with without_video_processors(), _quiet():
            if original_layout(path) is not None:
                return load_original_processor(path, trust_remote_code=trust_remote_code)
            if _is_language_model(path):
                return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        # A processor that finds no torchvision says so, lacks an argument, or is given its parts in another order.
        if image_backend() == "pil" and re.search(
            "torchvision|video_processor|Received a dict for argument", str(error)
        ):
            needs = "torchvision and num2words" if "video_processor" in str(error) else "torchvision"
            raise ModelError(
                f"{path}: its processor needs {needs}; `genrecal doctor` says how to install them"
            ) from None
        raise ModelError(f"{path}: its processor cannot be loaded: {first_line(error)}") from None
    if image_backend() == "pil" and "video_processor" in getattr(type(processor), "get_attributes", list)():

        def refuse(*_: Any, **__: Any) -> None:
            raise ModelError("this processor was loaded without its video half and must not be saved; copy the files")

        processor.save_pretrained = refuse
    return processor


def _is_language_model(path: str | Path) -> bool:
    """Whether a folder's config is one of transformers' own that take text alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        kind = type(AutoConfig.from_pretrained(path))
    except Exception:  # no config, or one with code of its own
        return False
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_renderer(
    path: str | Path, options: PromptOptions | None = None, *, trust_remote_code: bool = False
) -> Renderer:
    """The renderer of a model folder or hub name. Raises ModelError and UsageError, which name it, as `Renderer` does."""
    processor = load_processor(path, trust_remote_code=trust_remote_code)
    try:
        return Renderer(processor, options)
    except (ModelError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None
    except SampleError as error:  # not even a probe can be rendered
        raise ModelError(f"{path}: {error}") from None


SPLIT = "split"  # the device of a model that is spread over all of a machine's GPUs


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UsageError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def placement(name: str) -> torch.device | str:
    """A device by its name, or "split" as it is, for `load_vlm`. Raises UsageError as `resolve_device` does."""
    return SPLIT if name == SPLIT else resolve_device(name)


@dataclass(frozen=True, kw_only=True)
class VLM:
    """A model split where genrecal needs it: `transform(head(body(x))) == model(x).logits`, bit for bit.

    Args:
        path: where it was loaded from.
        model: the stock model; body: its part up to and including the final norm; head: its `lm_head`.
        transform: what follows the head, found by test.
        renderer: conversations -> tokens and batches.
    """

    path: str
    model: Any
    body: nn.Module
    head: nn.Linear
    transform: LogitTransform
    renderer: Renderer

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """D, the width of the head's input."""
        return int(self.head.weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embeddings (a split model's head may stand elsewhere)."""
        return self.model.get_input_embeddings().weight.device

    def frozen_head(self) -> FrozenHead:
        """The head with what follows it, sharing the model's tensors."""
        weight, bias = self.head.weight.detach(), self.head.bias
        return FrozenHead(
            weight=weight,
            bias=None if bias is None else bias.detach(),
            transform=self.transform,
            vocab_size=min(len(self.renderer.tokenizer), weight.shape[0]),
        )

    def hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The body's output `[B, L, D]` for a collated batch, on the model's device."""
        return self.body(**self.on_device(inputs), use_cache=False).last_hidden_state

    def states(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """The body's output `[B, L, D]` for conversations, which run together or each alone; rows past a conversation's end
        mean nothing."""
        return pad_states([self.hidden(inputs) for inputs in self.renderer.batches(batch)])

    def on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch; floating tensors take the model's dtype."""
        dtype = self.head.weight.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }


def load_vlm(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    attention: str | None = None,
    prompt: PromptOptions | None = None,
) -> VLM:
    """Load a model folder (or hub name) and find its parts.

    Args:
        dtype: "auto" takes the checkpoint's.
        device: a torch device, or "split" to spread the layers over all GPUs of the machine (transformers'
            `device_map="auto"`), for a model that one does not hold.
        attention: transformers' `attn_implementation`; None lets it choose.
        trust_remote_code: run Python that comes with the checkpoint; never done without being asked for.
        prompt: how conversations are rendered.

    Raises:
        ModelError: the folder is not a model that AutoModelForImageTextToText knows, nor a language model; its chat
            template cannot be split into turns, or nothing known makes its logits from its head's output. The message is
            the reason.
    """
    placed = "auto" if device == SPLIT else None
    model = _load_model(
        path, dtype=dtype, device_map=placed, attn_implementation=attention, trust_remote_code=trust_remote_code
    )
    renderer = load_renderer(path, prompt, trust_remote_code=trust_remote_code)
    if device != SPLIT:
        model.to(device)
    return split_vlm(model.eval(), renderer, path=str(path))


def empty_model(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model without its weights, on the device "meta": of these, only the headers are read. Raises as `load_vlm`."""
    return _load_model(path, dtype="auto", device_map="meta", trust_remote_code=trust_remote_code)


def _load_model(path: str | Path, *, trust_remote_code: bool, **options: Any) -> Any:
    """A model by its own class, all of whose tensors are in its files."""
    from transformers import AutoConfig

    if not (model_folder(path) / "config.json").exists():
        raise ModelError(f"{path}: expected a model folder, found no config.json in it")
    if (layout := original_layout(path)) is not None:
        raise ModelError(
            f"{path}: transformers has no class for the original {layout.model_type} layout; {layout.instead}, or cache it as "
            "a teacher with --backend vllm"
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, info = auto_class(config).from_pretrained(
                path, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
    except Exception as error:
        raise ModelError(f"{path}: the model cannot be loaded: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path}: its files lack {len(missing)} tensors of {type(model).__name__}, the first {missing[0]}; transformers "
            "would put random numbers there: look whether all files are there, and of this model"
        )
    return model


def auto_class(config: Any) -> Any:
    """transformers' class that builds the model of a config: AutoModelForCausalLM for one that names itself a language
    model and that AutoModelForImageTextToText does not know."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    names = config.architectures or ()
    is_text = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    is_text = is_text and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def split_vlm(model: Any, renderer: Renderer, *, path: str = "") -> VLM:
    """Split an already built model; see `load_vlm`."""
    body, head = model.base_model, model.get_output_embeddings()
    if body is model or not isinstance(head, nn.Linear):
        raise ModelError(f"{path}: {type(model).__name__} has no language-model head apart from its body")
    transform = find_logit_transform(model, body, head, renderer)
    vlm = VLM(path=path, model=model, body=body, head=head, transform=transform, renderer=renderer)
    try:
        renderer.alone, renderer.writes_alone = why_alone(vlm.text_config, renderer, vlm.hidden, device=vlm.device.type)
    except (ModelError, SampleError) as error:
        raise ModelError(f"{path}: {type(model).__name__}: {error}") from None
    if renderer.writes_alone:
        what = "conversation runs" if renderer.alone else "answer is written"
        sys.stderr.write(f"genrecal: {path}: each {what} alone, which is slower: {renderer.writes_alone}\n")
    return vlm


def pad_states(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """States `[B, L, D]` of several forward passes -> one tensor, padded on the right with zeros."""
    rows = [row for part in parts for row in part]
    return parts[0] if len(parts) == 1 else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def find_logit_transform(model: Any, body: nn.Module, head: nn.Linear, renderer: Renderer) -> LogitTransform:
    """What the model does after its head, by trying on a real forward; the config alone is not believed.

    (Gemma3ForConditionalGeneration of transformers 5.23 has a softcap in its config and does not apply it.)
    Raises ModelError if no known combination gives the model's own logits bit for bit.
    """
    parts = (ImageRef(0), "What is shown?") if renderer.takes_pictures else ("What is it?",)
    picture = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    pictures = [picture] if len(parts) == 2 else []
    messages = [Message(role="user", parts=parts), Message(role="assistant", parts=("a red square",))]
    inputs = renderer.collate([renderer.encode_messages(messages, pictures)])
    _check_ids(model, inputs["input_ids"], renderer, pictured=bool(pictures))
    device, dtype = model.get_input_embeddings().weight.device, head.weight.dtype
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    try:
        logits = model(**inputs, use_cache=False).logits
        raw = head(body(**inputs, use_cache=False).last_hidden_state)
    except Exception as error:  # an encoder-decoder, say, or the processor of another model
        raise ModelError(
            f"{type(model).__name__} cannot run a rendered conversation through its body: {first_line(error)}; expected the "
            f"tokenizer's and processor's files of this model, got a {type(renderer.processor).__name__}"
        ) from None
    if logits.shape != raw.shape:
        raise ModelError(
            f"{type(model).__name__}: its logits have {logits.shape[-1]} columns but its head {raw.shape[-1]} rows"
        )
    for transform in _candidate_transforms(model.config):
        if torch.equal(transform(raw), logits):
            return transform
    worst = (raw.float() - logits.float()).abs().max().item()
    raise ModelError(
        f"{type(model).__name__}: its logits are not its head's output, nor that output scaled or softcapped as its "
        f"config says (largest difference {worst:.3g}); hidden states alone would not reproduce this teacher"
    )


def _check_ids(model: Any, ids: torch.Tensor, renderer: Renderer, *, pictured: bool) -> None:
    """Raises ModelError for ids of another model's tokenizer or processor (a GPU would only say "device-side assert")."""
    rows, token = model.get_input_embeddings().weight.shape[0], image_token_id(model.config)
    got = f"got those of a {type(renderer.processor).__name__}"
    expected = f"{type(model).__name__}: expected the tokenizer's and processor's files of this model, {got}"
    if int(ids.max()) >= rows:
        raise ModelError(f"{expected}: they give token id {int(ids.max())}, and its embeddings have {rows} rows")
    if pictured and token is not None and not (ids == token).any():
        raise ModelError(f"{expected}: they put no image token of its config (id {token}) where a picture is")


def _candidate_transforms(config: Any) -> Iterator[LogitTransform]:
    """Every combination of what the text config mentions, the simplest first."""

    def values(names: tuple[str, ...], absent: float | None) -> list[Any]:
        places = (config.get_text_config(), config)
        found = [getattr(place, name, None) for place in places for name in names]
        return [absent, *dict.fromkeys(float(value) for value in found if value)]

    for divisor, scale, softcap in itertools.product(
        values(DIVISOR_NAMES, 1.0), values(SCALE_NAMES, 1.0), values(SOFTCAP_NAMES, None)
    ):
        yield LogitTransform(scale=scale, divisor=divisor, softcap=softcap)


def image_token_id(config: Any) -> int | None:
    """The placeholder token that a visual embedding takes the place of, as the config calls it; None if it does not."""
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)


# ----------------------------------------------------------------------------------------------------- files and digests

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", ".onnx", ".onnx_data", ".ot", ".tflite",
)  # fmt: skip
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "image_processor_config.json",
)  # fmt: skip


def is_weight_file(path: Path) -> bool:
    """Whether a file of a model folder holds weights, or the index of files that do."""
    return path.name.endswith(WEIGHT_SUFFIXES)


def model_folder(path: str | Path) -> Path:
    """The local folder of a model: itself, or the hub's snapshot for a hub name (without its weights if absent)."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") > 1 or str(path).startswith((".", "/", "~")) or not str(path):
        raise ModelError(f"{path}: no such folder; expected a model folder, or a hub model as OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), ignore_patterns=[f"*{suffix}" for suffix in WEIGHT_SUFFIXES]))
    except Exception as error:
        raise ModelError(f"{path}: neither a model folder nor a reachable hub model: {first_line(error)}") from None


def processor_files(folder: Path) -> list[Path]:
    """The tokenizer, chat template and processor files that stand in a model folder."""
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]


def file_digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """What an error says first, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No per-file progress bars and no notes on slow image processors while loading."""
    from transformers.utils import logging as library_logging

    level = library_logging.get_verbosity()
    library_logging.set_verbosity(logging.ERROR)
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_logging.set_verbosity(level)
