"""Similarity matrices and t-SNE in the report: the numbers of the snapshots, and what follows from made ones."""

import sys

import numpy as np
import pytest
from html_page import Page, assert_harmless
from made_run import made_snapshot, write_run

from genrecal.cli import main
from genrecal.report.alignment import matrices, neighbour_shares, scatter
from genrecal.report.run_figures import read_run
from genrecal.report.run_page import write_run_report


def test_page_of_two_runs(tmp_path):
    snapshots = {}
    for number, (name, weight) in enumerate((("with", 1.0), ("without", 0.0))):
        write_run(tmp_path / name, config={"loss": {"reg_weight": weight}})
        snapshots[name] = [made_snapshot(1, "start", seed=number), made_snapshot(1, "end", seed=number + 5)]
        for snapshot in snapshots[name]:
            snapshot.write(tmp_path / name)
    runs = [tmp_path / name for name in snapshots]
    write_run_report(runs, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert_harmless(page)
    head, *rows = page.tables["Similarity in numbers"]
    assert len(rows) == 2 * 2 * 2 * 3
    for run, weight, moment, answer, over, *numbers in rows:
        snapshot = snapshots[run][moment == "end of stage 1"]
        pairing = {"student's answer": "own", "teacher's answer": "splice"}[answer]
        cosines = snapshot.similarity[f"{pairing}.{over.split()[0]}"]
        on = np.diag(cosines).mean()
        off = cosines[~np.eye(4, dtype=bool)].mean()
        assert [float(n) for n in numbers] == pytest.approx([on, off, on - off], abs=1.1e-3)
        assert weight == {"with": "1.0", "without": "0.0"}[run]
    name = "without, start of stage 1, answer tokens, The student's own question and answer against the teacher's"
    matrix = [[float(cell) for cell in row[1:]] for row in page.tables[name][1:]]
    np.testing.assert_allclose(matrix, snapshots["without"][0].similarity["own.answer"], atol=6e-4)
    samples = page.tables["Samples that are compared"][1:]
    assert [row[1] for row in samples] == ["k0", "k1", "k2", "k3"] and samples[1][2] == "(no category)"
    near = {tuple(row[1:3]): row[3:] for row in page.tables["Neighbours in numbers"][1:] if row[0] == "with"}
    assert near["end of stage 1", "student after"] == ["0%", "-", "0%", "100%"]
    alone = page.tables["Teacher and student alone, in numbers"][1]
    assert alone == ["with", "start of stage 1", "student", "2.5", "3.5", "-", "64"]
    assert any("teacher alone: 0.25" in alt for alt in page.charts if alt.startswith("later tokens"))
    assert any("student alone: 3.5" in alt for alt in page.charts if alt.startswith("first tokens"))


def test_cells_are_on_one_scale(tmp_path):
    write_run(tmp_path / "a")
    for snapshot in (made_snapshot(1, "start"), made_snapshot(2, "end", seed=3)):
        snapshot.write(tmp_path / "a")
    runs = [read_run(tmp_path / "a", "a")]
    drawn, low, high = matrices(runs, "splice", "all")
    whole = np.stack([s.similarity["splice.all"] for s in runs[0].snapshots])
    assert (low, high) == pytest.approx((whole.min(), whole.max()))
    shares = np.array([[[share for *_, share, _ in row] for row in matrix["cells"]] for matrix in drawn])
    np.testing.assert_allclose(shares, (whole - low) / (high - low), atol=1e-3)
    cells = drawn[0]["cells"]
    assert (cells[2][1][0] - cells[2][0][0], cells[1][0][1] - cells[0][0][1]) == (
        30,
        30,
    )


def test_tsne_keeps_clouds_apart_and_is_the_same_every_time():
    snapshot = made_snapshot()
    drawn = scatter(snapshot)
    assert drawn == scatter(snapshot)
    places = {group: np.array([place[:2] for place in places]) for group, places in drawn["groups"].items()}
    centres = {group: value.mean(0) for group, value in places.items()}

    def apart(one, other):
        return np.linalg.norm(centres[one] - centres[other])

    assert apart("student after", "teacher after") < 0.5 * apart("student after", "student before")
    assert apart("student after", "teacher after") < 0.5 * apart("student after", "teacher before")
    every = np.concatenate(list(places.values()))
    assert every.min() >= 0 and (every.max(0) <= (360, 210)).all()
    assert [place[2] for place in drawn["groups"]["teacher before"]] == [True, False] * 6
    assert neighbour_shares(snapshot)["student after"]["teacher after"] == 1


def test_without_scikit_learn_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a")
    made_snapshot().write(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and 'pip install "genrecal[report]"' in error
    assert not (tmp_path / "r.html").exists()
