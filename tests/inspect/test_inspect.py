"""Inspecting a cache: every number against a computation of its own, odd texts, keys that are not there, SQL, JSON."""

import dataclasses
import importlib.abc
import io
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import transformers
from conftest import conversation, mixed_samples, png, write_llava
from rich.cells import cell_len
from rich.console import Console
from shard_records import make_answer
from tokenizers import Tokenizer

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.cli.output import plain_json
from genrecal.demo.data import Flaws, write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.errors import DamageError, FormatError, UsageError
from genrecal.inspect import describe_record, find_record, least_likely, run_sql, save_images, summarize
from genrecal.inspect.summary import NOT_COLUMNS, arrow_column_bytes, blind_teacher, histogram
from genrecal.inspect.text import record_text, sql_text, summary_text, visible
from genrecal.samples import open_samples
from genrecal.samples.survey import reason_kind
from genrecal.shards.codecs import CODECS
from genrecal.shards.reader import open_cache
from genrecal.shards.record import to_arrow
from genrecal.shards.storage import open_store
from genrecal.shards.vocabulary import load_vocabulary

TOP_K = 8
ODD = [
    conversation(("Say it", "a\x1b[31mred\x07\ttab\nline"), key="00000000"),
    conversation(("Emoji?", "👩‍👩‍👧 and ❤️🦜"), ("More?", "是的，中文 [/bold] [red]"), images={0: 2}, key="00000001"),
    conversation(("Turn\u202earound?", "ab \u202e cd \\xf0 \\"), key="00000002"),
    conversation(("Long?", "word " * 60 + "end"), key="00000003"),
]


@pytest.fixture(scope="module")
def samples():
    return ODD + mixed_samples(8)


@pytest.fixture(scope="module")
def path(teacher, samples, tmp_path_factory):
    """Twelve samples, and three records that are skipped, two of them for the same kind of reason."""
    folder = tmp_path_factory.mktemp("inspect")
    data = write_llava(folder / "data", samples)
    records = json.loads(data.read_text())
    answered = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    records += [{"id": f"gone{i}", "image": f"images/gone{i}.png", "conversations": answered} for i in range(2)]
    records.append({"id": "s3", "conversations": [{"from": "human", "value": "q"}]})
    records[4] |= {"weather": "fine", "mood": "good"}
    records[5] |= {"weather": "rain"}
    data.write_text(json.dumps(records, indent=1))
    options = CacheOptions(
        top_k=TOP_K, samples_per_shard=5, max_skip=0.5, answer_codec="bf16", question_codec="bf16",
        question_fraction=0.6, draws=9,
    )  # fmt: skip
    run_cache_job(teacher, open_samples([data]), folder / "cache", options)
    return folder / "cache"


@pytest.fixture(scope="module")
def cache(path):
    return open_cache(path)


@pytest.fixture(scope="module")
def descriptions(cache):
    return [describe_record(record, alternatives=TOP_K) for record in cache]


