"""`genrecal verify`: what it finds, what it leaves alone, and that a repaired cache is made again byte for byte."""

import dataclasses
import hashlib
import json
import tarfile

import made_cache
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import PER_SHARD, finish, make_cache, make_head, make_record, tree, write_shard

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.errors import DamageError, FormatError
from genrecal.samples import Sample, open_samples
from genrecal.shards import verify
from genrecal.shards.head import HEAD_FILE
from genrecal.shards.index import INDEX_FILE
from genrecal.shards.layout import CACHE_FILE, manifest_name, read_cache_json, tar_name, write_cache_json
from genrecal.shards.manifest import ManifestRow, Member, manifest_bytes, read_manifest
from genrecal.shards.reader import open_cache
from genrecal.shards.storage import open_store
from genrecal.shards.verify import quarantine, verify_cache


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


def change(cache, **settings):
    """Write cache.json with other settings and the digest that fits them."""
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
    assert found(cache) == ["questions/00001.tar: missing"]
    for shard in (0, 2):
        (cache / tar_name("questions", shard)).unlink()
    result = verify_cache(cache)
    assert result.whole and "questions tier was deleted" in result.notes[0]


def test_a_missing_index_is_noted_and_nothing_else_changes(cache):
    before = [record.hidden().tobytes() for record in open_cache(cache)]
    (cache / INDEX_FILE).unlink()
    result = verify_cache(cache)
    assert result.whole and "no index.parquet: opening reads every manifest" in result.notes[0]
    assert [record.hidden().tobytes() for record in open_cache(cache)] == before


def test_no_cache_at_all(tmp_path):
    with pytest.raises(FormatError, match=r"not a cache: it has no cache\.json; `genrecal cache` writes one"):
        verify_cache(tmp_path)


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_kind_of_damage_in_a_shard_is_named_and_one_damaged_shard_hides_no_other(cache):
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
    assert result.damaged_shards == [0, 1, 2] and len(lines) == 5
    assert lines[0].startswith(f"samples/00000.tar: sample 00000000-s0: member {member.name}: xxh3: expected ")
    assert lines[1].startswith("samples/00000.tar: sha256: expected ")
    assert lines[2].startswith("manifest/00001.parquet: not a readable manifest")
    assert (
        lines[3].startswith("samples/00002.tar: sample 00000008-s8: member 00000008-s8.")
        and "of 4000 bytes" in lines[3]
    )
    assert lines[4].startswith("samples/00002.tar: sha256: expected ")


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
        ({"sampled_targets": "all"}, "sampled_targets: expected a whole number from 0 to 65535, got 'all'"),
        ({"answers": {"kind": "guessed"}}, "answers: expected an object with a kind of given, greedy or sampled"),
        ({"vocab_size": 61}, "vocab_size: expected at most head_rows"),
        ({"num_shards": 4}, "num_shards: expected numbers that fit each other"),
        ({"question_fraction": "all"}, "question_fraction: expected a share from 0 to 1, got 'all'"),
        ({"image_backend": "other"}, "image_backend: expected pil or torchvision"),
        ({"image_background": "black"}, "image_background: expected white"),
        ({"teacher": 3}, "teacher: expected an object"),
        ({"teacher": {"name": "", "dtype": "", "files_sha256": {"../../secret": ""}}}, "teacher: expected an object"),
        ({"totals": {"cached": 9}}, "totals: cached: not the manifests' sum"),
        ({"totals": 3}, "totals: expected an object"),
    ],
)
def test_settings_that_cannot_be_are_named_and_no_shard_is_moved(cache, settings, words):
    """Also where the digest fits them."""
    change(cache, **settings)
    result = verify_cache(cache)
    assert any(words in str(finding) for finding in result.findings), result.findings
    assert result.damaged_shards == []
    with pytest.raises(DamageError, match=r"cache\.json: damaged, so nothing was moved"):
        quarantine(result)
    assert not (cache / "quarantine").exists()


