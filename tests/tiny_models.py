"""Tiny models of the real architecture classes with real tokenizers and processors, made in a second and offline.

`make(family, folder)` writes a complete Hugging Face folder. Weights are random; everything else is as in the released
models of that family, only smaller.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from genrecal.vlm.loading import without_video_processors

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is shown in the image? A red square and a blue circle.",
    "user assistant system You are a helpful assistant.",
    "How many bars are there? 0 1 2 3 4 5 6 7 8 9 (A) (B) (C) (D)",
    "Which company issued this receipt? What is the total amount?",
] * 20

# Chat templates as released, where a part on tools is left out and `IMAGE` stands for the family's own placeholder.
QWEN2 = (  # Qwen2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_VL = (  # and Qwen2.5-VL
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = """\
{%- set image_count = namespace(value=0) %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                {%- set image_count.value = image_count.value + 1 %}
                {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
INTERNVL = (  # InternVL3 in transformers' layout
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ 'IMAGE\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS3 = (  # SmolVLM begins with <|im_start|>
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
QWEN3 = """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n') %}
                {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
                {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = (  # it writes the token that its tokenizer would add too
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_VL = (  # the same with images in it: no InternVL on Llama 3 is released in transformers' layout
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'IMAGE\n' }}{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096,
)  # fmt: skip
# vLLM's attention on CPUs takes heads of 32 and more; two kv heads can be spread over two workers.
WIDE_TEXT = TEXT | dict(hidden_size=64, num_attention_heads=2)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


# How the released tokenizers cut a text into words: they differ in how many digits make one.
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_bpe(specials: list[str], *, vocab_size: int = 400, like: str | None = None) -> Tokenizer:
    """A byte-level BPE; `like` "qwen2" (NFC, digit by digit) or "llama3" (digits by threes, a token before the text)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=like == "llama3"))
    if like is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = Regex(CUT.replace("DIGITS", "{1,3}" if like == "llama3" else ""))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(cut, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if like == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Qwen's joins the end of a mark in plain text with the line break after it.
    corpus = CORPUS + (["<image>\n </Image>\n <tile_1>"] * 40 if like == "qwen2" else [])
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    )
    if like == "llama3":
        begin = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer


def sentencepiece_bpe(specials: list[str], *, vocab_size: int = 420) -> Tokenizer:
    """A Llama-2- or InternLM2-like BPE: spaces as U+2581, a dummy space before the text, bytes for what it lacks."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next")])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", *specials, *byte_tokens])
    )
    import json

    content = json.loads(trained.to_str())
    content["model"]["byte_fallback"] = True
    content["model"]["unk_token"] = "<unk>"
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in byte_tokens]
    content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def fast(
    backend: Tokenizer, template: str, *, specials: list[str], eos: str = "<|im_end|>", **kwargs: Any
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        padding_side="right",
        model_max_length=4096,
        **kwargs,
    )
    tokenizer.chat_template = template
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, *, wide: bool = False, **kwargs: Any) -> dict[str, Any]:
    return dict(
        WIDE_TEXT if wide else TEXT,
        vocab_size=kwargs.pop("rows", len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )


def _image_processor(name: str, **kwargs: Any) -> Any:
    plain = transformers.utils.is_torchvision_available()
    return getattr(transformers, name if plain else f"{name}Pil")(**kwargs)


def _video_processor(name: str, **kwargs: Any) -> Any:
    return getattr(transformers, name)(**kwargs) if transformers.utils.is_torchvision_available() else None


def qwen_vl(
    version: str,
    *,
    head_rows_past_tokenizer: int = 0,
    wide: bool = False,
    like: str | None = None,
    tied: bool = True,
    **sizes: int,
) -> tuple[Any, Any]:
    specials = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = QWEN3_VL if version == "3" else QWEN2_VL
    backend = byte_bpe(["<|endoftext|>", "<|im_end|>", *specials], like=like)
    tokenizer = fast(backend, template, specials=specials)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(("vision_start", "vision_end", "image", "video"), specials[1:], strict=True)
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6] if wide else [1, 1, 2]}
    text = _text(tokenizer, wide=wide, rope_parameters=rope, rows=len(tokenizer) + head_rows_past_tokenizer) | sizes
    out = text["hidden_size"]
    patch = 14
    if version == "2":
        vision = dict(depth=1, embed_dim=32, hidden_size=out, num_heads=2, mlp_ratio=2, patch_size=patch)
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        model: Any = transformers.Qwen2VLForConditionalGeneration(config)
        processor_class: Any = transformers.Qwen2VLProcessor
    elif version == "2.5":
        vision = dict(
            depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=out, num_heads=2, patch_size=patch,
            window_size=56, fullatt_block_indexes=[1],
        )  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        processor_class = transformers.Qwen2_5_VLProcessor
    else:
        patch = 16
        text |= dict(head_dim=8, rope_parameters=rope | {"mrope_interleaved": True, "mrope_section": [2, 1, 1]})
        vision = dict(
            depth=3, hidden_size=32, intermediate_size=64, out_hidden_size=32, num_heads=2, patch_size=patch,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        )  # fmt: skip
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        model = transformers.Qwen3VLForConditionalGeneration(config)
        processor_class = transformers.Qwen3VLProcessor
    size = {"shortest_edge": (2 * patch) ** 2 * 2, "longest_edge": (2 * patch) ** 2 * 8}
    processor = processor_class(
        image_processor=_image_processor("Qwen2VLImageProcessor", patch_size=patch, size=size),
        tokenizer=tokenizer,
        video_processor=_video_processor("Qwen2VLVideoProcessor", patch_size=patch),
        chat_template=tokenizer.chat_template,
    )
    return model, processor


# The two encoders of InternVL: that of the students, and that of the teachers with its 6 billion parameters.
INTERN_VIT_300M = dict(VISION, attention_bias=True)
INTERN_VIT_6B = dict(VISION, hidden_size=40, num_attention_heads=5, norm_type="rms_norm", use_qk_norm=True)


def internvl(
    text_model: str,
    *,
    wide: bool = False,
    like: str | None = None,
    vision: dict[str, Any] = VISION,
    marks: tuple[str, str, str] = ("<img>", "</img>", "<IMG_CONTEXT>"),
    **text: Any,
) -> tuple[Any, Any]:
    """InternVL with Qwen2 text and byte-level BPE, or Llama text and a sentencepiece-like BPE (as InternLM2 has).

    Args:
        like: the tokenizer's kind where it is another, with the template that goes with it: "qwen2" or "llama3".
        marks: the tokens before, after and in the place of a picture.
        vision, text: settings of the encoder, and of the text model over those of every tiny one.
    """
    eos = "<|eot_id|>" if like == "llama3" else "<|im_end|>"
    specials = ["<|start_header_id|>", "<|end_header_id|>"] if like == "llama3" else ["<|im_start|>"]
    template = (LLAMA3_VL if like == "llama3" else INTERNVL).replace("IMAGE", marks[2])
    base = ["<|endoftext|>", eos, *specials]
    if text_model == "llama" and like is None:
        backend = sentencepiece_bpe(base)
    elif like == "llama3":
        backend = byte_bpe(["<|begin_of_text|>", *base], like=like)
    else:
        backend = byte_bpe(base, vocab_size=360, like=like)
    names = ("start_image_token", "end_image_token", "context_image_token")
    extra = dict(zip(names, marks, strict=True)) | {"video_token": "<video>"}
    begin = {"bos_token": "<|begin_of_text|>"} if like == "llama3" else {}
    tokenizer = fast(backend, template, specials=specials, eos=eos, extra_special_tokens=extra, **begin)
    config = transformers.InternVLConfig(
        text_config=_text(tokenizer, wide=wide, model_type=text_model) | text,
        vision_config=dict(vision, image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    imagenet = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]) if wide else {}
    processor = transformers.InternVLProcessor(
        image_processor=_image_processor(
            "GotOcr2ImageProcessor", size=size, crop_to_patches=True, min_patches=1, max_patches=4, **imagenet
        ),
        tokenizer=tokenizer,
        video_processor=_video_processor("InternVLVideoProcessor", size=size),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


# The code that comes with a checkpoint, as far as its config goes.
ORIGINAL_CONFIG = """
from transformers import PretrainedConfig, TEXTConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class ChatConfig(PretrainedConfig):
    model_type = "MODEL_TYPE"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = TEXTConfig(**(llm_config or {}))
        super().__init__(**kwargs)
"""
NVLM_DUMMY_HEADS = 7  # of the encoder: zeros, so that GPUs can share the heads evenly


def make_original(native: Path, folder: Path, *, nvlm: bool = False) -> Path:
    """An InternVL of transformers' layout in its original one, or in NVLM-D's: the same weights by other names, with code of
    its own. One with a sentencepiece-like tokenizer has InternLM2's text model."""
    import json
    import re
    import shutil

    from safetensors.torch import load_file, save_file

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    names = [
        (r"^vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
        (r"^vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding"),
        (r"^vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
        (r"^vision_tower.encoder.layer.", "vision_model.encoder.layers."),
        (r"attention.projection_layer", "attn.proj"),
        (r"attention.([qk])_norm", r"attn.\1_norm"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"lambda_", "ls"),
        (r"^multi_modal_projector.layer_norm", "mlp1.0"),
        (r"^multi_modal_projector.linear_1", "mlp1.1"),
        (r"^multi_modal_projector.linear_2", "mlp1.3"),
    ]
    config = json.loads((native / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    llm_config = text
    head_dim = vision["hidden_size"] // vision["num_attention_heads"]

    def padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """With the dummy heads' zeros."""
        shape = list(tensor.shape)
        shape[dim] = (NVLM_DUMMY_HEADS if nvlm else 0) * head_dim
        return torch.cat([tensor, tensor.new_zeros(shape)], dim)

    tensors, parts = {}, {}
    for name, tensor in load_file(native / "model.safetensors").items():
        for old, new in names:
            name = re.sub(old, new, name)
        if match := re.fullmatch(r"(.*)\.attention\.([qkv])_proj\.(weight|bias)", name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = padded(tensor, 0)
        elif nvlm and re.fullmatch(r"mlp1\.[13]\.bias", name):
            assert not tensor.any()  # its projector has none
        elif re.search(r"attn\.(proj\.weight|[qk]_norm)", name):
            tensors[name] = padded(tensor, -1)
        else:
            tensors[name] = tensor
    tokenizer = json.loads((native / "tokenizer.json").read_text())
    internlm2 = tokenizer["model"]["byte_fallback"]
    if internlm2:
        tensors = _internlm2(tensors, text)
        llm_config = {k: v for k, v in text.items() if k not in ("attention_bias", "rope_parameters")} | INTERNLM2_KEYS
    for (stem, kind), qkv in parts.items():
        tensors[f"{stem}.attn.qkv.{kind}"] = torch.cat([qkv[letter] for letter in "qkv"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "NVLM_D" if nvlm else "internvl_chat"
    text_class = {"qwen2": "Qwen2", "llama": "Llama"}[text["model_type"]]
    code = ORIGINAL_CONFIG.replace("MODEL_TYPE", kind).replace("TEXT", text_class)
    (folder / "configuration_chat.py").write_text(code)
    written = dict(
        architectures=["NVLM_D" if nvlm else "InternVLChatModel"], model_type=kind, dtype="float32",
        auto_map={"AutoConfig": "configuration_chat.ChatConfig"}, tie_word_embeddings=False,
        llm_config={"architectures": [f"{text_class}ForCausalLM"]} | llm_config,
        vision_config=dict(
            architectures=["InternVisionModel"], model_type="intern_vit_6b", hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"], num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"], image_size=56, patch_size=14, num_channels=3,
            qkv_bias=vision["attention_bias"], qk_normalization=vision["use_qk_norm"], norm_type=vision["norm_type"],
            layer_norm_eps=vision["layer_norm_eps"], hidden_act="gelu", initializer_factor=0.1, use_flash_attn=False,
        ),
        downsample_ratio=0.5, dynamic_image_size=True, force_image_size=56, max_dynamic_patch=4, min_dynamic_patch=1,
        use_thumbnail=True, ps_version="v2", select_layer=-1, template="internvl2_5",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(native / name, folder / name)
    if internlm2:
        _sentencepiece_files(tokenizer, folder)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config.pop("processor_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    template = (native / "chat_template.jinja").read_text()
    template = template.replace("{% if message['content'] is string %}", "{% if true %}")  # as the original's
    (folder / "chat_template.jinja").write_text(template)
    return folder


INTERNLM2_KEYS = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}  # fmt: skip


def _internlm2(tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Llama's tensors as InternLM2 has them: the rows of each key head after those of the queries that share it."""
    names = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings", "language_model.lm_head": "language_model.output",
    }  # fmt: skip
    size = text["hidden_size"] // text["num_attention_heads"]
    shared = text["num_attention_heads"] // text["num_key_value_heads"]
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("self_attn.q_proj.weight"):
            stem = name.removesuffix("self_attn.q_proj.weight")
            queries, keys, values = (tensors[f"{stem}self_attn.{letter}_proj.weight"].split(size) for letter in "qkv")
            rows = []
            for head, (key, value) in enumerate(zip(keys, values, strict=True)):
                rows += [*queries[head * shared : (head + 1) * shared], key, value]
            result[f"{stem}attention.wqkv.weight"] = torch.cat(rows)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            result[name] = tensor
    return result


def _sentencepiece_files(tokenizer: dict[str, Any], folder: Path) -> None:
    """What such a checkpoint ships in place of tokenizer.json: pieces, and tokens that were added to them."""
    import json

    from transformers.convert_slow_tokenizer import import_protobuf

    protobuf = import_protobuf()
    vocabulary = tokenizer["model"]["vocab"]
    pieces = [protobuf.ModelProto.SentencePiece(piece=piece) for piece in sorted(vocabulary, key=vocabulary.get)]
    (folder / "tokenizer.model").write_bytes(protobuf.ModelProto(pieces=pieces).SerializeToString())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer.json").unlink()


def llava_onevision() -> tuple[Any, Any]:
    specials = ["<|im_start|>", "<image>", "<video>"]
    backend = byte_bpe(["<|endoftext|>", "<|im_end|>", *specials])
    tokenizer = fast(backend, LLAVA_ONEVISION, specials=specials)
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=dict(
            VISION, num_hidden_layers=2, model_type="siglip_vision_model", image_size=56, patch_size=14,
            vision_use_head=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=_image_processor("LlavaOnevisionImageProcessor", size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=_video_processor("LlavaOnevisionVideoProcessor", size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=tokenizer.chat_template,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def idefics3(name: str = "Idefics3") -> tuple[Any, Any]:
    """Idefics3, or SmolVLM, which is the same but for the names of its classes."""
    specials = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|begin_of_text|>"]
    specials += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    backend = byte_bpe(["<|endoftext|>", *specials])
    tokenizer = fast(
        backend,
        IDEFICS3,
        specials=specials,
        eos="<end_of_utterance>",
        bos_token="<|begin_of_text|>",
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=dict(VISION, image_size=56, patch_size=14),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    video = {"video_processor": _video_processor("SmolVLMVideoProcessor")} if name == "SmolVLM" else {}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=_image_processor(
            f"{name}ImageProcessor", size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
        **video,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def gemma3() -> tuple[Any, Any]:
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    specials = ["<start_of_turn>", "<end_of_turn>"]
    backend = byte_bpe(["<|endoftext|>", "<bos>", *specials])
    tokenizer = fast(
        backend, GEMMA3, specials=specials, eos="<end_of_turn>", bos_token="<bos>",
        extra_special_tokens=extra,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=_text(
            tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, sliding_window_pattern=2
        ),
        vision_config=dict(VISION, image_size=56, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=_image_processor("Gemma3ImageProcessor", size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def text_only(model_class: str, *, like: str, **text: Any) -> tuple[Any, Any]:
    """A language model without pictures, and its tokenizer in the place of a processor."""
    if like == "llama3":
        specials, eos, template = ["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", LLAMA3
        base, begin = ["<|begin_of_text|>", "<|endoftext|>", eos, *specials], {"bos_token": "<|begin_of_text|>"}
    else:
        specials, eos, template = ["<|im_start|>"], "<|im_end|>", QWEN2
        base, begin = ["<|endoftext|>", eos, *specials], {}
        if model_class == "Qwen3":
            template, specials = QWEN3, [*specials, "<|box_start|>", "<|box_end|>"]
    tokenizer = fast(byte_bpe(base, like=like), template, specials=specials, eos=eos, **begin)
    if model_class == "Qwen3":
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    config = getattr(transformers, f"{model_class}Config")(**_text(tokenizer) | text)
    return getattr(transformers, f"{model_class}ForCausalLM")(config), tokenizer


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": functools.partial(qwen_vl, "2"),
    "qwen2_vl_padded_head": functools.partial(qwen_vl, "2", head_rows_past_tokenizer=24),
    "qwen2_vl_wide": functools.partial(qwen_vl, "2", head_rows_past_tokenizer=24, wide=True),
    "qwen2_5_vl_wide": functools.partial(qwen_vl, "2.5", wide=True),
    "internvl_wide": functools.partial(internvl, "qwen2", wide=True),
    "qwen2_5_vl": functools.partial(qwen_vl, "2.5"),
    "qwen3_vl": functools.partial(qwen_vl, "3"),
    "internvl_qwen2": functools.partial(internvl, "qwen2"),
    "internvl_llama": functools.partial(internvl, "llama"),
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "gemma3": gemma3,
}

NEEDS_TORCHVISION = {"smolvlm": functools.partial(idefics3, "SmolVLM")}  # and num2words

LANGUAGE_MODELS = {
    "qwen2": functools.partial(text_only, "Qwen2", like="qwen2", tie_word_embeddings=True),
    "qwen2_wide": functools.partial(text_only, "Qwen2", like="qwen2", **WIDE_TEXT),
    "llama3": functools.partial(text_only, "Llama", like="llama3"),
    "qwen3": functools.partial(text_only, "Qwen3", like="qwen2", head_dim=16),  # it thinks
}

# The paper's models: classes, config keys, tokenizer and ratios of heads as released, but for NVLM-D (`make_original`).
LARGE = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=1)
INTERNLM2 = dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}, attention_bias=False)
LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 5e5}
PAPER = {
    "qwen2_vl_72b": functools.partial(qwen_vl, "2", like="qwen2", head_rows_past_tokenizer=24, tied=False, **LARGE),
    "internvl2_76b": functools.partial(
        internvl, "llama", like="llama3", vision=INTERN_VIT_6B, rope_parameters=LLAMA3_ROPE, **LARGE
    ),
    "internvl2_5_78b": functools.partial(internvl, "qwen2", like="qwen2", vision=INTERN_VIT_6B, **LARGE),
    "qwen2_vl_2b": functools.partial(qwen_vl, "2", like="qwen2", head_rows_past_tokenizer=8),
    "qwen2_vl_7b": functools.partial(qwen_vl, "2", like="qwen2", head_rows_past_tokenizer=24, tied=False),
    "internvl2_5_1b": functools.partial(
        internvl, "qwen2", like="qwen2", vision=INTERN_VIT_300M, hidden_size=56, num_attention_heads=7,
        num_key_value_heads=1,
    ),
    "internvl2_5_2b": functools.partial(internvl, "llama", vision=INTERN_VIT_300M, **INTERNLM2),
    "internvl2_5_4b": functools.partial(
        internvl, "qwen2", like="qwen2", vision=INTERN_VIT_300M, num_attention_heads=8, num_key_value_heads=1
    ),
    "internvl2_5_8b": functools.partial(
        internvl, "llama", vision=INTERN_VIT_300M, hidden_size=48, num_key_value_heads=1, **INTERNLM2
    ),
    # The same in the original layout, with heads that vLLM takes.
    "internvl2_76b_wide": functools.partial(
        internvl, "llama", wide=True, like="llama3", vision=INTERN_VIT_6B, rope_parameters=LLAMA3_ROPE
    ),
    # InternLM2 in the original layout, with heads that vLLM takes: queries that share a key head, and several of these.
    "internlm2_native_wide": functools.partial(
        internvl, "llama", wide=True, vision=INTERN_VIT_300M, hidden_size=128, num_attention_heads=4,
        num_key_value_heads=2, **INTERNLM2,
    ),
    # What `make_original` makes NVLM-D of. Its projector is as wide as the text model's MLP.
    "nvlm_d_native_wide": functools.partial(
        internvl, "qwen2", wide=True, like="qwen2", vision=INTERN_VIT_6B, intermediate_size=64,
        marks=("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    ),
}  # fmt: skip


def is_vision_encoder(parameter: str) -> bool:
    """Whether a parameter belongs to the vision encoder, by the names of the families here."""
    encoders = {"visual", "vision_tower", "vision_model"}
    projectors = {"merger", "merger_list", "deepstack_merger_list", "multi_modal_projector", "connector"}
    parts = set(parameter.split("."))
    return bool(parts & encoders) and not parts & projectors


def make(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny model of `family` to `folder` once and return it."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        with without_video_processors():
            model, processor = (FAMILIES | PAPER | LANGUAGE_MODELS | NEEDS_TORCHVISION)[family]()
            _spread_weights(model, norms=family.endswith("_wide"))
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread_weights(model: torch.nn.Module, *, norms: bool) -> None:
    """Larger weights than the default 0.02, so that logits are peaked and a misplaced position shows at once."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.5 if "embed" in name else 2.0 / parameter[0].numel() ** 0.5)
        elif norms and "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)  # so that leaving out a norm shows too
