"""A conversation -> token ids split as Q1 A1 ... QT AT, and batches of them, for any chat template and processor.

Nothing here knows a model family. The ids are those of the model's own `apply_chat_template(tokenize=True)`: the prompt of
the last answer, as the template renders it with `add_generation_prompt`, the answer as the template writes it, and the token
that closes it. docs/models.md lists the exceptions. Answers are left out of the text that the model's processor gets (it
expands image placeholders and may return anything about the images), and their tokens are put in afterwards: no token
straddles the border between a prompt and its answer, as none does when the model writes the answer itself.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import ImageRef, Message, Sample, decode_image
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MARK = "GENRECALxANSWER"  # stands for an answer while a conversation is rendered; plain letters pass every template
QUESTION, REASONING = "GENRECALxQUESTION", "GENRECALxREASONING"  # of the probes
# Variables of chat templates that transformers itself sets.
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How conversations are rendered beside what the model's own files say.

    Args:
        template_args: variables of the chat template, such as `enable_thinking`.
        allowed_tokens: added tokens of the tokenizer that texts may hold, such as those around a box.
        inherited: of another model, a student's teacher: its arguments that this template has too, where `template_args`
            says nothing, and its allowed tokens.
    """

    template_args: Mapping[str, Any] = field(default_factory=dict)
    allowed_tokens: tuple[str, ...] = ()
    inherited: "PromptOptions | None" = None

    @classmethod
    def parse(cls, template_args: Sequence[str] | None, allowed_tokens: Sequence[str] | None) -> "PromptOptions":
        """From `--template-arg` and `--allow-token` options."""
        return cls(
            template_args=named_values("--template-arg", template_args or (), "enable_thinking=false"),
            allowed_tokens=tuple(allowed_tokens or ()),
        )