@pytest.mark.parametrize("value", [{"name": "other"}, {"top_k": 5}, {"batch_tokens": 99}, {"data": []}, {"new": 1}])
def test_any_edit_of_cache_json_is_found_by_its_digest(cache, value):
    (cache / CACHE_FILE).write_text(json.dumps(json.loads((cache / CACHE_FILE).read_text()) | value))
    result = verify_cache(cache)
    (line,) = map(str, result.findings)
    assert line.startswith("cache.json: content_xxh3 of its other content; delete cache.json and run")
    assert "nothing else was checked" in result.notes[0]


def test_a_cache_json_that_is_missing_is_not_to_be_deleted(cache):
    (cache / "cache.json").unlink()
    (line,) = found(cache)
    assert line == "cache.json: missing; run `genrecal cache` again with the same options: finished shards are kept"


def test_a_file_that_is_not_the_teachers_is_named(cache):
    (cache / "teacher/added_tokens.json").write_text("{}")
    (cache / "teacher/config.json").write_text("{}")
    assert [line.split(":")[0] for line in found(cache)] == ["teacher/config.json", "teacher/added_tokens.json"]


def test_shards_of_another_place_are_named(cache):
    for name in ("samples/{}.tar", "questions/{}.tar", "manifest/{}.parquet"):
        first, second = (cache / name.format(shard) for shard in ("00000", "00001"))
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1]), second.write_bytes(data[0])
    assert found(cache) == [
        "manifest/00000.parquet: expected the manifest of shard 0, got that of shard 1",
        "manifest/00001.parquet: expected the manifest of shard 1, got that of shard 0",
    ]
    with pytest.raises(DamageError, match="expected the manifest of shard 0, got that of shard 1"):
        open_cache(cache)[0]


def test_an_index_that_was_changed_is_found(cache):
    table = pq.read_table(cache / INDEX_FILE)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"more": b"1"}), cache / INDEX_FILE)
    (line,) = found(cache)
    assert line.startswith("index.parquet: sha256; delete it and run `genrecal cache` again with the same options")


def edited(**values):
    return lambda rows: [rows[0] | values, *rows[1:]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows: [rows[2], *rows[1:]], "keys: expected "),
        (lambda rows: rows[::-1], "keys: expected "),
        (lambda rows: rows[:3], "rows that are cached: expected 3, got 2"),
        (lambda rows: rows[:3], "rows, by the plan: expected 4, got 3"),
        (edited(turns=3), "turns of the conversation: expected 3, got 2"),
        (edited(turns=2**31 - 1), "answer file: turns: expected 2147483647, got 2"),
        (edited(images=0), "number of images of the conversation: expected 0, got 1"),
        (edited(answer_tokens=1), "answer file: rows: expected 3, got"),
        (edited(question_tokens=1), "question file: rows: expected 1, got"),
        (edited(category="other"), "category of the conversation: expected other, got kind 0"),
        (edited(status="done"), "rows that are cached or skipped: expected 4, got 3"),
    ],
)
def test_what_a_manifest_says_is_compared_with_the_members_and_the_plan(cache, edit, words):
    """Also where its digest fits; with an index, that finds it too."""

    def whole(facts):
        table, _ = read_manifest((cache / manifest_name(1)).read_bytes(), where="manifest")
        facts["rows"] = len(edit(table.to_pylist()))

    edit_manifest(cache, 1, edit, facts_too=whole)
    result = verify_cache(cache)
    assert result.findings[0].what == "content_xxh3 of its rows and facts"
    assert any(words in str(finding) for finding in result.findings), [str(finding) for finding in result.findings]
    (cache / INDEX_FILE).unlink()
    result = verify_cache(cache)
    assert any(words in str(finding) for finding in result.findings) and result.damaged_shards == [1]


def test_a_shard_that_was_written_with_other_options_is_named(cache, monkeypatch):
    monkeypatch.setattr(made_cache, "TOP_K", 3)
    write_shard(cache, 1, make_head())
    monkeypatch.undo()
    write_shard(cache, 2, make_head(), codec="int8")
    finish(cache)
    result = verify_cache(cache)
    lines = [str(finding) for finding in result.findings]
    assert result.damaged_shards == [1, 2]
    assert lines[0] == "samples/00001.tar: sample 00000004-s4: answer file: logits per row: expected 4, got 3"
    assert any(line.startswith("manifest/00002.parquet: codecs: expected {'answer': 'bf16'") for line in lines)
    assert "samples/00002.tar: sample 00000008-s8: answer file: codec: expected bf16, got int8" in lines


