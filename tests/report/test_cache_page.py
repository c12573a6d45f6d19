"""The page of a cache: what it says against what the cache holds, and no harm from texts and images of strangers."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import conversation, mixed_samples, png, write_llava
from html_page import HOSTILE, Page, assert_harmless
from PIL import Image

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.inspect import describe_record, summarize
from genrecal.inspect.record import ImageDescription
from genrecal.report import cache_page
from genrecal.report.cache_page import _image
from genrecal.report.page import ORIGINAL_BYTES
from genrecal.samples import open_samples
from genrecal.shards.reader import open_cache

EVIL = HOSTILE.replace("\ud800", "").replace("\x00", "\x1b[2J")


@pytest.fixture(scope="module")
def path(teacher, tmp_path_factory):
    """Ten samples, the first of them hostile in every text, and a record that is skipped with a hostile reason."""
    folder = tmp_path_factory.mktemp("cache-page")
    samples = [conversation((EVIL, EVIL), images={0: 1}), *mixed_samples(9)]
    data = write_llava(folder / "data", samples)

    records = json.loads(data.read_text())
    records[0] |= {"category": EVIL, "source": EVIL, "id": EVIL}
    answered = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    records.append({"id": "gone", "image": "<script>alert(1)</script>.png", "conversations": answered})
    data.write_text(json.dumps(records))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=4, max_skip=0.5))
    return folder / "c"


@pytest.fixture(scope="module")
def page(path):
    assert main_status("inspect", path, "--html", path.parent / "c.html") == 0
    return Page(path.parent / "c.html")


def main_status(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def visible(text):
    return text.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")


def test_nothing_of_the_data_acts(page):
    assert_harmless(page)
    assert visible(EVIL) in page.text and "<script>alert(1)</script>" in page.text
    assert {row[0] for row in page.tables["Categories"]} >= {visible(EVIL), "test"}
    (reason,) = page.tables["Skipped samples by reason"][1:]
    assert reason[1] == "1" and "<script>alert(1)</script>" in reason[2]


def test_summary_is_the_caches(page, path):
    summary = summarize(open_cache(path))
    for title, counts in (("Categories", summary.categories), ("Sources", summary.sources)):
        rows = page.tables[title][1:]
        assert {visible(name): str(count) for name, count in counts.items()} == {row[0]: row[1] for row in rows}
    for title, name in (
        ("Question tokens of a sample", "question_tokens"),
        ("Answer tokens of a sample", "answer_tokens"),
    ):
        assert sum(int(row[1]) for row in page.tables[title][1:]) == summary.cached == 10
        (lengths,) = [row for row in page.tables["Quantiles of lengths"] if row[0] == name.replace("_", " ")]
        assert [int(cell) for cell in lengths[1:]] == list(summary.token_quantiles[name].values())
    assert [row[:2] for row in page.tables["What the codecs cost"][1:]] == [["answer", "int8"], ["question", "int4"]]
    assert float(page.tables["What the codecs cost"][2][3]) == pytest.approx(
        summary.fidelity["question"].kl_mean, rel=0.1
    )
    widths = [float(given["width"]) for tag, given in page.tags if tag == "rect" and "x" not in given]
    assert max(widths) == 100 and min(widths) >= 0


def test_records_are_the_caches(page, path):
    """Every token with its probability and alternatives; the images byte for byte."""
    cache = open_cache(path)
    shown = re.findall(r"Record \d of 8 shown: (\S+)", page.text)
    assert shown == [cache[int(place)].key for place in np.argsort(cache.column("log_prob"), kind="stable")[:8]]
    images = [base64.b64decode(given["src"].split(",")[1]) for tag, given in page.tags if tag == "img"]
    assert images == [data for key in shown for data in cache.by_key(key).images] and len(images) > 4
    for key in shown:
        described = describe_record(cache.by_key(key))
        rows = [
            row
            for name, table in page.tables.items()
            if name.startswith(f"Tokens of record {key}")
            for row in table[1:]
        ]
        assert [float(row[1]) for row in rows] == pytest.approx(
            [t.probability for t in described.tokens], rel=0.6, abs=1e-4
        )
        assert [row[2] for row in rows] == [str(t.rank or f">{described.top_k}") for t in described.tokens]
        for row, token in zip(rows, described.tokens, strict=True):
            assert row[4].count("  ") >= len(token.alternatives) - 1 == 4
            assert (token.end_of_turn and row[0].startswith("end of turn")) or row[0].startswith('"')
    doubts = [float(given["style"].split()[-1]) for tag, given in page.tags if given.get("class") == "token"]
    assert len(doubts) == sum(len(describe_record(cache.by_key(key)).tokens) for key in shown)
    assert doubts[0] == pytest.approx(1 - describe_record(cache.by_key(shown[0])).tokens[0].probability, abs=1e-3)


def test_one_record_and_bounds(path, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_page, "TOKENS", 3)
    monkeypatch.setattr(cache_page, "PAGE_BYTES", 300)
    key = open_cache(path)[0].key
    assert main_status("inspect", path, "--key", key, "--html", tmp_path / "c.html") == 0
    page = Page(tmp_path / "c.html")
    assert re.findall(r"Record \d of 1 shown: (\S+)", page.text) == [key]
    assert len(page.tables[f"Tokens of record {key}, message 2"]) == 4
    assert re.search(r"And \d+ more tokens", page.text)
    assert "not shown, the page is large enough" in page.text and not [tag for tag, _ in page.tags if tag == "img"]


def test_a_damaged_record_is_named_and_the_others_stand(path, tmp_path):

    copy = shutil.copytree(path, tmp_path / "c")
    tar = copy / "samples/00001.tar"
    data = bytearray(tar.read_bytes())
    data[1000:-2000] = b"\x00" * (len(data) - 3000)
    tar.write_bytes(data)
    assert main_status("inspect", copy, "--html", tmp_path / "c.html") == 0
    page = Page(tmp_path / "c.html")
    assert page.text.count("It cannot be read:") >= 2 and page.text.count("Token by token") >= 6


@pytest.mark.parametrize("words", [["--json"], ["--sql", "select 1"], ["--key", "x", "--save-images", "y"]])
def test_html_alone(path, tmp_path, capsys, words):
    assert main_status("inspect", path, "--html", tmp_path / "c.html", *words) == 2
    assert "--html: expected no --sql, --least-likely, --json or --save-images" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def image(data, **facts):
    return _image(ImageDescription(index=0, member="k.0.png", bytes=len(data), **facts), data, 10**7)


def test_images_that_are_large_or_of_other_kinds_are_made_small():
    stream = io.BytesIO()
    Image.effect_noise((1500, 900), 80).save(stream, "PNG")
    large = stream.getvalue()
    assert len(large) > ORIGINAL_BYTES
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(stream, "BMP")
    for data, facts, size in (
        (large, {"format": "PNG", "width": 1500, "height": 900}, (1024, 614)),
        (stream.getvalue(), {"format": "BMP", "width": 40, "height": 30}, (40, 30)),
    ):
        found = image(data, **facts)
        caption, _, uri = found
        assert uri.startswith("data:image/jpeg;base64,") and "shown smaller" in caption
        assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == size
    small = png()
    found = image(small, format="PNG", width=90, height=60)
    assert found[2] == "data:image/png;base64," + base64.b64encode(small).decode()
    bomb = image(small, format="PNG", width=90_000, height=90_000)  # the header's word; what it holds is decoded anew
    assert bomb[2].startswith("data:image/jpeg")
    assert image(b"<svg onload='alert(1)'/>", problem="cannot identify image file")[2] is None
