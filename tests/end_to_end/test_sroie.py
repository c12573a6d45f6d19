"""Real scanned receipts, several turns each, through every command with the demo's tiny models, without code for them."""

import json

import pytest
from conftest import SROIE
from safetensors.torch import load_file

from genrecal.cli import main
from genrecal.demo.pipeline import ASSETS
from genrecal.shards.reader import open_cache
from genrecal.train.logs import read_metrics


def run(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0


@pytest.mark.slow
@pytest.mark.skipif(not SROIE.exists(), reason="the receipts are not here")
def test_receipts_through_every_command(tmp_path, capsys):
    cache, out, student = tmp_path / "cache", tmp_path / "run", tmp_path / "student"
    run("cache", "--teacher", ASSETS / "teacher", "--data", SROIE, "--out", cache, "--samples-per-shard", 16)
    opened = open_cache(cache)
    records = json.loads(SROIE.read_text())
    assert len(opened) == len(records) == 50
    for record, entry in zip(records, opened, strict=True):
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        assert list(entry.sample.answers) == answers
        assert entry.images == [(SROIE.parent / record["image"]).read_bytes()]
        assert (entry.row["turns"], entry.row["category"], entry.row["source"]) == (
            len(answers),
            "Chart & Document",
            "SROIE",
        )
    capsys.readouterr()
    run("inspect", cache, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["cached"], summary["skipped"], summary["shards"]) == (50, 0, [4, 4])
    assert summary["turns"] == sum(len(record["conversations"]) // 2 for record in records)
    settings = [f"stage{n}.{s}" for n in (1, 2, 3) for s in ("batch_size=4", "accumulation=2", "max_steps=3")]
    options = [word for setting in ["data.workers=0", *settings] for word in ("--set", setting)]
    run("train", "--cache", cache, "--student", ASSETS / "student", "--out", out, *options)
    lines = read_metrics(out)
    assert [line["stage"] for line in lines] == [1] * 3 + [2] * 3 + [3] * 3
    assert all(line["samples"] == 8 for line in lines)
    run("export", out, "--out", student)
    assert load_file(student / "model.safetensors").keys() == load_file(ASSETS / "student" / "model.safetensors").keys()
    capsys.readouterr()
    run("evaluate", "--model", student, "--data", SROIE, "--limit", 2, "--max-new-tokens", 8, "--json")
    assert json.loads(capsys.readouterr().out)["overall"]["n"] == 8
