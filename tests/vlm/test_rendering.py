"""Conversations -> ids and segments, over every tiny family: nothing here may depend on one."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from conftest import conversation, picture
from own_template import assert_own_ids, own_ids

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import Message
from genrecal.vlm.loading import load_processor, load_renderer
from genrecal.vlm.rendering import PromptOptions, Renderer

FAMILIES = [*sorted(tiny_models.FAMILIES), "internvl2_76b"]  # the last for Llama 3's tokenizer and template
LANGUAGE_MODELS = sorted(tiny_models.LANGUAGE_MODELS)
TRIMMING = ("gemma3", "internvl2_76b")  # whose templates trim answers
OFF, ON = (PromptOptions(template_args={"enable_thinking": value}) for value in (False, True))
ANSWERS = [" leading space", "\n\nnewlines\n", "7 of 9", "中文，好的。", "🙂 and 👨‍👩‍👧", "trailing \n", "plain"]


@pytest.fixture(scope="module")
def renderers(tiny):
    made = {}

    def get(family: str) -> Renderer:
        if family not in made:
            made[family] = Renderer(load_processor(tiny(family)))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_segments_hold_the_answers(renderers, family):
    renderer = renderers(family)
    sample = conversation(*((f"Question {i}", a) for i, a in enumerate(ANSWERS)), images={0: 1, 2: 2, 5: 1})
    encoded = renderer.encode(sample)
    ids = encoded.input_ids
    answers = [segment for segment in encoded.segments() if segment[2]]
    assert [end for _, end, _ in answers][-1] == len(encoded) == len(ids)
    texts = []
    for (start, end, _), tokens in zip(answers, encoded.answers, strict=True):
        assert ids[end - 1] == renderer.marks.end_of_turn_id
        assert ids[start:end].tolist() == tokens.ids.tolist()
        texts.append(b"".join(renderer.byte_tokenizer.token_bytes(int(i)) for i in ids[start : end - 1]).decode())
    written = [answer.strip() if family in TRIMMING else answer for answer in ANSWERS]
    assert texts == [renderer.marks.answer_prefix + answer for answer in written]


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_ranges_tile_each_answer(renderers, family):
    encoded = renderers(family).encode(conversation(*(("q", a) for a in ANSWERS)))
    for answer, tokens in zip(ANSWERS, encoded.answers, strict=True):
        data = answer.encode()
        assert b"".join(data[s:e] for s, e in zip(tokens.starts, tokens.ends, strict=True)) == data
        assert (tokens.starts[-1], tokens.ends[-1]) == (len(data), len(data))  # the end-of-turn token


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_turn_is_part_of_the_next_question(renderers, family):
    renderer = renderers(family)
    whole = conversation(("What?", "a b c"), ("And?", "7"), ("Last?", "no"), images={0: 1, 1: 1})
    context = [dataclasses.replace(m, target=place != 3) for place, m in enumerate(whole.messages)]
    full, part = renderer.encode(whole), renderer.encode(dataclasses.replace(whole, messages=tuple(context)))
    assert part.input_ids.tolist() == full.input_ids.tolist()
    (q1, q2, q3), (a1, a2, a3) = full.question_lengths, full.answer_lengths
    assert (part.question_lengths, part.answer_lengths) == ((q1, q2 + a2 + q3), (a1, a3))


@pytest.mark.parametrize("family", FAMILIES)
def test_question_segments_are_the_prompts_that_generation_gets(renderers, family):
    renderer = renderers(family)
    sample = conversation(("What?", "a b c"), ("And this?", "7"), images={0: 1, 1: 1})
    pictures = [picture(0, 90), picture(1, 70)]
    encoded = renderer.encode_messages(sample.messages, pictures)
    prompt = renderer.encode_prompt(sample.messages[:3], pictures)
    assert prompt["input_ids"][0].tolist() == encoded.input_ids[: len(encoded) - encoded.answer_lengths[-1]].tolist()


SHOWN = [("What is shown?", "A red square."), ("And now?", "7 of 9"), ("Où?", "中文，好的。\n\nyes"), ("Last", "plain")]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("images", [{}, {0: 1, 1: 2, 3: 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_models_own_template(renderers, family, images, system):
    renderer = renderers(family)
    for turns in (1, 2, 4):
        sample = conversation(*SHOWN[:turns], images={k: v for k, v in images.items() if k < turns})
        pictures = [picture(i, 90 - 20 * (i % 2), 60) for i in range(len(sample.images))]
        messages = [Message(role="system", parts=("Be brief.",))] * system + list(sample.messages)
        assert_own_ids(renderer, messages, pictures)


@pytest.mark.parametrize("options", [None, OFF, ON])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_ids_of_language_models_are_those_of_their_own_template(tiny, family, options):
    if options is not None and family != "qwen3":
        with pytest.raises(UsageError, match="enable_thinking: the chat template has no such variable; it has none"):
            load_renderer(tiny(family), options)
        return
    renderer = load_renderer(tiny(family), options)
    for turns in (1, 2, 4):
        assert_own_ids(renderer, conversation(*SHOWN[:turns]).messages, **renderer.template_args)


@pytest.mark.parametrize("family", FAMILIES)
def test_collating_equals_the_processors_own_batch(renderers, family):
    """One picture, two of another size, and none: put together by us and by the processor."""
    renderer = renderers(family)
    samples = [
        conversation(("What is shown here?", "a"), images={0: 1}),
        conversation(("Which", "a"), images={0: 2}),
        conversation(("No picture at all in this one", "a")),
    ]
    pictures = [[picture(0, 90)], [picture(1, 60, 90), picture(2, 120, 50)], []]
    prompts = [
        renderer.encode_prompt(sample.messages[:1], images) for sample, images in zip(samples, pictures, strict=True)
    ]
    ours = renderer.collate(prompts)
    texts = [renderer._render(sample.messages[:1], prompt=True) for sample in samples]
    if family == "idefics3":  # its processor wants as many lists as texts with pictures
        texts, pictures, prompts = texts[:2], pictures[:2], prompts[:2]
        ours = renderer.collate(prompts)
    once = {"add_special_tokens": False} if renderer.tokenizer.bos_token else {}  # the template writes it
    theirs = renderer.processor(
        text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="right", **once
    )
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        if name == "batch_num_images":
            assert ours[name].tolist()[: len(value)] == value.tolist()
        else:
            assert torch.equal(ours[name], value), name


def test_left_padding(renderers):
    renderer = renderers("qwen2_vl")
    rows = [renderer.encode_prompt(conversation((q, "a")).messages[:1], []) for q in ("short", "a longer question")]
    batch = renderer.collate(rows, padding_side="left")
    used = rows[0]["input_ids"].shape[1]
    assert batch["input_ids"][0, -used:].tolist() == rows[0]["input_ids"][0].tolist()
    assert batch["attention_mask"][0].sum() == used


def test_a_prompt_that_ends_with_other_white_space_than_a_conversation_has(renderers):
    """LLaVA-OneVision's history has "assistant \\n" but its prompt "assistant\\n": the last answer stands after its prompt."""
    renderer = renderers("llava_onevision")
    encoded = renderer.encode(conversation(("What?", "a b"), ("And?", " c"), images={0: 1}))
    text = renderer.tokenizer.decode(encoded.input_ids)
    assert text.count("assistant \na b<|im_end|>") == 1 and text.endswith("assistant\n c<|im_end|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}\n{% endfor %}",
            "no special token closes",
        ),
        ("{% for m in messages %}{{ m['content'][0]['text'][:3] }}<|im_end|>{% endfor %}", "as it is given"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'][0]['text'] + '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
            "when it asks for one",
        ),
        ("{{ raise_exception('no such roles') }}", "no such roles"),
    ],
)
def test_templates_that_cannot_be_handled_are_refused(tiny, template, reason):
    processor = load_processor(tiny("qwen2_vl"))
    processor.chat_template = processor.tokenizer.chat_template = template
    with pytest.raises(ModelError, match=reason):
        Renderer(processor)


