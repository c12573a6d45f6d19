"""Tiny models of the families of transformers 5.23 and what of genrecal works with each: `scripts/family_table.py` writes
it into docs/models.md. A family here is its config class with small sizes, its processor and a chat template of its kind."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import TEXT, VISION, _spread_weights, byte_bpe, fast
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from genrecal.cli import main
from genrecal.shards.reader import Cache
from genrecal.vlm.cached_teacher import prompt_options
from genrecal.vlm.loading import auto_class, load_vlm, without_video_processors

# ------------------------------------------------------------------------------------------------ chat templates

# A turn is what opens its role, the content and what closes it; THINKING is the variable that switches thinking off.
TURNS = """
{%- macro show(content) -%}
{%- if content is string -%}{{ content | trim if trims else content }}
{%- else -%}{%- for part in content -%}
{%- if part.type == "image" -%}{{ image }}{%- else -%}{{ part.text | trim if trims else part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{ begin }}
{%- for message in messages -%}
{{ opens[message.role] }}ANSWER_THOUGHT
{{- message.content if plain_answers and message.role == "assistant" else show(message.content) }}
{{- closes[message.role] }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ opens.assistant + prompt }}PROMPT_THOUGHT{%- endif -%}"""
ANSWER_THOUGHT = """
{%- if message.role == "assistant" and (every_thought or loop.last) -%}
{{ think[0] + (message.reasoning_content or "") + think[1] }}
{%- endif -%}"""
PROMPT_THOUGHT = "{{ think[0] + think[1] if THINKING is defined and not THINKING else think[0] }}"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A kind of chat template. The first special token of `end` ends generation; a `begin` of one token is the BOS."""

    user: str
    assistant: str
    end: str
    user_end: str | None = None  # where it is another than an answer's
    image: str = "<image>"
    begin: str = ""
    prompt: str = ""  # what the prompt alone has behind the opening of an answer
    trims: bool = False
    plain_answers: bool = False  # answers can be given as strings alone
    thinking: str | None = None  # the variable that switches it off
    think: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    every_thought: bool = False  # earlier answers keep their (empty) thinking

    def template(self) -> str:
        end = self.end if self.user_end is None else self.user_end
        values = dict(
            opens=dict(system=self.user.replace("user", "system"), user=self.user, assistant=self.assistant),
            closes=dict(system=end, user=end, assistant=self.end), begin=self.begin, image=self.image, prompt=self.prompt,
            trims=self.trims, plain_answers=self.plain_answers,
        )  # fmt: skip
        answer = prompt = ""
        if self.thinking is not None:
            values |= dict(think=self.think, every_thought=self.every_thought)
            answer, prompt = ANSWER_THOUGHT, PROMPT_THOUGHT
        text = "".join(
            f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in values.items()
        )
        text += TURNS.replace("ANSWER_THOUGHT", answer).replace("PROMPT_THOUGHT", prompt)
        return text.replace("THINKING", self.thinking or "")


def marked(opening: str, end: str, assistant: str = "assistant", **more: Any) -> Chat:
    """A chat whose turns open alike, with the role in the place of ROLE."""
    return Chat(user=opening.replace("ROLE", "user"), assistant=opening.replace("ROLE", assistant), end=end, **more)


def chatml(image: str = "<image>", **more: Any) -> Chat:
    return marked("<|im_start|>ROLE\n", "<|im_end|>\n", image=image, **more)


def llama(opening: str, end: str) -> Chat:
    return marked(opening, end, image="<|image|>", begin="<|begin_of_text|>")


