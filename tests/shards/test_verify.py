"""`genrecal verify`: what it finds, what it leaves alone, and that a repaired cache is made again byte for byte."""

import dataclasses
import hashlib
import io
import json
import tarfile

import made_cache
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import PER_SHARD, make_cache, make_head, make_record, tree, write_index, write_shard

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.errors import DamageError, FormatError
from genrecal.samples import Sample, open_samples
from genrecal.shards import verify
from genrecal.shards.head import HEAD_FILE
from genrecal.shards.index import INDEX_FILE
from genrecal.shards.layout import manifest_name, read_cache_json, tar_name, write_cache_json
from genrecal.shards.manifest import METADATA_KEY, ManifestRow, Member, manifest_bytes, read_manifest
from genrecal.shards.reader import open_cache
from genrecal.shards.storage import open_store
from genrecal.shards.verify import quarantine, verify_cache


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


def change(cache, **settings):
    write_cache_json(open_store(cache), read_cache_json(open_store(cache)) | settings)


def found(cache, **options):
    """The findings as lines."""
    return [str(finding) for finding in verify_cache(cache, **options).findings]


def edit_manifest(cache, shard, edit, *, facts_too=lambda facts: None):
    """Write a manifest anew with the rows that `edit` leaves, its digest right again."""
    table, facts = read_manifest((cache / manifest_name(shard)).read_bytes(), where="manifest")
    rows = [
        ManifestRow(**row | {"members": [Member(**member) for member in row["members"]]})
        for row in edit(table.to_pylist())
    ]
    facts_too(facts)
    (cache / manifest_name(shard)).write_bytes(manifest_bytes(rows, facts))


# --------------------------------------------------------------------------------------------------------- whole caches


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_a_whole_cache_is_whole(tmp_path, codec):
    cache = make_cache(tmp_path / "cache", codec=codec)
    before = tree(cache)
    result = verify_cache(cache, deep=True)
    assert result.findings == () and result.notes == ()
    assert (result.shards, result.cached, result.skipped) == ((3, 3), 10, 1)
    shards = [name for name in before if name.split("/")[0] in ("samples", "questions", "manifest")]
    assert result.bytes == sum(len(before[name]) for name in shards)  # each byte once
    assert tree(cache) == before


def test_an_unfinished_cache_is_no_damage(cache):
    description = read_cache_json(open_store(cache))
    del description["totals"]
    write_cache_json(open_store(cache), description)
    assert verify_cache(cache).notes == (
        "every shard is there, but cache.json has no totals yet; run `genrecal cache` again",
    )
    (cache / manifest_name(1)).unlink()
    result = verify_cache(cache)
    assert result.whole and result.shards == (2, 3) and "unfinished: 2 of 3 shards" in result.notes[0]


def test_a_deleted_question_tier_is_no_damage_and_one_missing_tar_is(cache):
    (cache / tar_name("questions", 1)).unlink()
    (line,) = found(cache)
    assert line.startswith("questions/00001.tar: missing, while 2 of 3 shards have theirs")
    for shard in (0, 2):
        (cache / tar_name("questions", shard)).unlink()
    result = verify_cache(cache)
    assert result.whole and "questions tier was deleted" in result.notes[0]


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_kind_of_damage_in_a_shard_is_named_and_one_bad_shard_hides_no_other(cache):
    path = cache / tar_name("samples", 0)
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    data = bytearray(path.read_bytes())
    data[member.offset_data] ^= 1
    path.write_bytes(data)
    (cache / manifest_name(1)).write_bytes(b"PAR1 nonsense")
    (cache / tar_name("samples", 2)).write_bytes((cache / tar_name("samples", 2)).read_bytes()[:4000])
    result = verify_cache(cache)
    lines = [str(finding) for finding in result.findings]
    assert result.damaged_shards == [0, 1, 2]
    assert lines[0].startswith(f"samples/00000.tar: sample 00000000-s0: member {member.name}: xxh3: expected ")
    assert lines[1].startswith("samples/00000.tar: sha256: expected ")
    assert any(line.startswith("manifest/00001.parquet: not a readable manifest") for line in lines)
    assert any(
        "members; the first that is missing is 00000008-s8.answer.arrow: expected 9, got 3" in line for line in lines
    )


