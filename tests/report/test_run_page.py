"""The page of runs: its figures against the metrics they are of, and what may stand in a run's folder without harm."""

import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import mixed_samples, write_llava
from html_page import HOSTILE, Page, assert_harmless
from made_run import write_run

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.errors import UsageError
from genrecal.report.chart import HEIGHT, LEFT, RIGHT, WIDTH, Line, panel, round_step, thinned
from genrecal.report.run_figures import path_names
from genrecal.report.run_page import write_run_report
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache
from genrecal.train.config import load_config
from genrecal.train.logs import read_evaluations, read_metrics
from genrecal.train.loop import train
from genrecal.train.run import Run

# ------------------------------------------------------------------------------------------------------------ geometry


def values_of(drawn, number=0):
    """A drawn line's values, read back through the labels of the axis."""
    (at, low), (at_2, high) = [(place, float(label)) for place, label in (drawn.y_ticks[0], drawn.y_ticks[-1])]
    ys = [float(pair.split()[1]) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", drawn.paths[number].data)]
    if drawn.is_log:
        low, high = math.log10(low), math.log10(high)
    values = low + (np.array(ys) - at) / (at_2 - at) * (high - low)
    return 10**values if drawn.is_log else values


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_a_curve_is_where_the_axis_says(scale):
    ys = scale * np.array([3.2, 1.1, 0.7, 2.5])
    drawn = panel("t", [Line(label="a", xs=[0, 1, 2, 3], ys=ys)], x_label="step")
    assert not drawn.is_log and np.allclose(values_of(drawn), ys, atol=0.02 * scale)
    assert drawn.y_ticks[0] == (HEIGHT - 34, "0") and len(drawn.y_ticks) >= 3
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn.paths[0].data)]
    assert np.allclose(xs, np.linspace(LEFT, WIDTH - RIGHT, 4), atol=0.1)
    assert drawn.alt == f"t. a: {ys[0]:.4g} to {ys[-1]:.4g}."


def test_falling_over_decades_is_drawn_logarithmically():
    ys = np.geomspace(8, 0.003, 20)
    own = Line(label="own", xs=[0], ys=[0.5], reference=True)
    drawn = panel("t", [Line(label="a", xs=range(20), ys=ys), own], x_label="step")
    assert drawn.is_log and np.allclose(values_of(drawn), ys, rtol=0.02)
    assert values_of(drawn, 1) == pytest.approx(0.5, rel=0.02) and drawn.paths[1].data.endswith(f"H{WIDTH - RIGHT}")


def test_odd_curves():
    assert panel("t", [Line(label="a", xs=[0, 1], ys=[math.nan, math.inf])], x_label="") is None
    gap = panel("t", [Line(label="a", xs=range(4), ys=[1, math.nan, -2, 3])], x_label="")
    assert gap.paths[0].data.count("M") == 2 and np.allclose(values_of(gap), [1, -2, 3], atol=0.05)
    one = panel("t", [Line(label="a", xs=[7], ys=[0.0])], x_label="")
    assert len(one.paths[0].dots) == 1
    assert [round_step(v) for v in (0.9, 1.2, 2.1, 4, 6, 0.03)] == [1, 2, 2.5, 5, 10, 0.05]


def test_long_curves_are_means_of_equal_pieces():
    xs, ys = thinned(range(1600), [float(i) for i in range(1600)], 160)
    assert len(xs) == 160 and xs[0] == ys[0] == 4.5 and np.allclose(np.diff(ys), 10, atol=1)
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


# ---------------------------------------------------------------------------------------------------------------- pages


