"""The result that a report leads with: its arithmetic against the predictions, and ten questions with their images."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import mixed_samples, write_llava
from html_page import HOSTILE, Page, assert_harmless
from made_run import write_run

from genrecal.cli import main
from genrecal.errors import DataError
from genrecal.evaluate.evaluate import Prediction
from genrecal.report.answers import Model, best_and_others, comparable, mean_of, verdict
from genrecal.samples import open_samples


def answers(*scores, losses=None, texts=None):
    """Predictions with these scores: two questions in each conversation, in two categories."""
    losses, texts = losses or [1.0] * len(scores), texts or ["said"] * len(scores)
    return [
        Prediction(
            key=f"{i // 2:08d}-s{i // 2}", turn=i % 2, category=f"c{i % 2}", question=f"q{i}", answer="right",
            prediction=text, metric="exact", score=score, log_loss=loss,
        )
        for i, (score, loss, text) in enumerate(zip(scores, losses, texts, strict=True))
    ]  # fmt: skip


def write(path, predictions):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in predictions))


def test_errors_and_gains_over_seeds():
    base = [answers(0, 1, 0, 0), answers(1, 1, 0, 0), answers(1, 1, 1, 0)]
    other = [answers(1, 1, 0, 0), answers(1, 1, 1, 0, losses=[3, 1, 1, 1]), answers(0, 1, 1, 0)]
    own, gains = np.array([0.5, 0.75, 0.5]), np.array([0.25, 0.25, -0.25])
    assert mean_of(other, "score") == pytest.approx((own.mean(), own.std(ddof=1) / math.sqrt(3)))
    assert mean_of(other, "score", base) == pytest.approx((gains.mean(), gains.std(ddof=1) / math.sqrt(3)))
    assert mean_of(other, "log_loss", base) == pytest.approx((0.5 / 3, np.std([0, 0.5, 0], ddof=1) / math.sqrt(3)))
    assert mean_of(other, "score", category="c0").value == pytest.approx(2 / 3)


def test_with_one_seed_errors_are_over_conversations():
    """Two conversations of two questions: their sums' spread about the mean, as `genrecal evaluate` has it."""
    base, other = [answers(0, 1, 0, 0)], [answers(1, 1, 1, 0)]
    assert mean_of(other, "score") == pytest.approx((0.75, math.sqrt(2 * (0.5**2 + 0.5**2)) / 4))
    assert mean_of(other, "score", base) == pytest.approx((0.5, 0.0))  # each conversation gained one
    with pytest.raises(DataError, match="not asked the same questions"):
        mean_of([answers(0, 1)], "score", [answers(0, 1, 1)])


def test_one_sentence_names_every_baseline_and_the_start():
    models = [
        Model(name="teacher", seeds=[answers(1, 1, 1, 1)], kind="teacher"),
        Model(name="student before", seeds=[answers(0, 0, 0, 0)], kind="before"),
        Model(name="SFT", seeds=[answers(1, 0, 1, 0)], kind="baseline"),
        Model(name="worse", seeds=[answers(0, 0, 1, 0)]),
        Model(name="ours", seeds=[answers(1, 1, 0, 1)]),
    ]
    best, others = best_and_others(models)
    assert (best.name, [other.name for other in others]) == ("ours", ["SFT", "student before"])
    assert verdict(models) == (
        "ours answers 75.0% ± 25.0% of 4 held-out questions right: +25.0 ± 25.0 points compared with SFT (no clear "
        "difference), +75.0 ± 25.0 points compared with student before; the teacher answers 100.0% ± 0.0%. It is the best of 2."
    )
    apart = Model(name="elsewhere", seeds=[answers(1, 1)])
    assert comparable([*models, apart]) == (models, ["elsewhere"])


