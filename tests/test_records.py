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
from genrecal.samples import BadRecord, FieldMap, ImageRef, Sample, open_samples, parse_record
from genrecal.samples.fields import EMPTY_JSON, IMAGE_FIELD, METADATA, RECORD_FIELDS, TURN_FIELDS, has_content
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache

Record = dict[str, Any]
A, B, C = "a.png", "b.png", "c.png"  # pictures 0, 1 and 2
FIRST, SECOND, THIRD = map(ImageRef, range(3))
B64 = [base64.b64encode(png(i)).decode() for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, and one with a space in its name."""
    folder = tmp_path_factory.mktemp("records")
    for number, name in enumerate((A, B, C, "a b.png")):
        (folder / name).write_bytes(png(number % 3))
    return folder


def parsed(folder: Path, record: Any, fields: FieldMap | None = None) -> Sample:
    record = json.loads(json.dumps(record)) if is_json(record) else record
    return parse_record(record, index=0, location="here", image_root=folder, fields=fields or FieldMap())


def is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except TypeError:  # bytes, as tables have them
        return False


def said(sample: Sample) -> list[tuple[Any, ...]]:
    """The turns: role, parts, and what is not as usual."""
    return [
        (m.role[0], *m.parts, *([] if m.target else [False]), *([{"think": m.reasoning}] if m.reasoning else []))
        for m in sample.messages
    ]


def shown(sample: Sample) -> list[int]:
    """Which pictures, in reading order."""
    return [[png(i) for i in range(3)].index(image.read()) for image in sample.images]


def llava(*texts: str, **fields: Any) -> Record:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def chat(*contents: Any, **fields: Any) -> Record:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns, **fields}


def turn(role: str, content: Any = "x", **fields: Any) -> Record:
    return {"role": role, "content": content, **fields}


def messages(*turns: Record, **fields: Any) -> Record:
    return {"messages": list(turns), **fields}


def text(words: str) -> Record:
    return {"type": "text", "text": words}


def image(name: Any = None) -> Record:
    return {"type": "image"} | ({} if name is None else {"image": name})


# -------------------------------------------------------------------------------------------------- records that are read

Q, ANSWER = ("u", "q"), ("a", "a")
SEEN = ("u", FIRST, "q")  # the usual question
ONE, TWO = ([SEEN, ANSWER], [0]), ([("u", FIRST, SECOND, "q"), ANSWER], [0, 1])

PUBLISHED: dict[str, tuple[Record, tuple[list[Any], list[int]]]] = {
    "LLaVA": (llava("<image>\nq", "a", id="1", image=A), ONE),
    "ShareGPT4V": (llava("q\n<image>", "a", id="1", image=A), ([("u", "q", FIRST), ANSWER], [0])),
    "LLaVA-OneVision": (llava("<image>\nq", "a", id="1", data_source="x", image={"bytes": png(), "path": A}), ONE),
    "The Cauldron": (
        {"images": [{"bytes": png(), "path": None}], "texts": [{"user": "q", "assistant": "a", "source": "x"}]},
        ONE,
    ),
    "Docmatix": (
        {"images": [{"bytes": png(0)}, {"bytes": png(1)}], "texts": [{"user": "q", "assistant": "a", "source": "PDF"}]},
        TWO,
    ),
    "M4-Instruct": (
        llava("<image>\n<image>\nq", "a", sample_id=1, image=[A, B], choice_list=None, metadata={"dataset": "x"}),
        TWO,
    ),
    "InternVL": (
        llava("Image-1: <image>\nImage-2: <image>\nq", "a", id=0, image=[A, B], width_list=[9, 9], height_list=[6, 6]),
        ([("u", "Image-1: ", FIRST, "Image-2: ", SECOND, "q"), ANSWER], [0, 1]),
    ),
    "Qwen-VL": (
        {
            "id": "1",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nq"},
                {"from": "assistant", "value": "a"},
            ],
        },
        ([("u", "Picture 1: ", FIRST, "q"), ANSWER], [0]),
    ),
    "Qwen2-VL": (chat([image(f"file:///{{}}/{A}"), text("q")], "a"), ONE),
    "MiniGPT-4": (llava("<Img><ImageHere></Img> q", "a", image=A), ([("u", FIRST, " q"), ANSWER], [0])),
    "Phi-3-vision": (chat("<|image_1|>\n<|image_2|>\nq", "a", images=[A, B]), TWO),
    "Pixtral": (chat("[IMG][IMG]q", "a", images=[A, B]), TWO),
    "Gemma 3": (chat("<start_of_image>q", "a", image=A), ONE),
    "Qwen2-VL's own tokens": (chat("<|vision_start|><|image_pad|><|vision_end|>q", "a", image=A), ONE),
    "ViP-LLaVA": (llava("<image>\nq", "a", id="1", image=A, bboxes=[[0, 0, 9, 9]]), ONE),
    "VLM-R1": ({"id": 1, "image": A, "problem": "q", "solution": "a"}, ONE),
    "LLaVA-CoT": (
        llava("q", "<SUMMARY> s </SUMMARY>", id="1", image=A),
        ([SEEN, ("a", "<SUMMARY> s </SUMMARY>")], [0]),
    ),
    "llava-instruct-mix": (
        messages(
            turn("user", [{"index": None, "text": "q", "type": "text"}, {"index": 0, "text": None, "type": "image"}]),
            turn("assistant", [{"index": None, "text": "a", "type": "text"}]),
            images=[{"bytes": png()}],
        ),
        ([("u", "q", FIRST), ANSWER], [0]),
    ),
    "ms-swift": (
        messages(turn("system"), *chat("<image>q", "a")["messages"], images=[A]),
        ([("s", "x"), *ONE[0]], [0]),
    ),
    "ms-swift, with loss": (
        messages(
            turn("user", "q"), turn("assistant", "a", loss=False), turn("user", "q"), turn("assistant", "b", loss=True)
        ),
        ([Q, ("a", "a", False), Q, ("a", "b")], []),
    ),
    "ms-swift, query and response": (
        {"query": "q", "response": "a", "history": [["one", "1"]], "images": [A], "system": "s"},
        ([("s", "s"), ("u", FIRST, "one"), ("a", "1"), Q, ANSWER], [0]),
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["one", "1"], ["two", "2"]]},
        ([("s", "s"), ("u", "one"), ("a", "1"), ("u", "two"), ("a", "2"), ("u", "q\nmore"), ANSWER], []),
    ),
    "LLaMA-Factory, sharegpt": (
        {"conversations": llava("<image>q", "a")["conversations"], "system": "s", "tools": "[]", "images": [A]},
        ([("s", "s"), *ONE[0]], [0]),
    ),
    "LLaMA-Factory, frames": (chat("<video>q", "a", videos=[[A, B]]), TWO),
    "ms-swift, pairs": (
        {"system": "s", "conversation": [{"human": "one", "assistant": "1"}, {"human": "q", "assistant": "a"}]},
        ([("s", "s"), ("u", "one"), ("a", "1"), Q, ANSWER], []),
    ),
    "XTuner": ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, ([("s", "s"), Q, ANSWER], [])),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, ([Q, ANSWER], [])),
    "TRL, texts": ({"prompt": "q", "completion": "a"}, ([Q, ANSWER], [])),
    "TRL, messages": (
        {"prompt": chat("one", "1", "q")["messages"], "completion": [turn("assistant", "a")], "image": A},
        ([("u", FIRST, "one"), ("a", "1", False), Q, ANSWER], [0]),
    ),
    "axolotl, weight": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "b", "weight": 0},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a", "weight": 1},
            ]
        },
        ([Q, ("a", "b", False), Q, ANSWER], []),
    ),
    "axolotl, train": (
        messages(
            turn("user", "q", train=False),
            turn("assistant", "b", train=False),
            turn("user", "q"),
            turn("assistant", "a", training=True),
        ),
        ([Q, ("a", "b", False), Q, ANSWER], []),
    ),
    "OpenAI": (
        messages(
            turn("developer", "s"),
            turn(
                "user",
                [
                    text("q"),
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64[0]}", "detail": "low"}},
                ],
            ),
            turn("assistant", "a", weight=1, refusal=None),
        ),
        ([("s", "s"), ("u", "q", FIRST), ANSWER], [0]),
    ),
    "OpenAI, responses": (
        chat(
            [{"type": "input_text", "text": "q"}, {"type": "input_image", "image_url": f"data:;base64,{B64[1]}"}],
            [{"type": "output_text", "text": "a"}],
        ),
        ([("u", "q", FIRST), ANSWER], [1]),
    ),
    "Anthropic": (
        chat(
            [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64[0]}}, text("q")],
            [{"type": "thinking", "thinking": "t", "signature": ""}, text("a")],
            system="s",
        ),
        ([("s", "s"), SEEN, ("a", "a", {"think": "t"})], [0]),
    ),
    "DeepSeek and Qwen3": (
        messages(turn("user", "q"), turn("assistant", "a", reasoning_content="t")),
        ([Q, ("a", "a", {"think": "t"})], []),
    ),
    "Gemini": (messages(turn("User", "q"), turn("MODEL", "a")), ([Q, ANSWER], [])),
    "Ollama": (messages(turn("user", "q", images=[B64[0]]), turn("assistant", "a")), ONE),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        ([Q, ANSWER], []),
    ),
    "the hub's Json(), a list": ({"messages": json.dumps(chat("q", "a")["messages"]), "images": [A]}, ONE),
    "the hub's Json(), turns": ({"messages": list(map(json.dumps, chat("q", "a")["messages"])), "images": [A]}, ONE),
    "VQA table": ({"image": {"bytes": png(), "path": "x"}, "question": "q", "answer": "a", "question_id": 7}, ONE),
    "TextVQA": (
        {"image": {"bytes": png()}, "question": "q", "answers": ["a"] * 10, "image_width": 9, "image_id": "f.jpg"},
        ONE,
    ),
    "ChartQA": ({"image": png(), "query": "q", "label": ["a"]}, ONE),
    "WebDataset as a table": ({"__key__": "k", "__url__": "x.tar", "jpg": png(), "json": llava("q", "a", id="1")}, ONE),
    "numbered columns": (
        {"image_10": png(2), "image_1": png(0), "image_2": png(1), "question": "q", "answer": "a"},
        ([("u", FIRST, SECOND, THIRD, "q"), ANSWER], [0, 1, 2]),
    ),
    **{
        f"column {name}": (chat("q", "a", **{name: A}), ONE)
        for name in (
            "image_path",
            "img",
            "img_path",
            "image_url",
            "image_file",
            "picture",
            "photo",
            "images_path",
            "Image",
            "image_0",
            "png",
            "0.jpg",
        )
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_format_is_read(folder: Path, name: str) -> None:
    record, expected = PUBLISHED[name]
    if is_json(record):
        record = json.loads(json.dumps(record).replace("{}", str(folder)[1:]))
    sample = parsed(folder, record)
    assert (said(sample), shown(sample)) == expected
    assert [part.index for m in sample.messages for part in m.parts if isinstance(part, ImageRef)] == list(
        range(len(sample.images))
    )
    if name not in ("ViP-LLaVA", "OpenAI"):
        assert sample.unread == ()


def test_a_cache_of_all_published_formats_says_what_they_say(folder: Path, teacher: HFTeacher, tmp_path: Path) -> None:
    texts = [json.dumps(record).replace("{}", str(folder)[1:]) for record, _ in PUBLISHED.values() if is_json(record)]
    (tmp_path / "d.jsonl").write_text("\n".join(texts))
    samples = open_samples([tmp_path / "d.jsonl"], image_root=folder)
    options = CacheOptions(max_skip=1.0, top_k=4)
    run_cache_job(teacher, samples, tmp_path / "cache", options)
    cached = {record.sample.key: record for record in open_cache(tmp_path / "cache")}
    skipped = [s for s in samples if not isinstance(s, Sample) or s.key not in cached]
    assert all(
        isinstance(s, Sample) and any(m.reasoning for m in s.messages) for s in skipped
    )  # its template has no place
    assert len(cached) > 40
    for sample in samples:
        if isinstance(sample, Sample) and sample.key in cached:
            assert cached[sample.key].sample.messages == sample.messages
            assert cached[sample.key].images == [image.read() for image in sample.images]
    assert verify_cache(tmp_path / "cache", deep=True).whole


PLACES: dict[str, tuple[Record, list[Any], list[int]]] = {
    "a tag in a text part": (
        chat([text("see <image> and"), image(), text("q")], "a", images=[A, B]),
        ["see ", FIRST, " and", SECOND, "q"],
        [0, 1],
    ),
    "tags for images in parts": (
        chat([image(A), image(B), text("one <image>\ntwo <image>")], "a"),
        ["one ", FIRST, "two ", SECOND],
        [0, 1],
    ),
    "parts between texts": (chat([text("x"), image(B), text("y"), image(A)], "a"), ["x", FIRST, "y", SECOND], [1, 0]),
    "the same images twice": (chat([image(A), text("q")], "a", images=[A]), [FIRST, "q"], [0]),
    "numbered tags": (chat("<image 2> then <image 1>", "a", images=[A, B]), [FIRST, " then ", SECOND], [1, 0]),
    "numbers from 0": (chat("<image_1> then <image_0>", "a", images=[A, B]), [FIRST, " then ", SECOND], [1, 0]),
    "parts of an index": (
        chat([image() | {"index": 1}, image() | {"index": 0}], "a", images=[A, B]),
        [FIRST, SECOND],
        [1, 0],
    ),
    "a part without a type": (chat([{"image": A}, {"text": "q"}], "a"), [FIRST, "q"], [0]),
    "a text among parts": (chat([image(A), "q"], "a"), [FIRST, "q"], [0]),
    "MiniCPM-V": (
        llava("<image_00> <image_01>q", "a", image={"<image_00>": B, "<image_01>": A}),
        [FIRST, " ", SECOND, "q"],
        [1, 0],
    ),
    "a closed tag": (chat("<image/>q", "a", image=A), [FIRST, "q"], [0]),
    "a placeholder": (chat("<image_placeholder>q", "a", image=A), [FIRST, "q"], [0]),
    "an upper tag": (chat("<IMAGE>q", "a", image=A), [FIRST, "q"], [0]),
    "images of a turn at its tags": (
        messages(turn("user", "x <image> y", image=B), turn("assistant", "a")),
        ["x ", FIRST, " y"],
        [1],
    ),
    "frames as a part": (chat([{"type": "video", "video": [A, B]}, text("q")], "a"), [FIRST, SECOND, "q"], [0, 1]),
    "frames without a tag": (chat("q", "a", video=[A, B]), [FIRST, SECOND, "q"], [0, 1]),
    "frames and an image": (
        chat("<image> in <video>?", "a", videos=[[A, B]], images=[C]),
        [FIRST, " in ", SECOND, THIRD, "?"],
        [2, 0, 1],
    ),
    "html": (
        chat('<img src="x.png"> <b>[image]</b>'.replace("[image]", "image"), "a"),
        ['<img src="x.png"> <b>image</b>'],
        [],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_images_stand_where_the_record_says(folder: Path, name: str) -> None:
    record, parts, images = PLACES[name]
    sample = parsed(folder, record)
    assert (list(sample.messages[0].parts), shown(sample)) == (parts, images)


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
    "in an object": {"url": f"data:image/png;base64,{B64[0]}"},
    "bytes as text": {"bytes": B64[0], "path": "x.png"},
    "bytes": png(),
    "a path in an object": {"path": A},
    "a list in a list": [[A]],
    "a list as text": json.dumps([A]),
    "a file URL": "file://{folder}/a.png",
    "a file URL of a host": "file://localhost{folder}/a.png",
    "a short file URL": "file:{folder}/a.png",
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_read_in_every_form(folder: Path, name: str) -> None:
    entry = IMAGES[name]
    entry = entry.replace("{folder}", str(folder)) if isinstance(entry, str) else entry
    for record in (chat("<image>q", "a", image=entry), chat([image(entry), text("q")], "a")):
        sample = parsed(folder, record)
        assert (said(sample), shown(sample)) == ONE


def test_percent_signs_of_a_file_url_are_its_path(folder: Path) -> None:
    [name] = parsed(folder, chat("q", "a", image=f"file://{folder}/a%20b.png")).images
    assert name.path == folder / "a b.png"
    (folder / "50%25.png").write_bytes(png())
    assert parsed(folder, chat("q", "a", image=f"file://{folder}/50%25.png")).images[0].path == folder / "50%25.png"


# ------------------------------------------------------------------------------------------------ records that are refused

REFUSALS: dict[str, tuple[Any, str]] = {
    "a video file": (llava("<video>\nq", "a", video="x.mp4"), r"'<video>' is not read|'video' is a video"),
    "LLaVA-Video": (llava("<image>\nq", "a", video="x.mp4"), "more image places|'video' is a video"),
    "videos without a tag": (chat("q", "a", videos=["x.mp4"]), "the field 'videos' is a video"),
    "a video tag alone": (chat("<video>q", "a"), "the tag '<video>' is not read"),
    "a video part": (chat([{"type": "video", "video": "x.mp4"}, text("q")], "a"), "got 'video', which is not read"),
    "video as an image": (chat("q", "a", image="x.mp4"), r"image x.mp4 is a video"),
    "a video elsewhere": (chat("q", "a", clip="x.webm"), "the field 'clip' names a video"),
    "audio": (chat("<audio>q", "a", audios=["x.wav"]), "the tag '<audio>' is not read"),
    "audio without a tag": (chat("q", "a", audio={"bytes": "x", "sampling_rate": 16000}), "the field 'audio' is audio"),
    "an audio part": (chat([{"type": "input_audio", "input_audio": {"data": "x"}}], "a"), "got 'input_audio'"),
    "tool calls": (
        messages(turn("user"), turn("assistant", None, tool_calls=[{"id": "1"}])),
        r"'messages\[\].tool_calls' is about tools",
    ),
    "tool calls beside a text": (
        messages(turn("user"), turn("assistant", tool_calls=[{"id": "1"}])),
        "tool_calls' is about tools",
    ),
    "a function call": (
        messages(turn("user"), turn("assistant", None, function_call={"name": "f"})),
        "function_call' is about tools",
    ),
    "a tool's turn": (messages(turn("user"), turn("tool"), turn("assistant")), "role 'tool': tool calls are not read"),
    "sharegpt's tools": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
        "role 'function_call'",
    ),
    "observation": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "{}"}]},
        "role 'observation'",
    ),
    "Anthropic's tools": (chat("q", [{"type": "tool_use", "name": "f"}]), "got 'tool_use', which is not read"),
    "tools": (chat("q", "a", tools=[{"name": "f"}]), "the field 'tools' is about tools"),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "the field 'chosen' is preference data"),
    "TRL's preferences": ({"chosen": chat("q", "a")["messages"], "rejected": []}, "'chosen' is preference data"),
    "ms-swift's preferences": (chat("q", "a", rejected_response="b"), "'rejected_response' is preference data"),
    "KTO": (chat("q", "a", label=False), "'label' is preference data"),
    "a fractional weight": (
        messages(turn("user"), turn("assistant", weight=0.5)),
        "'weight' of a turn is 0.5; only 0 and 1",
    ),
    "a loss of words": (messages(turn("user"), turn("assistant", loss="last")), "'loss' of a turn is 'last'"),
    "loss on a question": (messages(turn("user", train=True), turn("assistant")), "it is the user's"),
    "a mask": (messages(turn("user"), turn("assistant", mask=True)), r"'messages\[\].mask' says what is learned"),
    "a mask of tokens": (
        messages(turn("user"), turn("assistant", train_detail=[{"begin_offset": 0}])),
        "train_detail' says what is",
    ),
    "a weight of the sample": (chat("q", "a", weight=0.3), "the field 'weight' says what is learned"),
    "nothing to learn": (messages(turn("user"), turn("assistant", loss=False)), "every assistant turn is context"),
    "a user who thinks": (messages(turn("user", thinking="t"), turn("assistant")), "reasoning that is no text"),
    "thinking that is true": (messages(turn("user"), turn("assistant", thinking=True)), "reasoning that is no text"),
    "two systems": (
        messages(turn("system", "one"), turn("user"), turn("assistant"), system="two"),
        "two system messages",
    ),
    "MMC4": ({"text_list": ["x"], "image_info": [{"image_name": "a.jpg"}]}, "no conversation|names an image"),
    "captions": ({"image": A, "caption": "a cat"}, "no conversation.*its fields are 'image, caption'"),
    "PixMo's captions": ({"image_url": "https://x.y/a.jpg", "caption": "a"}, "no conversation"),
    "PixMo's questions": ({"image_url": "https://x.y/a.jpg", "question": "q", "answer": "a"}, "is a web address"),
    "a text": ({"text": "once"}, "no conversation"),
    "no answer": ({"question": "q"}, "no conversation"),
    "an empty answer": ({"question": "q", "answer": ""}, "no conversation.*'question, answer .empty.'"),
    "an empty question": (chat(" ", "a"), "turn 1: empty question"),
    "an empty image among others": (chat("q", "a", images=[A, None]), "one of its 2 images is empty"),
    "several answers": ({"question": "q", "answers": ["a", "b", "a"]}, "2 different answers under 'answers'"),
    "answers of objects": ({"question": "q", "answers": [{"answer": "a"}]}, "expected text under 'answers', got list"),
    "SQuAD": ({"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}}, "got dict"),
    "an answer's number": ({"question": "q", "answer": 2}, "expected text under 'answer', got int"),
    "choices": ({"question": "q", "answer": "B", "choices": ["x", "y"]}, "'choices' may be part of the question"),
    "MMBench": (
        {"question": "q", "answer": "A", "A": "x", "B": "y", "image": B64[0]},
        "the field 'A' may be part of the q",
    ),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a"}, "'context' may be part of the question"),
    "two questions": (
        {"question": "q", "prompt": "p", "answer": "a"},
        "'question' and 'prompt' may all be the question",
    ),
    "two answers": (
        {"problem": "q", "solution": "long", "answer": "a"},
        "'answer' and 'solution' may all be the answer",
    ),
    "two images of two names": (chat("q", "a", image=A, img=B), "the fields 'image' and 'img' hold different images"),
    "a depth map": (chat("q", "a", image=png(0), depth=png(1)), "the field 'depth' holds bytes"),
    "an unknown column of an image": (
        chat("q", "a", screenshot={"bytes": png(), "path": None}),
        "'screenshot' holds bytes.*--field image=screenshot",
    ),
    "an unknown column of a path": (
        chat("q", "a", file_name="a.png"),
        "'file_name' names an image.*--field image=file_name",
    ),
    "an unknown column of base64": (chat("q", "a", shot=f"data:image/png;base64,{B64[0]}"), "'shot' holds an image"),
    "images of other turns": (chat([image(A), text("q")], "a", images=[B]), "others than those listed beside them"),
    "more tags": (chat("<image><image>q", "a", image=A), "more image places than the 1 images"),
    "more spelled tags": (chat("[IMG][IMG]q", "a", image=A), "more image places than the 1 images"),
    "a tag without an image": (chat("<image>q", "a"), "more image places than the 0 images"),
    "a spelled tag without an image": (chat("<|image|>q", "a"), "more image places than the 0 images"),
    "fewer tags": (chat("<image>q", "a", images=[A, B]), "2 images but 1 image places"),
    "a number too many": (chat("<image 1><image 3>", "a", images=[A, B]), r"image places of the numbers \[1, 3\]"),
    "a number twice": (chat("<image 1><image 1>", "a", images=[A, B]), r"numbers \[1, 1\]"),
    "some of a turn's images": (chat([image(A), image(B), text("<image>q")], "a"), "a turn of 2 images has 1 tags"),
    "an unknown tag": (chat("<image_start>q", "a", image=A), "the tag '<image_start>' is not read; write <image>"),
    "a bare img": (chat("<img>q", "a", image=A), "the tag '<img>' is not read"),
    "BBCode": (chat("[IMG]http://x.y/z[/IMG]", "a"), "the tag .* is not read"),
    "a tag in an answer": (chat("q", "see <image>", image=A), "assistant's text holds '<image>'"),
    "fewer videos": (chat("<video>q", "a", videos=[[A], [B]]), "2 videos but 1 places"),
    "ms-swift's grounding": (
        chat("<image>find <ref-object>", "<bbox>", images=[A], objects={"ref": ["x"], "bbox": [[1, 2, 3, 4]]}),
        "the field 'objects'",
    ),
    "data of no image": (chat("q", "a", image="data:text/plain,hello"), "expected a path or data:image"),
    "a bucket": (chat("q", "a", image="s3://x/y.png"), "is a web address"),
    "parts as text": (chat('[{"type": "text", "text": "q"}]', "a"), "the JSON text of a list of parts"),
    "half a character in JSON text": (
        {"messages": json.dumps(chat("q", "\ud83d")["messages"])},
        "'messages': broken JSON",
    ),
    "a name twice in JSON text": (
        {"messages": '[{"role": "user", "content": "q", "content": "r"}, {"role": "model", "content": "a"}]'},
        "the field 'content' stands twice",
    ),
    "JSON beside its own fields": (
        {"image": A, "json": llava("q", "a", image=B)},
        "'image' stands beside the field 'json'",
    ),
    "OCR-VQA's questions": ({"question": ["q", "r"], "answer": ["yes", "yes"]}, "2 questions under 'question'"),
    "answers as text": ({"question": "q", "answers": '["a", "b"]'}, "2 different answers under 'answers'"),
    "answers as Python's text": ({"question": "q", "answers": "['a', 'b']"}, "the field 'answers': broken JSON"),
    "a loss of the record": (chat("q", "a", loss=False), "the field 'loss' says what is learned"),
    **{
        f"options as {name}": (
            {"question": "q", "answer": "x", name: "x"},
            f"the field '{name}' may be part of the question",
        )
        for name in (
            "option1",
            "options 1",
            "choice_a",
            "answer_choices",
            "multiple_choices",
            "opa",
            "distractor1",
            "article",
        )
    },
    **{
        f"base64 under {name}": (chat("q", "a", image=A, **{name: [B64[1]]}), f"the field '{name}' holds an image")
        for name in ("image_data", "attachments")
    },
    **{
        f"{name} of none": (
            {"question": "q", "answer": "a", name: "7"},
            f"'{name}' names an image or a video, and the rec",
        )
        for name in ("image_id", "video_id", "video_name", "clip_key", "coco_image_id")
    },
    **{
        f"the tag {tag}": (chat(f"q {tag} r", "a", images=[A, B]), "^the tag .* is not read; write <image>")
        for tag in (
            "<image:2>",
            "<image id=2>",
            "< image >",
            "<images>",
            "<|begin_of_image|>",
            "<|media_pad|>",
            "<im_patch>",
            "<frame>",
            "{image}",
            "{{image_1}}",
            "[Image 2]",
            "<img src='b.png'/>",
            "![](b.png)",
        )
    },
    "documents": (chat("q", "a", documents=[{"text": "x"}]), "'documents' changes the prompt"),
    "a history of turns": ({"query": "q", "response": "a", "history": [["one"]]}, "expected pairs"),
    "a system that is a list": (chat("q", "a", system=["x"]), "expected text under 'system'"),
    "two images of a part": (chat([image([A, B])], "a"), "an image part of 2 images"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_record_that_cannot_be_read_is_refused_in_one_line(folder: Path, name: str) -> None:
    record, reason = REFUSALS[name]
    with pytest.raises(SampleError, match=reason) as refused:
        parsed(folder, record)
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------- what is not read at all


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        (chat("q", "a", score=0.5, tools=[], emotion={"x": "y"}), ("a field 'score'", "a field 'emotion'")),
        (messages(turn("user", name="Bob"), turn("assistant")), ("a field 'messages[].name'",)),
        (chat([text("q") | {"cache_control": {"x": 1}}], "a"), ("a field 'messages[].content[].cache_control'",)),
        (chat("q", "a", image={"path": A, "detail": "low"}), ("a field 'image.detail'",)),
        ({"texts": [{"user": "q", "assistant": "a", "source": "s", "rating": 5}]}, ("a field 'texts[].rating'",)),
        (chat("q", "a", prompt="q"), ("a field 'prompt'",)),
        (chat("q", "a", image=A, image_url="https://x.y/a.jpg"), ("a field 'image_url'",)),
        (chat("q", "a", image=png(), image_path="x/a.png"), ("a field 'image_path'",)),
        (chat("q", "a", image=A, file_name="a.png"), ("a field 'file_name'",)),
        (chat("q", "a", "and?"), ("turns after the last answer",)),
        (chat("<image_caption>q", "a", image=A, image_id=7), ()),
        (chat("<image>See [Image 1].", "a", image=A), ()),
        (chat("q", "a", height=3, width=[4], url="x", question_id=1, split="train", language="en"), ()),
        (chat("q", "a", a=None, b="", c=[], d={}, e=[None, {}], g=float("nan"), f={"x": None}), ()),
    ],
)
def test_what_is_not_read_is_named(folder: Path, record: Record, unread: tuple[str, ...]) -> None:
    assert parsed(folder, record).unread == unread


def test_a_last_question_without_an_answer_and_its_image_are_left_out(folder: Path) -> None:
    sample = parsed(folder, chat("<image>q", "a", "<image>and?", images=[A, B]))
    assert (said(sample), shown(sample), sample.unread) == (*ONE, ("turns after the last answer",))
    context = {"messages": [*chat("q", "a", "r")["messages"], turn("assistant", "b", loss=False)]}
    assert said(parsed(folder, context)) == [Q, ANSWER]


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
    extra = {
        name: value
        for name, value in extra.items()
        if not (name.lower() in KNOWN or IMAGE_FIELD.fullmatch(name.lower()))
    }
    for record, where in (
        ({**extra, **chat("q", "a")}, ""),
        ({"messages": [{**extra, **turn("user", "q")}, turn("assistant", "a")]}, "messages[]."),
    ):
        try:
            sample = parse_record(record, index=0, location="here", image_root=Path("/nowhere"))
        except SampleError as error:
            assert any(repr(where + name)[1:-1] in str(error) for name in extra)
            continue
        assert sample.images == () and [m.text for m in sample.messages] == ["q", "a"]
        for name, value in extra.items():
            if has_content(value) and value not in EMPTY_JSON and not METADATA.fullmatch(name.lower()):
                assert f"a field {where + name!r}" in sample.unread


# ---------------------------------------------------------------------------------------------------- the user's own names


def test_fields_and_roles_may_have_other_names(folder: Path) -> None:
    record = {"q": "q", "gold": "a", "shot": B, "second": A, "answer": "no", "depth": B64[2], "kind": "C", "no": 7}
    names = ["question=q", "answer=gold", "image=shot", "image=second", "ignore=depth", "category=kind", "id=no"]
    sample = parsed(folder, record, FieldMap.parse(names))
    assert (said(sample), shown(sample)) == ([("u", FIRST, SECOND, "q"), ANSWER], [1, 0])
    assert (sample.category, sample.sample_id, sample.unread) == ("C", "7", ("a field 'answer'",))
    assert parsed(folder, record | {"answer": None}, FieldMap.parse(names)).answers == ("a",)
    turns = {"dialogue": [{"from": "Human", "value": "q"}, {"from": "Robot", "value": "a"}]}
    assert said(parsed(folder, turns, FieldMap.parse(roles=["Robot=assistant"]))) == [Q, ANSWER]
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


# --------------------------------------------------------------------------------------------------------------- containers


def test_what_stands_beside_a_tars_json(tmp_path: Path) -> None:
    import io
    import tarfile

    members = {
        "one": {"json": json.dumps(chat("q", "a")), "jpg": png(0), "txt": "words"},
        "two": {"json": json.dumps(chat("q", "a")), "mp4": b"x"},
        "three": {"json": json.dumps(chat("q", "a", image="0.png")), "0.png": png(0), "depth.png": png(1)},
    }
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for key, parts in members.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                data = data.encode() if isinstance(data, str) else data
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    one, two, three = open_samples([tmp_path / "d.tar"])
    assert isinstance(one, Sample) and shown(one) == [0] and one.unread == ("a member 'txt'",)
    assert isinstance(two, BadRecord) and "the member 'mp4' is a video" in two.reason
    assert isinstance(three, Sample) and shown(three) == [0] and three.unread == ("a member 'depth.png'",)
