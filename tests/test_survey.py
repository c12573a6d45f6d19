"""The look over the records before a job: what it counts is true, and what it says stops a job stops it."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png
from test_containers import tar

import genrecal.samples.survey as module
from genrecal.cli import main
from genrecal.demo.pipeline import ASSETS
from genrecal.errors import DataError
from genrecal.samples import open_samples
from genrecal.samples.survey import Reasons, Survey, reason_kind, survey


def record(i: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"r{i}",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    } | fields


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """31 records: 16 bad in three ways; of the others five with an image each, one with two, four with fields not read."""
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [record(i, image=f"gone/{i}.png") for i in range(9)]
    lines += [record(i, messages=[{"role": "user", "content": f"q{i}"}]) for i in range(9, 15)]
    lines += [record(15, video="a.mp4")]
    lines += [record(16 + i, image=f"{i}.png") for i in range(5)] + [record(21, images=["5.png", "6.png"])]
    lines += [record(22 + i, notes="x") for i in range(3)] + [record(25, notes="y", more=[1])]
    lines += [record(i) for i in range(26, 31)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "d.jsonl"


def test_what_is_counted(made: Path) -> None:
    found = survey(open_samples([made]))
    assert (found.records, found.surveyed, found.bad, found.with_images, found.images) == (31, 31, 16, 6, 7)
    assert found.unread == {"a field 'notes'": 4, "a field 'more'": 1}
    lines = list(found.lines(0.01))
    assert lines[:4] == [
        "6 of 15 samples have images (7 images)",
        "4 records have a field 'notes', which is not read",
        "1 record has a field 'more', which is not read",
        "16 of 31 records cannot be used, the job will stop at --max-skip 1.00%:",
    ]
    assert lines[4] == f"  9 like {made}:1: image {made.parent}/gone/0.png does not exist"
    assert lines[5].startswith(f"  6 like {made}:10: ") and lines[6].startswith(f"  {made}:16: ") and len(lines) == 7
    assert "the job will stop" not in "".join(found.lines(0.6))
    with pytest.raises(
        DataError, match=r"16 of 31 samples cannot be used, over the limit of 1\.00% \(--max-skip\): 9 like"
    ):
        found.check(0.01)
    found.check(16 / 31)


def test_what_stands_beside_the_list_is_said(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "beside.json"
    path.write_text(json.dumps({"version": 1, "data": [record(0)], "info": {"a": 1}}))
    assert f"{path}: 'version', 'info' beside the list of records is not read" in survey(open_samples([path])).lines()


def test_a_selection_and_a_limit_are_looked_at_alone(made: Path) -> None:
    assert survey(open_samples([made], limit=18)).bad == 16
    assert survey(open_samples([made], limit=18)).records == 18


def many(folder: Path, kind: str, count: int) -> Path:
    """Records of which every tenth is bad and every second has an image."""
    rows = [
        {"question": "q", "answer": "" if i % 10 == 0 else "a", "image": png(i % 7) if i % 2 else None}
        for i in range(count)
    ]
    path = folder / f"many.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    elif kind == "jsonl":
        (folder / "a.png").write_bytes(png(1))
        path.write_text("\n".join(json.dumps(row | {"image": row["image"] and "a.png"}) for row in rows))
    else:
        members = [(f"{i:05d}.json", json.dumps({**row, "image": None})) for i, row in enumerate(rows)]
        images = [(f"{i:05d}.png", png(i % 7)) for i in range(count) if i % 2]
        tar(path, *sorted(members + images))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_of_more_records_some_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = many(tmp_path, kind, 1500)
    whole = survey(open_samples([path]))
    assert (whole.bad, whole.with_images, whole.surveyed) == (150, 750, 1500)
    monkeypatch.setattr(module, "MAX_RECORDS", 550)
    drawn = survey(open_samples([path]))
    assert 200 < drawn.surveyed <= 550 and drawn.records == 1500
    assert drawn.bad / drawn.surveyed == pytest.approx(0.1, abs=0.03)
    assert next(drawn.lines()).endswith(f"(of {drawn.surveyed} of 1500 records, drawn)")
    assert survey(open_samples([path])) == drawn  # another worker says the same


def test_bytes_bound_what_is_read_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path, "parquet", 2000)
    monkeypatch.setattr(module, "MAX_BYTES", path.stat().st_size / 3)
    assert survey(open_samples([path])).surveyed in (256 + 2000 % 256, 512)


def test_only_what_is_certain_stops_a_job() -> None:
    """Of drawn parts, six standard errors of as many draws as parts: bad records often stand together."""
    assert Survey(records=100, surveyed=100, parts=1, bad=2).over(0.01)
    assert not Survey(records=100, surveyed=100, parts=1, bad=1).over(0.01)
    assert not Survey(records=10**6, surveyed=10**5, parts=400, bad=2000).over(0.01)
    assert Survey(records=10**6, surveyed=10**5, parts=400, bad=50_000).over(0.01)
    assert Survey(records=10**6, surveyed=10**5, parts=400, bad=10**5).over(0.01)
    assert not Survey(records=0).over(0.01)


def test_a_survey_that_stops_a_job_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over data whose bad records stand together or apart, it never stops a job that would have finished."""
    monkeypatch.setattr(module, "MAX_RECORDS", 400)
    monkeypatch.setattr(module, "PART_RECORDS", 10)
    rng, stopped = random.Random(0), 0
    for trial in range(20):
        share, together = rng.choice([0.0, 0.005, 0.02, 0.3]), rng.choice([1, 40])
        bad = {start + i for start in range(0, 2000, together) if rng.random() < share for i in range(together)}
        path = tmp_path / f"{trial}.jsonl"
        path.write_text("\n".join("{" if i in bad else json.dumps(record(i)) for i in range(2000)))
        over = survey(open_samples([path])).over(0.01)
        stopped += over
        assert not over or len(bad) > 20
    assert stopped > 2


