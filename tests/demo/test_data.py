"""The demo's data and the tokenizers of its shipped models."""

import json
import pathlib
import random

import numpy as np
import pytest
import transformers
from PIL import Image

import genrecal.demo
from genrecal.demo import data
from genrecal.vlm.loading import without_video_processors

ASSETS = pathlib.Path(next(iter(genrecal.demo.__path__))) / "assets"
ANY_TEXT = [
    "What is the sum of the digits?",
    " leading and  double   spaces ",
    "TOTAL\tRM 12.50\r\nCASH\n\n\n  20.00 *** 5% off!",
    "收据 总计：１２元。こんにちは 안녕",
    "naïve Ångström e\u0301 ﬁ 😀👩‍👩‍👧 \u200b\x00\x7f",
    "<0x41> <|not_special|> {{ jinja }} \\n </p>",
]


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    return list(data.make_samples(600, "train", seed=3))


def test_the_same_arguments_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    for name in ("first", "second"):
        data.write_dataset(tmp_path / name, num_samples=60, split="train", seed=1)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("changed", [{"seed": 2}, {"split": "test"}])
def test_another_seed_or_split_gives_other_pictures(tmp_path: pathlib.Path, changed: dict) -> None:
    arguments = {"num_samples": 30, "split": "train", "seed": 1}
    data.write_dataset(tmp_path / "first", **arguments)
    data.write_dataset(tmp_path / "second", **(arguments | changed))
    first, second = (set(files_of(tmp_path / name).values()) for name in ("first", "second"))
    assert not first & second


def test_a_longer_data_set_begins_with_the_shorter_one() -> None:
    short = [sample.conversations() for sample in data.make_samples(20, "train", seed=5)]
    long = [sample.conversations() for sample in data.make_samples(40, "train", seed=5)]
    assert long[:20] == short


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="validation"):
        data.make_samples(1, "validation", seed=0)  # type: ignore[arg-type]


def test_the_written_records_are_llava_records(tmp_path: pathlib.Path) -> None:
    path = data.write_dataset(tmp_path, num_samples=300, split="train", seed=0)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "data.json"
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


def test_every_category_is_about_a_third(samples: list[data.Sample]) -> None:
    counts = [sum(sample.category == category for sample in samples) for category in data.CATEGORIES]
    assert sum(counts) == len(samples)
    assert min(counts) > len(samples) * 0.28


def test_all_forms_of_conversation_are_present(samples: list[data.Sample]) -> None:
    multi_turn = sum(len(sample.turns) > 1 for sample in samples) / len(samples)
    two_images = sum(len(sample.images) == 2 for sample in samples) / len(samples)
    text_only = sum(not sample.images for sample in samples) / len(samples)
    assert 0.17 < multi_turn < 0.33
    assert 0.02 < two_images < 0.1
    assert 0.01 < text_only < 0.1
    for sample in samples:
        assert sum(turn.new_image for turn in sample.turns) == len(sample.images)
        if len(sample.images) == 2:
            assert sample.turns[0].new_image
            assert sample.turns[-1].new_image


def test_no_question_is_repeated_about_a_picture() -> None:
    rng = random.Random(0)
    for category in data.CATEGORIES:
        for _ in range(30):
            turns = data.dialogue([data.make_scene(category, rng, "train")], [12], rng, "train")
            assert len({turn.question for turn in turns}) == len(turns)


def test_pretraining_only_describes() -> None:
    kinds = {turn.kind for sample in data.make_samples(300, "pretrain", seed=0) for turn in sample.turns}
    assert kinds == data.PRETRAIN_KINDS | {data.TEXT_KIND}


@pytest.mark.parametrize("size", [1797, 150, 178, 442, 569])
def test_the_test_pool_is_held_out(size: int) -> None:
    assert data.pool(size, "train") == data.pool(size, "pretrain")
    assert not set(data.pool(size, "train")) & set(data.pool(size, "test"))
    assert len(data.pool(size, "train")) + len(data.pool(size, "test")) == size
    assert len(data.pool(size, "test")) == size // data.HELD_OUT_EVERY


def test_no_test_digit_is_drawn_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = data.digit_images()
    visible = np.array([not data.held_out(index) for index in range(len(labels))])
    monkeypatch.setattr(data, "digit_images", lambda: (np.where(visible[:, None, None], 0, images), labels))
    blank = data.digits_scene(random.Random(0), "train").image
    assert np.asarray(blank)[:40].min() == 255
    assert np.asarray(data.digits_scene(random.Random(0), "test").image)[:40].min() < 100


def test_bars_have_the_height_of_their_values() -> None:
    rng = random.Random(4)
    for _ in range(20):
        scene = data.chart_scene(rng, "train")
        pixels = np.asarray(scene.image).astype(int)
        for color, value in scene.facts:
            near = np.abs(pixels - np.array(data.COLORS[color])).max(axis=-1) <= 22
            height = near.sum(axis=0).max()
            assert abs(height - value * data.LEVEL_PIXELS) <= 2