def test_missing_files_are_named(cache):
    (cache / tar_name("samples", 0)).unlink()
    (cache / manifest_name(1)).unlink()
    (cache / HEAD_FILE).unlink()
    (cache / "teacher/config.json").unlink()
    lines = found(cache)
    assert [line.split(":")[0] for line in lines] == [
        HEAD_FILE, "teacher/config.json", "samples/00000.tar", "manifest/00001.parquet",
    ]  # fmt: skip
    assert "No such file" in lines[0] and "finished shards are kept" in lines[0]
    assert "missing, of a cache that says it is complete" in lines[3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format_version": 2}, "format version 2; this genrecal reads version 1"),
        ({"answer_codec": "int3"}, "codec 'int3'"),
        ({"answer_codec": "int8"}, "answer_codec: 3 of 3 shards disagree"),
        ({"hidden_size": 8}, "hidden_size: not that of head.safetensors: expected 16, got 8"),
        ({"top_k": 5}, "top_k: 3 of 3 shards disagree"),
        ({"sampled_targets": 4}, "sampled_targets: 3 of 3 shards disagree"),
        ({"sampled_targets": 0}, "sampled_targets: 3 of 3 shards disagree"),
        ({"sampled_targets": "all"}, "sampled_targets: expected a whole number, 0 or more, got 'all'"),
        ({"answers": {"kind": "guessed"}}, "answers: expected an object with a kind of given, greedy or sampled"),
        ({"vocab_size": 61}, "vocab_size: expected at most head_rows"),
        ({"num_samples": 12}, "num_samples: 1 of 3 shards disagree"),
        ({"samples_per_shard": 5}, "samples_per_shard: 3 of 3 shards disagree"),
        ({"num_shards": 4}, "num_shards: expected numbers that fit each other"),
        ({"question_fraction": 0.0}, "question_fraction: 3 of 3 shards disagree"),
        ({"question_fraction": "all"}, "question_fraction: expected a share from 0 to 1, got 'all'"),
        ({"image_backend": "other"}, "image_backend: expected pil or torchvision"),
        ({"image_background": "black"}, "image_background: expected white"),
        ({"teacher": 3}, "teacher: expected an object"),
        ({"totals": {"cached": 10}}, "totals.skipped: not the manifests' sum"),
        ({"totals": 3}, "totals: expected an object"),
    ],
)
def test_a_wrong_setting_is_held_against_cache_json_and_not_against_the_shards(cache, settings, words):
    change(cache, **settings)
    result = verify_cache(cache)
    assert any(words in str(finding) for finding in result.findings), result.findings
    assert result.damaged_shards == []
    with pytest.raises(DamageError, match=r"cache\.json: damaged, so nothing was moved"):
        quarantine(result)
    assert not (cache / "quarantine").exists()


def test_no_cache_at_all(tmp_path):
    with pytest.raises(FormatError, match=r"not a cache: it has no cache\.json; `genrecal cache` makes one"):
        verify_cache(tmp_path)


def test_a_cache_json_that_is_missing_is_not_to_be_deleted(cache):
    (cache / "cache.json").unlink()
    (line,) = found(cache)
    assert line == "cache.json: missing; run `genrecal cache` again with the same options: finished shards are kept"


def test_a_file_that_is_not_the_teachers_is_named(cache):
    (cache / "teacher/added_tokens.json").write_text("{}")
    (cache / "teacher/config.json").write_text("{}")
    description = read_cache_json(open_store(cache))
    description["teacher"]["files_sha256"]["../../secret"] = "00"
    write_cache_json(open_store(cache), description)
    lines = found(cache)
    assert [line.split(":")[0] for line in lines] == [
        "cache.json", "teacher/config.json", "teacher/added_tokens.json",
    ]  # fmt: skip


def test_shards_of_another_place_are_named(cache):
    for name in ("samples/{}.tar", "questions/{}.tar", "manifest/{}.parquet"):
        first, second = (cache / name.format(shard) for shard in ("00000", "00001"))
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1]), second.write_bytes(data[0])
    assert found(cache) == [
        "manifest/00000.parquet: it is another shard's: expected 0, got 1",
        "manifest/00001.parquet: it is another shard's: expected 1, got 0",
    ]
    with pytest.raises(DamageError, match="expected the manifest of shard 0, got that of shard 1"):
        open_cache(cache)[0]