@pytest.fixture
def compared(tmp_path):
    """A comparison's folder as `genrecal compare` writes it, with made answers over data that have images."""
    data = write_llava(tmp_path / "data", mixed_samples(6))
    keys = [sample.key for sample in open_samples([data])]
    out = tmp_path / "compared"
    for number, (name, scores) in enumerate({"SFT": [0, 1, 0, 1, 0, 1], "GenRecal": [1, 1, 0, 0, 1, 1]}.items()):
        made = answers(*(score for score in scores for _ in range(2)), texts=[HOSTILE[:90] if number else "x"] * 12)
        for seed in (0, 1):
            write(out / f"predictions/{name}/seed{seed}.jsonl", [replace(p, key=keys[int(p.key[:8])]) for p in made])
        write_run(out / f"runs/{name}/seed0", caches=[f"/caches/{name}"])
    facts = {
        "variants": {"SFT": "SFT", "ours <b>": "GenRecal"},
        "seeds": [0, 1],
        "data": [str(data)],
        "image_root": None,
    }
    (out / "report.json").write_text(json.dumps(facts))
    (out / "compare.json").write_text("{}")
    return out


def test_a_comparison_leads_with_its_result(compared, tmp_path):
    write(tmp_path / "teacher.jsonl", [replace(p, score=1.0) for p in map(as_prediction, lines(compared))])
    write(tmp_path / "other-questions.jsonl", answers(1, 1))
    words = [
        "report",
        compared,
        tmp_path / "teacher.jsonl",
        tmp_path / "other-questions.jsonl",
        "--out",
        tmp_path / "r.html",
    ]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert not stop.value.code
    page = Page(tmp_path / "r.html")
    assert_harmless(page)
    text = " ".join(page.text.split())
    assert "ours <b> answers 66.7% ± 0.0% of 12 held-out questions right, mean of 2 seeds: +16.7 ± 0.0 points" in text
    assert "other questions answered other questions and cannot be compared here" in text
    head, *rows = page.tables["Result"]
    assert [row[0] for row in rows] == ["teacher", "SFT", "ours <b>"] and head[-1] == "c1 (n = 6)"
    assert rows[0][1].startswith("100.0%") and rows[2][2] == "+16.7 ± 0.0"
    shown = [rows for name, rows in page.tables.items() if name.startswith("Answers to ")]
    assert len(shown) == 10 and all(
        [row[0] for row in rows[1:]] == ["right answer", "teacher", "SFT", "ours <b>"] for rows in shown
    )
    outcomes = [(rows[3][2], rows[4][2]) for rows in shown]
    assert outcomes[:3] == [("wrong", "right"), ("right", "wrong"), ("right", "right")] or outcomes[2] == (
        "wrong",
        "wrong",
    )
    assert all("<script>" in rows[4][1] for rows in shown)
    assert len([tag for tag, _ in page.tags if tag == "img"]) >= 5
    assert ["cache", "/caches/SFT", "/caches/GenRecal"] in page.tables["Settings that differ"]
    order = [given["id"] for tag, given in page.tags if tag == "section"]
    assert order[:3] == ["result", "questions", "cost"] and order.index("stage1") > order.index("runs")


def lines(compared):
    return (compared / "predictions/SFT/seed0.jsonl").read_text().splitlines()


def as_prediction(line):
    return Prediction(**json.loads(line))


@pytest.mark.parametrize("content", ["", "[]", '{"key": 1}', json.dumps(asdict(answers(0)[0]) | {"score": "x"})])
def test_what_is_no_file_of_answers_is_one_line(tmp_path, capsys, content):
    (tmp_path / "a.jsonl").write_text(content + "\n" if content else "")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "r.html")])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "a.jsonl" in error and error.count("\n") == 1


def test_a_comparison_of_an_earlier_version_says_what_to_do(compared, tmp_path, capsys):
    (compared / "report.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(compared), "--out", str(tmp_path / "r.html")])
    assert stop.value.code == 2 and "run the same `genrecal compare` again" in capsys.readouterr().err