def cohere(image: str) -> Chat:
    user, assistant = (f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>" for role in ("USER", "CHATBOT"))
    return Chat(user=user, assistant=assistant, end="<|END_OF_TURN_TOKEN|>", begin="<BOS_TOKEN>", image=image)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LLAMA3 = llama("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>")
DEEPSEEK = Chat(
    user="User: ", user_end="\n\n", assistant="Assistant: ", end="<｜end▁of▁sentence｜>", image="<image_placeholder>"
)
GLM = marked("<|ROLE|>\n", "", image="<|begin_of_image|><|image|><|end_of_image|>", begin="[gMASK]<sop>")

# ------------------------------------------------------------------------------------------------------ families

WORDS = TEXT | dict(hidden_size=64, head_dim=16)
VIT = VISION | dict(image_size=56, patch_size=14, num_hidden_layers=2)
SIGLIP = VIT | dict(model_type="siglip_vision_model", vision_use_head=False)
QWEN_VIT = dict(hidden_size=32, intermediate_size=64, depth=2, num_heads=2, out_hidden_size=64, patch_size=14)
GRID = [[56, 112], [112, 56], [112, 112]]
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)
DEEPSEEK_MOE = EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
SIDE = dict(height=56, width=56)
SQUARE = dict(size=SIDE)
TILES = SQUARE | dict(crop_to_patches=True, min_patches=1, max_patches=4)


def mrope(*section: int, share: float = 1.0, **more: Any) -> dict[str, Any]:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=list(section), partial_rotary_factor=share)
    return {"rope_parameters": rope | more}


def pixels(least: int, most: int, patch: int = 14, **more: Any) -> dict[str, Any]:
    """An image processor that gives an image between `least` and `most` merged patches of 2 x 2."""
    area = (2 * patch) ** 2
    size = {"shortest_edge": least * area, "longest_edge": most * area}
    return dict(size=size, patch_size=patch, merge_size=2, temporal_patch_size=2) | more


@dataclass(frozen=True, kw_only=True)
class Family:
    """What makes a family: sizes besides the common ones; a string for a config's `..._id` or `..._index` is a token."""

    model_type: str
    chat: Chat
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = field(default_factory=lambda: VIT)
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # the tokenizer's own names for tokens
    tokens: str = ""  # special tokens that nothing above names

    def special_tokens(self) -> list[str]:
        """The token that ends generation, then all others in the order of their mention; no thinking marks."""
        chat = self.chat
        marks = [chat.end, chat.begin, chat.user, chat.user_end or "", chat.assistant, chat.image, chat.prompt]
        mentioned = " ".join([*marks, json.dumps(self.config, ensure_ascii=False), *self.names.values(), self.tokens])
        return list(dict.fromkeys(re.findall(r"<[^<>\s]+>|\[/?[A-Z_a-z]+\]|TILE_\w+", mentioned)))


AYA = dict(text=SLIDING | dict(model_type="cohere2", logit_scale=0.25), vision=SIGLIP)


def gemma4(prompt: str = "", **text: Any) -> Family:
    layers = SLIDING | dict(layer_types=SLIDING["layer_types"] * 2, num_hidden_layers=4, num_kv_shared_layers=2)
    layers |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=512)
    vision = dict(num_key_value_heads=2, head_dim=16, patch_size=8, pooling_kernel_size=2, position_embedding_size=64)
    names = dict(image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
                 boa_token="<|audio>", eoa_token="<audio|>")  # fmt: skip
    ids = {f"{name}_id": names[name] for name in ("image_token", "boi_token", "eoi_token", "audio_token")}
    chat = marked("<|turn>ROLE\n", "<turn|>\n", "model", prompt=prompt, image="<|image|>", begin="<bos>", trims=True)
    audio = dict(feature_extractor_type="Gemma4AudioFeatureExtractor")
    return Family(
        model_type="gemma4", chat=chat, text=layers | text, vision=VIT | vision, names=names,
        tokens="<|channel> <channel|> <|video|>", config=ids | dict(video_token_id="<|video|>"),
        images=dict(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70),
        processor=dict(image_seq_length=16, feature_extractor=audio),
    )  # fmt: skip


def glm(model_type: str, chat: Chat = GLM, **text: Any) -> Family:
    marks = {f"{kind}_{end}token_id": f"<|{begin}{kind}|>" for kind in ("image", "video")
             for end, begin in (("", ""), ("start_", "begin_of_"), ("end_", "end_of_"))}  # fmt: skip
    rope = {} if model_type == "glm5_next" else mrope(2, 1, 1, share=0.5)
    vision = QWEN_VIT | dict(image_size=56, projection_intermediate_size=64)
    return Family(model_type=model_type, chat=chat, text=rope | text, vision=vision, config=marks,
                  images=pixels(2, 16), tokens="<|assistant|> <|observation|>")  # fmt: skip