@pytest.mark.parametrize("where", ["log_prob", "category", "manifests"])
def test_an_index_that_says_otherwise_than_the_manifests_is_found(cache, where):
    table = pq.read_table(cache / INDEX_FILE)
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    if where == "manifests":
        facts["manifests"][1] = "0" * 16
    else:
        column = table.column(where).to_pylist()
        column[3] = column[0]
        place, kind = table.column_names.index(where), table.schema.field(where).type
        table = table.set_column(place, where, pa.chunked_array([pa.array(column, pa.string()).cast(kind)])
                                 if where == "category" else pa.chunked_array([pa.array(column, kind)]))  # fmt: skip
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}), cache / INDEX_FILE)
    (line,) = found(cache)
    what = "its metadata is not the manifests'" if where == "manifests" else f"column {where} is not the manifests'"
    assert line == f"index.parquet: {what}; delete it and run `genrecal cache` again: finished shards are kept"
    if where == "manifests":
        with pytest.raises(
            DamageError, match="manifest/00001.parquet: expected content_xxh3 0000000000000000 by index"
        ):
            open_cache(cache)[5]


def test_a_missing_index_is_noted_and_nothing_else_changes(cache):
    before = [record.hidden().tobytes() for record in open_cache(cache)]
    (cache / INDEX_FILE).unlink()
    result = verify_cache(cache)
    assert result.whole and "no index.parquet: opening reads every manifest" in result.notes[0]
    assert [record.hidden().tobytes() for record in open_cache(cache)] == before


def edited(**values):
    def edit(rows):
        rows[0] |= values
        return rows

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited(key="00000099-x"), "key of row 0: expected 00000004 first, got '00000099-x'"),
        (edited(key="00000004.x"), "key of row 0"),
        (lambda rows: [rows[2], *rows[1:]], "key: expected one row, got 2 rows"),
        (lambda rows: rows[:3], "rows that are cached: expected 3, got 2"),
        (lambda rows: rows[::-1], "key of row 0"),
        (edited(turns=3), "turns of the conversation: expected 3, got 2"),
        (edited(images=0), "members: expected 3 and 0 images, got 00000004-s4.json"),
        (edited(images=2**31 - 1, turns=2**31 - 1), "members: expected 3 and 2147483647 images"),
        (edited(turns=2**31 - 1), "column turn: expected rising from 0 to 2147483646, got [0, 1]"),
        (edited(answer_tokens=1), "rows of the answers = answer_tokens + turns"),
        (edited(question_tokens=1), "rows of the questions = question_tokens"),
        (edited(has_question=False), "has_question: expected True, got False"),
        (edited(category="other"), "category of the conversation: expected other, got kind 0"),
        (edited(entropy=None), "columns entropy: expected values, got null"),
        (edited(status="done"), "status: expected cached or skipped"),
        (edited(status="skipped"), "a skipped row"),
    ],
)
def test_what_a_manifest_says_is_compared_with_the_members_and_the_plan(cache, edit, words):
    def whole(facts):
        table, _ = read_manifest((cache / manifest_name(1)).read_bytes(), where="manifest")
        facts["rows"] = len(edit([dict(row) for row in table.to_pylist()]))

    edit_manifest(cache, 1, edit, facts_too=whole)
    result = verify_cache(cache)
    assert any(words in str(finding) for finding in result.findings), [str(finding) for finding in result.findings]
    assert result.damaged_shards in ([1], []) and all(finding.shard in (1, None) for finding in result.findings)


def test_a_shard_that_was_written_with_other_options_is_named(cache, monkeypatch):
    monkeypatch.setattr(made_cache, "TOP_K", 3)
    write_shard(cache, 1, make_head())
    monkeypatch.undo()
    write_shard(cache, 2, make_head(), codec="int8")
    wide = make_head()
    result = verify_cache(cache)
    lines = [str(finding) for finding in result.findings]
    assert result.damaged_shards == [1, 2]
    assert lines[0] == "samples/00001.tar: sample 00000004-s4: column topk_ids: values a row: expected 4, got [3]"
    assert "manifest/00002.parquet: answer_codec: expected bf16, got int8" in lines
    assert any("sample 00000008-s8: codec in the Arrow metadata: expected bf16, got int8" in line for line in lines)
    head = type(wide)(weight=torch.cat([wide.weight, wide.weight], dim=1), vocab_size=wide.vocab_size)
    head.save(cache / HEAD_FILE)
    teacher = read_cache_json(open_store(cache))["teacher"]
    digest = hashlib.sha256((cache / HEAD_FILE).read_bytes()).hexdigest()
    change(cache, teacher=teacher | {"head_sha256": digest})
    lines = found(cache, deep=True)
    assert lines[0] == "cache.json: hidden_size: not that of head.safetensors: expected 32, got 16"
    assert any("do not fit the head of 60 rows and 32 columns" in line for line in lines)


