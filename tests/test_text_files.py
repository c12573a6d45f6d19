"""JSON and CSV as people write them: every way gives the same samples, and what cannot be read is refused by name."""

import bz2
import csv
import gzip
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import png

from genrecal.errors import DataError
from genrecal.samples import BadRecord, Sample, open_samples

RECORDS: list[dict[str, Any]] = [
    {
        "id": f"r{i}",
        "image": "a.png" if i % 2 else None,
        "conversations": [
            {"from": "human", "value": f'<image>\n"{i}", 中文🙂\t[{{' if i % 2 else f"{i} \\ ]}}, ,"},
            {"from": "gpt", "value": "a" * i or "none"},
        ],
    }
    for i in range(7)
]


def lines(**options: Any) -> str:
    return "\n".join(json.dumps(record, **options) for record in RECORDS) + "\n"


def pretty(records: Any, **options: Any) -> str:
    return json.dumps(records, indent=2, ensure_ascii=False, **options)


WRITTEN: dict[str, tuple[str, str | bytes]] = {
    "lines": ("d.jsonl", lines()),
    "lines, another suffix": ("d.ndjson", lines(ensure_ascii=False)),
    "lines named json": ("d.json", lines()),
    "lines, upper case": ("D.JSONL", lines()),
    "lines of windows": ("d.jsonl", lines().replace("\n", "\r\n")),
    "lines with blank ones": ("d.jsonl", "\n\n" + lines().replace("\n", "\n \n\t\n")),
    "lines without the last line's end": ("d.jsonl", lines().rstrip()),
    "lines with a byte order mark": ("d.jsonl", "\ufeff" + lines()),
    "an array": ("d.json", json.dumps(RECORDS)),
    "an array over lines": ("d.json", pretty(RECORDS)),
    "an array of windows with a byte order mark": ("d.JSON", "\ufeff" + pretty(RECORDS).replace("\n", "\r\n") + "\r\n"),
    "an array named jsonl": ("d.jsonl", pretty(RECORDS)),
    "an array in one line named jsonl": ("d.jsonl", json.dumps(RECORDS)),
    "an array, one record a line": ("d.json", "[\n" + lines().rstrip().replace("}\n{", "},\n{") + "\n]"),
    "records over lines": ("d.json", "\n".join(pretty(record) for record in RECORDS)),
    "records over lines named jsonl": ("d.jsonl", "\n".join(pretty(record) for record in RECORDS)),
    "records without anything between": ("d.jsonl", "".join(map(json.dumps, RECORDS))),
    "a list in an object": ("d.json", json.dumps({"data": RECORDS})),
    "a list in an object, over lines": ("d.json", pretty({"version": "1.0", "data": RECORDS, "info": {"a": [1]}})),
    "gzip": ("d.jsonl.gz", gzip.compress(lines().encode())),
    "gzip of an array": ("d.json.GZ", gzip.compress(pretty(RECORDS).encode())),
    "two gzips": ("d.jsonl.gz", b"".join(gzip.compress(line.encode()) for line in lines().splitlines(True))),
    "zstd": ("d.jsonl.zst", zstandard.compress(lines().encode())),
    "bzip2": ("d.json.bz2", bz2.compress(pretty(RECORDS).encode())),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png(1))
    return tmp_path


def opened(folder: Path, name: str, content: str | bytes) -> Any:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return open_samples([folder / name])


def content_of(sample: Sample | BadRecord) -> Any:
    assert isinstance(sample, Sample), sample.reason
    return sample.key, sample.to_json(), [image.read() for image in sample.images]


@pytest.mark.parametrize(("name", "content"), WRITTEN.values(), ids=WRITTEN.keys())
def test_every_way_to_write_json_gives_the_same_samples(folder: Path, name: str, content: str | bytes) -> None:
    expected = [content_of(sample) for sample in opened(folder, "expected.jsonl", lines())]
    assert [key for key, *_ in expected] == [f"0000000{i}-r{i}" for i in range(7)]
    samples = opened(folder, name, content)
    assert [content_of(sample) for sample in samples] == expected
    order = random.Random(name).choices(range(7), k=40)
    with ThreadPoolExecutor(4) as pool:
        assert [content_of(sample) for sample in pool.map(samples.__getitem__, order)] == [expected[i] for i in order]


