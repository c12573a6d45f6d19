"""`genrecal demo` as a user runs it: its table is what its predictions say."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genrecal.shards.reader import open_cache

STUDENTS = {
    "SFT": "SFT",
    "GenRecal": "GenRecal",
    "byte-kl alone": "byte-kl-alone",
    "SFT on the teacher's answers": "SFT-on-the-teacher-s-answers",
    "byte-kl on the teacher's answers": "byte-kl-on-the-teacher-s-answers",
}


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run([sys.executable, "-m", "genrecal", "demo", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (out / "report.md").read_text()
    files = {"teacher": "predictions/teacher.jsonl", "student before": "predictions/student-before.jsonl"}
    files |= {name: f"compared/predictions/{folder}/seed0.jsonl" for name, folder in STUDENTS.items()}
    accuracy, scores = {}, {}
    for name, file in files.items():
        lines = [json.loads(line) for line in (out / file).read_text().splitlines()]
        scores[name] = {(line["key"], line["turn"]): line["score"] for line in lines}
        accuracy[name] = sum(scores[name].values()) / len(lines)
        shown = re.search(rf"\| {name} +\| ([\d.]+)% ± [\d.]+% \| ([+-][\d.]+|)", report)
        assert shown and abs(float(shown[1]) / 100 - accuracy[name]) < 6e-4
        if name in list(STUDENTS)[1:]:
            assert abs(float(shown[2]) / 100 - (accuracy[name] - accuracy["SFT"])) < 6e-4
        assert shown[0] in done.stdout
        assert {line["category"] for line in lines} == {"Knowledge", "Science & Math", "Chart & Document"}
    assert all(found.keys() == scores["teacher"].keys() for found in scores.values())
    assert accuracy["teacher"] > 0.8  # it sees the pixels
    assert accuracy["SFT on the teacher's answers"] > accuracy["SFT"] + 0.01  # three in ten given ones are wrong
    assert accuracy["SFT on the teacher's answers"] > accuracy["student before"] + 0.05
    assert accuracy["byte-kl alone"] > accuracy["SFT"] + 0.01  # it reads the teacher, not the wrong answers
    given, own = (open_cache(out / name) for name in ("cache", "cache-own"))
    assert given.is_complete and own.is_complete
    same = [a.sample.answers == b.sample.answers for a, b in zip(given, own, strict=False) if a.key == b.key]
    assert 0.5 < sum(same) / len(same) < 0.8  # a conversation has 1.4 answers
    for path in re.findall(
        r"^(?:cache|report|students|page of the \w+) (\S+?)(?:,.*)?$", done.stdout, flags=re.MULTILINE
    ):
        assert Path(path).exists()
    assert {path.name for path in out.glob("*.html")} == {"report.html", "cache.html"}
    page = html.unescape((out / "report.html").read_text())
    best = max(list(STUDENTS)[1:], key=accuracy.get)
    assert f"{best} answers {accuracy[best]:.1%}" in page and f"the teacher answers {accuracy['teacher']:.1%}" in page
    assert all(name in page for name in STUDENTS) and "seed0" not in page.split("</title>")[0]
    assert page.count('<img src="data:image/png') >= 8