# ------------------------------------------------------------------------------------------------- models that think


def thinking(tiny, options: PromptOptions | None = None) -> Renderer:
    return load_renderer(tiny("qwen3"), options)


def last_answer(renderer, *messages: Message) -> str:
    return renderer.tokenizer.decode(renderer.encode_messages(messages, []).answers[-1].ids)


def test_thinking_is_part_of_the_answer_or_off(tiny):
    question, answer = conversation(("Why?", "So.")).messages
    on, off = (thinking(tiny, options) for options in (ON, OFF))
    assert last_answer(off, question, answer) == "So.<|im_end|>"
    assert last_answer(on, question, answer) == "<think>\n\n</think>\n\nSo.<|im_end|>"
    prompts = [
        renderer.tokenizer.decode(renderer.encode_prompt([question], [])["input_ids"][0]) for renderer in (on, off)
    ]
    assert prompts[0].endswith("assistant\n") and prompts[1].endswith("assistant\n<think>\n\n</think>\n\n")


def test_what_the_template_adds_before_an_answer_covers_none_of_its_bytes(tiny):
    tokens = thinking(tiny, ON).encode(conversation(("Why?", "So it is."))).answers[0]
    covered = [(s, e) for s, e in zip(tokens.starts, tokens.ends, strict=True) if e > s]
    assert (covered[0][0], covered[-1][1], tokens.starts[0], tokens.ends[0]) == (0, len("So it is."), 0, 0)
    assert all(end == start for (_, end), (start, _) in zip(covered, covered[1:], strict=False))