def test_a_record_is_located_by_its_first_line(folder: Path) -> None:
    for name, content in (("d.json", pretty(RECORDS)), ("e.json", pretty({"v": 1, "data": RECORDS}))):
        found = [sample.location for sample in opened(folder, name, content)]
        starts = [
            i
            for i, line in enumerate(content.splitlines(), 1)
            if line.strip() == "{" and '"id"' in content.splitlines()[i]
        ]
        assert found == [f"{folder / name}:{line}" for line in starts] and len(found) == 7


def test_fields_beside_the_list_are_named(folder: Path) -> None:
    samples = opened(folder, "d.json", pretty({"version": "1.0", "data": RECORDS, "info": {"a": [1]}}))
    assert samples.files[0].unread == ("version", "info")
    assert opened(folder, "e.json", pretty(RECORDS)).files[0].unread == ()
    [bad] = opened(folder, "f.json", pretty({"columns": ["question", "answer"], "data": [["q", "a"]]}))
    assert isinstance(bad, BadRecord) and "its fields are 'columns, data'" in bad.reason


def test_lines_that_are_lists_are_lines(folder: Path) -> None:
    """A record of another shape is refused as that record, in its line."""
    content = "\n".join(json.dumps(record["conversations"]) for record in RECORDS)
    for text in (content, "[broken\n" + content):
        assert [sample.location.rpartition(":")[2] for sample in opened(folder, "d.jsonl", text)] == [
            str(i) for i in range(1, len(text.splitlines()) + 1)
        ]


def test_bytes_that_are_not_utf8_cost_only_their_record(folder: Path) -> None:
    """As JSON lines and as an array: a file saved as Latin-1 here and there."""
    for text in (lines(ensure_ascii=False), pretty(RECORDS)):
        samples = opened(folder, "d.json", text.encode().replace(b'"r2"', b'"r\xe92"'))
        assert [i for i, sample in enumerate(samples) if isinstance(sample, BadRecord)] == [2]
        assert "utf-8" in samples[2].reason


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "utf-16": ("d.jsonl", lines().encode("utf-16"), r"d\.jsonl: expected UTF-8 text, got UTF-16 or UTF-32; `iconv"),
    "utf-16 without a mark": ("d.json", lines().encode("utf-16-be"), "expected UTF-8 text, got UTF-16"),
    "utf-32": ("d.csv", "question,answer\nq,a\n".encode("utf-32"), "expected UTF-8 text, got UTF-16 or UTF-32"),
    "utf-16 csv": ("d.csv", "question,answer\nq,a\n".encode("utf-16"), "expected UTF-8 text, got UTF-16"),
    "an array never closed": ("d.json", pretty(RECORDS)[:-2], r"d\.json:\d+: the JSON array breaks off in record 8"),
    "an array of broken values": ("d.json", "[\n{},\n{oops}]", r"d\.json:3: the JSON array breaks off in record 2"),
    "text after an array": ("d.json", pretty(RECORDS) + "\n{}", "nothing after the JSON array's end, got '{'"),
    "an empty array": ("d.json", "[ ]", "no records"),
    "no zstd": ("d.jsonl.zst", lines(), "not a whole zstd file"),
    "gzip cut": ("d.jsonl.gz", gzip.compress(lines().encode())[:-20], "d.jsonl.gz: not a whole gzip file: Truncated"),
    "no gzip": ("d.jsonl.gz", lines(), "not a whole gzip file: .*; copy or download it again"),
    "gzip with something after it": ("d.jsonl.gz", gzip.compress(lines().encode()) + b"x" * 99, "not a whole gzip file"),
    "gzip spoiled": (
        "d.jsonl.gz",
        (lambda data: data[:90] + bytes([data[90] ^ 255]) + data[91:])(gzip.compress(lines().encode())),
        "not a whole gzip file",
    ),
    "a compressed tar": ("d.tar.gz", b"", "a compressed tar"),
    "another compression": ("d.jsonl.xz", b"", "expected one of .json, .jsonl"),
    "a csv with an open quote": ("d.csv", 'question,answer\nq,a\nq,"a\nq,a\n', r"csv:3: no CSV from here on: unexpected end"),
    "a csv with a quote inside": ("d.csv", 'question,answer\n"q" x,a\n', r"d\.csv:2: no CSV from here on: ',' expected"),
    "two columns of one name": ("d.csv", "question,answer,answer\nq,a,b\n", "two columns of one name: question, ans"),
    "a csv of a header alone": ("d.csv", "question,answer\n", "no records in"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_whole_or_not_text_is_refused_in_one_line(
    folder: Path, name: str, content: str | bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        opened(folder, name, content)
    assert "\n" not in str(raised.value)


def test_the_advice_on_utf16_works(folder: Path) -> None:
    text = lines().encode("utf-16").decode("utf-16").encode()  # what iconv does
    assert len(opened(folder, "d.jsonl", text)) == 7


def test_no_room_to_unpack_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder / "gone"))
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: cannot be unpacked into .*gone: No such file.*; set TMPDIR"):
        opened(folder, "d.jsonl.gz", gzip.compress(lines().encode()))