def internvl(text_type: str, **text: Any) -> Family:
    vision = VIT | dict(image_size=[56, 56], patch_size=[14, 14])
    names = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                 video_token="<video>")  # fmt: skip
    return Family(
        model_type="internvl", chat=chatml("<IMG_CONTEXT>\n"), text=dict(model_type=text_type) | text, vision=vision,
        config=dict(image_token_id="<IMG_CONTEXT>", image_seq_length=4), names=names, images=TILES,
        processor=dict(image_seq_length=4),
    )  # fmt: skip


def qwen(model_type: str, thinking: str | None = None, **text: Any) -> Family:
    ids = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")  # fmt: skip
    vision = QWEN_VIT | dict(patch_size=16, num_position_embeddings=64)
    vision |= {} if model_type.startswith("qwen3_5") else dict(deepstack_visual_indexes=[0, 1])
    text = mrope(4, 2, 2, mrope_interleaved=True) | text
    chat, images = chatml(QWEN_IMAGE, thinking=thinking), pixels(2, 8, patch=16)
    return Family(model_type=model_type, chat=chat, text=text, vision=vision, config=ids, images=images)


def deepseek(model_type: str, **more: Any) -> Family:
    return Family(
        model_type=model_type, chat=DEEPSEEK, text=dict(model_type="llama"), vision=SIGLIP,
        config=dict(image_token_id="<image_placeholder>") | more.pop("config", {}), images=SQUARE | more,
        processor=dict(num_image_tokens=16), names=dict(image_token="<image_placeholder>"),
    )  # fmt: skip


ERNIE = {f"{kind}_{part}token": f"<|{kind.upper()}_{token}|>" for kind in ("image", "video")
         for part, token in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))}  # fmt: skip
