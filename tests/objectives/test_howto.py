"""The example of docs/howto/objective.md, as it stands there: it trains, and its terms are what it says."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import UsageError
from genrecal.objectives import objective_named
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.config import load_config
from genrecal.train.logs import read_metrics
from genrecal.train.loop import build_distiller, train
from genrecal.train.run import Run

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "objective.md"


def test_the_example_of_the_guide_trains(tiny, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "trust.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trust", raising=False)
    data = write_llava(tmp_path / "d", mixed_samples(8))
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    run_cache_job(teacher, open_samples([data]), tmp_path / "c", CacheOptions())
    settings = ["objective=trust:Trust", "data.workers=1", "stage2.batch_size=4", "stage2.accumulation=2"]
    run = Run(
        path=tmp_path / "run",
        config=load_config(None, settings),
        student=str(tiny("internvl_llama")),
        caches=(str(tmp_path / "c"),),
    )
    train(run, stages=(2,))
    (line,) = read_metrics(run.path)
    assert {"sft", "sft_first", "trust", "trust_later", "loss"} <= line.keys()

    cache = open_caches(run.caches)
    distiller = build_distiller(run, cache, 2, torch.device("cpu"), torch.float32)
    batch = BatchBuilder(ShardSource(cache), distiller.student.renderer, distiller.objective)[range(8)].batch
    expected, tokens = 0.0, 0
    for record in cache:
        rows, encoded = record.answer_rows(), distiller.student.renderer.encode(record.sample)
        with torch.no_grad():
            logits = distiller.student.model(**distiller.student.renderer.collate([encoded])).logits[0]
        for turn, (start, end, _) in enumerate(s for s in encoded.segments() if s[2]):
            given = rows.target_log_prob[rows.predicts & (rows.turn == turn)]
            ids = torch.from_numpy(encoded.input_ids[start:end])
            ce = torch.nn.functional.cross_entropy(logits[start - 1 : end - 1].float(), ids, reduction="sum").item()
            expected += np.exp(given).mean() * ce
            tokens += len(given)
    assert cache.column("answer_tokens").sum() == tokens == line["teacher_tokens"]
    distiller.eval()
    assert distiller(batch, tokens).loss.item() == pytest.approx(expected / tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kd", "objective 'kd': expected one of genrecal, .*; or module:Class for one of your own"),
        ("no_such_module:Kd", "No module named 'no_such_module'; is the module on PYTHONPATH?"),
        (
            "json:JSONDecoder",
            "expected a subclass of genrecal.objectives.base.Objective, got <class 'json",
        ),
    ],
)
def test_what_is_no_objective_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        objective_named(name)
