"""The Recalibrator: two of the student's decoder blocks between two projections, up to the teacher's head."""

import copy
import logging
from typing import Any

import torch
from torch import nn


class Recalibrator(nn.Module):
    """Maps a splice of student and teacher states, or the student's states alone, to states that the teacher's head reads.

        rec_norm(rec_proj_post(rec_body(splice)))

    (paper, section 3.2, section 4.1(a) and Figure 3(c)). The blocks take the student's text configuration, are causal,
    and have a rotary embedding and consecutive position ids of their own. Dropped at export.

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
        from transformers import AutoModel

        config = recalibrator_config(student_config, num_blocks)
        student_size = config.hidden_size
        self.rec_proj_pre = nn.Linear(teacher_size, student_size) if takes_teacher else None
        self.rec_body: Any = None
        if num_blocks:
            self.rec_body = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.float32)
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
    """The student's text config with `num_blocks` layers of full attention and no vocabulary of its own."""
    config = copy.deepcopy(student_config.get_text_config())
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * num_blocks  # its length must match; a window would cut the question
    config.vocab_size = 1
    config.pad_token_id = None
    config.use_cache = False
    return config


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