def without_draws(answer):
    return dataclasses.replace(answer, sampled=None)


def with_draws(name, edit):
    def change_answer(answer):
        values = getattr(answer.sampled, name).copy()
        edit(values)
        return dataclasses.replace(answer, sampled=dataclasses.replace(answer.sampled, **{name: values}))

    return change_answer


def swap_first_two(ids):
    row = int((ids[:, 1] > 0).argmax())
    ids[row, :2] = ids[row, 1::-1]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without_draws, "column sample_ids: values a row: expected 5, got no such column"),
        (
            with_draws("counts", lambda counts: counts.__setitem__((0, 0), 9)),
            "sample_counts, their sum in a row: expected 5",
        ),
        (with_draws("ids", lambda ids: ids.__setitem__((0, 0), -1)), "ids of draws: expected 0 to 59, got -1 to"),
        (with_draws("ids", lambda ids: ids.__setitem__((0, -1), 60)), "ids of draws: expected 0 to 59"),
        (with_draws("ids", swap_first_two), "sample_ids: expected each drawn id once, rising, got another order"),
        (
            with_draws("counts", lambda counts: counts.__setitem__((0, slice(None)), counts[0, ::-1].copy())),
            "sample_ids: expected the drawn ids, then zeros with count 0, got another order",
        ),
        (
            with_draws("entropy", lambda e: e.__setitem__(0, np.nan)),
            "column entropy: expected finite, 0 or more, got nan",
        ),
        (
            with_draws("entropy", lambda e: e.__setitem__(0, -0.1)),
            "column entropy: expected finite, 0 or more, got -0.1",
        ),
        (with_draws("entropy", lambda e: e.__setitem__(0, 4.2)), "entropy of row 0, by its top k: expected "),
        (with_draws("entropy", lambda e: e.__setitem__(0, 0.0)), "entropy of row 0, by its top k: expected "),
    ],
)
def test_sampled_targets_that_cannot_be_are_named(cache, monkeypatch, edit, words):
    """In one shard, whose checksums are right."""

    def spoilt(index, head, **options):
        record = make_record(index, head, **options)
        return dataclasses.replace(record, answer=edit(record.answer))

    monkeypatch.setattr(made_cache, "make_record", spoilt)
    write_shard(cache, 1, make_head())
    result = verify_cache(cache)
    lines = [str(finding) for finding in result.findings]
    assert any(line.startswith("samples/00001.tar: sample 00000004-s4: ") and words in line for line in lines), lines
    assert result.damaged_shards == [1]


def test_a_manifest_that_was_edited_is_found_by_its_digest(cache):
    table = pq.read_table(cache / manifest_name(0))
    place = table.schema.get_field_index("log_prob")
    column = pa.array([0.0, *table.column("log_prob").to_pylist()[1:]], pa.float32())
    pq.write_table(table.set_column(place, "log_prob", column), (cache / manifest_name(0)))
    (line,) = found(cache)
    assert line.startswith("manifest/00000.parquet: content_xxh3 of its rows and facts: expected ")


def test_a_tar_that_was_written_by_another_tool_is_found(cache):
    """The same members at the same places, but one more behind them, or a header of another kind."""
    path = cache / tar_name("samples", 0)
    before = path.read_bytes()
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("00000000-s0.txt"), io.BytesIO())
    lines = found(cache)
    assert lines[0] == "samples/00000.tar: member '00000000-s0.txt' is not in the manifest" and len(lines) == 2
    path.write_bytes(before)
    with tarfile.open(path) as tar:
        info = tar.getmembers()[0]
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path.write_bytes(info.tobuf() + before[512:])
    lines = found(cache)
    assert lines[0].endswith("cannot be read after 0 members: member '00000000-s0.json' is not a plain file")


# ----------------------------------------------------------------------------------------------------------------- deep


def test_deep_figures_are_those_of_a_plain_computation(cache, monkeypatch):
    monkeypatch.setattr(verify, "LOGIT_BUDGET", 60 * 7)  # several chunks
    result = verify_cache(cache, deep=True)
    head, kl, agree = make_head(), [], []
    for record in open_cache(cache)[:PER_SHARD]:
        rows = record.answer_rows()
        again = head.logits(torch.from_numpy(rows.hidden)).double().log_softmax(-1).numpy()
        for i in np.flatnonzero(rows.predicts):
            p = np.exp(rows.topk_logits[i].astype(float) - rows.logsumexp[i])
            q = np.exp(again[i, rows.topk_ids[i]])
            kl.append((p * np.log(p / q)).sum() + (1 - p.sum()) * np.log((1 - p.sum()) / (1 - q.sum())))
            agree.append(again[i].argmax() == rows.topk_ids[i, 0])
    figures = result.deep[0]
    assert figures.rows == len(kl) and figures.top1_agreement == np.mean(agree)
    assert figures.kl_mean == pytest.approx(np.mean(kl), abs=1e-6)
    assert figures.kl_max == pytest.approx(np.max(kl), abs=1e-6)


