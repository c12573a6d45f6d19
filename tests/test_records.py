"""Records as data sets publish them -> what they say, or the reason why not; and no field that is passed over in silence."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import png
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import SampleError, UsageError
from genrecal.samples import FieldMap, Sample, open_samples, parse_record
from genrecal.samples.fields import EMPTY_JSON, IMAGE_FIELD, METADATA, RECORD_FIELDS, TURN_FIELDS, has_content
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

Record = dict[str, Any]
A, B, C = "a.png", "b.png", "c.png"  # images 0, 1 and 2
B64 = [base64.b64encode(png(i)).decode() for i in range(3)]
DATA = f"data:image/png;base64,{B64[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, and one with a space in its name."""
    folder = tmp_path_factory.mktemp("records")
    for number, name in enumerate((A, B, C, "a b.png")):
        (folder / name).write_bytes(png(number % 3))
    return folder


def parsed(folder: Path, record: Any, fields: FieldMap | None = None) -> Sample:
    if is_json(record):
        record = json.loads(json.dumps(record).replace("{folder}", str(folder)))
    return parse_record(record, index=0, location="here", image_root=folder, fields=fields or FieldMap())


def is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except TypeError:  # bytes, as tables have them
        return False


def said(sample: Sample) -> str:
    """The turns in one line: `u:<1>q a(t):a` is image 1 and q, then a after the thought t; `a-:` is an answer not learned."""
    numbers = [[png(i) for i in range(3)].index(image.read()) for image in sample.images]
    assert sample.image_indices == list(range(len(numbers)))
    return " ".join(
        m.role[0] + "-" * (not m.target) + f"({m.reasoning})" * bool(m.reasoning) + ":"
        + "".join(part if isinstance(part, str) else f"<{numbers[part.index]}>" for part in m.parts)
        for m in sample.messages
    )  # fmt: skip


def llava(*texts: str, **fields: Any) -> Record:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
        **fields,
    }


def chat(*contents: Any, **fields: Any) -> Record:
    return {"messages": [turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)], **fields}


def turn(role: str, content: Any = "x", **fields: Any) -> Record:
    return {"role": role, "content": content, **fields}


def messages(*turns: Record, **fields: Any) -> Record:
    return {"messages": list(turns), **fields}


def qa(**fields: Any) -> Record:
    return {"question": "q", "answer": "a", **fields}


def text(words: str) -> Record:
    return {"type": "text", "text": words}


def image(name: Any = None, **fields: Any) -> Record:
    return {"type": "image", **fields} | ({} if name is None else {"image": name})


# -------------------------------------------------------------------------------------------------- records that are read

