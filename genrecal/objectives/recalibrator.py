"""The Recalibrator: two decoder blocks of the student's sizes between two projections, up to the teacher's head."""

import logging
from typing import Any

import torch
from torch import nn

from genrecal.vlm.config_file import experts_of, first_field, layer_config


class Recalibrator(nn.Module):
    """Maps a splice of student and teacher states, or the student's states alone, to states that the teacher's head reads.

        rec_norm(rec_proj_post(rec_body(splice)))

    (paper, section 3.2, section 4.1(a) and Figure 3(c)). The blocks are Qwen2's for every student, in the student's sizes:
    causal full attention, a dense MLP, a rotary embedding and consecutive position ids of their own. Dropped at export.

    Args:
        student_config: the student's config, whose text part shapes the blocks.
        teacher_size: D_t.
        num_blocks: decoder blocks of rec_body; with 0 there is none, and every state is mapped by itself.
        takes_teacher: whether it is ever given the teacher's states; else there is no rec_proj_pre.
    """

    def __init__(
        self,
        student_config: Any,
        teacher_size: int,
        *,
        num_blocks: int = 2,
        attention: str = "sdpa",
        takes_teacher: bool = True,
    ):
        super().__init__()
        from transformers import Qwen2Model

        config = recalibrator_config(student_config, num_blocks)
        student_size = config.hidden_size
        self.rec_proj_pre = nn.Linear(teacher_size, student_size) if takes_teacher else None
        self.rec_body: Any = None
        if num_blocks:
            config._attn_implementation = attention
            self.rec_body = Qwen2Model(config).float()
            self.rec_body.embed_tokens = None  # it is given states, never ids
            # The paper's blocks end without a norm; rec_norm comes after the projection.
            self.rec_body.norm = nn.Identity()
        self.rec_proj_post = nn.Linear(student_size, teacher_size)
        self.rec_norm = nn.LayerNorm(teacher_size)

    def forward(self, splice: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Splices `[B, L, D_s]`, padded on the right -> states `[B, L, D_t]`, or `[N, D_t]` at the rows alone.

        No mask is passed: a causal body cannot look at padding on its right, and without a mask the attention kernels
        take their causal path. Position ids are the default 0, 1, 2, ...

        Args:
            rows: int64 `[N]`, flat in B * L.
        """
        hidden = splice
        if self.rec_body is not None:
            hidden = self.rec_body(inputs_embeds=splice, use_cache=False).last_hidden_state
        if rows is not None:
            hidden = hidden.flatten(0, 1)[rows]
        return self.rec_norm(self.rec_proj_post(hidden))

    def gradient_checkpointing_enable(self) -> None:
        """Compute the blocks' activations again in the backward pass."""
        if self.rec_body is not None:
            checkpoint_activations(self.rec_body)


def recalibrator_config(student_config: Any, num_blocks: int) -> Any:
    """A Qwen2 config of `num_blocks` plain blocks in the sizes of a student's text config, without a vocabulary."""
    from transformers import Qwen2Config

    text = layer_config(student_config.get_text_config())
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    # Latent attention (MLA) has heads of several widths and as many keys as queries.
    latent = getattr(text, "kv_lora_rank", None) is not None
    head_dim = None if latent else getattr(text, "head_dim", None)
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # Gemma's has one for each kind of layer
    return Qwen2Config(
        hidden_size=text.hidden_size,
        intermediate_size=active_width(text),
        num_hidden_layers=num_blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads if latent or heads % key_heads else key_heads,
        head_dim=head_dim or text.hidden_size // heads // 2 * 2,
        rms_norm_eps=first_field(text, "rms_norm_eps", "norm_eps", "layer_norm_epsilon") or 1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope.get("rope_theta") or 10_000.0)},
        max_position_embeddings=text.max_position_embeddings,
        initializer_range=getattr(text, "initializer_range", 0.02),
        vocab_size=1,
        pad_token_id=None,
        use_cache=False,
    )


def active_width(text: Any) -> int:
    """The width of the MLP that a token meets: of experts, the chosen ones side by side, and the shared ones."""
    _, used = experts_of(text)
    dense = first_field(text, "intermediate_size", "ffn_dim") or 4 * text.hidden_size
    if not used:
        return int(dense)
    width = first_field(text, "moe_intermediate_size", "expert_ffn_hidden_size") or dense
    shared = first_field(text, "shared_expert_intermediate_size", "shared_intermediate_size")
    return int(
        used * width + (shared or width * (first_field(text, "n_shared_experts", "moe_num_shared_experts") or 0))
    )


def checkpoint_activations(model: Any) -> None:
    """Compute the activations of a transformers model's blocks again in the backward pass."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a body without embeddings has none to make differentiable
    try:
        # transformers 5.19, which vLLM's pin allows, knows it by its older name.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    finally:
        logger.setLevel(level)
