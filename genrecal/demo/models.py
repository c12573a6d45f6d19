"""The demo's two small vision-language models: stock transformers classes, only the sizes are unusual.

Teacher and student are as different as the method has to cope with: Qwen2-VL with a byte-level vocabulary and pictures
of variable size against InternVL with a sentencepiece-like vocabulary and pictures of one fixed size; other widths,
other vocabularies, other splits of the same text.

The default initialisation of transformers (standard deviation 0.02, layer scale 0.1) does not learn at a width of 100
within a few thousand steps, so `initialise` scales every weight by its fan-in.
"""

import copy
import json
import math
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from genrecal.vlm.loading import without_video_processors

END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
MAX_POSITIONS = 4096
MAX_NEW_TOKENS = 64

TEACHER_VOCABULARY = 700
TEACHER_PATCH = 16
TEACHER_MERGE = 2
TEACHER_MAX_IMAGE_TOKENS = 64
STUDENT_VOCABULARY = 520
STUDENT_IMAGE = 48
STUDENT_PATCH = 12
STUDENT_DOWNSAMPLE = 0.5
STUDENT_IMAGE_TOKENS = int((STUDENT_IMAGE // STUDENT_PATCH) ** 2 * STUDENT_DOWNSAMPLE**2)

# One template for both kinds of content (a string, or a list of parts); only the image's marks differ by family.
_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}{{- 'IMAGE_MARK' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEACHER_TEMPLATE = _TEMPLATE.replace("IMAGE_MARK", "<|vision_start|><|image_pad|><|vision_end|>")
STUDENT_TEMPLATE = _TEMPLATE.replace("IMAGE_MARK", "<IMG_CONTEXT>\n")


@dataclass(frozen=True)
class Vlm:
    """A model with the processor that feeds it."""

    model: transformers.PreTrainedModel
    processor: transformers.ProcessorMixin


# ------------------------------------------------------------------------------------------------------- tokenizers


def teacher_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen has: any text is bytes, a word usually one token with the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", START_OF_TURN, END_OF_TURN]
    specials += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER_VOCABULARY - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        additional_special_tokens=specials[1:2] + specials[3:],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=TEACHER_TEMPLATE,
    )


def student_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Sentencepiece-like BPE, as InternLM2 and Llama have: "▁" for a space, single digits, unknown letters as bytes.

    The byte tokens have to be ordinary entries of the vocabulary (as special ones they would be matched in the text
    and dropped when decoding), which the trainer cannot do; so its merges are put into a vocabulary built here.
    As with every tokenizer of this kind a literal "▁" comes back as a space; any other text comes back unchanged.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    control = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    specials = [START_OF_TURN, END_OF_TURN, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = splitter
    size = STUDENT_VOCABULARY - len(control) - len(bytes_) - len(specials)
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    trained = json.loads(learned.to_str())["model"]
    pieces = control + bytes_ + sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control + specials])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=END_OF_TURN,
        pad_token="</s>",
        additional_special_tokens=[START_OF_TURN],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=STUDENT_TEMPLATE,
    )


# ----------------------------------------------------------------------------------------------------------- models


def teacher_config(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2VLConfig:
    """About 1.6 million parameters; a picture of 64 x 64 pixels is four tokens."""
    ident = tokenizer.convert_tokens_to_ids
    return transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            # the three sections have to add up to half the head's width
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 128,
            "num_heads": 3,
            "mlp_ratio": 3,
            "patch_size": TEACHER_PATCH,
            "spatial_merge_size": TEACHER_MERGE,
        },
        image_token_id=ident("<|image_pad|>"),
        video_token_id=ident("<|video_pad|>"),
        vision_start_token_id=ident("<|vision_start|>"),
        vision_end_token_id=ident("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def student_config(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.InternVLConfig:
    """About 0.4 million parameters; every picture is resized to 48 x 48 pixels, four tokens."""
    return transformers.InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 224,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [STUDENT_IMAGE, STUDENT_IMAGE],
            "patch_size": [STUDENT_PATCH, STUDENT_PATCH],
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=STUDENT_IMAGE_TOKENS,
        downsample_ratio=STUDENT_DOWNSAMPLE,
        tie_word_embeddings=False,
    )