PLAIN, ONE, TWO = "u:q a:a", "u:<0>q a:a", "u:<0><1>q a:a"
IMG = {"bytes": png(), "path": None}
OPENAI = {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}}
ANTHROPIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64[0]}}
TABLE_PART = {"index": None, "text": "q", "type": "text"}
# fmt: off
PUBLISHED: dict[str, tuple[Record, str]] = {
    "LLaVA": (llava("<image>\nq", "a", id="1", image=A), ONE),
    "ShareGPT4V": (llava("q\n<image>", "a", id="1", image=A), "u:q<0> a:a"),
    "LLaVA-OneVision": (llava("<image>\nq", "a", id="1", data_source="x", image={"bytes": png(), "path": A}), ONE),
    "The Cauldron": ({"images": [IMG], "texts": [{"user": "q", "assistant": "a", "source": "x"}]}, ONE),
    "Docmatix": ({"images": [{"bytes": png(i)} for i in (0, 1)], "texts": [{"user": "q", "assistant": "a"}]}, TWO),
    "M4-Instruct": (llava("<image>\n<image>\nq", "a", sample_id=1, image=[A, B], choice_list=None, metadata={"x": 1}), TWO),
    "InternVL": (llava("1: <image>\n2: <image>\nq", "a", image=[A, B], width_list=[9, 9]), "u:1: <0>2: <1>q a:a"),
    "Qwen-VL": (llava("Picture 1: <img>a.png</img>\nq", "a"), "u:Picture 1: <0>q a:a"),
    "Qwen2-VL": (chat([image("file://{folder}/a.png"), text("q")], "a"), ONE),
    "MiniGPT-4": (llava("<Img><ImageHere></Img> q", "a", image=A), "u:<0> q a:a"),
    "Phi-3-vision": (chat("<|image_1|>\n<|image_2|>\nq", "a", images=[A, B]), TWO),
    "Pixtral": (chat("[IMG][IMG]q", "a", images=[A, B]), TWO),
    "Gemma 3": (chat("<start_of_image>q", "a", image=A), ONE),
    "Qwen2-VL's own tokens": (chat("<|vision_start|><|image_pad|><|vision_end|>q", "a", image=A), ONE),
    "VLM-R1": ({"id": 1, "image": A, "problem": "q", "solution": "a"}, ONE),
    "LLaVA-CoT": (llava("q", "<SUMMARY> s </SUMMARY>", image=A), "u:<0>q a:<SUMMARY> s </SUMMARY>"),
    "llava-instruct-mix": (chat([TABLE_PART, {"index": 0, "text": None, "type": "image"}], "a", images=[IMG]), "u:q<0> a:a"),
    "ms-swift": (messages(turn("system"), *chat("<image>q", "a")["messages"], images=[A]), f"s:x {ONE}"),
    "ms-swift, query": ({"query": "q", "response": "a", "history": [["p", "1"]], "images": [A], "system": "s"},
                        "s:s u:<0>p a:1 u:q a:a"),
    "alpaca": ({"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["p", "1"], ["r", "2"]]},
               "s:s u:p a:1 u:r a:2 u:q\nmore a:a"),
    "alpaca, no input": ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
    "LLaMA-Factory": (llava("<image>q", "a", system="s", tools="[]", images=[A]), f"s:s {ONE}"),
    "LLaMA-Factory, frames": (chat("<video>q", "a", videos=[[A, B]]), TWO),
    "pairs": ({"system": "s", "conversation": [{"human": "p", "assistant": "1"}, {"human": "q", "assistant": "a"}]},
              "s:s u:p a:1 u:q a:a"),
    "XTuner": ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, "s:s u:q a:a"),
    "TRL, messages": ({"prompt": chat("p", "1", "q")["messages"], "completion": [turn("assistant", "a")], "image": A},
                      "u:<0>p a-:1 u:q a:a"),
    "axolotl, weight": (messages(turn("user", "q"), turn("model", "b", weight=0), *chat("q", "a")["messages"]),
                        "u:q a-:b u:q a:a"),
    "axolotl, train": (messages(turn("user", "q", train=False), turn("gpt", "b", train=False), turn("user", "q"),
                                turn("gpt", "a", training=True)), "u:q a-:b u:q a:a"),
    "OpenAI": (messages(turn("developer", "s"), turn("user", [text("q"), OPENAI]), turn("assistant", "a", refusal=None)),
               "s:s u:q<0> a:a"),
    "OpenAI, responses": (chat([{"type": "input_text", "text": "q"}, {"type": "input_image", "image_url": DATA}],
                               [{"type": "output_text", "text": "a"}]), "u:q<0> a:a"),
    "Anthropic": (chat([ANTHROPIC, text("q")], [{"type": "thinking", "thinking": "t"}, text("a")]), "u:<0>q a(t):a"),
    "DeepSeek and Qwen3": (messages(turn("user", "q"), turn("assistant", "a", reasoning_content="t")), "u:q a(t):a"),
    "Gemini": (messages(turn("User", "q"), turn("MODEL", "a")), PLAIN),
    "Ollama": (messages(turn("user", "q", images=[B64[0]]), turn("assistant", "a")), ONE),
    "the hub's Json(), a list": ({"messages": json.dumps(chat("q", "a")["messages"]), "images": [A]}, ONE),
    "the hub's Json(), turns": ({"messages": list(map(json.dumps, chat("q", "a")["messages"])), "images": [A]}, ONE),
    "VQA table": (qa(image=IMG, question_id=7), ONE),
    "TextVQA": ({"question": "q", "answers": ["a"] * 10, "image": IMG, "image_width": 9, "image_id": "f.jpg"}, ONE),
    "ChartQA": ({"image": png(), "query": "q", "label": ["a"]}, ONE),
    "WebDataset as a table": ({"__key__": "k", "__url__": "x.tar", "jpg": png(), "json": llava("q", "a", id="1")}, ONE),
    "numbered columns": (qa(image_10=png(2), image_1=png(0), image_2=png(1)), "u:<0><1><2>q a:a"),
    **{f"column {name}": (chat("q", "a", **{name: A}), ONE) for name in
       "image_path img img_path image_url image_file picture photo images_path Image image_0 png 0.jpg".split()},
}
PLACES: dict[str, tuple[Record, str]] = {
    "a tag in a text part": (chat([text("see <image> and"), image(), text("q")], "a", images=[A, B]), "see <0> and<1>q"),
    "tags for images in parts": (chat([image(A), image(B), text("1 <image>\n2 <image>")], "a"), "1 <0>2 <1>"),
    "parts between texts": (chat([text("x"), image(B), text("y"), image(A)], "a"), "x<1>y<0>"),
    "the same images twice": (chat([image(A), text("q")], "a", images=[A]), "<0>q"),
    "numbered tags": (chat("<image 2> then <image 1>", "a", images=[A, B]), "<1> then <0>"),
    "numbers from 0": (chat("<image_1> then <image_0>", "a", images=[A, B]), "<1> then <0>"),
    "parts of an index": (chat([image(index=1), image(index=0)], "a", images=[A, B]), "<1><0>"),
    "parts without a type": (chat([{"image": A}, {"text": "q"}, "r"], "a"), "<0>qr"),
    "null fields": (chat([image(None, image_url={"url": A}), text("q")], "a", images=None, conversations=None), "<0>q"),
    "MiniCPM-V": (llava("<image_00> <image_01>q", "a", image={"<image_00>": B, "<image_01>": A}), "<1> <0>q"),
    **{f"the tag {tag}": (chat(f"{tag}q", "a", image=A), "<0>q") for tag in ("<image/>", "<image_placeholder>", "<IMAGE>")},
    "a turn's image at its tag": (messages(turn("user", "x <image> y", image=B), turn("assistant", "a")), "x <1> y"),
    "frames as a part": (chat([{"type": "video", "video": [A, B]}, text("q")], "a"), "<0><1>q"),
    "frames without a tag": (chat("q", "a", video=[A, B]), "<0><1>q"),
    "frames and an image": (chat("<image> in <video>?", "a", videos=[[A, B]], images=[C]), "<2> in <0><1>?"),
    "html": (chat('<img src="x.png"> <b>image</b>', "a"), '<img src="x.png"> <b>image</b>'),
    "newlines beside tags": (chat("Look:\n<image>\n\nWhat?\n", "a", image=A), "Look:<0>\nWhat?\n"),
    "a tag alone": (chat("<image>", "a", image=A), "<0>"),
}
IMAGES: dict[str, Any] = {
    "plain base64": B64[0],
    "without its padding": B64[0].rstrip("="),
    "in lines": "\n".join(B64[0][i : i + 76] for i in range(0, len(B64[0]), 76)),
    "url-safe": base64.urlsafe_b64encode(png()).decode(),
    "without a type": f"data:;base64,{B64[0]}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{B64[0]}",
    "octets": f"data:application/octet-stream;base64,{B64[0]}",
    "percent": f"data:image/png;base64,{B64[0].replace('/', '%2F').replace('+', '%2B').replace('=', '%3D')}",
    "percent before": f"data:image%2Fpng;base64,{B64[0]}",
    "upper case": f"data:IMAGE/PNG;BASE64,{B64[0]}",
    "in an object": {"url": DATA},
    "bytes as text": {"bytes": B64[0], "path": "x.png"},
    "bytes": png(),
    "a path in an object": {"path": A},
    "a list in a list": [[A]],
    "a list as text": json.dumps([A]),
    "a file URL": "file://{folder}/a.png",
    "a file URL of a host": "file://localhost{folder}/a.png",
    "a short file URL": "file:{folder}/a.png",
    "percent in a file URL": "file://{folder}/a%20b.png",
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_format_is_read(folder: Path, name: str) -> None:
    record, expected = PUBLISHED[name]
    sample = parsed(folder, record)
    assert said(sample) == expected
    assert sample.unread == (("a field 'image.detail'",) if name == "OpenAI" else ())


@pytest.mark.parametrize("name", PLACES)
def test_images_stand_where_the_record_says(folder: Path, name: str) -> None:
    record, question = PLACES[name]
    assert said(parsed(folder, record)) == f"u:{question} a:a"


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_read_in_every_form(folder: Path, name: str) -> None:
    for record in (chat("<image>q", "a", image=IMAGES[name]), chat([image(IMAGES[name]), text("q")], "a")):
        assert said(parsed(folder, record)) == ONE


def test_a_percent_sign_may_be_part_of_a_name(folder: Path) -> None:
    (folder / "50%25.png").write_bytes(png())
    assert said(parsed(folder, chat("q", "a", image="file://{folder}/50%25.png"))) == ONE


def test_images_without_a_tag_stand_before_the_first_question_and_answers_keep_theirs(folder: Path) -> None:
    assert said(parsed(folder, llava("p", "1", "q", "a", image=[A, B]))) == "u:<0><1>p a:1 u:q a:a"
    assert parsed(folder, llava("q", "\n <image> \n")).answers == ("\n <image> \n",)


def test_names_of_a_record(folder: Path) -> None:
    sample = parsed(folder, chat("q", "a", id=0, category=None, data_source="web", image=""))
    assert (sample.images, sample.key, sample.category, sample.source) == ((), "00000000-0", "", "web")
    assert parsed(folder, chat("q", "a", id=None)).key == "00000000"


def test_a_cache_of_all_published_formats_says_what_they_say(folder: Path, teacher: HFTeacher, tmp_path: Path) -> None:
    texts = [json.dumps(record).replace("{folder}", str(folder)) for record, _ in PUBLISHED.values() if is_json(record)]
    (tmp_path / "d.jsonl").write_text("\n".join(texts))
    samples = open_samples([tmp_path / "d.jsonl"], image_root=folder)
    run_cache_job(teacher, samples, tmp_path / "cache", CacheOptions(max_skip=1.0, top_k=4))
    cached = {record.sample.key: record for record in open_cache(tmp_path / "cache")}
    skipped = [sample for sample in samples if sample.key not in cached]
    assert len(cached) > 30 and all(
        "(t)" in said(sample) for sample in skipped
    )  # the template has no place for a thought
    for sample in samples:
        if sample.key in cached:
            assert cached[sample.key].sample.messages == sample.messages
            assert cached[sample.key].images == [image.read() for image in sample.images]
    assert verify_cache(tmp_path / "cache", deep=True).whole


# ------------------------------------------------------------------------------------------------ records that are refused

# fmt: off
ROLE = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]}
TWICE = '[{"role": "user", "content": "q", "content": "r"}, {"role": "model", "content": "a"}]'
REFUSALS: dict[str, list[tuple[Any, str]]] = {
    "is a video": [
        (llava("<video>\nq", "a", video="x.mp4"), r"'<video>' is not read|'video' is a video"),
        (llava("<image>\nq", "a", video="x.mp4"), "more image places|'video' is a video"),
        (chat("q", "a", videos=["x.mp4"]), "the field 'videos' is a video"),
        (chat([{"type": "video", "video": "x.mp4"}, text("q")], "a"), "got 'video', which is not read"),
        (chat("q", "a", image="x.mp4"), r"image x.mp4 is a video"),
        (chat("q", "a", clip="x.webm"), "the field 'clip' names a video"),
        (chat("<video>q", "a", videos=[[A], [B]]), "2 videos but 1 places"),
    ],
    "is audio": [
        (chat("<audio>q", "a", audios=["x.wav"]), "the tag '<audio>' is not read"),
        (chat("q", "a", audio={"bytes": "x", "sampling_rate": 16000}), "the field 'audio' is audio"),
        (chat([{"type": "input_audio", "input_audio": {"data": "x"}}], "a"), "got 'input_audio'"),
    ],
    "tools": [
        (messages(turn("user"), turn("assistant", None, tool_calls=[1])), r"'messages\[\].tool_calls' is about tools"),
        (messages(turn("user"), turn("assistant", tool_calls=[{"id": "1"}])), "tool_calls' is about tools"),
        (messages(turn("user"), turn("assistant", None, function_call={"name": "f"})), "function_call' is about tools"),
        (messages(turn("user"), turn("tool"), turn("assistant")), "role 'tool': tool calls are not read"),
        (ROLE, "role 'function_call'"),
        (chat("q", [{"type": "tool_use", "name": "f"}]), "got 'tool_use', which is not read"),
    ],
    "preferences": [
        ({"chosen": chat("q", "a")["messages"], "rejected": []}, "'chosen' is preference data"),
        (chat("q", "a", rejected_response="b"), "'rejected_response' is preference data"),
        (chat("q", "a", label=False), "'label' is preference data"),
    ],
    "what is learned": [
        (messages(turn("user"), turn("assistant", loss="last")), "'loss' of a turn is 'last'; only 0 and 1"),
        (messages(turn("user", train=True), turn("assistant")), "it is the user's"),
        (messages(turn("user"), turn("assistant", mask=True)), r"'messages\[\].mask' says what is learned"),
        (messages(turn("user"), turn("assistant", train_detail=[{"begin": 0}])), "train_detail' says what is"),
        (chat("q", "a", weight=0.3), "the field 'weight' says what is learned"),
        (messages(turn("user"), turn("assistant", loss=False)), "every assistant turn is context"),
    ],
    "turns": [
        (messages(turn("user", thinking="t"), turn("assistant")), "reasoning that is no text"),
        (messages(turn("user"), turn("assistant", thinking=True)), "reasoning that is no text"),
        (messages(turn("system", "1"), turn("user"), turn("assistant"), system="2"), "two system messages"),
        (chat("q", "a", system=["x"]), "expected text under 'system'"),
        (chat(" ", "a"), "turn 1: empty question"),
        (chat("q", "a", "q", " \n"), "turn 4: empty answer"),
        (chat("q"), "no assistant turn"),
        (messages(turn("assistant"), turn("user")), "turn 1 is of role 'assistant', expected 'user'"),
        (messages(turn(["human"]), turn("assistant")), r"unknown role \['human'\]; expected one of ai, .*--role NAME=user"),
        ({"conversations": ["q", "a"]}, "each turn to be an object, got str"),
        ({"conversations": "hello"}, "non-empty list"),
        ({"messages": [{"role": "user"}]}, "'user' has no text"),
        (chat([{"type": "text"}], "a"), "no string under 'text'"),
        (chat("q", [image(A)]), "assistant turn holds an image"),
        (chat('[{"type": "text", "text": "q"}]', "a"), "the JSON text of a list of parts"),
        ({"messages": json.dumps(chat("q", "\ud83d")["messages"])}, "'messages': broken JSON"),
        ({"messages": TWICE}, "the field 'content' stands twice"),
        ({"query": "q", "response": "a", "history": [["one"]]}, "expected pairs"),
        ([1, 2], r"expected a record \(a JSON object\), got list"),
        (None, "got NoneType"),
    ],
    "a question and an answer": [
        ({"text_list": ["x"], "image_info": [{"image_name": "a.jpg"}]}, "no conversation|names an image"),
        ({"image": A, "caption": "a cat"}, "no conversation.*its fields are 'image, caption'"),
        ({"question": "q", "answer": ""}, "no conversation.*'question, answer .empty.'"),
        ({"question": "q", "answers": ["a", "b", "a"]}, "2 different answers under 'answers'"),
        ({"question": "q", "answers": [1, 2]}, "2 different answers under 'answers'"),
        ({"question": "q", "answers": [{"answer": "a"}]}, "expected text under 'answers', got list"),
        ({"question": "q", "context": "c", "answers": {"text": ["a"]}}, "got dict"),
        ({"question": "q", "answer": True}, "expected text under 'answer', got bool"),
        ({"question": "q", "answer": 2.0}, "expected text under 'answer', got float"),
        ({"question": "q", "label": 2}, "expected text under 'label', got int"),
        ({"question": 7, "answer": "a"}, "expected text under 'question', got int"),
        ({"question": "q", "answer": "A", "A": "x", "B": "y"}, "the field 'A' may be part of the q"),
        ({"instruction": "q", "context": "c", "response": "a"}, "'context' may be part of the question"),
        ({"question": "q", "prompt": "p", "answer": "a"}, "'question' and 'prompt' may all be the question"),
        ({"problem": "q", "solution": "long", "answer": "a"}, "'answer' and 'solution' may all be the answer"),
        ({"question": "q", "answers": '["a", "b"]'}, "2 different answers under 'answers'"),
        ({"question": "q", "answers": "['a', 'b']"}, "the field 'answers': broken JSON"),
        *((qa(**{name: "x"}), f"the field '{name}' may be part of the question") for name in
          ("option1", "options 1", "choice_a", "answer_choices", "multiple_choices", "opa", "distractor1", "article")),
        *((qa(**{name: "7"}), f"'{name}' names an image or a video, and the rec") for name in
          ("image_id", "video_id", "video_name", "clip_key", "coco_image_id")),
    ],
    "images": [
        (chat("q", "a", images=[A, None]), "one of its 2 images is empty"),
        (chat("q", "a", image=A, img=B), "the fields 'image' and 'img' hold different images"),
        (chat("q", "a", image=png(0), depth=png(1)), "the field 'depth' holds bytes"),
        (chat("q", "a", screenshot=IMG), "'screenshot' holds bytes.*--field image=screenshot"),
        (chat("q", "a", file_name="a.png"), "'file_name' names an image.*--field image=file_name"),
        (chat("q", "a", shot=DATA), "'shot' holds an image"),
        *((chat("q", "a", image=A, **{name: [B64[1]]}), f"'{name}' holds an image") for name in ("image_data", "attachments")),
        (chat([image(A), text("q")], "a", images=[B]), "others than those listed beside them"),
        ({"image": A, "json": llava("q", "a", image=B)}, "'image' stands beside the field 'json'"),
        (chat([image([A, B])], "a"), "an image part of 2 images"),
        (chat("q", "a", image="gone.png"), r"image .*gone\.png does not exist"),
        (chat("q", "a", image="x" * 999), "File name too long"),
        (chat("q", "a", image="QUJD" * 5000), "'QUJD.*' of 20000 characters: expected a path, or an image as base64"),
        (chat("q", "a", image="data:text/plain,hello"), "expected a path or data:image"),
        (chat("q", "a", image="data:image/png;base64,@@@"), "not valid base64"),
        (chat("q", "a", image="data:image/png;base64,äöü"), "not valid base64"),
        (chat("q", "a", image="s3://x/y.png"), "is a web address; download"),
        (chat("q", "a", image=5), "expected an image path, got int"),
    ],
    "tags": [
        (chat("[IMG][IMG]q", "a", image=A), "more image places than the 1 images"),
        (chat("<|image|>q", "a"), "more image places than the 0 images"),
        (chat("<image 1><image 3>", "a", images=[A, B]), r"image places of the numbers \[1, 3\]"),
        (chat("<image 1><image 1>", "a", images=[A, B]), r"numbers \[1, 1\]"),
        (chat([image(A), image(B), text("<image>q")], "a"), "a turn of 2 images has 1 tags"),
        (chat("<image_start>q", "a", image=A), "the tag '<image_start>' is not read; write <image>"),
        (chat("<img>q", "a", image=A), "the tag '<img>' is not read"),
        (chat("[IMG]http://x.y/z[/IMG]", "a"), "the tag .* is not read"),
        (chat("q", "see <image>", image=A), "assistant's text holds '<image>'"),
        (chat("<image>find <ref-object>", "<bbox>", images=[A], objects={"ref": ["x"]}), "the field 'objects'"),
        *((chat(f"q {tag} r", "a", images=[A, B]), "^the tag .* is not read; write <image>") for tag in
          ("<image:2>", "<image id=2>", "< image >", "<images>", "<|begin_of_image|>", "<|media_pad|>", "<im_patch>",
           "<frame>", "{image}", "{{image_1}}", "[Image 2]", "<img src='b.png'/>", "![](b.png)")),
    ],
    "prompts": [(chat("q", "a", documents=[{"text": "x"}]), "'documents' changes the prompt")],
}
UNREAD: list[tuple[Record, tuple[str, ...]]] = [
    (chat("q", "a", score=0.5, tools=[], emotion={"x": "y"}), ("a field 'score'", "a field 'emotion'")),
    (messages(turn("user", name="Bob"), turn("assistant")), ("a field 'messages[].name'",)),
    (chat([text("q") | {"cache_control": {"x": 1}}], "a"), ("a field 'messages[].content[].cache_control'",)),
    (chat("q", "a", image={"path": A, "detail": "low"}), ("a field 'image.detail'",)),
    ({"texts": [{"user": "q", "assistant": "a", "source": "s", "rating": 5}]}, ("a field 'texts[].rating'",)),
    (chat("q", "a", prompt="q"), ("a field 'prompt'",)),
    (chat("q", "a", image=A, image_url="https://x.y/a.jpg"), ("a field 'image_url'",)),
    (chat("q", "a", image=png(), image_path="x/a.png"), ("a field 'image_path'",)),
    (chat("q", "a", image=A, file_name="a.png", bboxes=[[0, 0, 9, 9]]), ("a field 'file_name'", "a field 'bboxes'")),
    (chat("q", "a", "and?"), ("turns after the last answer",)),
    (chat("<image_caption>q", "a", image=A, image_id=7), ()),
    (chat("<image>See [Image 1].", "a", image=A), ()),
    (chat("q", "a", height=3, width=[4], url="x", question_id=1, split="train", language="en"), ()),
    (chat("q", "a", a=None, b="", c=[], d={}, e=[None, {}], g=float("nan"), f={"x": None}), ()),
]
# fmt: on


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_record_that_cannot_be_read_is_refused_in_one_line(folder: Path, kind: str) -> None:
    for record, reason in REFUSALS[kind]:
        with pytest.raises(SampleError, match=reason) as refused:
            parsed(folder, record)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("record", "unread"), UNREAD)
