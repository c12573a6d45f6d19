"""docs/data.md: every row of its tables is what the program does."""

import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import png
from test_docs import ROOT, table

from genrecal.errors import DataError
from genrecal.samples import BadRecord, open_samples
from genrecal.samples.data_files import DATA_SUFFIXES
from genrecal.samples.fields import IMAGE_FIELD, RECORD_FIELDS, ROLE_NAMES
from genrecal.samples.text_file import COMPRESSIONS, TEXT_SUFFIXES

PAGE = ROOT / "docs/data.md"


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("7.png", "8.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


RECORDS = table(PAGE, "| record | result |")


@pytest.mark.parametrize(("record", "result"), RECORDS, ids=range(len(RECORDS)))
def test_a_record_of_the_page_comes_out_as_it_says(folder: Path, record: str, result: str) -> None:
    [text] = codes(record)
    (folder / "d.jsonl").write_text(text)
    [sample] = open_samples([folder / "d.jsonl"])
    if result.startswith("refused"):
        assert isinstance(sample, BadRecord) and codes(result)[0] in sample.reason
        return
    assert not isinstance(sample, BadRecord), sample.reason
    if result.startswith("counted"):
        assert list(sample.unread) == codes(result)[:1]
        return
    images, answers = map(int, re.fullmatch(r"read: (\d) images?, (\d) answers?", result).groups())  # type: ignore[union-attr]
    assert (len(sample.images), len(sample.answers), sample.unread) == (images, answers, ())


def test_the_page_has_every_kind_of_result_and_file() -> None:
    kinds = [result.partition(":")[0] for _, result in RECORDS]
    assert {kind: kinds.count(kind) > 1 for kind in kinds} == {"read": True, "counted": True, "refused": True}
    rows = [name for cell, *_ in table(PAGE, "| `--data` | a record is |") for name in codes(cell)]
    packed = [suffix for suffix in COMPRESSIONS if f"`{suffix}`" in PAGE.read_text()]
    assert {*rows, *(text + suffix for text in TEXT_SUFFIXES for suffix in packed)} == set(DATA_SUFFIXES)


LINE = json.dumps({"question": "q", "answer": "a"})
CONTENT = {
    "utf16.jsonl": LINE.encode("utf-16"),
    "cut.json": f"[{LINE},\n{LINE[:9]}".encode(),
    "cut.jsonl.gz": gzip.compress(LINE.encode())[:-5],
    "open-quote.csv": b'question,answer\nq,"a\n',
    "empty.jsonl": b"",
}
REFUSALS = table(PAGE, "| `--data` | refused with |")
REFUSED = [(name, codes(reason)[0]) for cell, reason in REFUSALS for name in codes(cell)]


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_a_file_of_the_page_is_refused_as_it_says(folder: Path, name: str, reason: str) -> None:
    (folder / name).write_bytes(CONTENT.get(name, b"x"))
    with pytest.raises(DataError, match=re.escape(reason)):
        open_samples([folder / name])


def test_the_tables_of_names_are_those_of_the_program() -> None:
    shown = {codes(name)[0]: codes(fields) for name, fields in table(PAGE, "| name | read without `--field` |")}
    images = shown.pop("image")
    assert shown == {name: list(names) for name, names in RECORD_FIELDS.items() if name != "image"}
    assert all(IMAGE_FIELD.fullmatch(name) for name in images) and len(images) > 5
    roles = {
        codes(role)[0]: codes(names) for role, names in table(PAGE, "| role | read without `--role`, in any case |")
    }
    assert {name: role for role, names in roles.items() for name in names} == ROLE_NAMES
