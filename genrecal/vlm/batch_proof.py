"""Whether a model gives a conversation the same states in a batch as alone: tried on known conversations when it is loaded.

Padding and other conversations' images must not change a state. For some families they do: indices into images that run
through the whole batch (Molmo 2), attention that pools blocks of keys, padding included (GLM 5), image tensors that cannot
be joined (Perception-LM). Such a model runs conversation by conversation, without padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from genrecal.errors import ModelError, SampleError
from genrecal.samples import ImageRef, Message
from genrecal.vlm.rendering import Encoded, Renderer

SIZES = ((120, 56), (64, 72), (56, 168))  # of the images, which so have unequal numbers of tiles or patches
SENTENCE = "The quick brown fox jumps over the lazy dog. "
# A state is off when it is farther from the same state alone than this share of its length. Rounding moves states by up to
# 2e-4 in float32 (HunYuan's image encoder), 0.04 in bfloat16; joined wrongly, they are off by 0.2 to 2.
OFF = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.1}
# In half precision a router of experts may choose another one for a token now and then: a few states may be off. Padding on
# the left, which shifts rotary positions, rounds otherwise in every layer.
MAX_OFF_SHARE, MAX_OFF_SHARE_LEFT = 0.02, 0.1
WINDOW_NAMES = ("window", "topk", "top_k", "budget", "block_size", "chunk_size", "kpool")  # of a text config's numbers
MAX_WINDOW_TOKENS = {"cpu": 64, "cuda": 1024}  # a longer window is not filled
NO_ROOM = (
    "out of memory while four short conversations were tried, beside the weights; take a larger GPU, several (--device split), "
    "or a narrower --dtype"
)
Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@torch.no_grad()
def why_alone(text_config: Any, renderer: Renderer, forward: Forward, *, device: str = "cpu") -> tuple[str, str]:
    """Why the model must run conversation by conversation, and why it must write answers so; empty where it need not.

    Args:
        forward: a collated batch -> states `[B, L, D]`. device: the type of its device; a CPU gets shorter conversations.

    Raises:
        ModelError: a rendered conversation has other states than what the model's own `apply_chat_template` returns, or
            cannot be run at all.
    """
    encoded, own = _conversations(renderer, _tokens_to_fill(text_config, device))
    try:
        alone = [forward(renderer.collate([item]))[0] for item in encoded]
        for item, inputs in zip(encoded, own, strict=True):
            if inputs is None or not item.num_images:
                continue
            prompt = forward(renderer.collate([renderer.without_last_answer(item)]))[0]
            if share := off_share(forward(inputs)[0], prompt):
                raise ModelError(
                    f"{share:.0%} of the states of {_described(item)} are not those that the model's own "
                    "apply_chat_template leads to"
                )
    except ModelError:
        raise
    except torch.OutOfMemoryError:
        raise ModelError(NO_ROOM) from None
    except Exception as error:
        raise ModelError(f"it cannot run a rendered conversation: {_one_line(error)}") from None
    # Students are trained without a mask; answers are written with padding on the left.
    reasons = {"right": "", "unmasked": "", "left": ""}
    for way in reasons:
        try:
            inputs = renderer.collate(encoded, padding_side="left" if way == "left" else "right")
            if way == "unmasked":
                inputs.pop("attention_mask", None)
            together = forward(inputs)
        except torch.OutOfMemoryError:  # says nothing about the model
            raise ModelError(NO_ROOM) from None
        except Exception as error:  # tensors that cannot be joined, or what the model makes of them
            reasons[way] = f"a batch cannot be run: {_one_line(error)}"
            continue
        for rows, item, expected in zip(together, encoded, alone, strict=True):
            states = rows[len(rows) - len(item) :] if way == "left" else rows[: len(item)]
            if share := off_share(states, expected, MAX_OFF_SHARE_LEFT if way == "left" else MAX_OFF_SHARE):
                reasons[way] = f"a batch changes {share:.0%} of the states of {_described(item)}"
                break
    reason = reasons["right"] or reasons["unmasked"]
    return reason, reason or reasons["left"]


def off_share(states: torch.Tensor, expected: torch.Tensor, allowed: float = MAX_OFF_SHARE) -> float:
    """The share of states `[L, D]` that differ by more than rounding explains; 0 for the few that half precision allows."""
    size = expected.float().norm(dim=-1).clamp(min=1e-6)
    off = ~((states.float() - expected.float()).norm(dim=-1) / size <= OFF[expected.dtype])  # NaN is off
    share = off.float().mean().item()
    return 0.0 if expected.dtype != torch.float32 and (share <= allowed or int(off.sum()) == 1) else share


def _described(item: Encoded) -> str:
    return f"a conversation of {len(item)} tokens with {item.num_images or 'no'} image{'s' * (item.num_images > 1)}"


def _conversations(renderer: Renderer, tokens: int) -> tuple[list[Encoded], list[dict[str, torch.Tensor] | None]]:
    """Unequal conversations, and the model's own inputs for the last prompt of each: without an image (one of them of `tokens`
    tokens or more), with one that has text before and after it, and with two over several turns."""
    repeats = tokens // max(1, len(renderer.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])) + 1
    images = [Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 40).convert("RGB") for size in SIZES]
    asked: list[tuple[list[Message], list[Image.Image]]] = [
        (_messages(("Hi?", "hello")), []),
        (_messages((SENTENCE * repeats, "yes it is")), []),
    ]
    if renderer.takes_pictures:
        asked += [
            (_messages(("Look:", ImageRef(0), "What is it?", "a red square")), images[:1]),
            (_messages(("Now", ImageRef(0), "then", ImageRef(1), "What?", "two"), ("Why?", "no")), images[1:]),
        ]
    encoded, own = [], []
    for messages, given in asked:
        try:
            encoded.append(renderer.encode_messages(messages, given))
        except SampleError:
            if len(given) < 2:  # some processors refuse two images of unequal tiles; such a sample is skipped
                raise
            given = [given[0], given[0]]
            encoded.append(renderer.encode_messages(messages, given))
        own.append(check_own_ids(renderer, messages, given, encoded[-1]))
    return encoded, own


def _messages(*turns: tuple[Any, ...]) -> list[Message]:
    """Of (parts of the question ..., answer) each."""
    sides = [(("user", turn[:-1]), ("assistant", turn[-1:])) for turn in turns]
    return [Message(role=role, parts=parts) for pair in sides for role, parts in pair]  # type: ignore[arg-type]


def check_own_ids(
    renderer: Renderer, messages: Sequence[Message], images: Sequence[Image.Image], encoded: Encoded
) -> dict[str, torch.Tensor] | None:
    """Check that a conversation's ids are the model's own: those of the last prompt, and of all of it where they can be.

    They cannot where an answer begins with white space or the last prompt ends with a space, which a tokenizer joins with
    what is on the other side; and what closes the last answer may be the next turn's first token.

    Returns:
        The model's own inputs for the last prompt; None if it has no template that makes them.

    Raises:
        ModelError: what differs.
    """
    prompt = encoded.input_ids[: len(encoded) - encoded.answer_lengths[-1]]
    own = renderer.own_inputs(messages[:-1], images, prompt=True)
    pairs = [("prompt", prompt, own)]
    answers = [message.text for message in messages if message.is_target]
    joined = any(answer[:1].isspace() for answer in answers) or renderer.tokenizer.decode(prompt[-1:])[-1:] == " "
    if renderer.marks.reopened is None and not joined:
        closed = renderer.marks.tail.startswith(renderer.marks.end_of_turn)
        ids = encoded.input_ids if closed else encoded.input_ids[:-1]
        pairs.append(("conversation", ids, renderer.own_inputs(messages, images)))
    for what, ids, inputs in pairs:
        if inputs is None:
            continue
        expected = inputs["input_ids"][0].numpy()
        if np.array_equal(ids, expected[: len(ids)]):
            continue
        place = next(i for i in range(len(ids)) if i >= len(expected) or ids[i] != expected[i])
        tokens = [renderer.tokenizer.decode(part[place : place + 1].tolist()) for part in (ids, expected)]
        raise ModelError(
            f"token {place} of the {what} is {tokens[0]!r}, expected {tokens[1]!r} as the model's own "
            "apply_chat_template(tokenize=True) has it"
        )
    return own


def _tokens_to_fill(text_config: Any, device: str) -> int:
    """Tokens that fill every window and top-k of the config twice, where it is small enough."""
    limit = MAX_WINDOW_TOKENS.get(device, MAX_WINDOW_TOKENS["cuda"])
    numbers = [
        value
        for name, value in text_config.to_dict().items()
        if isinstance(value, int) and value <= limit and any(word in name for word in WINDOW_NAMES)
    ]
    return 2 * max([16, *numbers])


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
