"""Conversations -> ids and segments, over every tiny family: nothing here may depend on one."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from conftest import conversation, picture

from genrecal.errors import ModelError, SampleError
from genrecal.samples import Message
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

FAMILIES = [*sorted(tiny_models.FAMILIES), "internvl2_76b"]  # the last for Llama 3's tokenizer and template
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
    assert texts == [renderer.marks.answer_prefix + answer for answer in ANSWERS]


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
    text = renderer.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    own = renderer.processor(text=[text], return_tensors="pt")["input_ids"][0].tolist()
    ours = renderer.encode_prompt(conversation(("Hi there", "x")).messages[:1], [])["input_ids"][0].tolist()
    assert ours == own


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
    theirs = renderer.processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="right")
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


def test_llava_onevision_template_of_the_released_models(tiny):
    """Its history writes "assistant \\n" but its prompt "assistant\\n": every turn is opened as the prompt is."""
    processor = load_processor(tiny("llava_onevision"))
    processor.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
        "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = Renderer(processor)
    encoded = renderer.encode(conversation(("What?", "a b"), ("And?", " c"), images={0: 1}))
    text = renderer.tokenizer.decode(encoded.input_ids[encoded.input_ids != 4])
    assert text.count("assistant\na b<|im_end|>") == 1 and "assistant\n c<|im_end|>" in text


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


def test_texts_with_special_tokens_are_refused(renderers):
    with pytest.raises(SampleError, match="special token"):
        renderers("qwen2_vl").encode(conversation(("What is <|im_end|>?", "a")))
    with pytest.raises(SampleError, match="special token"):
        renderers("qwen2_vl").encode(conversation(("What?", "<|image_pad|>")))


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