def test_what_is_not_read_is_named(folder: Path, record: Record, unread: tuple[str, ...]) -> None:
    assert parsed(folder, record).unread == unread


@pytest.mark.parametrize(("answer", "words"), [(7, "7"), (-12, "-12"), (0.25, "0.25"), (10**20, "1" + "0" * 20)])
def test_an_answer_that_is_a_number_is_its_text(folder: Path, answer: Any, words: str) -> None:
    for name, value in (("answer", answer), ("answers", [answer, answer])):
        sample = parsed(folder, {"question": "q", name: value})
        assert (sample.answers, sample.unread) == ((words,), (f"a number under {name!r}",))


def test_a_last_question_without_an_answer_and_its_image_are_left_out(folder: Path) -> None:
    sample = parsed(folder, chat("<image>q", "a", "<image>and?", images=[A, B]))
    assert (said(sample), sample.unread) == (ONE, ("turns after the last answer",))
    context = messages(*chat("q", "a", "r")["messages"], turn("assistant", "b", loss=False))
    assert said(parsed(folder, context)) == PLAIN


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | st.just("x/y.jpg"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KNOWN = {name for fields in (RECORD_FIELDS, TURN_FIELDS) for names in fields.values() for name in names} | {"json"}


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.text(min_size=1, max_size=10), values, min_size=1, max_size=3))
def test_no_field_is_passed_over_in_silence(extra: Record) -> None:
    """Whatever else a record holds: its field is read, refused or counted, or it is empty or known to say nothing."""
    extra = {k: v for k, v in extra.items() if not (k.lower() in KNOWN or IMAGE_FIELD.fullmatch(k.lower()))}
    for record, where in (
        ({**extra, **chat("q", "a")}, ""),
        (messages({**extra, **turn("user", "q")}, turn("assistant", "a")), "messages[]."),
    ):
        try:
            sample = parse_record(record, index=0, location="here", image_root=Path("/nowhere"))
        except SampleError as error:
            assert any(repr(where + name)[1:-1] in str(error) for name in extra)
            continue
        assert said(sample) == PLAIN
        for name, value in extra.items():
            if has_content(value) and value not in EMPTY_JSON and not METADATA.fullmatch(name.lower()):
                assert f"a field {where + name!r}" in sample.unread


