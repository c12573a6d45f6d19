"""Students of the demo's models, as `genrecal export` writes them, for the tests of what others do with them."""

from pathlib import Path

from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.demo.pipeline import ASSETS
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.export import export
from genrecal.train.loop import train
from genrecal.train.run import Run

# One step each of stages 1 and 2, of a size that leaves sensible answers.
STEP = "max_steps=1 batch_size=2 accumulation=1 lr=1e-5 lr_end=1e-6".split()
SETTINGS = ["data.workers=0", "precision=fp32", *(f"stage{n}.{setting}" for n in (1, 2) for setting in STEP)]


def exported_student(name: str, folder: Path) -> Path:
    """`student` (an InternVL) or `teacher` (a Qwen2-VL) of the demo, trained for two steps from a cache and exported."""
    data = write_llava(folder / "data", mixed_samples(4))
    cache = run_cache_job(
        HFTeacher.load(ASSETS / "teacher"), open_samples([data]), folder / "cache", CacheOptions(top_k=8)
    )
    assert cache.cached == 4
    config = load_config(settings=SETTINGS)
    run = Run(path=folder / "run", config=config, student=str(ASSETS / name), caches=(str(folder / "cache"),))
    train(run, stages=[1, 2])
    export(run, folder / "student")
    return folder / "student"
