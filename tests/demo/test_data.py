"""The demo's data and the tokenizers of its shipped models."""

import hashlib
import json
import pathlib
import random

import numpy as np
import pytest
import transformers
from PIL import Image

from genrecal.demo import data
from genrecal.demo.pipeline import ASSETS
from genrecal.vlm.loading import without_video_processors

ANY_TEXT = [
    " leading and  double   spaces ",
    "TOTAL\tRM 12.50\r\nCASH\n\n\n  20.00 *** 5% off!",
    "收据 总计：１２元。こんにちは 안녕",
    "naïve Ångström e\u0301 ﬁ 😀👩‍👩‍👧 \u200b\x00\x7f",
    "<0x41> <|not_special|> {{ jinja }} \\n </p>",
]


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    return list(data.make_samples(600, "train", seed=3))


def written(folder: pathlib.Path, count: int, split: data.Split = "train", seed: int = 1) -> dict[str, bytes]:
    path = data.write_dataset(folder, num_samples=count, split=split, seed=seed)
    assert path == folder / "data.json"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_questions_are_those_of_the_published_table() -> None:
    flaws = data.Flaws(wrong_answers=0.3)
    texts = json.dumps([sample.conversations() for sample in data.make_samples(768, "train", 0, flaws)])
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "1d18b5d74928183e"


def test_bytes_follow_from_the_arguments(tmp_path: pathlib.Path) -> None:
    first, again = (written(tmp_path / name, 60) for name in ("first", "again"))
    assert first == again
    long = written(tmp_path / "long", 90)
    assert [first[name] == long[name] for name in first] == [name != "data.json" for name in first]
    for other in (written(tmp_path / "seed", 30, seed=2), written(tmp_path / "test", 30, "test")):
        assert not set(first.values()) & set(other.values())


def test_the_written_records_are_llava_records(tmp_path: pathlib.Path) -> None:
    records = json.loads(written(tmp_path, 300)["data.json"])
    assert len({record["id"] for record in records}) == len(records) == 300
    shown = 0
    for record in records:
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        shown += len(names)
        assert sum(message["value"].count("<image>") for message in record["conversations"]) == len(names)
        senders = [message["from"] for message in record["conversations"]]
        assert senders == ["human", "gpt"] * (len(senders) // 2)
        for name in names:
            with Image.open(tmp_path / name) as image:
                assert (image.size, image.mode) == ((data.SIZE, data.SIZE), "RGB")
    assert len(list((tmp_path / "images").iterdir())) == shown


def test_categories_and_forms_of_conversation(samples: list[data.Sample]) -> None:
    def share(found: list[bool]) -> float:
        return sum(found) / len(samples)

    assert min(share([sample.category == category for sample in samples]) for category in data.CATEGORIES) > 0.28
    assert 0.17 < share([len(sample.turns) > 1 for sample in samples]) < 0.33
    assert 0.02 < share([len(sample.images) == 2 for sample in samples]) < 0.1
    assert 0.01 < share([not sample.images for sample in samples]) < 0.1
    for sample in samples:
        assert sum(turn.new_image for turn in sample.turns) == len(sample.images)
        assert len(sample.images) < 2 or (sample.turns[0].new_image and sample.turns[-1].new_image)
    rng = random.Random(0)
    for category in data.CATEGORIES * 30:  # no question is repeated about an image
        turns = data.dialogue([data.make_scene(category, rng, "train")], [12], rng, "train")
        assert len({turn.question for turn in turns}) == len(turns)
    kinds = {turn.kind for sample in data.make_samples(300, "pretrain", seed=0) for turn in sample.turns}
    assert kinds == data.PRETRAIN_KINDS | {data.TEXT_KIND}


def test_no_test_digit_is_drawn_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = data.digit_images()
    train, test = (set(data.pool(len(labels), split)) for split in ("train", "test"))
    assert train | test == set(range(len(labels))) and not train & test and len(test) == len(labels) // 5
    assert set(data.pool(len(labels), "pretrain")) == train
    visible = np.isin(np.arange(len(labels)), list(test))[:, None, None]
    monkeypatch.setattr(data, "digit_images", lambda: (np.where(visible, images, 0), labels))
    blank = data.digits_scene(random.Random(0), "train").image
    assert np.asarray(blank)[:40].min() == 255
    assert np.asarray(data.digits_scene(random.Random(0), "test").image)[:40].min() < 100


@pytest.mark.parametrize("unclear", [None, random.Random(5)])
def test_bars_have_the_height_of_their_values(unclear: random.Random | None) -> None:
    rng, errors = random.Random(4), []
    for _ in range(20):
        scene = data.chart_scene(rng, "train", unclear)
        pixels = np.asarray(scene.image).astype(int)
        for color, value in scene.facts:
            near = np.abs(pixels - np.array(data.COLORS[color])).max(axis=-1) <= 22
            errors.append(near.sum(axis=0).max() / data.LEVEL_PIXELS - value)
    assert max(map(abs, errors)) < (0.5 if unclear else 0) + 2.1 / data.LEVEL_PIXELS
    assert not unclear or np.std(errors) > 0.2  # of an even spread it is 0.29


def test_wrong_answers_are_wrong_and_leave_the_rest_as_it_is(samples: list[data.Sample]) -> None:
    spoiled = list(data.make_samples(200, "train", seed=3, flaws=data.Flaws(wrong_answers=0.3)))
    pairs = [(s, t) for a, b in zip(samples, spoiled, strict=False) for s, t in zip(a.turns, b.turns, strict=True)]
    wrong = [(old, new) for old, new in pairs if old.answer != new.answer]
    assert 0.23 < len(wrong) / len(pairs) < 0.37
    assert {old.kind for old, _ in wrong} > data.CAPTION_KINDS
    assert [(old.kind, old.question) for old, _ in pairs] == [(new.kind, new.question) for _, new in pairs]
    for a, b in zip(samples, spoiled, strict=False):
        assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    forms = {"exists": {"yes", "no"}, "parity": {"even", "odd"}, "digit": set("0123456789"), "shape": set(data.SHAPES)}
    found = [(forms[old.kind], new.answer) for old, new in wrong if old.kind in forms]
    assert len(found) > 5 and all(answer in form for form, answer in found)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_unclear_images_keep_their_answers(samples: list[data.Sample], share: float) -> None:
    spoiled = list(data.make_samples(90, "train", seed=3, flaws=data.Flaws(unclear_images=share)))
    assert [b.turns for b in spoiled] == [a.turns for a in samples[:90]]
    pairs = [(s, t) for a, b in zip(samples, spoiled, strict=False) for s, t in zip(a.images, b.images, strict=True)]
    assert abs(np.mean([old.tobytes() != new.tobytes() for old, new in pairs]) - share) < 0.15


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_any_text_and_every_answer_survive_the_tokenizers(name: str, samples: list[data.Sample]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / name)
    for text in [*ANY_TEXT, *sorted({turn.answer for sample in samples for turn in sample.turns})]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert whole.startswith(prompt + "yes" + tokenizer.eos_token)


@pytest.mark.parametrize(
    ("name", "small", "large"), [("teacher", range(4, 5), range(32, 65)), ("student", range(6, 7), range(6, 7))]
)
def test_a_large_image_stays_affordable(name: str, small: range, large: range) -> None:
    with without_video_processors():
        processor = transformers.AutoProcessor.from_pretrained(ASSETS / name)
    for size, expected in (((data.SIZE, data.SIZE), small), ((1000, 2000), large)):
        inputs = processor(images=[[Image.new("RGB", size)]], text=[processor.image_token], return_tensors="pt")
        assert inputs["input_ids"].shape[1] in expected
