"""`genrecal demo` as a user runs it: its table is what its predictions say."""

import json
import re
import subprocess
import sys

import pytest

from genrecal.shards.reader import open_cache


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "genrecal.cli", "demo", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = (out / "report.md").read_text()
    names = {"teacher": "teacher", "student before": "student-before", "student after SFT": "student-after-SFT",
             "student after GenRecal": "student-after-GenRecal"}  # fmt: skip
    accuracy = {}
    for name, file in names.items():
        lines = [json.loads(line) for line in (out / "predictions" / f"{file}.jsonl").read_text().splitlines()]
        accuracy[name] = sum(line["score"] for line in lines) / len(lines)
        shown = re.search(rf"\| {name} +\| ([\d.]+)% ± ", report)
        assert shown and abs(float(shown[1]) / 100 - accuracy[name]) < 6e-4
        assert shown[0] in done.stdout
        assert {line["category"] for line in lines} == {"Knowledge", "Science & Math", "Chart & Document"}
    assert accuracy["teacher"] > 0.8  # it sees the pixels
    assert accuracy["student after GenRecal"] > accuracy["student before"] + 0.05
    assert accuracy["student after SFT"] > accuracy["student before"] + 0.05
    assert open_cache(out / "cache").is_complete
    for path in re.findall(r"(?:cache|report) (\S+)", done.stdout):
        assert (tmp_path / path).exists() or path == "and"
