"""`--store`: a cache of targets holds the rows of one with states, less the states; objectives that need more say so."""

import json
import shutil

import numpy as np
import pytest
from conftest import mixed_samples, write_llava

from genrecal import cli
from genrecal.errors import FormatError
from genrecal.objectives import OBJECTIVES
from genrecal.shards.head import HEAD_FILE
from genrecal.shards.layout import sealed
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache
from genrecal.train.config import objectives_by_store

SMALL = " ".join(
    f"--set stage{n}.{name}" for n in (1, 2, 3) for name in ("batch_size=2", "accumulation=1", "max_steps=2")
)


def main(words: list[str]) -> int:
    """A command's exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


@pytest.fixture(scope="module")
def stores(tiny, tmp_path_factory):
    """The same eight conversations, stored three ways."""
    folder = tmp_path_factory.mktemp("stores")
    data = write_llava(folder / "data", mixed_samples())
    for store in ("targets", "states", "questions"):
        words = (
            f"cache --teacher {tiny('qwen2_vl')} --data {data} --store {store} --dtype float32 --out {folder / store}"
        )
        assert main(words.split()) == 0
    return folder


def test_each_store_holds_what_the_one_before_holds(stores):
    targets, states, questions = (open_cache(stores / name) for name in ("targets", "states", "questions"))
    for less, more in ((targets, states), (states, questions)):
        for a, b in zip(less, more, strict=True):
            assert a.sample == b.sample
            names = a.answer.column_names
            assert b.answer.select(names).replace_schema_metadata(None) == a.answer.replace_schema_metadata(None)
    assert {name for name in states[0].answer.column_names if name not in targets[0].answer.column_names} == {
        "hidden_q",
        "hidden_scale",
    }
    assert [(stores / name / HEAD_FILE).exists() for name in ("targets", "states", "questions")] == [False, True, True]
    assert [cache[0].has_question for cache in (targets, states, questions)] == [False, False, True]
    assert np.array_equal(states[0].hidden(), questions[0].hidden())


def test_what_is_not_stored_cannot_be_asked_for(stores):
    cache = open_cache(stores / "targets")
    for ask in (cache.head, cache[0].hidden):
        with pytest.raises(FormatError, match="--store targets"):
            ask()


@pytest.mark.parametrize("words, needed", [
    ("--store targets --answer-codec int4", "--answer-codec: expected --store states or questions"),
    ("--store targets --kl-budget 0.1", "--kl-budget: expected --store states or questions"),
    ("--store targets --question-fraction 0.5", "--question-fraction: expected --store questions"),
    ("--store states --question-codec bf16", "--question-codec: expected --store questions"),
    ("--store states --question-seed 3", "--question-seed: expected --store questions"),
])  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(words, needed, tmp_path, capsys):
    for command in ("plan", "cache"):
        assert main(f"{command} --teacher t --data d.jsonl --out {tmp_path / 'c'} {words}".split()) == 2
        assert needed in capsys.readouterr().err


@pytest.mark.parametrize("deep", [False, True])
def test_a_cache_of_targets_is_verified(stores, deep):
    assert verify_cache(stores / "targets", deep=deep).whole


def test_states_that_cache_json_does_not_speak_of_are_found(stores, tmp_path):
    """Shards of another store than cache.json says."""
    for said, stored in (("targets", "states"), ("states", "targets")):
        mixed = tmp_path / said
        shutil.copytree(stores / stored, mixed)
        content = json.loads((stores / said / "cache.json").read_text())
        there = json.loads((mixed / "cache.json").read_text())
        content |= {name: there[name] for name in ("index_sha256", "totals")}
        (mixed / "cache.json").write_text(json.dumps(sealed(content)))
        assert any("codec" in finding.what for finding in verify_cache(mixed).findings)


def test_training_on_targets_is_training_on_a_cache_with_states(stores, tiny, tmp_path):
    """Of an objective that reads no states; also from both at once."""
    losses = {}
    for name in ("targets", "questions"):
        words = f"train --cache {stores / name} --student {tiny('internvl_llama')} --objective byte-kl --stages 2 {SMALL} --out"
        assert main([*words.split(), str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["targets"] == losses["questions"] and len(losses["targets"]) == 2


def test_objectives_that_read_more_are_refused_and_the_advice_works(stores, tiny, tmp_path, capsys):
    served = objectives_by_store()
    assert sorted(sum(served.values(), [])) == sorted(OBJECTIVES)
    for store in ("states", "questions"):
        for name in served[store]:
            words = f"train --cache {stores / 'targets'} --student {tiny('internvl_llama')} --objective {name} {SMALL} --out"
            assert main([*words.split(), str(tmp_path / name), "--dry-run"]) == 2
            assert f"genrecal cache --store {store}" in capsys.readouterr().err
            words = words.replace(str(stores / "targets"), str(stores / store))
            assert main([*words.split(), str(tmp_path / name), "--dry-run"]) == 0