def test_wrong_answers_are_wrong_and_leave_the_rest_as_it_is(samples: list[data.Sample]) -> None:
    spoiled = list(data.make_samples(200, "train", seed=3, flaws=data.Flaws(wrong_answers=0.3)))
    pairs = [
        (old, new) for a, b in zip(samples, spoiled, strict=False) for old, new in zip(a.turns, b.turns, strict=True)
    ]
    wrong = [(old, new) for old, new in pairs if old.answer != new.answer]
    assert 0.23 < len(wrong) / len(pairs) < 0.37
    assert {old.kind for old, _ in wrong} > data.CAPTION_KINDS
    assert [(old.kind, old.question) for old, _ in pairs] == [(new.kind, new.question) for _, new in pairs]
    for a, b in zip(samples, spoiled, strict=False):
        assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    forms = {"exists": {"yes", "no"}, "parity": {"even", "odd"}, "digit": set("0123456789"), "shape": set(data.SHAPES)}
    found = [(forms[old.kind], new.answer) for old, new in wrong if old.kind in forms]
    assert len(found) > 5 and all(answer in form for form, answer in found)


def test_unclear_pictures_keep_their_answers(samples: list[data.Sample]) -> None:
    for share in (0.5, 1.0):
        spoiled = list(data.make_samples(90, "train", seed=3, flaws=data.Flaws(unclear_pictures=share)))
        assert [b.turns for b in spoiled] == [a.turns for a in samples[:90]]
        changed = [
            old.tobytes() != new.tobytes()
            for a, b in zip(samples, spoiled, strict=False)
            for old, new in zip(a.images, b.images, strict=True)
        ]
        assert abs(sum(changed) / len(changed) - share) < 0.15


def test_unclear_bars_end_within_half_a_value() -> None:
    rng, unclear = random.Random(4), random.Random(5)
    errors = []
    for _ in range(20):
        scene = data.chart_scene(rng, "train", unclear)
        pixels = np.asarray(scene.image).astype(int)
        for color, value in scene.facts:
            near = np.abs(pixels - np.array(data.COLORS[color])).max(axis=-1) <= 22
            errors.append(near.sum(axis=0).max() / data.LEVEL_PIXELS - value)
    assert max(map(abs, errors)) < 0.5 + 2 / data.LEVEL_PIXELS
    assert np.std(errors) > 0.2  # of an even spread it is 0.29


@pytest.fixture(scope="module", params=["teacher", "student"])
def tokenizer(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(ASSETS / request.param)


@pytest.mark.parametrize("text", ANY_TEXT)
def test_any_text_survives_the_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_answer_survives_the_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, samples: list[data.Sample]
) -> None:
    answers = sorted({turn.answer for sample in samples for turn in sample.turns})
    lengths = []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == answer
        lengths.append(len(ids))
    assert min(lengths) == 1
    assert 14 <= max(lengths) <= 30


def test_both_models_close_a_turn_with_their_end_token(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in text]
    answered = [*text, {"role": "assistant", "content": "yes"}]
    prompt = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].startswith("yes" + tokenizer.eos_token)


def test_the_two_models_split_text_differently() -> None:
    teacher, student = (transformers.AutoTokenizer.from_pretrained(ASSETS / name) for name in ("teacher", "student"))
    assert len(teacher) != len(student)
    shared = set(teacher.get_vocab()) & set(student.get_vocab())
    assert any(teacher.get_vocab()[token] != student.get_vocab()[token] for token in shared)
    text = "The digits are 8 and 9, so the sum is 17. It is called yosti."
    assert len(teacher.tokenize(text)) != len(student.tokenize(text))


def test_the_folders_are_complete_and_small() -> None:
    expected = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    total = 0
    for name in ("teacher", "student"):
        files = {path.name: path.stat().st_size for path in (ASSETS / name).iterdir()}
        assert set(files) == expected
        total += sum(files.values())
        config = json.loads((ASSETS / name / "processor_config.json").read_text(encoding="utf-8"))
        assert config["video_processor"]["video_processor_type"].endswith("VideoProcessor")
        assert config["video_processor"]["size"] == config["image_processor"]["size"]
    assert total < 8_000_000


@pytest.mark.parametrize(
    ("name", "small", "large"), [("teacher", range(4, 5), range(32, 65)), ("student", range(6, 7), range(6, 7))]
)
def test_a_large_picture_stays_affordable(name: str, small: range, large: range) -> None:
    with without_video_processors():
        processor = transformers.AutoProcessor.from_pretrained(ASSETS / name)
    for size, expected in (((data.SIZE, data.SIZE), small), ((1000, 2000), large)):
        inputs = processor(images=[[Image.new("RGB", size)]], text=[processor.image_token], return_tensors="pt")
        assert inputs["input_ids"].shape[1] in expected
