"""Shared fixtures: tiny real models, made once a session, and caches made with them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `set_num_threads` below does not reach threads that are made later, nor processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import tiny_models
import torch
from PIL import Image

from genrecal.cache.teacher import HFTeacher
from genrecal.samples import ImageRef, ImageSource, Message, Sample

torch.set_num_threads(1)
# `make test-all` sets it: all damages and all kills, of which CI tries a share.
FULL = bool(os.environ.get("GENRECAL_FULL"))
# CI tries the same examples every time; elsewhere every run tries new ones.
# None has a deadline: a busy machine is not an error.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("ci", derandomize=bool(os.environ.get("CI")), **patient)
hypothesis.settings.load_profile("ci")

REAL = Path(os.environ.get("GENRECAL_REAL") or Path(__file__).parents[1] / "build" / "real").absolute()
SROIE = Path(__file__).parents[2] / "shared" / "data" / "sroie" / "sroie.json"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("qwen2_vl")`: the folder of that family's tiny model."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: tiny_models.make(family, root / family)


@pytest.fixture(scope="session")
def teacher(tiny: Callable[[str], Path]) -> HFTeacher:
    """The tiny Qwen2-VL as a teacher, in float32. Who changes one loads another."""
    return HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real models, which scripts/make_real_models.py makes: `real / "gemma3-270m"`. For tests marked `real`."""
    assert REAL.is_dir(), f"{REAL} is missing: run `make test-real`, or set GENRECAL_REAL to where the models are"
    return REAL


def picture(seed: int = 0, width: int = 90, height: int = 60) -> Image.Image:
    """A picture of noise: every patch differs from every other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(seed: int = 0, width: int = 90, height: int = 60) -> bytes:
    import io

    stream = io.BytesIO()
    picture(seed, width, height).save(stream, "PNG")
    return stream.getvalue()


def conversation(*turns: tuple[str, str], images: dict[int, int] | None = None, key: str = "00000000") -> Sample:
    """A sample of (question, answer) turns; `images` says how many pictures stand before the question of a turn."""
    images = images or {}
    messages: list[Message] = []
    count = 0
    for number, (question, answer) in enumerate(turns):
        refs = tuple(ImageRef(count + i) for i in range(images.get(number, 0)))
        count += len(refs)
        messages += [Message(role="user", parts=(*refs, question)), Message(role="assistant", parts=(answer,))]
    sources = tuple(ImageSource(data=png(i, 90 - 20 * (i % 2), 60), suffix="png") for i in range(count))
    return Sample(key=key, sample_id=key, messages=tuple(messages), images=sources, category="test", source="made")


def mixed_samples(count: int = 8) -> list[Sample]:
    """Conversations of every kind: one turn and several, no picture, one, and two in different turns."""
    kinds = [
        lambda key: conversation(("What is shown?", "a red square"), images={0: 1}, key=key),
        lambda key: conversation(("How many?", "7 of 9"), ("And now?", " blue\n"), images={0: 1, 1: 1}, key=key),
        lambda key: conversation(("What is the total?", "中文 and 🙂 too"), key=key),
        lambda key: conversation(("One", "1"), ("Two", "2 2"), ("Three", "3 3 3"), images={1: 1}, key=key),
    ]
    return [kinds[i % len(kinds)](f"{i:08d}") for i in range(count)]


def write_llava(folder: Path, samples: list[Sample]) -> Path:
    """Write samples as a LLaVA json with its images; returns the json."""
    import json

    (folder / "images").mkdir(parents=True)
    records = []
    for number, sample in enumerate(samples):
        names = []
        for i, image in enumerate(sample.images):
            names.append(f"images/{number}-{i}.{image.suffix}")
            (folder / names[-1]).write_bytes(image.read())
        turns = []
        for message in sample.messages:
            text = "".join(part if isinstance(part, str) else "<image>\n" for part in message.parts)
            turns.append({"from": {"user": "human", "assistant": "gpt"}[message.role], "value": text})
        record = {"id": f"s{number}", "conversations": turns, "category": sample.category, "source": sample.source}
        records.append(record | ({"image": names} if names else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path
