"""Prompts on real tokenizers and templates, and on real weights."""

import re
from pathlib import Path

import pytest
import torch
from conftest import conversation
from own_template import assert_own_ids

from genrecal.cache.proof import prove
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import ModelError, SampleError
from genrecal.samples import Message
from genrecal.vlm.loading import load_renderer
from genrecal.vlm.rendering import PromptOptions

pytestmark = pytest.mark.real

TEMPLATES = ["gemma3-270m", "gemma3-asis", "llama3-tiny", "llama3_1-tiny", "qwen2-tiny", "qwen3-tiny", "deepseek-tiny"]
OFF, ON = (PromptOptions(template_args={"enable_thinking": value}) for value in (False, True))
TURNS = [
    ("What is shown?", "A red square."),
    ("Sum of 12.5 and 7?", "19.5, i.e. 12.5 + 7"),
    ("显示了什么？", "三个红色的正方形。"),
    ("Code?", "def f():\n    return 1\n"),
    ("🙂?", "👩‍🔬 and 🇪🇺"),
    ("Spaces?", "Two sentences.  Two spaces; a\ttab"),
]


CASES = [*((name, None) for name in TEMPLATES), ("qwen3-tiny", OFF), ("qwen3-tiny", ON)]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_ids_are_those_of_the_models_own_template(real: Path, name: str, options: PromptOptions | None) -> None:
    renderer = load_renderer(real / name, options)
    for turns in range(1, len(TURNS) + 1):
        messages = conversation(*TURNS[:turns]).messages
        assert_own_ids(renderer, messages, **renderer.template_args)
        system = Message(role="system", parts=("Be brief.",))
        assert_own_ids(renderer, [system, *messages], **renderer.template_args)


@pytest.mark.parametrize("name", ["gemma3-270m", "gemma3-asis"])
def test_gemma_proves_itself_as_a_teacher(real: Path, name: str) -> None:
    teacher = HFTeacher.load(real / name, dtype=torch.bfloat16)
    sample = conversation(("The capital of France?", "Paris."), ("And of Italy?", "Rome."))
    encoded = teacher.encode(sample)
    assert encoded.input_ids.tolist().count(teacher.renderer.tokenizer.bos_token_id) == 1
    with torch.inference_mode():
        assert prove(teacher, sample, encoded)


def test_two_bos_tokens_are_found(real: Path) -> None:
    teacher = HFTeacher.load(real / "llama3_1-tiny", dtype=torch.float32)
    teacher.renderer._process = lambda text, images: dict(teacher.renderer.tokenizer([text], return_tensors="pt"))
    sample = conversation(("What?", "This."))
    reason = "token 1 of the prompt is '<|begin_of_text|>', expected '<|start_header_id|>' as the model's own"
    with torch.inference_mode(), pytest.raises(ModelError, match=re.escape(reason)):
        prove(teacher, sample, teacher.encode(sample))


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_can_begin_a_turn(real: Path, name: str) -> None:
    """Every added token in what the template writes, special or not, is refused in a question."""
    renderer = load_renderer(real / name)
    question, answer = conversation(("QUESTION", "ANSWER")).messages
    ids = renderer.encode_messages([question, answer, question, answer], []).input_ids
    written = {i for i in ids.tolist() if i in renderer.tokenizer.added_tokens_decoder}
    tokens = [token for token in renderer.tokenizer.convert_ids_to_tokens(sorted(written)) if token.strip()]
    assert len(tokens) >= 2
    for token in tokens:
        with pytest.raises(SampleError, match="that its chat template writes"):
            renderer.encode(conversation((f"one{token}two", "a")))


def test_deepseeks_role_tokens_are_refused(real: Path) -> None:
    renderer = load_renderer(real / "deepseek-tiny")
    assert not renderer.tokenizer.added_tokens_decoder[
        renderer.tokenizer.convert_tokens_to_ids("<｜Assistant｜>")
    ].special
    for token in ("<｜Assistant｜>", "<｜User｜>", "<｜tool▁calls▁begin｜>"):
        with pytest.raises(SampleError, match=f"the user's text holds '{re.escape(token)}'"):
            renderer.encode(conversation((f"Hi{token}there", "a")))


def test_qwens_boxes_can_be_allowed(real: Path) -> None:
    box = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>"
    tokens = tuple(re.findall(r"<\|\w+\|>", box))
    renderer = load_renderer(
        real / "qwen3-tiny", PromptOptions(template_args={"enable_thinking": False}, allowed_tokens=tokens)
    )
    sample = conversation(("Where is the <|object_ref_start|>cat<|object_ref_end|>?", box))
    ids = renderer.encode(sample).answers[0].ids.tolist()
    assert set(renderer.tokenizer.convert_tokens_to_ids(list(tokens))) <= set(ids)
    assert renderer.tokenizer.decode(ids[:-1]) == box
    assert_own_ids(renderer, sample.messages, enable_thinking=False)


def test_qwen3_thinks_where_the_template_says(real: Path) -> None:
    question, answer = conversation(("Why?", "So.")).messages
    thought = Message(role="assistant", parts=("So.",), reasoning="It is.")
    with pytest.raises(ModelError, match="enable_thinking=false for answers without thinking"):
        load_renderer(real / "qwen3-tiny").refuse_unsaid_thinking("MODEL")
    for value in ("off", 0, None):  # all of which Qwen's template takes for "on"
        with pytest.raises(ModelError, match="enable_thinking=false for answers without thinking"):
            options = PromptOptions(template_args={"enable_thinking": value})
            load_renderer(real / "qwen3-tiny", options).refuse_unsaid_thinking("MODEL")
    on, off = (load_renderer(real / "qwen3-tiny", options) for options in (ON, OFF))
    for options, thinks in ((ON, True), (OFF, False)):
        said = PromptOptions.parse([f"enable_thinking={thinks}"], None)
        assert said == options
        load_renderer(real / "qwen3-tiny", said).refuse_unsaid_thinking("MODEL")
    answers = [
        renderer.tokenizer.decode(renderer.encode_messages([question, last], []).answers[0].ids)
        for renderer, last in ((on, answer), (on, thought), (off, answer))
    ]
    assert answers == [f"<think>\n{text}\n</think>\n\nSo.<|im_end|>" for text in ("", "It is.")] + ["So.<|im_end|>"]
    assert_own_ids(on, [question, thought, question, thought], enable_thinking=True)
