"""A decoder's last layer where few places of a batch are read: its keys and values everywhere, all else at those places.

    at_places(layer)
    layer(hidden, read_positions=positions, ...)[b, p] == layer(hidden, ...)[b, positions[b, p]]

The layer's own code runs on the chosen rows alone, as it runs on the newest tokens when it generates: a cache hands it the
keys and values of the whole sequence. Only those are worked out here. Letters: B samples, L places, P places read of each.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which places of a batch are read.

    Args:
        positions: int64 `[B, P]`, of each sample, as many as the one with most has; filled up with 0.
        chosen: int64 `[N]`, flat in B * P: those that are asked for, in their order.
    """

    positions: torch.Tensor
    chosen: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, num_samples: int, length: int) -> "Reads":
        """From int64 `[N]`, flat in B * L and grouped by sample. Of none, place 0 of each sample is computed all the same:
        ranks that work together run the same modules."""
        sample, position = rows // length, rows % length
        counts = torch.bincount(sample, minlength=num_samples)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sample]
        most = max(int(counts.max()), 1)
        positions = torch.zeros(num_samples, most, dtype=torch.int64, device=rows.device)
        positions[sample, place] = position
        return cls(positions=positions, chosen=sample * most + place)

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, D]` -> `[N, D]`."""
        return states_at(states, self.positions).flatten(0, 1)[self.chosen]

    def to(self, device: torch.device) -> "Reads":
        return Reads(positions=self.positions.to(device), chosen=self.chosen.to(device))


def at_places(body: Any) -> bool:
    """Let a body's last layer be asked for some places only, with the keyword `read_positions`, `[B, P]`.

    False, and nothing is changed, where the layer is of another shape than Llama's, Qwen's and Gemma's, or attends with
    something else than torch's SDPA. Whether it is of that shape is tried out.
    """
    layer = body.layers[-1]
    attention = getattr(layer, "self_attn", None)
    known = (
        getattr(body.config, "_attn_implementation", None) == "sdpa"
        and all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("k_proj", "v_proj"))
        and hasattr(layer, "input_layernorm")
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
    )
    if not known:
        return False
    layer.forward = functools.partial(_forward, layer)
    layer._can_checkpoint_with_cache = True  # transformers would take a cache that is written away from it
    if not _agrees(body):
        del layer.forward, layer._can_checkpoint_with_cache
        return False
    return True


def _forward(
    layer: Any, hidden: torch.Tensor, *, read_positions: torch.Tensor | None = None, **inputs: Any
) -> torch.Tensor:
    """The layer over `[B, L, D]`: its states `[B, P, D]` at the positions asked for, or everywhere."""
    whole = type(layer).forward
    if read_positions is None:
        return whole(layer, hidden, **inputs)  # type: ignore[no-any-return]
    tables = inputs["position_embeddings"]
    keys, values = _keys_and_values(layer, hidden, *tables)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    inputs |= {
        "past_key_values": _Everywhere(keys, values),
        "attention_mask": (places <= read_positions[:, :, None])[:, None],  # [B, 1, P, L]
        "position_embeddings": tuple(states_at(table.expand(len(hidden), -1, -1), read_positions) for table in tables),
    }
    return whole(layer, states_at(hidden, read_positions), **inputs)  # type: ignore[no-any-return]


def states_at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B, L, D]` at `[B, P]` -> `[B, P, D]`."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[-1]))


def _keys_and_values(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer attends to, `[B, heads, L, head_dim]`, the keys with their positions turned in."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    keys, values = (project(normed).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return turn(keys[:, :0], keys, cos, sin)[1], values


class _Everywhere:
    """Stands for transformers' cache: whatever a layer adds for its own rows, it gets the keys and values of all."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


@torch.no_grad()
def _agrees(body: Any) -> bool:
    """Whether the body gives at some places what it gives there when asked for all. On the meta device nothing tells."""
    weight = body.layers[-1].self_attn.k_proj.weight
    if weight.is_meta:
        return True
    states = torch.randn(2, 5, body.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    positions = torch.tensor([[0, 2, 3], [4, 1, 1]], device=weight.device)
    training = body.training
    body.eval()
    try:
        whole = body(inputs_embeds=states, use_cache=False).last_hidden_state
        some = body(inputs_embeds=states, use_cache=False, read_positions=positions).last_hidden_state
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        body.train(training)
    return some.shape == (2, 3, states.shape[-1]) and torch.allclose(
        some, states_at(whole, positions), rtol=1e-4, atol=1e-5
    )