def values(**changed):
    """An edit of answer rows, or of their draws: a row's first value is another one."""

    def edit(answer):
        for name, value in changed.items():
            part = answer.sampled if hasattr(answer.sampled, name) else answer
            array = getattr(part, name).copy()
            array[(0,) * array.ndim] = value
            if part is answer:
                answer = dataclasses.replace(answer, **{name: array})
            else:
                answer = dataclasses.replace(answer, sampled=dataclasses.replace(part, **{name: array}))
        return answer

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda answer: dataclasses.replace(answer, sampled=None), "draws per row: expected 5, got 0"),
        (values(counts=9), "columns with values that cannot be: expected [], got ['sample_counts']"),
        (values(ids=-1), "got ['sample_ids']"),
        (values(ids=60), "got ['sample_ids']"),
        (values(topk_ids=60), "got ['topk_ids']"),
        (values(target_id=60), "got ['target_id']"),
        (values(target_id=-1), "answer file: rows with a target: expected "),
        (values(topk_logits=np.inf), "got ['topk_logits']"),
        (values(logsumexp=np.nan), "got ['logsumexp']"),
        (values(entropy=np.nan), "got ['entropy']"),
        (values(position=9), "turns and positions: expected rising"),
    ],
)
def test_values_that_cannot_be_are_named(cache, monkeypatch, edit, words):
    """In one shard, all of whose digests are right."""

    def spoilt(index, head, **options):
        record = make_record(index, head, **options)
        return dataclasses.replace(record, answer=edit(record.answer))

    monkeypatch.setattr(made_cache, "make_record", spoilt)
    write_shard(cache, 1, make_head())
    finish(cache)
    result = verify_cache(cache)
    lines = [str(finding) for finding in result.findings]
    assert any(line.startswith("samples/00001.tar: sample 00000004-s4: ") and words in line for line in lines), lines
    assert result.damaged_shards == [1]


def test_a_manifest_that_was_edited_is_found_by_its_digest(cache):
    table = pq.read_table(cache / manifest_name(0))
    place = table.schema.get_field_index("log_prob")
    column = table.column("log_prob").fill_null(0).combine_chunks().to_numpy() + np.float32(1)
    pq.write_table(table.set_column(place, "log_prob", [column]), cache / manifest_name(0))
    (line,) = found(cache)
    assert line.startswith("manifest/00000.parquet: content_xxh3 of its rows and facts: expected ")


def test_a_tar_that_another_tool_appended_to_is_found(cache):
    with tarfile.open(cache / tar_name("samples", 0), "a") as tar:
        tar.addfile(tarfile.TarInfo("00000000-s0.txt"))
    (line,) = found(cache)
    assert line.startswith("samples/00000.tar: sha256: expected ")


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
    """Checksums alone say nothing."""
    cache = make_cache(tmp_path / "one")
    write_shard(cache, 1, make_head(), hidden=spoil)
    finish(cache)
    assert verify_cache(cache).whole
    result = verify_cache(cache, deep=True)
    assert result.damaged_shards == [1] and "its states do not give its logits" in str(result.findings[0])
    assert result.deep[1].kl_mean > 0.3 > 1e-3 > result.deep[0].kl_mean


def test_another_order_of_the_heads_rows_is_found(cache):
    head = make_head()
    type(head)(weight=head.weight.flip(0), vocab_size=head.vocab_size).save(cache / HEAD_FILE)
    assert [line.split(":")[0] for line in found(cache)] == [HEAD_FILE]
    teacher = read_cache_json(open_store(cache))["teacher"]
    change(cache, teacher=teacher | {"head_sha256": hashlib.sha256((cache / HEAD_FILE).read_bytes()).hexdigest()})
    assert verify_cache(cache).whole
    result = verify_cache(cache, deep=True)
    assert result.damaged_shards == [0, 1, 2]
    assert all("if most shards say so: a wrong head" in str(finding) for finding in result.findings)


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
