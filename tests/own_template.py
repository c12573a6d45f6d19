"""What a model's own chat template and processor make of a conversation, beside what genrecal renders."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from genrecal.samples import Message
from genrecal.vlm.rendering import Renderer


def own_ids(
    processor: Any,
    messages: Sequence[Message],
    images: Sequence[Image.Image] = (),
    *,
    prompt: bool = False,
    **args: Any,
) -> list[int]:
    """The ids of `apply_chat_template(tokenize=True)`."""
    chat = []
    for message in messages:
        content: Any = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": images[part.index]}
            for part in message.parts
        ]
        content = content if hasattr(processor, "image_processor") else message.text
        reasoning = {"reasoning_content": message.reasoning} if message.reasoning else {}
        chat.append({"role": message.role, "content": content, **reasoning})
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompt}
    return list(processor.apply_chat_template([chat], **options, **args)["input_ids"][0])


def assert_own_ids(
    renderer: Renderer, messages: Sequence[Message], images: Sequence[Image.Image] = (), **args: Any
) -> None:
    """Prompt and conversation are the template's, and nothing but what it writes after the last answer is left out."""
    processor, tokenizer = renderer.processor, renderer.tokenizer
    encoded = renderer.encode_messages(messages, images)
    ids, answer = encoded.input_ids.tolist(), encoded.answers[-1].ids.tolist()
    prompt = own_ids(processor, messages[:-1], images, prompt=True, **args)
    assert renderer.encode_prompt(messages[:-1], images)["input_ids"][0].tolist() == prompt
    assert ids == prompt + answer
    if tokenizer.bos_token is not None:
        assert ids.count(tokenizer.bos_token_id) == 1
    whole = own_ids(processor, messages, images, **args)
    if (
        renderer.marks.reopened is not None
    ):  # LLaVA-OneVision: other white space stands before an answer than ends the prompt
        assert whole[-len(answer) :] == answer
        return
    assert ids == whole[: len(ids)]
    assert renderer.marks.tail == renderer.marks.end_of_turn + tokenizer.decode(whole[len(ids) :])