MINICPM = dict(
    image_start_token="<image>", image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
    image_id_start_token="<image_id>", image_id_end_token="</image_id>", image_token="<|image_pad|>",
    video_token="<|video_pad|>",
)  # fmt: skip
SPECS: dict[str, Family] = {
    "aya_vision": Family(
        model_type="aya_vision", chat=cohere("<image>"), **AYA, images=TILES, processor=dict(img_size=56, patch_size=28),
        config=dict(image_token_index="<|IMG_PATCH|>", downsample_factor=2),
        tokens="<|START_OF_IMG|> <|END_OF_IMG|> <|IMG_LINE_BREAK|> TILE_GLOBAL TILE_1 TILE_2 TILE_3 TILE_4",
    ),
    "cohere2_vision": Family(
        model_type="cohere2_vision", chat=cohere("<|IMG_PATCH|>"), **AYA, images=TILES | dict(patch_size=2),
        config=dict(image_token_id="<|IMG_PATCH|>", downsample_factor=2, alignment_intermediate_size=64),
        names=dict(boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
                   img_line_break_token="<|IMG_LINE_BREAK|>"),
    ),
    "deepseek_vl": deepseek("deepseek_vl"),
    "deepseek_vl_hybrid": deepseek(
        "deepseek_vl_hybrid", high_res_size=dict(height=64, width=64),
        config=dict(high_res_vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, output_channels=16, mlp_dim=64,
            window_size=2, global_attn_indexes=[1],
        )),
    ),
    "ernie4_5_vl_moe": Family(
        model_type="ernie4_5_vl_moe",
        chat=Chat(user="User: ", user_end="\n", assistant="Assistant: ", end="<|end_of_sentence|>",
                  begin="<|begin_of_sentence|>", image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
        text=mrope(3, 3, 2) | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=[32, 32], moe_num_shared_experts=1,
                                   mlp_layer_types=["dense", "sparse"]),
        vision=QWEN_VIT, images=pixels(1, 8, temporal_patch_size=1),
        processor=dict(video_processor=dict(video_processor_type="Ernie4_5_VLMoeVideoProcessor", draw_on_frames=False)),
        config={f"{name}_id": token for name, token in ERNIE.items()}, names=ERNIE,
    ),
    "gemma4_empty_thought": gemma4("<|channel>thought\n<channel|>"),
    "gemma4_moe": gemma4(
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=32, attention_k_eq_v=True, use_bidirectional_attention="vision",
    ),
    "glm4v": glm("glm4v", replace(GLM, plain_answers=True)),
    "glm4v_moe": glm("glm4v_moe", **DEEPSEEK_MOE),
    "glm5_next": glm(
        "glm5_next", **EXPERTS, n_routed_experts=4, num_key_value_heads=4, head_dim=0, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=16, v_head_dim=16, linear_num_heads=2, linear_head_dim=8, hc_mult=2, index_n_heads=2,
        index_head_dim=8, index_topk=16, index_kpool=4, indexer_types=["full", "full"],
        layer_types=["linear_attention", "indexed_attention"], mlp_layer_types=["dense", "sparse"],
    ),
    "granite4_vision": Family(
        model_type="granite4_vision", chat=marked("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n"),
        text=dict(logits_scaling=8.0, residual_multiplier=0.25), vision=SIGLIP | dict(hidden_size=64),
        config=dict(
            image_token_index="<image>", image_grid_pinpoints=GRID, downsample_rate="1/2",
            vision_feature_layer=-2, vision_feature_select_strategy="full", deepstack_layer_map=[[-2, 0]],
            spatial_target_layers=[1], spatial_vision_layer=-1,
            qformer_config=dict(hidden_size=64, encoder_hidden_size=64, num_attention_heads=1, num_hidden_layers=1,
                                intermediate_size=64),
        ),
        images=SQUARE | dict(crop_size=SIDE, image_grid_pinpoints=GRID),
        processor=dict(patch_size=14, downsample_rate="1/2", vision_feature_select_strategy="full", image_token="<image>"),
    ),
    "hunyuan_vl": Family(
        model_type="hunyuan_vl",
        chat=Chat(user="", user_end="<hy_User>", assistant="", end="<hy_eos>", begin="<hy_bos>",
                  image="<hy_image_start><hy_image><hy_image_end>"),
        text=mrope(2, 2, 2, 2, rope_type="dynamic", alpha=1e3, factor=1.0) | dict(eod_token_id="<hy_User>"),
        vision=VISION | dict(num_hidden_layers=2, num_key_value_heads=2, patch_size=16, out_hidden_size=64, text_hidden_size=64,
                             max_image_size=128, min_image_size=32),
        config=dict(image_token_id="<hy_image>", im_start_id="<hy_image_start>", im_end_id="<hy_image_end>",
                    im_newline_id="<hy_newline>"),
        images=pixels(1, 8, patch=16, temporal_patch_size=1),
        names=dict(image_token="<hy_image>", image_start_token="<hy_image_start>", image_end_token="<hy_image_end>"),
    ),
    "internvl_gpt_oss": internvl("gpt_oss", num_local_experts=4, num_experts_per_tok=2, **SLIDING),
    "internvl_qwen3": internvl("qwen3"),
    "kimi_k25": Family(
        model_type="kimi_k25",
        chat=marked("<|im_ROLE|>ROLE<|im_middle|>", "<|im_end|>", thinking="thinking", think=("<think>", "</think>"),
                    every_thought=True, image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"),
        text=DEEPSEEK_MOE | dict(model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, head_dim=8,
                                 qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
        vision=VISION | dict(num_hidden_layers=2, patch_size=14, pos_emb_height=16, pos_emb_width=16),
        config=dict(projection_hidden_size=32, image_token_id="<|media_pad|>", vision_start_token_id="<|media_begin|>",
                    vision_end_token_id="<|media_end|>", video_token_id="<|kimi_k25_video_placeholder|>"),
        images=dict(patch_size=14, merge_size=2, size=dict(max_height=512, max_width=512)), tokens="<|im_system|>",
    ),
    "lfm2_vl": Family(
        model_type="lfm2_vl", chat=chatml(begin="<|startoftext|>"),
        text=dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        vision=VIT | dict(model_type="siglip2_vision_model", vision_use_head=False, patch_size=16, num_patches=64),
        config=dict(image_token_id="<image>", downsample_factor=2, projector_hidden_size=64),
        images=dict(tile_size=64, encoder_patch_size=16, downsample_factor=2, min_tiles=2, max_tiles=4, min_image_tokens=4,
                    max_image_tokens=16, max_num_patches=64),
        tokens="<|image_start|> <|image_end|> <|img_thumbnail|> "
        + " ".join(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
    ),
    "llama4": Family(
        model_type="llama4", chat=llama("<|header_start|>ROLE<|header_end|>\n\n", "<|eot|>"),
        text=dict(num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=64, attention_chunk_size=32),
        vision=VIT | dict(intermediate_size=128, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64),
        config=dict(boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>", image_token_index="<|patch|>"),
        images=SQUARE | dict(max_patches=4),
        processor=dict(patch_size=14, image_token="<|image|>", fake_image_token="<|image|>"),
        tokens="<|tile_x_separator|> <|tile_y_separator|>",
    ),
    "minicpmv4_7": Family(
        model_type="minicpmv4_7", chat=chatml("<|image_pad|>"), names=MINICPM,
        text=LINEAR | mrope(1, 1, 0, share=0.25, mrope_interleaved=True) | dict(model_type="qwen3_5_text"),
        vision=VIT | dict(num_hidden_layers=3, image_size=112, insert_layer_id=1),
        config=dict(image_size=112, insert_layer_id=1, newline_id="Ċ", image_token_id="<|image_pad|>",
                    video_token_id="<|video_pad|>", image_start_id="<image>", image_end_id="</image>",
                    slice_start_id="<slice>", slice_end_id="</slice>"),
        images=dict(scale_resolution=112, max_slice_nums=4, patch_size=14),
        processor=dict(video_processor=dict(video_processor_type="MiniCPMV4_6VideoProcessor")),
    ),
    "mistral3": Family(
        model_type="mistral3", text=dict(model_type="mistral"), tokens="[IMG_BREAK] [IMG_END]",
        chat=Chat(user="[INST]", user_end="[/INST]", assistant="", end="</s>", image="[IMG]", begin="<s>", plain_answers=True),
        vision=VIT | dict(model_type="pixtral", head_dim=16, image_size=112),
        config=dict(image_token_index="[IMG]", spatial_merge_size=2),
        images=dict(size=dict(longest_edge=112), patch_size=dict(height=28, width=28)),
        processor=dict(patch_size=14, spatial_merge_size=2, image_token="[IMG]", image_break_token="[IMG_BREAK]",
                       image_end_token="[IMG_END]"),
    ),
    "mllama": Family(
        model_type="mllama", chat=LLAMA3,
        text=dict(cross_attention_layers=[1]), config=dict(image_token_index="<|image|>"),
        images=SQUARE | dict(max_image_tiles=4),
        vision=VIT | dict(attention_heads=2, num_global_layers=1, intermediate_layers_indices=[0], vision_output_dim=64),
    ),
    "molmo2": Family(
        model_type="molmo2", chat=chatml("<|image|>"), text=dict(additional_vocab_size=8, rope_scaling_layers=[0, 1]),
        vision=VIT | dict(image_size=[56, 56], num_key_value_heads=2, head_dim=16, num_position_embeddings=16),
        config=dict(
            adapter_config=dict(hidden_size=32, intermediate_size=64, text_hidden_size=64, num_attention_heads=2,
                                num_key_value_heads=2, head_dim=16, vision_feature_layer=[-1, -2]),
            image_patch_id="<im_patch>", image_start_token_id="<im_start>", low_res_image_start_token_id="<low_res_im_start>",
            image_end_token_id="<im_end>", frame_start_token_id="<frame_start>", frame_end_token_id="<frame_end>",
        ),
        images=SQUARE | dict(patch_size=14, pooling_size=[2, 2], max_crops=4, overlap_margins=[0, 0]),
        tokens="<im_col> <im_low> <|video|>",
    ),
    "perception_lm": Family(
        model_type="perception_lm", chat=LLAMA3,
        text=dict(model_type="llama"),
        vision=dict(
            model_type="timm_wrapper", architecture="vit_pe_core_tiny_patch16_384", do_pooling=False, global_pool="",
            model_args=dict(embed_dim=64, depth=2, num_heads=2, img_size=[64, 64], ref_feat_shape=[4, 4], global_pool="",
                            use_post_transformer_norm=False, init_values=0.1),
        ),
        config=dict(image_token_id="<|image|>", video_token_id="<|video|>", vision_use_cls_token=True,
                    projector_pooling_ratio=2),
        images=dict(tile_size=64, max_num_tiles=4, vision_input_type="thumb+tile"),
        processor=dict(patch_size=16, pooling_ratio=2),
        names=dict(image_token="<|image|>", video_token="<|video|>"),
    ),
    "qwen3_5": qwen(
        "qwen3_5", "enable_thinking", **LINEAR, **mrope(1, 1, 0, share=0.25, mrope_interleaved=True),
    ),
    "qwen3_vl_moe": qwen("qwen3_vl_moe", num_experts=4, **EXPERTS),
}  # fmt: skip

PAD = "<|endoftext|>"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by scripts/family_table.py -->", "<!-- end of families -->"
NEEDS_TORCHVISION = {
    "cohere2_vision", "gemma4_empty_thought", "gemma4_moe", "kimi_k25", "lfm2_vl", "llama4", "minicpmv4_7", "mistral3",
    "molmo2", "perception_lm",
}  # fmt: skip
NEEDS_TIMM = {"perception_lm"}
STATES_AGREE = 0.01  # float32 states as a share of their length; they are stored as bfloat16, which rounds by 0.004
ONE_STEP = [
    f"--set={name}"
    for stage in (1, 2, 3)
    for name in (f"stage{stage}.accumulation=1", f"stage{stage}.batch_size=4", f"stage{stage}.max_steps=1")
] + ["--set=data.workers=0", "--set=measure.samples=0", "--set=data.max_skip=1", "--set=device=cpu"]


def can_run(family: str) -> bool:
    """Whether this environment has what the family's processor needs."""
    with contextlib.suppress(ImportError):
        if family in NEEDS_TIMM:
            import timm  # noqa: F401
        return is_torchvision_available() or family not in NEEDS_TORCHVISION
    return False


def write_files(family: str, folder: Path) -> Path:
    """Write what a family's folder holds besides weights, and return it."""
    spec = SPECS[family]
    folder.mkdir(parents=True, exist_ok=True)
    specials = spec.special_tokens()
    end = next((token for token in specials if token in spec.chat.end), PAD)
    begin = {"bos_token": spec.chat.begin} if spec.chat.begin in specials else {}
    backend = byte_bpe(list(dict.fromkeys([PAD, *specials])), vocab_size=256 + len(specials) + 100, like="qwen2")
    tokenizer = fast(
        backend, spec.chat.template(), specials=specials, eos=end, extra_special_tokens=spec.names, **begin
    )
    tokenizer.add_tokens([word for word in ("<think>", "</think>") if spec.chat.thinking is not None])
    tokenizer.save_pretrained(folder)
    ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = WORDS | dict(vocab_size=len(tokenizer), **ids) | spec.text
    config = _with_ids(spec.config | dict(text_config=text, vision_config=spec.vision), tokenizer)
    AutoConfig.for_model(spec.model_type, **config).save_pretrained(folder)
    kind = spec.model_type
    images = IMAGE_PROCESSOR_MAPPING_NAMES[{"glm4v_moe": "glm4v", "qwen3_vl_moe": "qwen3_vl"}.get(kind, kind)][
        "torchvision"
    ]
    name = PROCESSOR_MAPPING_NAMES[kind]
    parts = dict(processor_class=name, image_processor=dict(image_processor_type=images) | spec.images)
    parts["video_processor"] = dict(video_processor_type=name.replace("Processor", "VideoProcessor"))
    (folder / "processor_config.json").write_text(json.dumps(parts | spec.processor))
    return folder


def _with_ids(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _with_ids(value, tokenizer)
        is_token = isinstance(value, str) and name.endswith(("_id", "_index"))
        return tokenizer.convert_tokens_to_ids(value) if is_token else value

    return {name: of(name, value) for name, value in config.items()}


def make_family(family: str, folder: Path) -> Path:
    """Write a family's tiny model with random weights to `folder` once and return it."""
    if not (folder / "model.safetensors").exists():
        write_files(family, folder)
        torch.manual_seed(0)
        with without_video_processors():
            config = AutoConfig.from_pretrained(folder)
            model = auto_class(config).from_config(config)
        _spread_weights(model, norms=False)
        model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Row:
    """What works with a family: "works", or the reason why not; `notes` are what a user is told."""

    teacher: str
    student: str
    export: str
    notes: str


def run_family(family: str, folder: Path, data: Path, cache: Path) -> Row:
    """Cache a family as a teacher, and train and export it as a student of `cache`, by the command line.

    Raises AssertionError for a traceback, and where cached states are not the model's own.
    """
    model, run = make_family(family, folder / "model"), folder / "run"
    variable = SPECS[family].chat.thinking
    options = [f"--template-arg={variable}=false"] if variable else []
    made = folder / "cache"
    teacher, notes = genrecal(
        "cache",
        f"--teacher={model}",
        f"--data={data}",
        f"--out={made}",
        "--device=cpu",
        "--max-skip=1",
        "--answer-codec=bf16",
        "--question-codec=bf16",
        *options,
    )
    if teacher == "works":
        _check_states(model, made)
    genrecal("plan", f"--teacher={model}", f"--data={data}", *options)  # no traceback
    settings = [f"--set=prompt.template_args.{variable}=false"] if variable else []
    student, more = genrecal("train", f"--cache={cache}", f"--student={model}", f"--out={run}", *ONE_STEP, *settings)
    genrecal("train", f"--cache={cache}", f"--student={model}", f"--out={run}", "--dry-run", *ONE_STEP, *settings)
    export = genrecal("export", str(run), f"--out={folder / 'out'}")[0] if student == "works" else "-"
    shutil.rmtree(run, ignore_errors=True)
    told = [note for note in ("runs alone", "is written alone", "routers") if note in notes + more]
    words = {"runs alone": "conversations run one by one", "is written alone": "answers are written one by one",
             "routers": "routers stay frozen; experts get no LoRA"}  # fmt: skip
    return Row(teacher=teacher, student=student, export=export, notes="; ".join(words[note] for note in told))


def genrecal(*args: str) -> tuple[str, str]:
    """Run a command in this process: "works" or "refused: ...", and all that it printed on standard error."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
        except SystemExit as end:
            status = int(end.code or 0)
    text = err.getvalue()
    errors = [line for line in text.splitlines() if line.startswith("genrecal: error: ")]
    assert not status or len(errors) == 1, f"genrecal {' '.join(args)}: exit status {status}\n{text}"
    if not status:
        return "works", text
    reason = errors[0].removeprefix("genrecal: error: ")
    for path in (arg.partition("=")[2] for arg in args):
        reason = reason.replace(f"{path}: ", "").replace(path, "...") if "/" in path else reason
    return f"refused: {reason}", text


def _check_states(model: Path, made: Path) -> None:
    """Every cached answer state is that of its conversation alone."""
    cache = Cache(str(made))
    vlm = load_vlm(model, prompt=prompt_options(cache))
    for record in cache:
        encoded = vlm.renderer.encode(record.sample)
        with torch.no_grad():
            states = vlm.hidden(vlm.renderer.collate([encoded]))[0].float().numpy()
        rows = record.answer_rows()
        expected = states[rows.position]
        off = np.linalg.norm(rows.hidden - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert off.max() < STATES_AGREE, f"{record.sample.key}: a cached state is off by {off.max():.0%} of its length"


# -------------------------------------------------------------------------------- the table in docs/models.md


def rows_of() -> dict[str, Row]:
    """What the page's table says of each family."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in cells[2:]}
    return {
        family: Row(**dict(zip(("teacher", "student", "export", "notes"), map(_plain, row), strict=True)))
        for family, row in rows.items()
    }


def write_rows(rows: dict[str, Row]) -> None:
    """Write the page's table."""
    lines = ["| family | teacher | student | export | notes |", "| --- | --- | --- | --- | --- |"]
    for family, row in sorted(rows.items()):
        cells = (row.teacher, row.student, row.export, row.notes)
        lines.append(f"| {family} | " + " | ".join(_escaped(cell) for cell in cells) + " |")
    page, written = PAGE.read_text(), "\n".join([BEGIN, *lines, END])
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: written, page, flags=re.DOTALL))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _plain(cell: str) -> str:
    return cell.replace("\\|", "|").replace("&lt;", "<")