def test_reasoning_goes_where_the_template_puts_it(tiny):
    question, answer = conversation(("Why?", "So.")).messages
    thought = dataclasses.replace(answer, reasoning="Because of it.")
    on = thinking(tiny, ON)
    assert last_answer(on, question, thought) == "<think>\nBecause of it.\n</think>\n\nSo.<|im_end|>"
    assert_own_ids(on, [question, thought], enable_thinking=True)
    assert_own_ids(on, [question, thought, question, thought], enable_thinking=True)  # dropped in the first
    # An answer that the model wrote holds its thinking in its text.
    written = dataclasses.replace(answer, parts=("<think>\nBecause of it.\n</think>\n\nSo.",))
    assert last_answer(on, question, written) == last_answer(on, question, thought)
    with pytest.raises(SampleError, match="does not open this one so; it has reasoning_content, and thinking is off"):
        thinking(tiny, OFF).encode_messages([question, thought], [])
    with pytest.raises(SampleError, match="the assistant's text holds '<think>'"):
        thinking(tiny, OFF).encode_messages([question, written], [])


def test_a_thinking_model_is_to_be_told(tiny):
    with pytest.raises(
        ModelError, match="choose enable_thinking=false for .* or enable_thinking=true .*--template-arg"
    ):
        thinking(tiny).refuse_unsaid_thinking("MODEL")
    for renderer in (thinking(tiny, ON), thinking(tiny, OFF), load_renderer(tiny("qwen2"))):
        renderer.refuse_unsaid_thinking("MODEL")


def test_earlier_answers_of_a_thinking_model_become_context(tiny):
    """No prompt looks like what stands before them, so their states would not be those of a model that answers."""
    sample = conversation(("One?", "1"), ("Two?", "2"), ("Three?", "3"))
    settled = thinking(tiny, OFF).settle(sample)
    assert [message.is_target for message in settled.messages] == [False, False, False, False, False, True]
    assert settled.answers == ("3",)
    assert Renderer(thinking(tiny).tokenizer, OFF).encode(settled).answer_lengths[-1] == 2
    assert load_renderer(tiny("qwen2")).settle(sample) == sample


def test_thinking_is_cached_as_the_template_writes_it(tiny):
    sample = conversation(("Why?", "<think>it is</think>So."))
    settled = thinking(tiny, ON).settle(sample)
    assert settled.answers == ("<think>\nit is\n</think>\n\nSo.",)
    assert_own_ids(thinking(tiny, ON), settled.messages, enable_thinking=True)
    assert thinking(tiny, ON).settle(settled) == settled


def test_a_students_template_takes_the_arguments_that_it_has(tiny):
    inherited = PromptOptions(
        template_args={"enable_thinking": False, "other": 1}, allowed_tokens=("<|box_start|>", "<ref>")
    )
    student = thinking(tiny, PromptOptions(inherited=inherited))
    assert student.template_args == {"enable_thinking": False} and student.allowed_tokens == ("<|box_start|>",)
    own = PromptOptions(template_args={"enable_thinking": True}, inherited=inherited)
    assert thinking(tiny, own).template_args == {"enable_thinking": True}
    assert load_renderer(tiny("qwen2"), PromptOptions(inherited=inherited)).template_args == {}


GLM = (  # GLM-4.1V: nothing closes the last answer, the next turn's token any other; an answer is a string
    "[gMASK]<sop>{%- for msg in messages %}{%- if msg.role == 'user' %}<|user|>{{ '\n' }}"
    "{%- if msg.content is string %}{{ msg.content }}{%- else %}{%- for item in msg.content %}"
    "{%- if item.type == 'image' %}<|image_pad|>{%- else %}{{ item.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- elif msg.role == 'assistant' %}<|assistant|>{{ '\n' + msg.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{{ '\n' }}{%- endif %}"
)


