"""Every pair of teacher and student on tiny models of the real classes: cache, three stages, export, a stock model.

NVLM-D runs in vLLM alone; its pairs are in tests/cache/test_vllm.py.
"""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import conversation, mixed_samples, write_llava
from pair_runs import STUDENTS, TEACHERS, record, train_and_check

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache

HF_TEACHERS = [name for name in TEACHERS if name != "nvlm_d_72b"]
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
                HFTeacher.load(tiny(teacher), dtype=torch.float32), open_samples([data]), folder / "cache", CacheOptions()
            )
            assert len(open_cache(folder / "cache")) == 8
            made[teacher] = folder / "cache"
        return made[teacher]

    return get


@pytest.mark.parametrize(("teacher", "student"), pairs(itertools.product(HF_TEACHERS, STUDENTS)))
def test_the_papers_pairs(cache_of, tiny, tmp_path, record_property, teacher, student):
    record(record_property, teacher, student, "hf")
    train_and_check(cache_of(teacher), tiny(student), tmp_path)