def shifted(states):
    return np.roll(states, 1, axis=0)


def not_normalised(states):
    return states * np.float32(4)  # exact in bfloat16


@pytest.mark.parametrize("spoil", [shifted, not_normalised])
def test_states_that_do_not_give_the_logits_are_found(tmp_path, spoil):
    """In one shard it is that shard, in all it is what they have in common; checksums alone say nothing."""
    cache = make_cache(tmp_path / "one")
    write_shard(cache, 1, make_head(), hidden=spoil)
    write_index(cache)
    assert verify_cache(cache).whole
    result = verify_cache(cache, deep=True)
    assert result.damaged_shards == [1] and "its states do not give its logits" in str(result.findings[0])
    assert result.deep[1].kl_mean > 0.3 > 1e-3 > result.deep[0].kl_mean
    result = verify_cache(make_cache(tmp_path / "all", hidden=spoil), deep=True)
    assert "it does not give the stored logits of 3 of 3 shards" in str(result.findings[0])
    assert quarantine(result) == []


def test_another_order_of_the_heads_rows_is_found(cache):
    head = make_head()
    type(head)(weight=head.weight.flip(0), vocab_size=head.vocab_size).save(cache / HEAD_FILE)
    assert [line.split(":")[0] for line in found(cache)] == [HEAD_FILE]
    teacher = read_cache_json(open_store(cache))["teacher"]
    change(cache, teacher=teacher | {"head_sha256": hashlib.sha256((cache / HEAD_FILE).read_bytes()).hexdigest()})
    assert verify_cache(cache).whole
    (line,) = found(cache, deep=True)
    assert line.startswith("head.safetensors: it does not give the stored logits of 3 of 3 shards")


def test_the_limit_is_what_is_asked_for(tmp_path):
    cache = make_cache(tmp_path / "cache", codec="int4")
    mean = max(figures.kl_mean for figures in verify_cache(cache, deep=True).deep)
    assert verify_cache(cache, deep=True, max_kl=mean).whole
    assert not verify_cache(cache, deep=True, max_kl=mean * 0.99).whole


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("data") / "d", mixed_samples(12))


@pytest.mark.parametrize(
    "wrong", [("a red", "a▁red"), ("2 2", "2  2"), ("7 of", "8 of"), ("中文", "中"), ("3 3 3", "3 3 3 3")]
)
def test_an_answer_that_its_tokens_do_not_spell_is_found_and_repaired(teacher, data, tmp_path, monkeypatch, wrong):
    """Written as it would be by a job that gets the text of tokens wrong: every checksum is right."""
    options = CacheOptions(samples_per_shard=4)
    run_cache_job(teacher, open_samples([data]), tmp_path / "right", options)
    assert verify_cache(tmp_path / "right", deep=True).whole
    to_json = Sample.to_json
    with monkeypatch.context() as patch:
        patch.setattr(
            Sample, "to_json", lambda self: json.loads(json.dumps(to_json(self)).replace(*map(escaped, wrong)))
        )
        run_cache_job(teacher, open_samples([data]), tmp_path / "wrong", options)
    assert verify_cache(tmp_path / "wrong").whole
    result = verify_cache(tmp_path / "wrong", deep=True)
    assert result.damaged_shards == [0, 1, 2] and len(result.findings) == 3
    assert "sample 0000000" in str(result.findings[0])
    assert "not what its tokens stand for" in str(result.findings[0])
    quarantine(result)
    run_cache_job(teacher, open_samples([data]), tmp_path / "wrong", options)
    again = {name: content for name, content in tree(tmp_path / "wrong").items() if "quarantine" not in name}
    assert again == tree(tmp_path / "right")


def escaped(text):
    return json.dumps(text)[1:-1]


# --------------------------------------------------------------------------------------------------------------- repair