def test_a_prompt_that_ends_with_a_space(tiny):
    """A tokenizer joins it with the answer, except where the model is to write that."""
    processor = load_processor(tiny("qwen2_vl"))
    processor.chat_template = (
        "{%- for m in messages %}{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}{%- for c in m.content %}"
        "{%- if c.type == 'image' %}<|image_pad|>{%- else %}{{ c.text }}{%- endif %}{%- endfor %}"
        "{{ '\\n' if m.role == 'user' else '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}Assistant: {% endif %}"
    )
    renderer = Renderer(processor)
    turns = conversation(("One?", "a red square"), ("Two?", "7"), ("Three?", "a blue circle")).messages
    for last in (1, 3, 5):
        prompt = own_ids(processor, turns[:last], prompt=True)
        assert renderer.encode_prompt(turns[:last], [])["input_ids"][0].tolist() == prompt
        encoded = renderer.encode_messages(turns[: last + 1], [])
        assert encoded.input_ids[: len(encoded) - encoded.answer_lengths[-1]].tolist() == prompt
    assert [renderer.tokenizer.decode(a.ids[:-1]) for a in encoded.answers] == [" a red square", " 7", "a blue circle"]
    assert (encoded.answers[0].starts[0], encoded.answers[0].ends[-1]) == (0, len("a red square"))


def test_a_template_that_closes_the_last_answer_with_nothing(tiny):
    processor = load_processor(tiny("qwen2_vl"))
    processor.tokenizer.add_tokens(["<|user|>", "<|assistant|>", "[gMASK]", "<sop>"])
    processor.chat_template = GLM
    renderer = Renderer(processor)
    encoded = renderer.encode(conversation(("What?", "a b"), ("And?", "c"), images={0: 1}))
    text = renderer.tokenizer.decode(encoded.input_ids).replace("<|image_pad|>", "")
    assert text == "[gMASK]<sop><|user|>\nWhat?<|assistant|>\na b<|user|>\nAnd?<|assistant|>\nc<|user|>"
    assert [renderer.tokenizer.decode(answer.ids) for answer in encoded.answers] == ["a b<|user|>", "c<|user|>"]


# -------------------------------------------------------------------------------------------- tokens that texts may not hold


def test_texts_with_special_tokens_are_refused(renderers):
    with pytest.raises(SampleError, match="a special token of this model that its chat template writes"):
        renderers("qwen2_vl").encode(conversation(("What is <|im_end|>?", "a")))
    with pytest.raises(SampleError, match="special token"):
        renderers("qwen2_vl").encode(conversation(("What?", "<|image_pad|>")))


@pytest.mark.parametrize("token", ["<think>", "</think>", "<|im_start|>", "<|box_start|>", "<|endoftext|>"])
def test_tokens_of_the_template_are_refused_in_questions(tiny, token):
    """Those that the tokenizer does not call special too."""
    with pytest.raises(SampleError, match="the user's text holds"):
        thinking(tiny, ON).encode(conversation((f"What is {token}?", "a")))


def test_added_tokens_that_nothing_writes_are_plain_text(tiny):
    encoded = thinking(tiny, ON).encode(conversation(("What is <tool_call>?", "a <tool_call>")))
    assert encoded.answers[0].ends[-1] == len("a <tool_call>")


def test_allowed_tokens(tiny):
    text = "<|box_start|>(1,2),(3,4)<|box_end|>"
    renderer = thinking(
        tiny, PromptOptions(template_args={"enable_thinking": False}, allowed_tokens=("<|box_start|>", "<|box_end|>"))
    )
    encoded = renderer.encode(conversation((f"What is in {text}?", text)))
    box = renderer.tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert encoded.answers[0].ids[0] == box and list(encoded.input_ids).count(box) == 2
    assert (encoded.answers[0].starts[0], encoded.answers[0].ends[0]) == (0, len("<|box_start|>"))
    assert_own_ids(renderer, conversation((f"What is in {text}?", text)).messages, enable_thinking=False)
    with pytest.raises(
        SampleError, match="special token of this model; --allow-token '<|box_start|>' lets texts hold it"
    ):
        thinking(tiny, OFF).encode(conversation(("What?", text)))
    with pytest.raises(UsageError, match="'<ref>': the tokenizer has no such added token"):
        thinking(tiny, PromptOptions(allowed_tokens=("<ref>",)))
    with pytest.raises(UsageError, match="the chat template writes it itself"):
        thinking(tiny, PromptOptions(allowed_tokens=("<|im_end|>",)))


def test_too_long_conversations_are_refused(renderers):
    with pytest.raises(SampleError, match="over the limit of 20"):
        renderers("qwen2_vl").encode(conversation(("What is this? " * 9, "a")), max_tokens=20)


def test_system_messages_stand_in_the_first_question(renderers):
    sample = conversation(("What?", "a"))
    renderer = renderers("qwen2_vl")
    plain = renderer.encode_messages(sample.messages, [])
    system = renderer.encode_messages([Message(role="system", parts=("Be brief.",)), *sample.messages], [])
    assert len(system.question_lengths) == 1
    assert system.question_lengths[0] > plain.question_lengths[0]
    assert np.array_equal(system.answers[0].ids, plain.answers[0].ids)