# ---------------------------------------------------------------------------------------------------- the user's own names


def test_fields_and_roles_may_have_other_names(folder: Path) -> None:
    record = {"q": "q", "gold": "a", "shot": B, "second": A, "answer": "no", "depth": B64[2], "kind": "C", "no": 7}
    names = ["question=q", "answer=gold", "image=shot", "image=second", "ignore=depth", "category=kind", "id=no"]
    sample = parsed(folder, record, FieldMap.parse(names))
    assert said(sample) == "u:<1><0>q a:a"
    assert (sample.category, sample.sample_id, sample.unread) == ("C", "7", ("a field 'answer'",))
    turns = {"dialogue": [{"from": "Human", "value": "q"}, {"from": "Robot", "value": "a"}]}
    assert said(parsed(folder, turns, FieldMap.parse(roles=["Robot=assistant"]))) == PLAIN
    assert parsed(folder, chat("q", "a", tools=["x"]), FieldMap.parse(["ignore=tools"])).unread == ()


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("answer=gold", {"question": "q", "answer": "a", "gold": None}, "no conversation"),
        ("question=q", {"question": "q", "answer": "a"}, "no conversation"),
        ("messages=chat", {"question": "q", "answer": "a"}, "no turns under 'chat', which --field says they are"),
        ("messages=chat", chat("q", "a"), "no turns under 'chat'"),
        ("image=shot", chat("q", "a", image=A), "the field 'image' names an image"),
    ],
)
def test_a_field_that_is_named_is_not_replaced_by_another(folder: Path, name: str, record: Record, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        parsed(folder, record, FieldMap.parse([name]))


@pytest.mark.parametrize(
    ("fields", "roles", "words"),
    [
        (["qestion=q"], [], "no field 'qestion' is read; expected one of messages, texts, system"),
        (["question"], [], "--field 'question': expected two names, as in --field question=q"),
        (["question=a", "question=b"], [], "two fields are named 'question'"),
        (["question=a", "answer=a"], [], "the field 'a' is named twice"),
        ([], ["Robot=robot"], "--role Robot=robot: expected user, assistant or system"),
        ([], ["=user"], "expected two names, as in --role Human=user"),
    ],
)
def test_names_that_cannot_be_are_refused(fields: list[str], roles: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("'", ".")):
        FieldMap.parse(fields, roles)
