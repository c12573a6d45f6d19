"""Input files -> samples: every accepted shape, every refused one with its place and reason, and image decoding."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SROIE, picture, png
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genrecal.errors import DataError, SampleError
from genrecal.samples import (
    BadRecord,
    ImageRef,
    ImageSource,
    Message,
    Sample,
    SampleSet,
    decode_image,
    make_key,
    open_samples,
)

Record = dict[str, Any]


def llava(*texts: str, **fields: Any) -> Record:
    """A LLaVA record: questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "one", "conversations": turns, **fields}


def chat(*contents: Any, **fields: Any) -> Record:
    """A chat-messages record: user and assistant contents in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns, **fields}


GOOD = llava("q", "a", id="good")


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three pictures."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def opened(folder: Path, text: str | bytes, name: str = "data.jsonl", **options: Any) -> SampleSet:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return open_samples([path], **options)


def only(folder: Path, record: Record) -> Sample:
    [sample] = opened(folder, jsonl(record))
    assert isinstance(sample, Sample), sample
    return sample


# ------------------------------------------------------------------------------------------------- records that are none


def test_a_bad_record_keeps_its_place_and_costs_no_other(folder: Path) -> None:
    bad_record = llava("q", id="x/1", category="C", data_source="S")
    for text, name, line in (
        (jsonl(GOOD, bad_record, GOOD), "data.jsonl", 2),
        (jsonl(bad_record, GOOD, GOOD), "first.jsonl", 1),
        (json.dumps([GOOD, bad_record, GOOD], indent=0), "data.json", json.dumps([GOOD], indent=0).count("\n") + 1),
    ):
        samples = opened(folder, text, name)
        [bad] = [sample for sample in samples if isinstance(sample, BadRecord)]
        assert len(samples) == 3 and bad.location == f"{folder / name}:{line}" and bad.reason == "no assistant turn"
        assert (bad.key[8:], bad.sample_id, bad.category, bad.source) == ("-x-1", "x/1", "C", "S")


@pytest.mark.parametrize(
    "line", ['{"id": "x", ', "\ufeff{}", '{"id": ' + "1" * 5000 + "}", "[" * 100_000, b'{"id": "\xff"}', "]",
             '{"a": 1, "a": 2}'],
    ids=["cut", "bom", "huge-number", "deep", "not-utf8", "closing", "twice"],
)  # fmt: skip
def test_a_broken_line_is_named_and_costs_no_other(folder: Path, line: str | bytes) -> None:
    line = line.encode() if isinstance(line, str) else line
    samples = opened(folder, b"\n" + line + b"\n\n" + jsonl(GOOD).encode())
    broken, good = samples
    assert isinstance(good, Sample) and good.location == f"{folder / 'data.jsonl'}:4"
    assert isinstance(broken, BadRecord) and broken.location == f"{folder / 'data.jsonl'}:2"
    assert broken.reason.startswith("broken JSON: ") and broken.key == "00000000"


# ------------------------------------------------------------------------------------------------------------ containers


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"gone\.json: No such file"):
        open_samples([tmp_path / "gone.json"])
    with pytest.raises(DataError, match=r"folder\.json: Is a directory"):
        open_samples([tmp_path / "folder.json"])


@pytest.fixture
def ten(folder: Path) -> SampleSet:
    """Ten samples in two files of different shapes."""
    (folder / "x").mkdir()
    (folder / "1.jsonl").write_text(jsonl(*(llava("q", str(i), id=i, image="a.png") for i in range(6))))
    (folder / "x" / "2.json").write_text(json.dumps([chat("q", str(i), images=["../b.png"]) for i in range(6, 10)]))
    return open_samples([folder / "1.jsonl", folder / "x" / "2.json"])


def test_several_files_are_one_sequence_and_images_start_at_their_own_file(ten: SampleSet) -> None:
    assert len(ten) == 10
    assert [s.answers for s in ten] == [(str(i),) for i in range(10)]
    assert [s.images[0].read() for s in ten] == [png(0)] * 6 + [png(1)] * 4
    assert [s.key for s in ten] == [f"{i:08d}-{i}" for i in range(6)] + [f"{i:08d}" for i in range(6, 10)]


def test_indices_count_from_either_end_and_slices_are_lists(ten: SampleSet) -> None:
    assert [ten[i - 10] for i in range(10)] == list(ten)
    assert ten[np.int64(7)] == ten[7] and ten[7:2:-2] == [ten[7], ten[5], ten[3]] and ten[20:] == []
    for index in (10, -11):
        with pytest.raises(IndexError):
            ten[index]


@pytest.mark.parametrize(("limit", "length"), [(1, 1), (7, 7), (10, 10), (99, 10)])
def test_a_limit_takes_the_first(ten: SampleSet, limit: int, length: int) -> None:
    limited = open_samples([file.path for file in ten.files], limit=limit)
    assert list(limited) == ten[:length]
    assert limited[-1] == ten[length - 1]


def test_image_root_replaces_the_files_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    [sample] = opened(folder, jsonl(llava("q", "a", image="a.png")), "data/d.jsonl", image_root=folder)
    assert sample.images[0].path == folder / "a.png"
    [absolute] = opened(folder, jsonl(llava("q", "a", image=f"file://{folder / 'b.png'}")), "data/e.jsonl")
    assert absolute.images[0].path == folder / "b.png"


def test_an_image_deleted_after_parsing_is_a_sample_error(folder: Path) -> None:
    sample = only(folder, llava("q", "a", image="a.png"))
    (folder / "a.png").unlink()
    with pytest.raises(SampleError, match=r"a\.png: No such file"):
        sample.images[0].read()


# ------------------------------------------------------------------------------------------------------ keys, round trips


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5), st.integers(0, 99_999_999))
def test_keys_are_stable_unique_and_name_files(ids: list[str], start: int) -> None:
    keys = [make_key(start + i, sample_id) for i, sample_id in enumerate(ids)]
    assert keys == [make_key(start + i, sample_id) for i, sample_id in enumerate(ids)]
    assert len(set(keys)) == len(ids)
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() and len(key) <= 60 for key in keys)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
parts = st.lists(texts | st.integers(0, 2).map(ImageRef), max_size=4).map(tuple)
plain = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), parts=parts)
answers = st.builds(
    Message, role=st.just("assistant"), parts=parts, target=st.booleans(), reasoning=texts | st.just("")
)
messages = st.lists(plain | answers, max_size=5)


@given(messages.map(tuple), texts, texts, texts)
def test_json_round_trip(messages: tuple[Message, ...], sample_id: str, category: str, source: str) -> None:
    images = tuple(ImageSource(data=bytes([i]), suffix="png") for i in range(3))
    sample = Sample(
        key="k", sample_id=sample_id, messages=messages, images=images, category=category, source=source, location="k"
    )
    content = json.loads(json.dumps(sample.to_json(), ensure_ascii=False).encode())
    assert Sample.from_json("k", content, images) == sample


# --------------------------------------------------------------------------------------------------------- decode_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))],
)
def test_exif_orientation_is_applied(orientation: int, turned: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(0, 6, 4)
    assert np.array_equal(np.asarray(decode_image(encoded(image, exif=exif))), turned(np.asarray(image)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_content(mode: str) -> None:
    grey = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    decoded = decode_image(encoded(image))
    assert image.mode == mode and decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_greys_keep_their_shades() -> None:
    image = Image.fromarray((np.arange(256, dtype=np.uint16) * 256).reshape(16, 16))
    assert np.array_equal(np.asarray(decode_image(encoded(image)))[..., 0].ravel(), np.arange(256))


def ink(colour: int) -> Image.Image:
    """A square of ink in the middle of a transparent image."""
    pixels = np.full((4, 4, 4), colour, np.uint8)
    pixels[..., 3] = 0
    pixels[1:3, 1:3, 3] = 255
    return Image.fromarray(pixels)


def test_transparent_images_are_put_on_white() -> None:
    expected = np.full((4, 4, 3), 255, np.uint8)
    expected[1:3, 1:3] = 0
    for image in (ink(0), ink(0).convert("LA")):
        for kind in ("PNG", "WEBP", "TIFF")[: 3 if image.mode == "RGBA" else 1]:
            options = {"lossless": True} if kind == "WEBP" else {}
            assert np.array_equal(np.asarray(decode_image(encoded(image, kind, **options))), expected), (
                image.mode,
                kind,
            )
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    half.putpixel((0, 0), (100, 0, 0, 255))
    assert np.asarray(decode_image(encoded(half))).tolist() == [[[100, 0, 0], [127, 127, 127]], [[127, 127, 127]] * 2]
    shades = Image.fromarray(np.array([[0, 90, 200]] * 2, np.uint8))
    for image in (shades, shades.convert("RGB"), shades.convert("P")):
        hidden = {"L": 90, "RGB": (90, 90, 90), "P": image.getpixel((1, 0))}[image.mode]
        decoded = decode_image(encoded(image, transparency=hidden))
        assert np.asarray(decoded)[0, :, 0].tolist() == [0, 255, 200], image.mode


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(ink(255)), "no contrast"),
        (encoded(Image.fromarray(np.array([[0, 200], [0, 200]], np.uint16))), "no contrast"),
        (encoded(Image.fromarray(np.array([[0.1, 0.9], [0, 0]], np.float32)), "TIFF"), "32 bits a pixel"),
        (encoded(Image.fromarray(np.array([[7, 900], [0, 0]], np.int32)), "TIFF"), "32 bits a pixel"),
        *(
            (encoded(picture(0, 20, 20), kind, save_all=True, append_images=[picture(1, 20, 20)]), "2 frames or pages")
            for kind in ("GIF", "WEBP", "PNG", "TIFF")
        ),
        (encoded(picture(0, 20, 3)), "20 x 3 pixels: image processors take 3 rows for colour channels"),
        (encoded(picture(0, 20, 1)), "enlarge it to 4 or more rows"),
    ],
)
def test_an_image_of_which_something_would_be_lost_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        decode_image(data)


def test_cmyk_ink_is_dark_and_paper_is_light() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8, :, 3] = 255
    decoded = np.asarray(decode_image(encoded(Image.fromarray(pixels, "CMYK"), "JPEG", quality=100)))
    assert decoded[:7].max() < 5 and decoded[9:].min() > 250


def test_a_blank_image_is_read() -> None:
    for image in (
        Image.new("RGBA", (4, 4), "white"),
        Image.new("RGB", (4, 4)),
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)),
    ):
        assert decode_image(encoded(image)).size == (4, 4)


def test_limits_and_damage() -> None:
    data = encoded(picture(0, 20, 10), "JPEG")
    assert decode_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(SampleError, match="20 x 10 pixels is over the limit of 199"):
        decode_image(data, max_pixels=199)
    for damaged in (b"", b"hello", data[: len(data) // 2]):
        with pytest.raises(SampleError, match="cannot be decoded"):
            decode_image(damaged)


# ------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SROIE.exists(), reason="the SROIE sample is not here")
def test_sroie() -> None:
    samples = list(open_samples([SROIE]))
    assert len(samples) == 50 and not [sample for sample in samples if isinstance(sample, BadRecord)]
    assert sum(len(sample.answers) == 4 for sample in samples) > 25
    assert all(len(sample.images) == 1 and sample.images[0].suffix == "jpg" for sample in samples)
    assert samples[0].messages[0].parts == (ImageRef(0), "Which company issued this receipt?")
    assert decode_image(samples[0].images[0].read()).mode == "RGB"