def damage(cache, shard):
    path = cache / tar_name("samples", shard)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_damaged_shards_are_set_aside_and_no_earlier_ones_overwritten(cache):
    before = tree(cache)
    damage(cache, 1)
    spoilt = tree(cache)["samples/00001.tar"]
    assert quarantine(verify_cache(cache)) == [f"{cache}/quarantine/00001.0"]
    after = tree(cache)
    moved = {f"{name}.tar": before[f"{name}/00001.tar"] for name in ("samples", "questions")}
    moved |= {"manifest.parquet": before["manifest/00001.parquet"], "samples.tar": spoilt}
    assert {
        name.removeprefix("quarantine/00001.0/"): data for name, data in after.items() if "quarantine" in name
    } == moved
    assert {name: data for name, data in after.items() if "00001" not in name} == {
        name: data for name, data in before.items() if "00001" not in name
    }
    with pytest.raises(DamageError, match="1 of 3 manifests"):
        open_cache(cache)
    write_shard(cache, 1, make_head())
    assert verify_cache(cache).whole
    damage(cache, 1)
    assert quarantine(verify_cache(cache)) == [f"{cache}/quarantine/00001.1"]
    assert len(tree(cache / "quarantine")) == 6


def test_after_repair_the_cache_job_makes_the_same_bytes(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=4, answer_codec="bf16", question_codec="bf16", question_fraction=0.5)
    run_cache_job(teacher, open_samples([data]), tmp_path, options)
    before = tree(tmp_path)
    result = verify_cache(tmp_path, deep=True)
    assert result.whole, [str(finding) for finding in result.findings]
    assert all(figures.kl_mean < 1e-4 and figures.top1_agreement > 0.95 for figures in result.deep)
    for spoil in (
        lambda: (damage(tmp_path, 0), (tmp_path / tar_name("questions", 2)).unlink()),
        lambda: (tmp_path / manifest_name(1)).write_bytes((tmp_path / manifest_name(1)).read_bytes()[:-20]),
        lambda: (tmp_path / manifest_name(1)).unlink(),
    ):
        spoil()
        found = verify_cache(tmp_path)
        assert not found.whole
        assert len(quarantine(found)) == len(found.damaged_shards)
        report = run_cache_job(teacher, open_samples([data]), tmp_path, options)
        assert report.shards_done == len(found.damaged_shards)
        assert {name: content for name, content in tree(tmp_path).items() if "quarantine" not in name} == before
        assert verify_cache(tmp_path).whole


def test_what_to_do_for_damage_outside_the_shards_helps(teacher, data, tmp_path):
    """Delete cache.json (and the head), run again: the shards are kept, the bytes are the same."""
    options = CacheOptions(samples_per_shard=4)
    run_cache_job(teacher, open_samples([data]), tmp_path, options)
    before = tree(tmp_path)
    (tmp_path / "teacher/config.json").write_text("{}")
    (tmp_path / HEAD_FILE).write_bytes(b"")
    lines = found(tmp_path)
    assert len(lines) == 2 and all("cache.json" in line and "finished shards are kept" in line for line in lines)
    for name in ("cache.json", HEAD_FILE):
        (tmp_path / name).unlink()
    assert run_cache_job(teacher, open_samples([data]), tmp_path, options).shards_done == 0
    assert tree(tmp_path) == before


# --------------------------------------------------------------------------------------------------------- command line


def run(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, args)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return stop.value.code, out


def test_the_command_says_what_it_found_and_ends_with_0_or_1(cache, tmp_path, capsys):
    status, out = run(capsys, cache, "--deep", "--device", "cpu")
    assert status == 0 and out.splitlines()[-1].startswith(f"{cache}: whole: 3 of 3 shards, 10 samples cached")
    assert out.splitlines()[0].startswith("shard  target rows  mean KL")
    damage(cache, 2)
    status, out = run(capsys, cache)
    assert status == 1 and out.splitlines()[0].startswith("samples/00002.tar: ")
    assert f"`genrecal verify {cache} --repair`" in out.splitlines()[-1]
    status, out = run(capsys, cache, "--json")
    content = json.loads(out)
    assert status == 1 and not content["whole"] and content["quarantined"] == []
    assert {finding["shard"] for finding in content["findings"]} == {2} and content["cached"] == 10
    status, out = run(capsys, cache, "--repair")
    assert status == 1 and f"set aside: {cache}/quarantine/00002.0" in out.splitlines()
    status, out = run(capsys, tmp_path / "none")
    assert status == 1 and not out
    assert run(capsys, cache, "--deep", "--max-kl", "-1")[0] == 2
