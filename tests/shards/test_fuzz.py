"""Seeded damages of a cache: verify finds each, or nothing that the reader returns has changed.

The reader gives right data or one of genrecal's errors, whatever is damaged.
"""

import json
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FULL
from made_cache import make_cache, tree

import genrecal
from genrecal.errors import GenrecalError
from genrecal.shards import verify
from genrecal.shards.manifest import DIGEST, METADATA_KEY, SCHEMA, content_digest

SEED = 20261121


@pytest.fixture(scope="module", params=["bf16", "int4"])
def cache(request, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("fuzz") / "cache", codec=request.param)


# ------------------------------------------------------------------------------------------------------------ the damages


def flip(rng, files, name):
    data = bytearray(files[name])
    data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
    return {name: bytes(data)}


def flip_a_bit(rng, files, name):
    data = bytearray(files[name])
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return {name: bytes(data)}


def cut(rng, files, name):
    return {name: files[name][: rng.integers(len(files[name]))]}


def delete(rng, files, name):
    return {name: None}


def append(rng, files, name):
    return {name: files[name] + rng.bytes(int(rng.integers(1, 3000)))}


def fill_with_zeros(rng, files, name):
    """A hole, as a file system leaves after a crash."""
    data = files[name]
    start = int(rng.integers(len(data)))
    end = min(len(data), start + int(rng.integers(1, 5000)))
    return {name: data[:start] + bytes(end - start) + data[end:]}


def partner(rng, files, name):
    """Another file; mostly of the same kind."""
    others = [other for other in files if other != name]
    same = [other for other in others if other.split("/")[0] == name.split("/")[0]]
    return str(rng.choice(same if same and rng.random() < 0.7 else others))


def duplicate(rng, files, name):
    return {name: files[partner(rng, files, name)]}


def swap(rng, files, name):
    other = partner(rng, files, name)
    return {name: files[other], other: files[name]}


def rewrite_manifest(rng, files, name):
    """A manifest that pyarrow reads without complaint, with a value in it that is not what it was."""
    name = str(rng.choice([name for name in files if name.startswith("manifest/")]))
    table = pq.read_table(pa.BufferReader(files[name]))
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    rows = table.to_pylist()
    row = rows[rng.integers(len(rows))]
    member = row["members"][rng.integers(len(row["members"]))] if row["members"] else None
    edit = rng.integers(12)
    if edit == 0:
        row["key"] = f"{int(rng.integers(20)):08d}-other"
    elif edit == 1:
        other = rows[rng.integers(len(rows))]
        row["key"], other["key"] = other["key"], row["key"]
    elif edit == 2 and member:
        member["name"] = str(rng.choice(["x", "../x", row["key"] + ".json", row["key"] + ".9.png", ""]))
    elif edit == 3 and member:
        member["offset"] = int(rng.choice([-1, 0, member["offset"] + 1, 2**62, -(2**63), 2**63 - 1]))
    elif edit == 4 and member:
        member["size"] = int(rng.choice([-1, 0, member["size"] + 1, 2**62, -(2**63), 2**63 - 1]))
    elif edit == 5 and member:
        member["tier"] = str(rng.choice(["../samples", "samples", "questions", "/tmp", ""]))
    elif edit == 6:
        column = str(rng.choice([column for column in SCHEMA.names if column != "members"]))
        row[column] = None
    elif edit == 7:
        rows.pop(int(rng.integers(len(rows))))
        facts["rows"] -= int(rng.integers(2))
    elif edit == 8:
        rows.append(row)
        facts["rows"] += int(rng.integers(2))
    elif edit == 9:
        rng.shuffle(rows)
    elif edit == 10:
        fact = str(rng.choice(list(facts)))
        facts[fact] = [None, -1, "x", {}, 10**30, [1]][rng.integers(6)]
    else:
        column = str(rng.choice(["turns", "images", "question_tokens", "answer_tokens", "shard"]))
        row[column] = int(rng.choice([-1, 0, 1, 2**31 - 1]))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if rng.random() < 0.5 and DIGEST in facts:
        facts[DIGEST] = content_digest(table, facts)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}), sink)
    return {name: sink.getvalue().to_pybytes()}


DAMAGES = (flip, flip, flip_a_bit, cut, delete, append, fill_with_zeros, duplicate, swap, rewrite_manifest)


# ------------------------------------------------------------------------------------------------------------- the checks


def content(record):
    """All that a record says, comparable."""
    rows = record.record()
    answer = vars(rows.answer) | rows.answer.coded.columns | vars(rows.answer.sampled)
    arrays = [answer, vars(rows.question) | rows.question.coded.columns if rows.question else {}]
    flat = [
        (name, value.dtype.str, value.tobytes())
        for part in arrays
        for name, value in part.items()
        if isinstance(value, np.ndarray)
    ]
    return [record.key, rows.sample, record.images, flat]