@pytest.mark.parametrize(("reason", "kind"), [
    ("d.parquet row 7: no assistant turn", "no assistant turn"),
    ("s3://b/d.tar:part/00001: no part/00001.json beside its other members", "no … beside its other members"),
    ("/data/my set.csv:7: a CSV row of 3 cells under a header of 2", "a CSV row of … cells under a header of …"),
])  # fmt: skip
def test_reasons_of_every_container_are_grouped(reason: str, kind: str) -> None:
    assert reason_kind(reason) == kind


def test_reasons_are_grouped_and_counted() -> None:
    reasons = Reasons.of(f"d.jsonl:{i}: image {i}.png does not exist" for i in range(1, 5))
    reasons.add("d.jsonl:9: turn 2: empty answer")
    assert list(reasons.lines()) == ["4 like d.jsonl:1: image 1.png does not exist", "d.jsonl:9: turn 2: empty answer"]
    assert list(reasons.lines(1)) == ["4 like d.jsonl:1: image 1.png does not exist", "1 of 1 other kinds"]


# --------------------------------------------------------------------------------------------------------------- commands


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)


def test_the_job_stops_before_the_teacher_is_loaded(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "no/teacher"  # it would be an error of its own
    assert run("cache", "--teacher", gone, "--data", made, "--out", tmp_path / "c") == 1
    out, err = capfd.readouterr()
    assert out.startswith("6 of 15 samples have images (7 images)\n4 records have a field 'notes', which is not read\n")
    assert "16 of 31 records cannot be used, the job will stop at --max-skip 1.00%" in out
    assert err.startswith(
        "genrecal: error: 16 of 31 samples cannot be used, over the limit of 1.00% (--max-skip): 9 like "
    )
    assert err.count("\n") == 1 and not (tmp_path / "c").exists()
    assert run("cache", "--teacher", gone, "--data", made, "--out", tmp_path / "c", "--max-skip", 0.6) != 0
    assert "no/teacher" in capfd.readouterr().err


def test_plan_says_the_same_and_its_status_too(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--teacher", ASSETS / "teacher", "--data", made) == 1
    assert capfd.readouterr().out.startswith("6 of 15 samples have images (7 images)\n")
    assert run("plan", "--teacher", ASSETS / "teacher", "--data", made, "--max-skip", 0.6) == 0
    capfd.readouterr()
    assert run("plan", "--teacher", ASSETS / "teacher", "--data", made, "--json") == 1
    content = json.loads(capfd.readouterr().out)
    assert content["survey"]["images"] == 7 and content["survey"]["unread"] == {
        "a field 'notes'": 4,
        "a field 'more'": 1,
    }


def test_plan_counts_what_only_rendering_shows(made: Path, tmp_path: Path) -> None:
    """An image that is none is a bad record that no survey sees."""
    (tmp_path / "0.png").write_bytes(b"no image")
    rest = made.read_text().splitlines()[16:]
    (tmp_path / "rest.jsonl").write_text("\n".join(rest))
    assert not survey(open_samples([tmp_path / "rest.jsonl"])).bad
    assert run("plan", "--teacher", ASSETS / "teacher", "--data", tmp_path / "rest.jsonl") == 1
    assert run("plan", "--teacher", ASSETS / "teacher", "--data", tmp_path / "rest.jsonl", "--max-skip", 0.1) == 0


def test_cache_and_inspect_begin_with_the_images(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["cache", "--teacher", ASSETS / "teacher", "--data", made, "--out", tmp_path / "c", "--max-skip", 0.6]
    assert run(*arguments, "--device", "cpu") == 0
    out = capfd.readouterr().out
    assert out.startswith("6 of 15 samples have images (7 images)\n")
    assert out.count("gone/0.png does not exist") == 1  # by the survey, and not again at the end
    assert "15 samples cached, 16 skipped" in out
    assert run("inspect", tmp_path / "c") == 0
    assert capfd.readouterr().out.split("\n")[0].split() == "images 6 of 15 samples have images (7 images)".split()
