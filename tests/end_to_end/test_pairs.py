"""Every pair of teacher and student on tiny models of the real classes: cache, three stages, export, a stock model.

NVLM-D runs in vLLM alone; its pairs are in tests/cache/test_vllm.py.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from conftest import conversation, mixed_samples, write_llava
from pair_runs import HF_TEACHERS, NEED_TORCHVISION, RING, STUDENTS, note_pair, train_and_check
from transformers.utils import is_num2words_available, is_torchvision_available

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import DataError, ModelError, TrainingError
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.train.logs import read_metrics
from genrecal.vlm.loading import load_processor

QUICK = [("qwen2_vl_72b", "internvl2_5_8b"), ("internvl2_76b", "qwen2_vl_2b"), ("internvl2_5_78b", "internvl2_5_1b")]


def pairs(chosen):
    """Parameters of a test: all pairs, all but the quick ones marked slow."""
    return [pytest.param(*pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.slow) for pair in chosen]


@pytest.fixture(scope="module")
def cache_of(tiny, tmp_path_factory):
    """teacher family -> its cache of eight conversations of every kind, made once."""
    made = {}

    def get(teacher: str) -> Path:
        if teacher not in made:
            folder = tmp_path_factory.mktemp(teacher)
            data = write_llava(folder / "data", mixed_samples(8))
            run_cache_job(
                HFTeacher.load(tiny(teacher), dtype=torch.float32),
                open_samples([data]),
                folder / "cache",
                CacheOptions(),
            )
            assert len(open_cache(folder / "cache")) == 8
            made[teacher] = folder / "cache"
        return made[teacher]

    return get


@pytest.mark.parametrize(("teacher", "student"), pairs(itertools.product(HF_TEACHERS, STUDENTS)))
def test_the_papers_pairs(cache_of, tiny, tmp_path, record_property, teacher, student):
    note_pair(record_property, teacher, student)
    train_and_check(cache_of(teacher), tiny(student), tmp_path)


@pytest.mark.parametrize(("teacher", "student"), pairs(itertools.pairwise(RING)))
def test_pairs_beyond_the_paper(cache_of, tiny, tmp_path, record_property, teacher, student):
    note_pair(record_property, teacher, student)
    train_and_check(cache_of(teacher), tiny(student), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not (is_torchvision_available() and is_num2words_available()), reason="tests/vlm/test_torchvision.py runs it"
)
@pytest.mark.parametrize(("teacher", "student"), NEED_TORCHVISION)
def test_pairs_that_need_torchvision(cache_of, tiny, tmp_path, teacher, student):
    train_and_check(cache_of(teacher), tiny(student), tmp_path)


@pytest.mark.skipif(is_torchvision_available(), reason="it is there")
def test_what_needs_torchvision_says_so(tiny, tmp_path):
    folder = shutil.copytree(tiny("idefics3"), tmp_path / "smolvlm")
    for name in ("processor_config.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    with pytest.raises(ModelError, match="needs torchvision and num2words; `genrecal doctor` says how to install them"):
        load_processor(folder)


# ------------------------------------------------------------------------------------------------------- language models

TEXT = [conversation((f"What is {i} and {i}?", f"it is {2 * i}"), key=f"{i:08d}") for i in range(6)]


def test_a_language_model_as_teacher_leaves_pictures_out(tiny, tmp_path, record_property):
    note_pair(record_property, "llama3", "qwen2_vl_2b")
    data = write_llava(tmp_path / "data", [*TEXT, *mixed_samples(2)])
    teacher, out = HFTeacher.load(tiny("llama3"), dtype=torch.float32), tmp_path / "cache"
    with pytest.raises(DataError, match="of 8 samples cannot be used.*takes text alone"):
        run_cache_job(teacher, open_samples([data]), out, CacheOptions())
    run_cache_job(teacher, open_samples([data]), out, CacheOptions(max_skip=0.25))
    rows = open_cache(out).manifest().to_pylist()
    assert [row["status"] for row in rows] == ["cached"] * 6 + ["skipped"] * 2
    assert all("language model" in row["reason"] for row in rows[6:])
    train_and_check(out, tiny("qwen2_vl_2b"), tmp_path)


def test_a_language_model_as_student_leaves_pictures_out(tiny, tmp_path, record_property):
    note_pair(record_property, "internvl2_76b", "qwen2")
    data = write_llava(tmp_path / "data", [*mixed_samples(2), *TEXT])
    teacher, cache = HFTeacher.load(tiny("internvl2_76b"), dtype=torch.float32), tmp_path / "cache"
    run_cache_job(teacher, open_samples([data]), cache, CacheOptions())
    with pytest.raises(TrainingError, match=r"cannot take 2 of 8 samples.*takes text alone"):
        train_and_check(cache, tiny("qwen2"), tmp_path / "refused", "stage1.max_steps=1")
    run = train_and_check(cache, tiny("qwen2"), tmp_path, "data.max_skip=0.3")
    skipped = [text for line in read_metrics(run.path) for text in line.get("skipped", [])]
    assert len(skipped) == 2 * 3 * 3 and all(
        "language model" in text for text in skipped
    )  # three epochs of three stages


@pytest.mark.slow
def test_two_language_models(tiny, tmp_path, record_property):
    note_pair(record_property, "llama3", "qwen2")
    data = write_llava(tmp_path / "data", TEXT)
    run_cache_job(
        HFTeacher.load(tiny("llama3"), dtype=torch.float32), open_samples([data]), tmp_path / "cache", CacheOptions()
    )
    train_and_check(tmp_path / "cache", tiny("qwen2"), tmp_path)