def test_figures_are_the_metrics(tmp_path):
    lines = write_run(tmp_path / "mine")
    other = write_run(tmp_path / "other", steps=(20, 30))
    write_run_report([tmp_path / "mine", tmp_path / "other"], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert_harmless(page)
    for stage in (1, 2, 3):
        head, *rows = page.tables[f"Stage {stage} in numbers"]
        assert head == ["run", "term", "first tenth", "last tenth", "least", "steps"]
        for run, term, first, last, least, count in rows:
            values = [line[term] for line in {"mine": lines, "other": other}[run] if line["stage"] == stage]
            some = len(values) // 10
            expected = [np.mean(values[:some]), np.mean(values[-some:]), min(values)]
            assert [float(first), float(last), float(least)] == pytest.approx(expected, rel=1e-3)
            assert int(count) == len(values)
        shown = {row[1] for row in rows}
        assert {1: "reg_kl_later", 2: "kl_first", 3: "sft_later"}[stage] in shown and "loss" in shown
    (alt,) = [alt for alt in page.charts if alt.startswith("first tokens") and "other, teacher's question" in alt][:1]
    ends = [line["reg_ce_first"] for line in other if line["stage"] == 1]
    assert f"other, teacher's question: {ends[0]:.4g} to {ends[-1]:.4g}" in alt
    assert not any("teacher alone" in alt for alt in page.charts)  # these folders do not say what the cache was
    assert "Of the cache of mine, other" in " ".join(page.text.split())


@pytest.mark.parametrize(
    "paths, names",
    [
        (["mine"], ["mine"]),
        (["runs/SFT/seed0", "runs/GenRecal/seed0"], ["SFT", "GenRecal"]),
        (["a/x/seed0", "a/y/seed0", "b/x/seed0"], ["a/x", "a/y", "b/x"]),
        (["a/seed0", "a/seed1", "b/seed0"], ["a/seed0", "a/seed1", "b/seed0"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(paths, names):
    assert path_names([Path(path) for path in paths]) == names


def test_a_run_given_twice(tmp_path):
    with pytest.raises(UsageError, match="mine: given twice"):
        path_names([tmp_path / "mine", tmp_path / "other", tmp_path / "other/../mine"])


def test_accuracy_is_shown_at_each_measured_share(tmp_path):
    write_run(tmp_path / "mine")
    write_run_report([tmp_path / "mine"], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    rows = page.tables["Accuracy in numbers"][1:]
    assert len(rows) == 11 * 3
    assert rows[3] == ["mine", "2", "20%", "all questions", "30", "44.0% ± 5.0%", "2.8 ± -"]
    assert {row[3] for row in rows} == {"all questions", "numbers", "(no category)"}
    assert any(alt == "numbers. mine: 20.0% to 80.0%." for alt in page.charts)


def test_cost_with_lines_left_out(tmp_path):
    """`log_every` 4: a line stands for the steps between it and the next too."""
    write_run(tmp_path / "mine", teacher="live:T")
    lines = read_metrics(tmp_path / "mine")
    kept = [line for line in lines if line["step"] % 4 == 0 or line["step"] == 39]
    (tmp_path / "mine/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    write_run_report([tmp_path / "mine"], tmp_path / "r.html")
    cost = {row[0]: row[1] for row in Page(tmp_path / "r.html").tables["Cost"][1:]}
    assert cost["stage 1: samples seen"] == "240" and cost["teacher passes of this run"] == "480"
    assert float(cost["stage 2: hours"]) == pytest.approx(20 / 3600, rel=1e-2)
    assert float(cost["hours of all processes"]) == pytest.approx(120 / 3600, rel=1e-2)
    assert cost["stage 3: peak memory, GB"] == "1.39" and cost["stage 3: waiting for data"] == "10.0%"
    assert cost["stage 3: student tokens per second"] == "1,200"


def test_a_hostile_run_is_shown_as_text(tmp_path):
    """Names, settings and categories from anywhere: text as it is, and no tag, address or template of theirs."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    lines = write_run(folder, category=HOSTILE, student=HOSTILE, caches=[HOSTILE], teacher="live:" + HOSTILE)
    lines[0] |= {"ce": "1e999</svg>", "kl": None, "loss": math.nan, "lr": [1], "memory_gb": True, "seconds": 10**400}
    odd = ["[]", '{"stage": 9, "step": 0}', '{"stage": 1, "step": "0"}', '{"stage": [1], "step": 0}']
    odd += ['{"stage": 2, "step": 1, "evaluation": {"done": "x", "overall": 3, "by_category": {"a": null}}}']
    text = (folder / "metrics.jsonl").read_text().splitlines()[len(lines) : -1]
    (folder / "metrics.jsonl").write_text("".join(s + "\n" for s in [*odd, *map(json.dumps, lines), *text]))
    (folder / "cache-facts.json").write_text(json.dumps({"bytes": "many", "log_prob": "</script>", "samples": []}))
    write_run_report([folder], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert_harmless(page)
    visible = HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    compared = {row[0]: row[1] for row in page.tables["Runs side by side"]}
    assert compared["student"] == visible and compared["its states from"] == "live:" + visible
    assert compared["caches"] == visible
    assert {row[3] for row in page.tables["Accuracy in numbers"][1:]} >= {visible, "all questions"}
    for svg in re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text(), flags=re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text("{}")
    for path, words in ((tmp_path / "gone", "not a run"), (tmp_path / "begun", "no step yet")):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(path), "--out", str(tmp_path / "r.html")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    write_run(tmp_path / "mine")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "mine"), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "cannot be written" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def real(tiny, teacher, tmp_path_factory):
    """A cache of twelve samples, and a run of a few steps in every stage, evaluated as it goes."""
    folder = tmp_path_factory.mktemp("report")
    data = write_llava(folder / "d", mixed_samples(12))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8))
    small = "batch_size=6 accumulation=1 max_steps=3 epochs=9 lr=1e-3".split()
    asked = [f'evaluate.data=["{write_llava(folder / "e", mixed_samples(4))}"]', "evaluate.max_new_tokens=2"]
    settings = ["data.workers=0", *asked, *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in small)]
    run = Run(
        path=folder / "r",
        config=load_config(None, settings),
        student=str(tiny("qwen2_vl")),
        caches=(str(folder / "c"),),
    )
    train(run)
    return run


def test_a_real_run(real, tmp_path):
    assert main_ok("report", real.path, "--out", tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert_harmless(page)
    cache = open_cache(real.caches[0])
    tokens = cache.column("answer_tokens")
    own = -float((cache.column("log_prob") * tokens).sum() / tokens.sum())
    assert any(f"teacher alone: {own:.4g}" in alt for alt in page.charts)
    cost = {row[0]: row[1] for row in page.tables["Cost"][1:]}
    assert cost["teacher passes of this run"] == "0"
    assert cost["teacher passes of the cache, once for all its runs"] == "12"
    assert cost["teacher passes with the teacher beside the student"] == "36"
    tars = sum(path.stat().st_size for path in (real.path.parent / "c/questions").iterdir())
    assert cost["cache: bytes of question states"] == f"{tars / 1000:.2f} kB"
    assert {row[0]: row[1] for row in page.tables["Runs side by side"]}["caches"] == str(real.path.parent / "c")
    rows = page.tables["Accuracy in numbers"][1:]
    assert len(rows) == len(read_evaluations(real.path)) == 7


def main_ok(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code in (0, None)