@pytest.fixture
def run(capsys):
    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def rendered(renderable, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


# ---------------------------------------------------------------------------------------------------------------- record


def test_tokens_are_what_the_model_itself_says(teacher, cache, samples, descriptions, tiny):
    """Probability, rank, entropy and alternatives against the logits of the whole model, run by transformers alone."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny("qwen2_vl"), dtype=torch.float32).eval()
    compared = 0
    for sample, described in zip(samples, descriptions, strict=True):
        encoded = teacher.encode(sample)
        with torch.no_grad():
            logits = model(**encoded.inputs).logits[0].double()
        log_probs = (logits - logits.logsumexp(-1, keepdim=True)).numpy()
        ids = encoded.inputs["input_ids"][0].tolist()
        expected = [
            token for start, end, answer in encoded.segments() if answer for token in range(start, end)
        ]  # fmt: skip
        assert [token.position for token in described.tokens] == expected
        for token in described.tokens:
            row = log_probs[token.position - 1]
            order = np.argsort(-row, kind="stable")
            assert token.id == ids[token.position]
            assert token.log_prob == pytest.approx(row[token.id], abs=2e-4)
            assert token.probability == pytest.approx(np.exp(row[token.id]), rel=3e-4)
            place = order.tolist().index(token.id) + 1
            assert token.rank == (place if place <= TOP_K else None)
            top = np.exp(row[order[:TOP_K]])
            tail = 1 - top.sum()
            assert token.tail == pytest.approx(tail, abs=1e-4)
            assert token.entropy == pytest.approx(-(top * np.log(top)).sum() - tail * np.log(tail), abs=1e-3)
            others = [int(i) for i in order[:TOP_K] if i != token.id]
            assert [other.id for other in token.alternatives] == others
            assert [o.probability for o in token.alternatives] == pytest.approx(np.exp(row[others]), rel=3e-4)
            compared += 1
    assert compared == sum(cache.column("answer_tokens")) > 250


def test_token_texts_put_together_are_the_answer(samples, descriptions):
    """Also where an emoji or a Chinese character is spread over byte tokens."""
    split = 0
    for sample, described in zip(samples, descriptions, strict=True):
        assert described.key.startswith("0000") and len(described.messages) == len(sample.messages)
        for turn, answer in enumerate(sample.answers):
            tokens = [token for token in described.tokens if token.turn == turn]
            data = answer.encode()
            assert b"".join(data[token.start : token.end] for token in tokens) == data
            assert [token.end_of_turn for token in tokens] == [False] * (len(tokens) - 1) + [True]
            assert tokens[-1].vocabulary_text == "<|im_end|>" and tokens[-1].text == ""
            for token in tokens[:-1]:
                piece = data[token.start : token.end]
                try:
                    assert token.text == piece.decode() == token.vocabulary_text
                except UnicodeDecodeError:
                    split += 1
                    assert token.text == "".join(f"\\x{byte:02x}" for byte in piece) == token.vocabulary_text
    assert split > 20


def test_means_over_a_records_tokens_are_the_manifests(descriptions):
    for described in descriptions:
        assert np.mean([t.entropy for t in described.tokens]) == pytest.approx(described.entropy, rel=1e-4)
        assert np.mean([t.log_prob for t in described.tokens]) == pytest.approx(described.log_prob, rel=1e-4)
        assert np.mean([t.rank == 1 for t in described.tokens]) == pytest.approx(described.top1_agreement, abs=1e-6)
        assert len(described.tokens) == described.answer_tokens


def test_images_are_described_and_saved_as_they_were(cache, descriptions, tmp_path):
    record, described = cache[1], descriptions[1]
    assert [(i.index, i.format, i.width, i.height) for i in described.images] == [
        (0, "PNG", 90, 60),
        (1, "PNG", 70, 60),
    ]
    assert [i.bytes for i in described.images] == [len(png(0, 90, 60)), len(png(1, 70, 60))]
    paths = save_images(record, tmp_path / "a")
    assert paths == save_images(record, tmp_path / "a")  # there already, and the same
    assert [path.read_bytes() for path in paths] == [png(0, 90, 60), png(1, 70, 60)] == record.images
    assert [path.name for path in paths] == [image.member for image in described.images]
    paths[1].write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists and is another file"):
        save_images(record, tmp_path / "a")
    assert paths[1].read_bytes() == b"mine"
    with pytest.raises(UsageError, match="cannot be written"):
        save_images(record, paths[0] / "folder")


def test_measurements_that_are_missing_are_damage(path, tmp_path):
    """A manifest that is not ours: cached, and yet without its numbers."""
    import shutil

    import pyarrow.parquet as pq

    shutil.copytree(path, tmp_path / "cache")
    file = tmp_path / "cache/manifest/00000.parquet"
    table = pq.read_table(file)
    index = table.column_names.index("log_prob")
    pq.write_table(table.set_column(index, table.field(index), [pa.nulls(len(table), pa.float32())]), file)
    (tmp_path / "cache/index.parquet").unlink()
    with pytest.raises(
        DamageError, match=r"00000\.parquet: not a readable manifest: column log_prob of cached samples has nulls"
    ):
        open_cache(tmp_path / "cache")


def test_an_image_member_cannot_be_written_elsewhere(cache, tmp_path):
    members = [dict(member) for member in cache[1].row["members"]]
    members[1]["name"] = "../escaped.0.png"
    hostile = dataclasses.replace(cache[1], row=dict(cache[1].row) | {"members": members})
    with pytest.raises(DamageError, match="expected a name such as KEY.0.jpg"):
        save_images(hostile, tmp_path / "in")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl_llama", "gemma3"])
def test_vocabulary_is_the_tokenizers(tiny, family):
    """Byte-level and sentencepiece-like; against what the tokenizers library makes of runs of tokens."""
    vocabulary, note = load_vocabulary(open_store(tiny(family)), folder="")
    backend = Tokenizer.from_file(str(tiny(family) / "tokenizer.json"))
    assert note == "" and vocabulary.text(10_000_000) is None
    for text in ("What is shown? a red square", "7 of 9 (A)", "中文 🙂"):
        words = [vocabulary.text(i) for i in backend.encode(text, add_special_tokens=False).ids]
        whole = "".join(words).encode("latin-1", "backslashreplace") if all(ord(c) < 256 for c in text) else None
        if whole is not None:
            assert whole.decode().removeprefix(" ") == text
        else:
            assert any("\\x" in word for word in words) and " " in words
    assert vocabulary.text(backend.token_to_id("<|endoftext|>")) == "<|endoftext|>"


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"model": {"vocab": 3}}'])
def test_without_a_readable_tokenizer_there_are_ids(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    vocabulary, note = load_vocabulary(open_store(tmp_path), folder="")
    assert vocabulary is None and str(tmp_path) in note and "by their ids" in note


def test_damaged_bytes_are_named_and_not_shown(path, tmp_path):
    import shutil

    shutil.copytree(path, tmp_path / "cache")
    member = next(m for m in open_cache(path)[0].row["members"] if m["name"].endswith("answer.arrow"))
    with (tmp_path / "cache/samples/00000.tar").open("rb+") as file:
        file.seek(member["offset"] + member["size"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    damaged = open_cache(tmp_path / "cache")
    with pytest.raises(DamageError, match="xxh3"):
        describe_record(damaged[0])
    summary = summarize(damaged)
    assert any("1 of the" in warning and member["name"] in warning for warning in summary.warnings)
    assert summary.columns["answer"].records == len(damaged) - 1


# ------------------------------------------------------------------------------------------------------------------ keys


def test_keys_and_unique_sample_ids_find_the_record(cache):
    rows = cache.manifest().to_pylist()
    assert find_record(cache, rows[2]["key"]).key == rows[2]["key"]
    assert find_record(cache, "s5").row["sample_id"] == "s5"
    with pytest.raises(UsageError, match=r"2 samples have the id 's3'; give the key of one: 00000003-s3, 00000014-s3"):
        find_record(cache, "s3")


@pytest.mark.parametrize(("wrong", "hint"), [
    ("00000005-s55", "00000005-s5"), ("0000005-s5", "00000005-s5"), ("00000007", "00000007-s7"), ("gonee1", "00000013-gone1"),
])  # fmt: skip
def test_a_wrong_key_suggests_the_nearest(cache, wrong, hint):
    with pytest.raises(UsageError, match=f"no sample has the key or id '{wrong}'; the nearest are .*{hint}"):
        find_record(cache, wrong)


def test_an_empty_key_is_no_key(cache):
    with pytest.raises(UsageError, match="no sample has the key or id ''"):
        find_record(cache, "")


@pytest.mark.parametrize("name", ["00000012-gone0", "gone0"])
def test_a_skipped_key_says_why(cache, name):
    with pytest.raises(FormatError, match=r"00000012-gone0 was skipped: .*data\.json:\d+: image .*gone0\.png does not"):
        find_record(cache, name)


# --------------------------------------------------------------------------------------------------------------- summary


def test_summary_counts_and_histograms(cache, descriptions):
    summary = summarize(cache)
    assert (summary.cached, summary.skipped, summary.shards) == (12, 3, (3, 3))
    tokens = [token for described in descriptions for token in described.tokens]
    assert summary.top1_agreement == pytest.approx(np.mean([token.rank == 1 for token in tokens]))
    assert summary.log_prob == pytest.approx(np.mean([token.log_prob for token in tokens]), rel=1e-5)
    for name, found in (("entropy", summary.entropy_histogram), ("log_prob", summary.log_prob_histogram)):
        values = [getattr(described, name) for described in descriptions]
        assert sum(found.counts) == 12 and found.not_finite == 0 and len(found.edges) == len(found.counts) + 1
        last = len(found.counts) - 1
        by_hand = [
            sum(low <= v < high or (i == last and v == high) for v in values)
            for i, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False))
        ]
        assert list(found.counts) == by_hand
    lengths = sorted(len(described.tokens) for described in descriptions)
    quantiles = summary.token_quantiles["answer_tokens"]
    assert (quantiles["min"], quantiles["p50"], quantiles["max"]) == (lengths[0], lengths[5], lengths[-1])
    assert set(quantiles.values()) <= set(lengths)


def test_skipped_samples_by_reason_with_a_place(cache):
    summary = summarize(cache)
    assert summary.skip_reasons == {"image … does not exist": 2, "no assistant turn": 1}
    first = summary.skip_examples["image … does not exist"]
    assert "data.json:" in first and first.endswith("gone0.png does not exist")
    assert first in cache.manifest().column("reason").to_pylist()
    lines = [
        line.split() for line in rendered(summary_text(summary), 400).splitlines() if line.startswith("  skipped: ")
    ]
    assert [(" ".join(line[1:-1]), line[-1]) for line in lines] == [
        (first, "2"), (summary.skip_examples["no assistant turn"], "1"),
    ]  # fmt: skip


def test_fields_that_were_not_read_are_listed(path, cache):
    """By the manifests: the job counted them."""
    summary = summarize(cache)
    assert summary.not_read == {"a field 'weather'": 2, "a field 'mood'": 1}
    lines = [line.split() for line in rendered(summary_text(summary), 400).splitlines()]
    assert ["not", "read:", "a", "field", "'weather'", "2"] in lines


@pytest.mark.parametrize(("reason", "kind"), [
    ("d.jsonl:7: no assistant turn", "no assistant turn"),
    ("a b/d: 2.json:7: turn 2: empty answer", "turn …: empty answer"),
    ("d.json:1: image of 9 x 8 pixels is over the limit of 40 pixels", "image of … x … pixels is over the limit of … pixels"),
    ("d.json:1: image /a/b 1/c.png does not exist", "image … does not exist"),
    ("d.json:1: cannot identify <_io.BytesIO object at 0x7f1>", "cannot identify <_io.BytesIO object at …"),
    ("d.json:1: unknown role 'toolbox'; expected one of user", "unknown role …; expected one of user"),
    ("d.json:1: the field 'tools' is about tools", "the field 'tools' is about tools"),
    ("no place, and: a colon", "no place, and: a colon"),
    ("", ""),
])  # fmt: skip
def test_reasons_of_a_kind_count_together(reason, kind):
    assert reason_kind(reason) == kind


def test_bytes_by_column_add_up_to_the_files(cache):
    summary = summarize(cache)
    members = Counter()
    for row in cache.cached.to_pylist():
        for member in row["members"]:
            members[member["name"].split(".", 1)[1]] += member["size"]
    for kind, name in (("answer", "answer states"), ("question", "question states")):
        measured = summary.columns[kind]
        assert sum(column.bytes for column in measured.columns) == members[f"{kind}.arrow"] == summary.bytes[name]
    assert summary.columns["answer"].records == summary.columns["answer"].of_records == 12
    assert 0 < summary.columns["question"].records == summary.with_question < 12
    assert summary.columns["answer"].rows == sum(record.answer.num_rows for record in cache)
    few = summarize(cache, column_records=3).columns["answer"]
    compression = CODECS[cache.description["answer_codec"]].compression
    expected = [
        arrow_column_bytes(cache[i].read(cache[i]._member(".answer.arrow")), compression, where="x")[0]
        for i in (0, 6, 11)
    ]
    assert (few.records, few.of_records) == (3, 12)
    assert [c.bytes for c in few.columns] == [sum(c.bytes for c in column) for column in zip(*expected, strict=True)]
    assert summarize(cache, column_records=3) == summarize(cache, column_records=3)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_arrow_column_bytes_are_the_buffers_of_the_file(codec):
    """Together they are the body of the file's one record batch; raw bytes are the columns' own."""
    data = to_arrow(make_answer((40, 30), width=256), CODECS[codec])
    compression = CODECS[codec].compression
    measured, rows = arrow_column_bytes(data, compression, where="a.arrow")
    table = pa.ipc.open_file(data).read_all()
    assert [column.name for column in measured] == [*table.column_names, NOT_COLUMNS]
    assert rows == len(table) and sum(column.bytes for column in measured) == len(data)
    source = pa.BufferReader(data)
    source.seek(8)
    pa.ipc.read_message(source)
    assert sum(column.bytes for column in measured[:-1]) == pa.ipc.read_message(source).body.size
    for column in measured[:-1]:
        assert 0 <= column.raw_bytes - table.column(column.name).nbytes < 64  # but for padding
    with pytest.raises(DamageError, match=r"a\.arrow: not a readable Arrow file"):
        arrow_column_bytes(data[:-20], compression, where="a.arrow")


def test_a_deleted_question_tier_is_left_out(path, tmp_path):
    import shutil

    shutil.copytree(path, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/questions")
    summary = summarize(open_cache(tmp_path / "cache"))
    assert list(summary.columns) == ["answer"] and not any("corrupt" in w for w in summary.warnings)


def test_a_teacher_that_does_not_know_the_answers_is_said_so(cache):
    """Random weights do not; and the same numbers from a good teacher would not be called so."""
    summary = summarize(cache)
    [warning] = summary.warnings
    assert summary.log_prob < -math.log(summary.head_rows)
    assert warning.startswith("the teacher does not know these answers: wrong weights, template or images?")
    assert f"{summary.log_prob:.3f}" in warning and f"{-math.log(summary.head_rows):.3f}" in warning


@pytest.mark.parametrize(("agreement", "log_prob", "rows", "warned"), [
    (0.9, -0.3, 152_064, False), (0.05, -5.0, 152_064, False), (0.001, -5.0, 152_064, True),
    (0.3, -12.0, 152_064, True), (0.02, -3.0, 400, True), (math.nan, math.nan, 400, False),
])  # fmt: skip
def test_when_a_teacher_is_called_blind(agreement, log_prob, rows, warned):
    assert bool(list(blind_teacher(agreement, log_prob, rows))) == warned


def test_histograms_of_nothing_of_one_value_and_of_nan():
    assert histogram(np.array([], np.float32)).counts == ()
    same = histogram(np.array([2.0, 2.0, math.nan, math.inf]))
    assert (same.edges, same.counts, same.not_finite) == ((2.0, 2.0), (2,), 2)


# ------------------------------------------------------------------------------------------------------------------- SQL


def test_sql_gives_what_pyarrow_gives(cache):
    table = cache.manifest()
    everything = run_sql(cache, "SELECT * EXCLUDE members FROM manifest")
    assert everything.to_dicts() == table.drop_columns(["members"]).to_pylist()
    grouped = run_sql(
        cache, "SELECT status, count(*) AS n, sum(answer_tokens) AS t FROM manifest GROUP BY 1 ORDER BY 1"
    )
    expected = table.group_by("status").aggregate([([], "count_all"), ("answer_tokens", "sum")]).sort_by("status")
    assert grouped.rows == tuple(
        tuple(row[n] for n in ("status", "count_all", "answer_tokens_sum")) for row in expected.to_pylist()
    )
    sizes = run_sql(cache, "SELECT sum(m.size)::BIGINT AS b FROM (SELECT unnest(members) AS m FROM manifest)")
    members = pc.list_flatten(table.column("members"))
    assert sizes.rows == ((pc.sum(pc.struct_field(members, "size")).as_py(),),)
    assert run_sql(cache, "SELECT 1 AS a, 2 AS a, 3 AS a_1").columns == ("a", "a_1", "a_1_1")


@pytest.mark.parametrize("query", [
    "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'", "COPY manifest TO '{out}/x.csv'",
    "ATTACH '{out}/x.db'", "EXPORT DATABASE '{out}/x'", "SET enable_external_access = true", "INSTALL httpfs",
    "SELECT * FROM glob('/etc/*')", "SELECT * FROM table", "SELEKT", "SELECT nope FROM manifest", "", "-- nothing",
    "SELECT CAST('x' AS INT) FROM manifest", "SELECT content FROM read_text('/etc/passwd')", "LOAD 'x.duckdb_extension'",
    "SET memory_limit = '1TB'", "RESET memory_limit", "SET lock_configuration = false", "SET temp_directory = '/tmp'",
    "PRAGMA enable_profiling = 'json'; PRAGMA profile_output = '{out}/x'", "SELECT * FROM cache",
    "SELECT * FROM read_parquet('http://localhost/x')",
])  # fmt: skip
def test_sql_reaches_nothing_else_and_a_wrong_query_is_one_line(run, path, cache, tmp_path, query):
    table = cache.manifest()  # a variable of a calling frame: DuckDB would find it by its name
    assert len(table)
    status, out, err = run("inspect", path, "--sql", query.format(out=tmp_path))
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("genrecal: error: --sql"), err
    assert not list(tmp_path.iterdir())


def test_sql_takes_a_bounded_memory_and_no_disk(cache):
    query = "SELECT value FROM duckdb_settings() WHERE name IN ('memory_limit', 'temp_directory') ORDER BY name"
    assert run_sql(cache, query).rows == (("4.0 GiB",), ("",))


def test_least_likely_answers_come_first(run, path, cache, tmp_path):
    """By the mean over each sample's answer tokens, worked out anew from its rows."""
    means = {}
    for record in cache:
        rows = record.answer_rows()
        means[record.key] = rows.target_log_prob[rows.predicts].mean()
    worst = sorted(means, key=means.get)
    status, out, _ = run("inspect", path, "--least-likely", 3, "--save-keys", tmp_path / "keys.txt", "--json")
    rows = json.loads(out)
    assert status == 0 and (tmp_path / "keys.txt").read_text().splitlines() == worst[:3] == [row["key"] for row in rows]
    assert [row["log_prob"] for row in rows] == pytest.approx([means[key] for key in worst[:3]], abs=1e-4)
    sample = cache.by_key(worst[0]).sample
    assert rows[0]["answers"] == " | ".join(sample.answers) and sample.messages[0].text in rows[0]["questions"]
    assert visible(worst[1]) in run("inspect", path, "--least-likely", 2)[1]
    assert len(json.loads(run("inspect", path, "--least-likely", 99, "--json")[1])) == len(cache)
    for options in (["--sql", "x"], ["--key", "x"], ["--html", tmp_path / "x.html"]):
        assert run("inspect", path, "--least-likely", 2, *options)[0] == 2
    assert run("inspect", path, "--save-keys", tmp_path / "x")[2].startswith(
        "genrecal: error: --save-keys: expected --least-"
    )


def test_wrong_answers_are_among_the_least_likely(tmp_path):
    """Of a teacher that was trained, over data of which a share of the answers was exchanged."""
    data = {
        share: open_samples(
            [
                write_dataset(
                    tmp_path / str(share), num_samples=48, split="train", seed=0, flaws=Flaws(wrong_answers=share)
                )
            ]
        )
        for share in (0.0, 0.3)
    }
    wrong = [bad.key for good, bad in zip(data[0.0], data[0.3], strict=True) if good.answers != bad.answers]
    trained = HFTeacher.load(ASSETS / "teacher", dtype=torch.float32)
    run_cache_job(trained, data[0.3], tmp_path / "c", CacheOptions(top_k=4, question_fraction=0.0))
    keys = [row["key"] for row in least_likely(open_cache(tmp_path / "c"), 48).to_dicts()]
    assert 10 < len(wrong) < 30 and set(keys[:10]) < set(wrong) < set(keys[:34])


def test_without_duckdb_one_line_says_how_to_get_it(run, path, monkeypatch):
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, *_):
            if name.split(".")[0] in ("duckdb", "_duckdb"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] in ("duckdb", "_duckdb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    status, _, err = run("inspect", path, "--sql", "SELECT 1")
    assert (status, err.count("\n")) == (2, 1) and "pip install duckdb" in err and "`report`" in err


# -------------------------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminals_lines_are_whole(cache, descriptions, width):
    """No table line is wider than the terminal or broken over two; no control character gets through."""
    for described in descriptions[:6]:
        lines = rendered(record_text(described), width).splitlines()
        starts = [int(line.split()[0]) for line in lines if line[:8].strip().isdecimal() and len(line) > 8]
        assert starts == [token.position for token in described.tokens]
        tables = [line for line in lines if line.startswith("position") or line[:8].strip().isdecimal()]
        assert all(cell_len(line) <= width for line in tables) and "…" in "".join(tables) or width == 200
        for line, token in zip((line for line in tables if line[0] == " "), described.tokens, strict=True):
            assert f"  {token.id}  " in line and f"{token.entropy:.3f}" in line  # numbers stand whole
        assert all(char.isprintable() or char in "\u200d\u202f" for line in lines for char in line), lines
    for text in (summary_text(summarize(cache)), sql_text(run_sql(cache, "SELECT * FROM manifest"))):
        assert all(cell_len(line) <= width for line in rendered(text, width).splitlines())


def test_a_piped_record_shows_its_numbers(run, path, descriptions):
    status, out, err = run("inspect", path, "--key", "s1")
    described = descriptions[1]
    assert (status, err) == (0, "") and "\x1b" not in out
    assert "是的，中文 [/bold] [red]" in out  # no markup
    assert "image 0" in out and "PNG of 90 x 60 pixels" in out
    rows = [line for line in out.splitlines() if line[:8].strip().isdecimal()]
    assert [int(row.split()[0]) for row in rows] == [token.position for token in described.tokens]
    assert sum("end of turn <|im_end|>" in row for row in rows) == 2
    assert "\\xf0" in out


def test_escapes_are_shown_not_sent(run, path):
    _, out, _ = run("inspect", path, "--key", "s0")
    assert "\x1b" not in out and "\x07" not in out and "a\\x1b[31mred\\x07\\ttab\nline" in out
    _, out, _ = run("inspect", path, "--key", "s2")
    assert "\u202e" not in out and "Turn\\u202earound?" in out
    assert visible("a\x9bb\ud800c\u2028") == "a\\x9bb\\ud800c\\u2028"


ODD_VALUES = "SELECT *, 'nan'::FLOAT AS x, DATE '2026-01-02' AS d, 'a'::BLOB AS b FROM manifest"


@pytest.mark.parametrize("args", [[], ["--key", "s1"], ["--key", "s0"], ["--sql", ODD_VALUES]])
def test_json_is_json(run, path, args):
    def refuse(word):
        raise AssertionError(word)

    status, out, err = run("inspect", path, *args, "--json")
    content = json.loads(out, parse_constant=refuse)
    assert (status, err) == (0, "")
    if args[:1] == ["--sql"]:
        assert len(content) == 15 and {row["x"] for row in content} == {None} and content[0]["d"] == "2026-01-02"
        assert content[0]["members"][0]["tier"] == "samples" and content[-1]["log_prob"] is None
    elif args:
        described = describe_record(find_record(open_cache(path), args[1]))
        assert content == plain_json(dataclasses.asdict(described)) | {"saved_images": []}
    else:
        assert content == plain_json(dataclasses.asdict(summarize(open_cache(path))))


def test_an_unfinished_cache_of_no_shard_is_summarised(run, path, tmp_path):
    description = json.loads((path / "cache.json").read_text())
    del description["totals"]
    (tmp_path / "cache.json").write_text(json.dumps(description))
    status, out, _ = run("inspect", tmp_path, "--json")
    summary = json.loads(out)
    assert status == 0 and summary["cached"] == 0 and summary["log_prob"] is None and summary["warnings"] == []
    status, out, _ = run("inspect", tmp_path)
    assert status == 0 and "0 of 3, unfinished" in out
    status, _, err = run("inspect", tmp_path, "--key", "s1")
    assert status == 2 and "no finished samples" in err


def test_a_folder_above_caches_names_them(run, path):
    status, out, err = run("inspect", path.parent)
    assert (status, out) == (1, "") and f"not a cache: it has no cache.json; its caches are {path}" in err


def test_save_images_prints_the_paths(run, path, tmp_path):
    status, out, _ = run("inspect", path, "--key", "s1", "--save-images", tmp_path / "p")
    assert status == 0 and out.splitlines()[-2:] == [str(p) for p in sorted((tmp_path / "p").iterdir())]
    _, out, _ = run("inspect", path, "--key", "s1", "--save-images", tmp_path / "p", "--json")
    assert json.loads(out)["saved_images"] == [str(p) for p in sorted((tmp_path / "p").iterdir())]


@pytest.mark.parametrize("args", [["--key", "s1", "--sql", "SELECT 1"], ["--save-images", "x"]])
def test_contradictory_options_are_refused(run, path, args):
    status, out, err = run("inspect", path, *args)
    assert (status, out, err.count("\n")) == (2, "", 1) and "--key" in err


def test_nothing_of_inspect_needs_a_model_library(path):
    """In a process where transformers, tokenizers and torch's friends cannot be imported."""
    import subprocess

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'tokenizers', 'peft')))\n"
        "from genrecal.inspect import *; from genrecal.shards.reader import open_cache\n"
        "cache = open_cache(sys.argv[1]); summarize(cache)\n"
        "print(describe_record(cache[1]).tokens[-1].vocabulary_text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "<|im_end|>\n", done.stderr