class Fuzzed:
    """A cache that is damaged and restored. What a damage does not touch is not checked again.

    Verify's findings on a shard depend on its own files and on cache.json, and a record on its shard's files and
    cache.json; `everything` leaves that assumption out.
    """

    def __init__(self, cache: Path, monkeypatch):
        self.cache, self.files = cache, tree(cache)
        self.expected = [content(record) for record in genrecal.open_cache(cache)]
        self.rows = genrecal.open_cache(cache).manifest().to_pylist()
        self.everything, self.touched = True, set()
        self.checked, self._check = {}, verify.check_shard
        monkeypatch.setattr(verify, "check_shard", self.check_shard)
        monkeypatch.setattr(verify.Progress, "advance", lambda *args: None)
        self.whole = verify.verify_cache(cache)
        assert self.whole.whole and not self.whole.notes

    def check_shard(self, cache, shard, *others):
        if self.everything or shard in self.touched or others[1] is None:
            result = self._check(cache, shard, *others)
            if not self.touched:
                self.checked[shard] = result
            return result
        return self.checked[shard]

    def apply(self, number):
        """The damage of that number: its kind, and whether it was `found` or is `harmless`."""
        rng = np.random.default_rng([SEED, number])
        kind = DAMAGES[rng.integers(len(DAMAGES))]
        name = str(rng.choice(list(self.files)))
        changed = {name: data for name, data in kind(rng, self.files, name).items() if data != self.files[name]}
        shards = {int(Path(name).stem) for name in changed if Path(name).stem.isdecimal()}
        self.touched = shards or {None}
        self.everything = "cache.json" in changed or number % 50 == 0
        try:
            for name, data in changed.items():
                path = self.cache / name
                path.unlink() if data is None else path.write_bytes(data)
            found = not verify.verify_cache(self.cache).whole
            forged = kind is rewrite_manifest
            read = self.read(forged)
            if changed and not found:
                assert read == "right", f"damage {number}: {kind.__name__} of {list(changed)} was not found, {read}"
            return kind.__name__, "found" if found else "harmless" if changed else "no change"
        finally:
            for name in changed:
                (self.cache / name).write_bytes(self.files[name])
            self.touched = set()

    def read(self, forged):
        """Read all that the damage can have touched: `right`, or which error came. Wrong data and other errors fail.

        A manifest that was forged, with the digest that fits it, may leave records out; what it does give is right.
        """
        try:
            opened = genrecal.open_cache(self.cache)
            keys = [record[0] for record in self.expected]
            if not forged:
                same = opened.manifest().to_pylist() == self.rows and len(opened) == len(keys)
                assert same, "other rows, and no error"
        except GenrecalError as error:
            return repr(error)
        wrong = "right" if len(opened) == len(keys) else "records are missing"
        for place in range(len(opened)):
            try:
                record = opened[place]
                if not (self.everything or record.row["shard"] in self.touched):
                    continue
                got = content(record)
            except GenrecalError as error:
                wrong = repr(error)
                continue
            expected = self.expected[keys.index(record.key)]
            parts = 3 if forged and not record.has_question else 4
            same = got[:parts] == expected[:parts]  # apart: pytest would take gigabytes to show how megabytes differ
            assert same, f"other data of {record.key}, and no error"
        try:
            opened.head()
        except GenrecalError as error:
            wrong = repr(error)
        return wrong


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(cache, monkeypatch, numbers):
    fuzzed = Fuzzed(cache, monkeypatch)
    counts, memory = Counter(), peak()
    for number in numbers:
        counts[fuzzed.apply(number)] += 1
    left = tree(cache)
    assert [name for name in left.keys() | fuzzed.files.keys() if left.get(name) != fuzzed.files.get(name)] == []
    assert peak() - memory < 300e6  # bytes; nothing is decoded because a damaged number asks for it
    outcomes = Counter()
    for (_, outcome), count in counts.items():
        outcomes[outcome] += count
    print(f"\n{len(numbers)} damages, {(peak() - memory) / 1e6:.0f} MB more: {dict(outcomes)}")
    for kind in sorted({kind for kind, _ in counts}):
        print(f"  {kind}: { {outcome: counts[kind, outcome] for outcome in outcomes if counts[kind, outcome]} }")
    return outcomes


def test_damage_is_found_or_harmless(cache, monkeypatch):
    start = 0 if "bf16" in json.loads((cache / "cache.json").read_text())["answer_codec"] else 150
    outcomes = run(cache, monkeypatch, range(start, start + 150))
    assert outcomes["found"] > 100


@pytest.mark.slow
def test_many_damages_are_found_or_harmless(cache, monkeypatch):
    count = 5000 if FULL else 250
    start = 1000 if "bf16" in json.loads((cache / "cache.json").read_text())["answer_codec"] else 1000 + count
    outcomes = run(cache, monkeypatch, range(start, start + count))
    assert outcomes["found"] > 0.8 * count