def teacher_processor(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2VLProcessor:
    """Pictures keep their size up to 64 tokens: 64 x 64 stays as it is, a photographed receipt is made smaller."""
    pixels_per_token = (TEACHER_PATCH * TEACHER_MERGE) ** 2
    image_processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=TEACHER_PATCH,
        merge_size=TEACHER_MERGE,
        size={"shortest_edge": pixels_per_token, "longest_edge": TEACHER_MAX_IMAGE_TOKENS * pixels_per_token},
    )
    with without_video_processors():
        return transformers.Qwen2VLProcessor(
            image_processor=image_processor, tokenizer=tokenizer, chat_template=tokenizer.chat_template
        )


def student_processor(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.InternVLProcessor:
    """Pictures are one tile of a fixed size.

    InternVLProcessor asks for tiles on every call, whatever ``crop_to_patches`` says; one tile at most prevents it.
    """
    image_processor = transformers.GotOcr2ImageProcessorPil(
        size={"height": STUDENT_IMAGE, "width": STUDENT_IMAGE}, crop_to_patches=False, max_patches=1
    )
    with without_video_processors():
        return transformers.InternVLProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            image_seq_length=STUDENT_IMAGE_TOKENS,
            chat_template=tokenizer.chat_template,
        )


def build_teacher(tokenizer: transformers.PreTrainedTokenizerFast) -> Vlm:
    """A freshly initialised teacher (random weights from torch's global generator)."""
    model = transformers.Qwen2VLForConditionalGeneration(teacher_config(tokenizer))
    return _finish(model, teacher_processor(tokenizer))


def build_student(tokenizer: transformers.PreTrainedTokenizerFast) -> Vlm:
    """A freshly initialised student (random weights from torch's global generator)."""
    model = transformers.InternVLForConditionalGeneration(student_config(tokenizer))
    return _finish(model, student_processor(tokenizer))


def _finish(model: transformers.PreTrainedModel, processor: transformers.ProcessorMixin) -> Vlm:
    initialise(model)
    tokenizer = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Vlm(model, processor)


_RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "attn.proj", "projection_layer", "fc2")


def initialise(model: Any) -> None:
    """Give every weight a scale that small widths can learn from; norms and biases keep the library's values."""
    residual = 1 / math.sqrt(2 * model.config.get_text_config().num_hidden_layers)
    for name, parameter in model.named_parameters():
        if "lambda_" in name:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "position_embeddings" in name or "cls_token" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() >= 2:
            gain = 0.5 if "lm_head" in name else residual if any(part in name for part in _RESIDUAL_OUTPUTS) else 1.0
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))


# ---------------------------------------------------------------------------------------------------------- folders


def save(vlm: Vlm, folder: pathlib.Path) -> None:
    """Write a complete Hugging Face folder with the weights in bfloat16.

    Only parameters are cast: ``model.to(torch.bfloat16)`` would also round the rotary frequencies.
    """
    model = copy.deepcopy(vlm.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    with without_video_processors():
        vlm.processor.save_pretrained(folder)
    _add_video_processor(vlm.processor, folder / "processor_config.json")


# What the video half of each processor is called; its settings follow the image half.
_VIDEO_PROCESSORS = {"Qwen2VLProcessor": "Qwen2VLVideoProcessor", "InternVLProcessor": "InternVLVideoProcessor"}
_SHARED_SETTINGS = (
    "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "resample",
    "rescale_factor", "size", "patch_size", "temporal_patch_size", "merge_size",
)  # fmt: skip


def _add_video_processor(processor: transformers.ProcessorMixin, path: pathlib.Path) -> None:
    """Describe the processor's video half in its configuration, although nothing here can build it.

    Video processors need torchvision. A processor saved on a machine without torchvision has no such entry, and then
    fails to load on a machine with it ("Can't load video processor"). With the entry the folder loads on both.
    """
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    image = config["image_processor"]
    video = {name: image[name] for name in _SHARED_SETTINGS if image.get(name) is not None}
    video["video_processor_type"] = _VIDEO_PROCESSORS[type(processor).__name__]
    config["video_processor"] = video
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