# -------------------------------------------------------------------------------------------------------------------- CSV

ROWS = [
    {"id": "1", "conversations": json.dumps(RECORDS[1]["conversations"]), "image": "a.png", "note": ""},
    {"id": "2", "conversations": json.dumps(RECORDS[2]["conversations"]), "image": "", "note": 'two\nlines, and "quotes"'},
    {"id": "3", "conversations": json.dumps(RECORDS[3]["conversations"]), "image": "a.png", "note": "x" * 300_000},
]  # fmt: skip


def csv_text(**options: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), **options)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


CSV: dict[str, tuple[str, str | bytes]] = {
    "python": ("d.csv", csv_text()),
    "all quoted": ("d.csv", csv_text(quoting=csv.QUOTE_ALL, lineterminator="\n")),
    "of a spreadsheet": ("D.CSV", "\ufeff" + csv_text(delimiter=";")),
    "tabs": ("d.tsv", csv_text(delimiter="\t")),
    "tabs named csv": ("d.csv", csv_text(delimiter="\t")),
    "gzip": ("d.csv.gz", gzip.compress(csv_text().encode())),
    "blank lines": ("d.csv", csv_text().replace("\r\n3,", "\r\n\r\n\r\n3,")),
}


@pytest.mark.parametrize(("name", "content"), CSV.values(), ids=CSV.keys())
def test_rows_of_csv_are_records_of_their_cells(folder: Path, name: str, content: str | bytes) -> None:
    [file] = opened(folder, name, content).files
    expected = [{key: cell for key, cell in row.items() if cell} for row in ROWS]
    assert [file.record(i) for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]


def test_a_csv_row_is_located_by_its_first_line(folder: Path) -> None:
    samples = opened(folder, "d.csv", csv_text())
    assert [sample.location.rpartition(":")[2] for sample in samples] == ["2", "3", "5"]


def test_a_csv_of_another_encoding_is_refused_row_by_row(folder: Path) -> None:
    samples = opened(folder, "d.csv", "question,answer,größe\nq,a,1\n".encode("cp1252"))
    assert [sample.reason for sample in samples] == ["not UTF-8 text"]


def test_a_bad_row_costs_no_other(folder: Path) -> None:
    rows = b"question,answer\nq1,a1\nq2\nq3,a3,more\nq4,\xe9\nq5,a5\n"
    samples = opened(folder, "d.csv", rows)
    found = {sample.location.rpartition(":")[2]: sample.reason for sample in samples if isinstance(sample, BadRecord)}
    assert found["3"] == "a CSV row of 1 cells under a header of 2"
    assert found["4"] == "a CSV row of 3 cells under a header of 2"
    assert found["5"] == "not UTF-8 text"
    assert samples.files[0].record(4) == {"question": "q5", "answer": "a5"} and len(samples) == 5


def test_quotes_behind_a_space_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('question,answer\nq, a\n"q", "a"\n"q ""x"""," and ""y"" "\n')
    one, two, three = open_samples([tmp_path / "d.csv"])
    assert isinstance(one, Sample) and one.answers == (" a",)
    assert isinstance(two, BadRecord) and two.reason.startswith("a CSV cell with a space before its quotes")
    assert isinstance(three, Sample) and three.answers == (' and "y" ',)
