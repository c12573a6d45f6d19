"""A conversation -> token ids split as Q1 A1 ... QT AT, and batches of them, for any chat template and processor.

Nothing here knows a model family. The chat template is probed once for what stands around an answer; a conversation is
then rendered with the answers left out, run through the model's own processor (which expands image placeholders and may
return anything about the pictures), and the answers' tokens are put in where they belong. So an answer's tokens are
always its own, and what the processor does with pictures is not repeated here.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from genrecal.errors import ModelError, SampleError
from genrecal.samples import ImageRef, Message, Sample, decode_image
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MARK = "GENRECALxANSWER"  # stands for an answer while a conversation is rendered; plain letters pass every template


@dataclass(frozen=True, kw_only=True)
class TurnMarks:
    """What a chat template puts around an assistant's answer.

    Args:
        header: what a template writes before an answer of the history, as it stands in the rendered text.
        prompt: what it writes there to ask for generation. Where the two differ by white space alone (LLaVA-OneVision's
            template does), `prompt` is used for every turn: it is what the model is given when it answers.
        answer_prefix: white space that belongs to the answer's first token, because the generation prompt ends before it
            (Idefics3: "Assistant:" and then " yes").
        end_of_turn: the special token that closes an answer, as text.
        end_of_turn_id: its id.
    """

    header: str
    prompt: str
    answer_prefix: str
    end_of_turn: str
    end_of_turn_id: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation, ready for a model.

    Args:
        key: the sample's key.
        inputs: the processor's tensors for a batch of one; text tensors are `[1, L]`.
        question_lengths, answer_lengths: tokens of Q_t and A_t, turn by turn; they add up to L. A_t ends with the
            end-of-turn token.
        answers: per turn, the answer's token ids and the byte range of each in the answer text (the end-of-turn token
            has an empty range at its end).
        num_images: pictures in the conversation.
    """

    key: str
    inputs: dict[str, torch.Tensor]
    question_lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    answers: tuple[TokenizedText, ...]
    num_images: int

    @property
    def input_ids(self) -> np.ndarray:
        """int64 `[L]`."""
        return np.asarray(self.inputs["input_ids"][0].numpy())

    def __len__(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, but for its ids."""
        return sum(value.nbytes for value in self.inputs.values())

    def segments(self) -> list[tuple[int, int, bool]]:
        """(start, end, is_answer) of Q1, A1, ..., QT, AT."""
        result, start = [], 0
        for question, answer in zip(self.question_lengths, self.answer_lengths, strict=True):
            result += [(start, start + question, False), (start + question, start + question + answer, True)]
            start += question + answer
        return result


class Renderer:
    """Renders conversations for one model's processor. Raises ModelError at once if its template cannot be handled."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_pictures = hasattr(processor, "image_processor")  # a language model has a tokenizer alone
        self.byte_tokenizer = ByteTokenizer(self.tokenizer)
        special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if getattr(t, "special", False)}
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or r"(?!)")
        self.marks = self._probe_turns()
        self.text_keys = tuple(self._process("a", []).keys())
        self._per_sample_keys = self._probe_images()

    # ------------------------------------------------------------------------------------------------ conversations

    def encode(self, sample: Sample, *, max_tokens: int | None = None) -> Encoded:
        """Render a sample teacher-forced. Raises SampleError with the reason if it cannot be."""
        images = [decode_image(image.read()) for image in sample.images]
        return self.encode_messages(sample.messages, images, key=sample.key, max_tokens=max_tokens)

    def encode_messages(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        *,
        key: str = "",
        max_tokens: int | None = None,
    ) -> Encoded:
        """Render messages that end with a target turn; an assistant turn that is none is part of the next question."""
        if images and not self.takes_pictures:
            raise SampleError("the conversation has pictures, and this is a language model, which takes text alone")
        answers = [message.text for message in messages if message.is_target]
        if any(message.reasoning for message in messages):
            raise SampleError("the assistant's reasoning cannot be rendered")
        self._refuse_special_tokens(messages)
        text, ordinals = self._text_without_answers(messages, num_answers=len(answers))
        inputs = self._process(text, _in_reading_order(messages, images))
        ids = inputs["input_ids"][0].numpy()
        closings = np.flatnonzero(ids == self.marks.end_of_turn_id)
        if len(closings) <= ordinals[-1]:
            raise SampleError("the processor dropped an end-of-turn token; the conversation cannot be split into turns")
        return self._insert_answers(key, inputs, closings[ordinals], answers, len(images), max_tokens)

    def raw_ids(self, messages: Sequence[Message]) -> list[int]:
        """The same conversation's ids before its processor expands image placeholders, for an engine that does that itself.

        Answers have the same tokens as in `encode_messages`. Raises SampleError as that does.
        """
        answers = [message.text for message in messages if message.is_target]
        text, ordinals = self._text_without_answers(messages, num_answers=len(answers))
        tokenize = getattr(self.processor, "raw_ids", None)  # a placeholder that is no single token needs care
        ids = list(tokenize(text) if tokenize is not None else self.tokenizer(text)["input_ids"])
        closings = [place for place, token in enumerate(ids) if token == self.marks.end_of_turn_id]
        result, start = [], 0
        for ordinal, answer in zip(ordinals, answers, strict=True):
            result += ids[start : closings[ordinal]] + self._tokenize_answer(answer).ids.tolist()
            start = closings[ordinal] + 1
        return result

    def encode_prompt(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Render messages that end with a user's turn, ready for generation; the same tokens as a Q segment."""
        self._refuse_special_tokens(messages)
        answer = Message(role="assistant", parts=("a",))
        return self.without_last_answer(self.encode_messages([*messages, answer], images)).inputs

    def without_last_answer(self, encoded: Encoded) -> Encoded:
        """The conversation up to its last question's end; A_T is empty in it."""
        length = len(encoded) - encoded.answer_lengths[-1]
        none = np.empty(0, np.int64)
        return dataclasses.replace(
            encoded,
            inputs={n: value[:, :length] if n in self.text_keys else value for n, value in encoded.inputs.items()},
            answer_lengths=(*encoded.answer_lengths[:-1], 0),
            answers=(*encoded.answers[:-1], TokenizedText(ids=none, starts=none, ends=none)),
        )

    def _insert_answers(
        self,
        key: str,
        inputs: dict[str, torch.Tensor],
        closings: np.ndarray,
        answers: Sequence[str],
        num_images: int,
        max_tokens: int | None,
    ) -> Encoded:
        tokenized = [self._tokenize_answer(answer) for answer in answers]
        starts = np.concatenate([[0], closings[:-1] + 1])
        question_lengths = tuple(int(n) for n in closings - starts)
        answer_lengths = tuple(len(answer.ids) for answer in tokenized)
        total = sum(question_lengths) + sum(answer_lengths)
        if max_tokens is not None and total > max_tokens:
            raise SampleError(f"{total} tokens, over the limit of {max_tokens}")
        result = dict(inputs)
        for name in self.text_keys:
            fill = 1 if name == "attention_mask" else 0
            pieces = []
            for start, closing, answer in zip(starts, closings, tokenized, strict=True):
                ids = torch.from_numpy(answer.ids)
                pieces.append(inputs[name][:, start:closing])
                pieces.append((ids if name == "input_ids" else torch.full_like(ids, fill)).to(inputs[name].dtype)[None])
            result[name] = torch.cat(pieces, dim=1)
        return Encoded(
            key=key,
            inputs=result,
            question_lengths=question_lengths,
            answer_lengths=answer_lengths,
            answers=tuple(tokenized),
            num_images=num_images,
        )

    def _tokenize_answer(self, answer: str) -> TokenizedText:
        """Answer text -> its tokens and the end-of-turn token, byte ranges relative to the answer itself."""
        prefix = len(self.marks.answer_prefix.encode())
        tokens = self.byte_tokenizer(self.marks.answer_prefix + answer)
        end = len(answer.encode())
        return TokenizedText(
            ids=np.append(tokens.ids, self.marks.end_of_turn_id),
            starts=np.append(np.maximum(tokens.starts - prefix, 0), end),
            ends=np.append(np.maximum(tokens.ends - prefix, 0), end),
        )

    def answer_text(self, ids: Sequence[int]) -> str:
        """A generated answer's ids, without the end-of-turn token, as text.

        Raises SampleError for ids that stand for no text.
        """
        return self.byte_tokenizer.text(ids).removeprefix(self.marks.answer_prefix)

    def _text_without_answers(self, messages: Sequence[Message], num_answers: int) -> tuple[str, list[int]]:
        """The rendered text up to the last end of turn, answers left out, and each closing token's count before it."""
        marks = self.marks
        pieces = self._render(messages, answer=MARK).split(MARK)
        if len(pieces) != num_answers + 1:
            raise SampleError(f"the rendered conversation has {len(pieces) - 1} answers, expected {num_answers}")
        text, ordinals = "", []
        for number, piece in enumerate(pieces):
            if number:
                if not piece.startswith(marks.end_of_turn):
                    raise SampleError(f"turn {number}: the answer is not closed by {marks.end_of_turn!r}")
                ordinals.append(text.count(marks.end_of_turn))
            if number == num_answers:
                return text + marks.end_of_turn, ordinals
            if not piece.endswith(marks.header + marks.answer_prefix):
                raise SampleError(
                    f"turn {number + 1}: the chat template does not open the answer as it did in the probe"
                )
            text += piece[: len(piece) - len(marks.header + marks.answer_prefix)] + marks.prompt
        raise AssertionError("a conversation has at least one answer")

    def _render(self, messages: Sequence[Message], *, answer: str | None = None, prompt: bool = False) -> str:
        rendered: list[dict[str, Any]] = []
        for message in messages:
            parts = [answer] if answer is not None and message.is_target else message.parts
            content: Any = [
                {"type": "image"} if isinstance(p, ImageRef) else {"type": "text", "text": p} for p in parts
            ]
            if not self.takes_pictures:  # templates of language models take strings
                content = "".join(part for part in parts if isinstance(part, str))
            rendered.append({"role": message.role, "content": content})
        try:
            return str(self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # Jinja raises what the template tells it to
            raise SampleError(f"the chat template cannot render this conversation: {error}") from None

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if match := self._special.search(message.text):
                raise SampleError(f"the {message.role}'s text holds {match[0]!r}, a special token of this model")
            if MARK in message.text:
                raise SampleError(f"the text holds {MARK!r}, which genrecal uses to mark answers")

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        pictures = {"images": [images]} if images else {}
        try:
            return dict(self.processor(text=[text], **pictures, return_tensors="pt"))
        except Exception as error:  # each processor has its own kinds
            raise SampleError(f"the processor refuses this conversation: {error}") from None

    # ------------------------------------------------------------------------------------------------------- batches

    def collate(
        self, batch: Sequence[Encoded | dict[str, torch.Tensor]], *, padding_side: str = "right"
    ) -> dict[str, Any]:
        """Conversations -> one batch, as the processor itself would have made of them all.

        Text tensors are padded to `[B, L]`. Pictures' tensors are either joined along their first axis (those that have
        one row a picture, tile or patch) or padded to one row a conversation; which of the two was found by probing.
        """
        rows = [item.inputs if isinstance(item, Encoded) else item for item in batch]
        length = max(row["input_ids"].shape[1] for row in rows)
        result: dict[str, Any] = {}
        for name in self.text_keys:
            fill = self.tokenizer.pad_token_id or 0 if name == "input_ids" else 0
            padded = torch.full((len(rows), length), fill, dtype=rows[0][name].dtype)
            for number, row in enumerate(rows):
                used = row[name].shape[1]
                padded[number, slice(0, used) if padding_side == "right" else slice(length - used, length)] = row[name][
                    0
                ]
            result[name] = padded
        for name in dict.fromkeys(name for row in rows for name in row if name not in self.text_keys):
            result[name] = self._join([row.get(name) for row in rows], per_sample=name in self._per_sample_keys)
        return result

    @staticmethod
    def _join(values: Sequence[torch.Tensor | None], *, per_sample: bool) -> torch.Tensor:
        present = [value for value in values if value is not None]
        widest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in present), strict=True)]
        if per_sample:
            values = [
                value if value is not None else present[0].new_zeros((1, *present[0].shape[1:])) for value in values
            ]
            present = [value for value in values if value is not None]
        padded = []
        for value in present:
            target = value.new_zeros((value.shape[0], *widest))
            target[(slice(None), *(slice(0, size) for size in value.shape[1:]))] = value
            padded.append(target)
        return torch.cat(padded)

    # ------------------------------------------------------------------------------------------------------- probing

    def _probe_turns(self) -> TurnMarks:
        """Find what stands around an answer by rendering one known conversation both ways."""
        question, answer = Message(role="user", parts=("one",)), Message(role="assistant", parts=(MARK,))
        if not getattr(self.processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise ModelError("the model has no chat template; copy the one it was trained with into its folder")
        try:
            history = self._render([question, answer, question, answer])
            prompt = self._render([question], prompt=True)
        except SampleError as error:
            raise ModelError(str(error)) from None
        pieces = history.split(MARK)
        if len(pieces) != 3:
            raise ModelError("the chat template does not render an assistant's text as it is given")
        before, after = pieces[0], pieces[1]
        closing = [t for t in self._special_tokens() if after.startswith(t)]
        if not closing:
            raise ModelError(
                f"no special token closes an assistant's turn: after the answer the template writes {after[:20]!r}"
            )
        end_of_turn = max(closing, key=len)
        shared = 0
        while shared < min(len(before), len(prompt)) and before[shared] == prompt[shared]:
            shared += 1
        header, generation, prefix = before[shared:], prompt[shared:], ""
        if not generation:  # the history only adds to the prompt
            header, prefix = "", header
        if prefix.strip() or header.strip() != generation.strip():
            raise ModelError(
                f"the chat template opens an answer with {before[-40:]!r} in a conversation but with "
                f"{prompt[-40:]!r} when it asks for one; teacher-forced states would not be the generating model's"
            )
        # As much context as is the template's own, so that the place is recognised in a text.
        shared = min(shared, before.rfind("one") + len("one"))
        return TurnMarks(
            header=before[shared : len(before) - len(prefix)],
            prompt=prompt[shared:],
            answer_prefix=prefix,
            end_of_turn=end_of_turn,
            end_of_turn_id=int(self.tokenizer.convert_tokens_to_ids(end_of_turn)),
        )

    def _special_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values()]

    def _probe_images(self) -> frozenset[str]:
        """Which of the processor's tensors have one row a conversation, however many pictures it holds."""
        if not self.takes_pictures:
            return frozenset()
        picture = Image.new("RGB", (64, 48), (200, 30, 30))
        question = Message(role="user", parts=(ImageRef(0), ImageRef(1), "one"))
        answer = Message(role="assistant", parts=("two",))
        longer = dataclasses.replace(answer, parts=("two three four five six",))
        try:
            short = self.encode_messages([question, answer], [picture, picture])
            long = self.encode_messages([question, answer, Message(role="user", parts=("x",)), longer], [picture] * 2)
        except SampleError as error:
            raise ModelError(f"a conversation with two pictures cannot be rendered: {error}") from None
        names = [name for name in short.inputs if name not in self.text_keys]
        for name in names:
            if short.inputs[name].shape != long.inputs[name].shape:
                raise ModelError(
                    f"the processor's {name} depends on the text's length, so answers cannot be put in later"
                )
        return frozenset(name for name in names if short.inputs[name].shape[0] == 1)


def _in_reading_order(messages: Sequence[Message], images: Sequence[Image.Image]) -> list[Image.Image]:
    return [images[part.index] for m in messages for part in m.parts if isinstance(part, ImageRef)]