@dataclass(frozen=True, kw_only=True)
class TurnMarks:
    """What a chat template puts around an assistant's answer, found by rendering known conversations.

    Args:
        end_of_turn: the token that closes an answer, as text. A template that closes the last answer with nothing has the
            token there that begins the next turn.
        end_of_turn_id: its id.
        answer_prefix: what the template writes between the generation prompt and an answer: white space (Idefics3:
            "Assistant:" and then " yes"), or the empty thinking of a model that thinks. It is part of the answer.
        tail: what it writes after the last answer, the closing token included.
        reopened: how the generation prompt ends, and what stands there in a conversation, where the two differ by white
            space (LLaVA-OneVision) or by empty thinking in the prompt (Gemma 4). The last answer then has the prompt's.
        earlier_alike: the template opens an earlier answer as it opens the last one.
        writes_reasoning: the template writes the last turn's `reasoning_content`.
    """

    end_of_turn: str
    end_of_turn_id: int
    answer_prefix: str
    tail: str
    reopened: tuple[str, str] | None
    earlier_alike: bool
    writes_reasoning: bool


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
        num_images: images in the conversation.
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
    """Renders conversations for one model's processor.

    Raises ModelError at once if its template cannot be handled, UsageError for options that it does not have.
    """

    def __init__(self, processor: Any, options: PromptOptions | None = None):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_pictures = hasattr(processor, "image_processor")  # a language model has a tokenizer alone
        self.byte_tokenizer = ByteTokenizer(self.tokenizer)
        self._added = {str(token): token_id for token_id, token in self.tokenizer.added_tokens_decoder.items()}
        options = options or PromptOptions()
        if not getattr(processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise ModelError("the model has no chat template; copy the one it was trained with into its folder")
        self.template_args = self._template_args(options)
        # Why the model must run one conversation at a time, and write one answer; found where it is loaded (batch_proof.py).
        self.alone = self.writes_alone = ""
        self._content_lists = self.takes_pictures
        self._written_tokens: set[str] = set()
        self._refused = self._refused_in_answers = re.compile(r"(?!)")
        self.marks = self._probe_turns()
        self.text_keys = tuple(self._process("a", []).keys())
        self._per_sample_keys, probed = self._probe_images()
        self.allowed_tokens = self._set_refused_tokens(options, {*probed, *self._probed_ids()})

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
        self._refuse_texts(messages)
        questions, answers = self._segments(messages)
        text, ordinals = self._without_answers(questions)
        inputs = self._process(text, _in_reading_order(messages, images))
        ids = inputs["input_ids"][0].numpy()
        closings = self._closings(ids, text)[ordinals]
        return self._insert_answers(key, inputs, closings, answers, len(images), max_tokens)

    def raw_ids(self, messages: Sequence[Message]) -> list[int]:
        """The same conversation's ids before its processor expands image placeholders, for an engine that does that itself.

        Answers have the same tokens as in `encode_messages`. Raises SampleError as that does.
        """
        questions, answers = self._segments(messages)
        text, ordinals = self._without_answers(questions)
        # A placeholder that is no single token needs care.
        tokenize = getattr(self.processor, "raw_ids", lambda *args, **kw: self.tokenizer(*args, **kw)["input_ids"])
        ids = list(tokenize(text, add_special_tokens=self._adds_special_tokens(text)))
        closings = self._closings(np.array(ids), text).tolist()
        result, start = [], 0
        for ordinal, answer in zip(ordinals, answers, strict=True):
            result += ids[start : closings[ordinal]] + answer.ids.tolist()
            start = closings[ordinal] + 1
        return result

    def _closings(self, ids: np.ndarray, text: str) -> np.ndarray:
        """Where the closing tokens of a text stand in its ids. A BOS token before them may be the same one (Molmo 2)."""
        places, count = np.flatnonzero(ids == self.marks.end_of_turn_id), text.count(self.marks.end_of_turn)
        if len(places) < count:
            raise SampleError("the processor dropped an end-of-turn token; the conversation cannot be split into turns")
        return places[len(places) - count :]

    def encode_prompt(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Render messages that end with a user's turn, ready for generation; the same tokens as a Q segment."""
        answer = Message(role="assistant", parts=("a",))
        return self.without_last_answer(self.encode_messages([*messages, answer], images)).inputs

    def own_inputs(
        self, messages: Sequence[Message], images: Sequence[Image.Image], *, prompt: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """The tensors of the model's own `apply_chat_template(tokenize=True)`; None if it has none that does it.

        Args:
            images: of all the messages that `ImageRef` counts through.
            prompt: with the generation prompt.
        """
        chat = self._chat(messages, images)
        if self.processor is not self.tokenizer and not hasattr(self.processor, "_resolve_chat_template"):
            return None  # a processor of genrecal's own, for a checkpoint that comes without one
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompt, "return_tensors": "pt"}
        try:
            return dict(self.processor.apply_chat_template([chat], **options, **self.template_args))
        except Exception as error:  # Jinja raises what the template tells it to
            raise SampleError(f"the chat template cannot render this conversation: {error}") from None

    def settle(self, sample: Sample) -> Sample:
        """The sample as this model's template has it, which is how a teacher's cache keeps it.

        - Earlier answers become context where the template opens them otherwise than the last one, as templates of models
          that think do: no prompt would ever look like what stands before them.
        - Thinking in the last answer's text is written as the template writes it.

        Raises SampleError if the template cannot render the sample.
        """
        *before, last = sample.messages
        if not self.marks.earlier_alike:
            before = [dataclasses.replace(message, target=False) for message in before]
        self._refuse_texts(sample.messages)
        written = self._written(self._render(sample.messages[:-1], prompt=True), sample.messages)
        if written is not None and not _is_in(last.text, written):
            last = dataclasses.replace(last, parts=(written,), reasoning="")
        given = sample.given_answers if self.marks.earlier_alike else sample.given_answers[-1:]
        return dataclasses.replace(sample, messages=(*before, last), given_answers=given)

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
        answers: Sequence[TokenizedText],
        num_images: int,
        max_tokens: int | None,
    ) -> Encoded:
        starts = np.concatenate([[0], closings[:-1] + 1])
        question_lengths = tuple(int(n) for n in closings - starts)
        answer_lengths = tuple(len(answer.ids) for answer in answers)
        total = sum(question_lengths) + sum(answer_lengths)
        if max_tokens is not None and total > max_tokens:
            raise SampleError(f"{total} tokens, over the limit of {max_tokens}")
        result = dict(inputs)
        for name in self.text_keys:
            fill = 1 if name == "attention_mask" else 0
            pieces = []
            for start, closing, answer in zip(starts, closings, answers, strict=True):
                ids = torch.from_numpy(answer.ids)
                pieces.append(inputs[name][:, start:closing])
                pieces.append((ids if name == "input_ids" else torch.full_like(ids, fill)).to(inputs[name].dtype)[None])
            result[name] = torch.cat(pieces, dim=1)
        return Encoded(
            key=key,
            inputs=result,
            question_lengths=question_lengths,
            answer_lengths=answer_lengths,
            answers=tuple(answers),
            num_images=num_images,
        )

    def _tokenize_answer(self, written: str, text: str | None = None) -> TokenizedText:
        """An answer as the template writes it -> its tokens and the end-of-turn token.

        Byte ranges are relative to the answer's own `text`, and cover all of it: what the template adds before it has empty
        ranges at its beginning, and white space that the template trims belongs to the token beside it.
        """
        text = written if text is None else text
        tokens, end, core = self.byte_tokenizer(written), len(text.encode()), text.strip()
        lead = len(text[: len(text) - len(text.lstrip())].encode())
        offset = len(written[: written.rfind(core)].encode()) - lead if core else len(written.encode()) - end
        starts, ends = np.clip(tokens.starts - offset, 0, end), np.clip(tokens.ends - offset, 0, end)
        if len(tokens.ids) and offset < 0:
            starts[0] = 0
        if len(tokens.ids):
            ends[-1] = end
        closing = self.marks.end_of_turn_id
        return TokenizedText(
            ids=np.append(tokens.ids, closing), starts=np.append(starts, end), ends=np.append(ends, end)
        )

    def answer_text(self, ids: Sequence[int]) -> str:
        """A generated answer's ids, without the end-of-turn token, as text.

        Raises SampleError for ids that stand for no text.
        """
        return self.byte_tokenizer.text(ids).removeprefix(self.marks.answer_prefix)

    def _segments(self, messages: Sequence[Message]) -> tuple[list[str], list[TokenizedText]]:
        """The texts of Q1 to QT, each but the first with the closing token before it; and A1 to AT."""
        targets = [message for message in messages if message.is_target]
        if not targets or not messages[-1].is_target:
            raise SampleError("the conversation does not end with an answer to learn")
        prompt = self._render(messages[:-1], prompt=True)
        marked = [dataclasses.replace(m, parts=(MARK,)) if m.is_target else m for m in messages[:-1]]
        questions = self._render(marked, prompt=True).split(MARK) if len(targets) > 1 else [prompt]
        # What the template adds to a prompt before an answer is a part of the answer, and so is a space in earlier turns, which
        # tokenizers join with the word behind it.
        earlier = [question.removesuffix(self.marks.answer_prefix).rstrip(" ") for question in questions[:-1]]
        questions = [*earlier, questions[-1]]
        if len(questions) != len(targets) or not prompt.startswith(questions[0]):
            raise SampleError(f"the rendered conversation has {len(questions)} answers, expected {len(targets)}")
        answers, place = [], len(questions[0])
        for number, (message, question) in enumerate(zip(targets, questions[1:], strict=False), start=1):
            if not question.startswith(self.marks.end_of_turn):
                raise SampleError(f"turn {number}: the answer is not closed by {self.marks.end_of_turn!r}")
            end = prompt.find(question, place)
            written = prompt[place:end]
            if end < 0 or not _is_in(message.text, written):
                raise SampleError(f"turn {number}: the chat template leaves out a part of this earlier answer")
            answers.append(self._tokenize_answer(written, message.text))
            place = end + len(question)
        if place != len(prompt):
            raise SampleError("the chat template renders earlier answers otherwise than in the probe")
        answers.append(self._last_answer(prompt, messages))
        return questions, answers

    def _last_answer(self, prompt: str, messages: Sequence[Message]) -> TokenizedText:
        text, written = messages[-1].text, self._written(prompt, messages)
        if written is None:
            thinking = "; it has reasoning_content, and thinking is off" if messages[-1].reasoning else ""
            raise SampleError(
                f"the chat template asks for the last answer with {prompt[-40:]!r}, but does not open this one so{thinking}"
            )
        # Where another model's template writes the answer's thinking otherwise, the answer stays as it was cached.
        return self._tokenize_answer(written if _is_in(text, written) else text, text)

    def _written(self, prompt: str, messages: Sequence[Message]) -> str | None:
        """What the template writes between the prompt and the closing token; None if it does not begin as the prompt does."""
        whole, marks = self._render(messages), self.marks
        if marks.reopened is not None:
            prompt = prompt.removesuffix(marks.reopened[0]) + marks.reopened[1]
        if not (whole.startswith(prompt) and whole.endswith(marks.tail)):
            return None
        return whole[len(prompt) : len(whole) - len(marks.tail)]

    def _without_answers(self, questions: Sequence[str]) -> tuple[str, list[int]]:
        """The text with closed empty answers, and the number of closing tokens before each that closes one."""
        ordinals, text, closing = [], "", self.marks.end_of_turn
        for question in questions:
            text += question
            ordinals.append(text.count(closing))
        return text + closing, ordinals

    def _chat(self, messages: Sequence[Message], images: Sequence[Image.Image] | None = None) -> list[dict[str, Any]]:
        """Messages as chat templates take them, with the images in place if they are given."""
        chat: list[dict[str, Any]] = []
        for message in messages:
            content: Any = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", **({} if images is None else {"image": images[part.index]})}
                for part in message.parts
            ]
            if not self._content_lists and all(isinstance(part, str) for part in message.parts):
                content = message.text
            reasoning = {"reasoning_content": message.reasoning} if message.reasoning else {}
            chat.append({"role": message.role, "content": content, **reasoning})
        return chat

    def _render(self, messages: Sequence[Message], *, prompt: bool = False, **args: Any) -> str:
        options = self.template_args | args
        try:
            return str(
                self.processor.apply_chat_template(
                    self._chat(messages), tokenize=False, add_generation_prompt=prompt, **options
                )
            )
        except Exception as error:  # Jinja raises what the template tells it to
            raise SampleError(f"the chat template cannot render this conversation: {error}") from None

    def _refuse_texts(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if not self.takes_pictures and any(isinstance(part, ImageRef) for part in message.parts):
                raise SampleError("the conversation has pictures, and this is a language model, which takes text alone")
            refused = self._refused_in_answers if message.role == "assistant" else self._refused
            for name, text in (("text", message.text), ("reasoning_content", message.reasoning)):
                if match := refused.search(text):
                    allow = (
                        " that its chat template writes"
                        if match[0] in self._written_tokens
                        else f"; --allow-token {match[0]!r} lets texts hold it"
                    )
                    raise SampleError(
                        f"the {message.role}'s {name} holds {match[0]!r}, a special token of this model{allow}"
                    )
                if MARK in text:
                    raise SampleError(f"the text holds {MARK!r}, which genrecal uses to mark answers")

    def _adds_special_tokens(self, text: str) -> bool:
        """As `apply_chat_template(tokenize=True)` does: a tokenizer's never adds any, a processor's unless the text begins
        with the BOS token."""
        bos = self.tokenizer.bos_token
        return self.processor is not self.tokenizer and not (bos and text.startswith(bos))

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"images": [images]} if images else {}
        if not self._adds_special_tokens(text):
            options["add_special_tokens"] = False
        try:
            return dict(self.processor(text=[text], **options, return_tensors="pt"))
        except Exception as error:  # each processor has its own kinds
            raise SampleError(f"the processor refuses this conversation: {error}") from None

    # ------------------------------------------------------------------------------------------------------- batches

    def batches(self, items: Sequence[Encoded], *, padding_side: str = "right") -> list[dict[str, torch.Tensor]]:
        """What goes through the model at once: all together, or each conversation by itself where it must run `alone`."""
        groups = [[item] for item in items] if self.alone else [items]
        return [self.collate(group, padding_side=padding_side) for group in groups]

    def collate(
        self,
        batch: Sequence[Encoded | dict[str, torch.Tensor]],
        *,
        padding_side: str = "right",
        text_only: bool = False,
    ) -> dict[str, Any]:
        """Conversations -> one batch, as the processor itself would have made of them all.

        Text tensors are padded to `[B, L]`. Pictures' tensors are either joined along their first axis (those that have
        one row a picture, tile or patch) or padded to one row a conversation; which of the two was found by probing. With
        `text_only` they are left out.
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
        if text_only:
            return result
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

    def _template_args(self, options: PromptOptions) -> dict[str, Any]:
        """The arguments that the template gets. Raises UsageError for one that it does not have."""
        known = template_variables(self.processor)
        if unknown := sorted(set(options.template_args) - known):
            raise UsageError(
                f"template argument {unknown[0]}: the chat template has no such variable; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        inherited = options.inherited.template_args if options.inherited else {}
        return {name: value for name, value in inherited.items() if name in known} | dict(options.template_args)

    def _probe_turns(self) -> TurnMarks:
        """Find what stands around an answer by rendering known conversations."""
        question, answer = Message(role="user", parts=(QUESTION,)), Message(role="assistant", parts=(MARK,))
        try:
            history = self._probe_contents([question, answer, question, answer])
            prompt, whole = self._render([question], prompt=True), self._render([question, answer])
        except SampleError as error:
            raise ModelError(str(error)) from None
        if history.count(MARK) != 2 or whole.count(MARK) != 1:
            raise ModelError("the chat template does not render an assistant's text as it is given")
        (earlier, after, _), (head, tail) = history.split(MARK), whole.split(MARK)
        closing = [token for token in self._added if token and after.startswith(token)]
        if not closing:
            raise ModelError(
                f"no special token closes an assistant's turn: after the answer the template writes {after[:20]!r}"
            )
        end_of_turn = max(closing, key=len)
        opening = _opening(prompt, head, self._added)
        if opening is None:
            raise ModelError(
                f"the chat template opens an answer with {head[-40:]!r} in a conversation but with "
                f"{prompt[-40:]!r} when it asks for one; teacher-forced states would not be the generating model's"
            )
        prefix, reopened = opening
        # White space apart, which some templates write otherwise in a prompt.
        openings = [text.rpartition(QUESTION)[2].split() for text in (earlier, prompt + prefix)]
        return TurnMarks(
            end_of_turn=end_of_turn,
            end_of_turn_id=int(self.tokenizer.convert_tokens_to_ids(end_of_turn)),
            answer_prefix=prefix,
            tail=tail,
            reopened=reopened,
            earlier_alike=openings[0] == openings[1],
            writes_reasoning=self._writes_reasoning(question, answer),
        )

    def _probe_contents(self, messages: Sequence[Message]) -> str:
        """Render messages. Templates of language models take texts as strings, others as lists of parts; a few write a list
        as Python does, and want strings where there is no image."""
        try:
            history = self._render(messages)
            if not self._content_lists or "{'type': 'text'" not in history:
                return history
        except SampleError:
            if not self._content_lists:
                raise
            self._content_lists = False
            try:
                return self._render(messages)
            except SampleError:
                self._content_lists = True
                raise
        self._content_lists = False
        return self._render(messages)

    def _writes_reasoning(self, question: Message, answer: Message) -> bool:
        try:
            return REASONING in self._render([question, dataclasses.replace(answer, reasoning=REASONING)])
        except SampleError:
            return False

    def refuse_unsaid_thinking(self, name: str) -> None:
        """Raises ModelError, with the model's name, for one that thinks unless it is told not to, where nothing was said of it.

        Its template then begins an answer with thinking that the prompt does not hold, and an argument of the template
        changes that.
        """
        if not self.marks.answer_prefix.strip():
            return
        question, answer = Message(role="user", parts=(QUESTION,)), Message(role="assistant", parts=(MARK,))
        said = {name for name, value in self.template_args.items() if isinstance(value, bool)}
        for variable in sorted(template_variables(self.processor) - said):
            for value in (False, True):
                try:
                    prompt = self._render([question], prompt=True, **{variable: value})
                    whole = self._render([question, answer], **{variable: value})
                except SampleError:
                    continue
                opening = _opening(prompt, whole.partition(MARK)[0], self._added)
                if opening is not None and not opening[0].strip():
                    off, on = (f"{variable}={json.dumps(choice)}" for choice in (value, not value))
                    raise ModelError(
                        f"{name}: this model thinks before it answers unless its chat template is told otherwise; choose "
                        f"{off} for answers without thinking or {on} for answers that begin with it: --template-arg "
                        f"{off}, or for train --set prompt.template_args.{off}"
                    )

    def _probed_ids(self) -> set[int]:
        """The ids of all that the template is known to write, in conversations whose texts hold no added token."""
        question, answer = Message(role="user", parts=(QUESTION,)), Message(role="assistant", parts=(MARK,))
        system, thinking = Message(role="system", parts=("be",)), dataclasses.replace(answer, reasoning=REASONING)
        ids: set[int] = set()
        for messages in ([question, answer, question, answer], [system, question, answer], [question, thinking]):
            for prompt in (True, False):
                with contextlib.suppress(SampleError):  # a template may know no system, say
                    text = self._render(messages[:-1] if prompt else messages, prompt=prompt)
                    ids |= set(self._process(text, [])["input_ids"][0].tolist())
        return ids

    def _set_refused_tokens(self, options: PromptOptions, probed: set[int]) -> tuple[str, ...]:
        """Set which tokens no text may hold: special ones, and those that the template or the processor writes. With one of
        these, a text could end its turn and begin another. White space is no such token (Gemma's "\n\n").

        Returns the tokens that are allowed. Raises UsageError for one that cannot be.
        """
        tokens = self.tokenizer.added_tokens_decoder
        literal = _literal_text(self.processor)
        in_template = {  # those of tool calls too
            text
            for text, token_id in self._added.items()
            if (token_id in probed or text in literal) and self.byte_tokenizer.token_bytes(token_id).strip()
        }
        self._written_tokens = {text for text in in_template if self._added[text] in probed}
        special = {text for text, token_id in self._added.items() if getattr(tokens[token_id], "special", False)}
        for token in options.allowed_tokens:
            if token not in self._added:
                raise UsageError(f"allowed token {token!r}: the tokenizer has no such added token")
            if token in self._written_tokens:
                raise UsageError(
                    f"allowed token {token!r}: the chat template writes it itself; in a text it would change the conversation"
                )
        inherited = options.inherited.allowed_tokens if options.inherited else ()
        allowed = {token for token in (*options.allowed_tokens, *inherited) if token in self._added}
        refused = (special | in_template) - (allowed - self._written_tokens)
        self._refused = _any_of(refused)
        # An answer may hold thinking where the template would begin it so.
        self._refused_in_answers = _any_of(
            token for token in refused if token in special or token not in self.marks.answer_prefix
        )
        return tuple(sorted(allowed))

    def _probe_images(self) -> tuple[frozenset[str], set[int]]:
        """Which of the processor's tensors have one row a conversation, however many images it holds; and the ids seen."""
        if not self.takes_pictures:
            return frozenset(), set()
        picture = Image.new("RGB", (64, 48), (200, 30, 30))
        question = Message(role="user", parts=(ImageRef(0), ImageRef(1), QUESTION))
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
        per_sample = frozenset(name for name in names if short.inputs[name].shape[0] == 1)
        return per_sample, set(short.input_ids.tolist())


def named_values(option: str, texts: Sequence[str], example: str) -> dict[str, Any]:
    """`name=value` options, the value as JSON, as Python's True, False or None, or else as text.

    Raises UsageError for one without a name or a value.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{option} {text!r}: expected name=value, such as {example}")
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            values[name] = value
    return values


def template_variables(processor: Any) -> set[str]:
    """The variables of a processor's or tokenizer's chat template that its user can set."""
    from transformers.utils.chat_template_utils import _get_template_variables

    special = getattr(processor, "tokenizer", processor).special_tokens_map
    return set(_get_template_variables(_template(processor))) - {*OWN_VARIABLES, *special}


def _literal_text(processor: Any) -> str:
    """All that the chat template can write by itself, in no order."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _template(processor)
    tree = _compile_jinja_template(template).environment.parse(template)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    return "\0".join([*texts, *(str(node.value) for node in tree.find_all(nodes.Const))])


def _template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(processor, "tokenizer", processor).chat_template
    return str(template["default"] if isinstance(template, dict) else template)


def _opening(prompt: str, head: str, added: Iterable[str]) -> tuple[str, tuple[str, str] | None] | None:
    """What the text before a given answer adds to the prompt for one, and the end of the prompt that it has otherwise, if any:
    white space, or empty thinking, opened and closed by two of the tokenizer's added tokens, that no conversation holds
    (Gemma 4). None if the two differ in more, such as thinking that the prompt only opens (DeepSeek-R1)."""
    if head.startswith(prompt):
        return head[len(prompt) :], None
    shared = len(os.path.commonprefix([prompt, head]))
    ends = prompt[shared:], head[shared:]
    empty_thinking = len(_any_of(token for token in added if token.strip()).findall(ends[0])) > 1
    return ("", ends) if not ends[1].strip() and (not ends[0].strip() or empty_thinking) else None


def _is_in(text: str, written: str) -> bool:
    """Whether a template has written an answer as it is, white space around it and what it adds before it apart."""
    return written.rstrip().endswith(text.strip())


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _in_reading_order(messages: Sequence[Message], images: Sequence[Image.Image]) -> list[Image.Image]:
    return [images[part.index] for m in messages for part in m.parts if isinstance(part, ImageRef)]
