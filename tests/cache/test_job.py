"""The cache job with a tiny real teacher: what is written, skipped, resumed and refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava
from made_cache import tree

from genrecal.cache.batching import batches_by_length
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher, LiveTeacher
from genrecal.errors import DataError, ModelError, UsageError
from genrecal.inspect import summarize
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("data") / "d", mixed_samples(20))


def test_writes_what_it_says(teacher, data, tmp_path):
    report = run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(samples_per_shard=8, top_k=7))
    assert (report.shards_done, report.cached, report.skipped) == (3, 20, 0)
    cache = open_cache(tmp_path)
    assert cache.is_complete and cache.description["totals"]["cached"] == 20
    assert [record.sample.answers for record in cache] == [sample.answers for sample in mixed_samples(20)]
    assert cache[0].answer_rows().topk_ids.shape[1] == 7
    files = set(tree(tmp_path))
    shards = {f"{folder}/0000{i}.{kind}" for i in range(3) for folder, kind in
              (("samples", "tar"), ("questions", "tar"), ("manifest", "parquet"))}  # fmt: skip
    teacher_files = {
        f"teacher/{name}"
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "processor_config.json",
        )
    }
    assert files == shards | teacher_files | {"cache.json", "head.safetensors", "index.parquet"}
    for name in teacher_files:
        assert (tmp_path / name).read_bytes() == (Path(teacher.path) / name.removeprefix("teacher/")).read_bytes()
    assert torch.equal(cache.head().weight, teacher.head.weight)


def test_a_turn_with_loss_false_is_context_and_the_others_have_the_same_rows(teacher, tmp_path):
    [whole] = [sample for sample in mixed_samples(4) if len(sample.answers) == 3]
    path, records = write_llava(tmp_path / "data", [whole]), {}
    content = json.loads(path.read_text())
    for name in ("whole", "part"):
        content[0]["conversations"][3] |= {"loss": name == "whole"}
        path.write_text(json.dumps(content))
        run_cache_job(teacher, open_samples([path]), tmp_path / name, CacheOptions())
        [records[name]] = open_cache(tmp_path / name)
        assert verify_cache(tmp_path / name, deep=True).whole
    assert records["part"].sample.answers == ("1", "3 3 3") and records["part"].row["turns"] == 2
    assert records["part"].sample.messages[3].text == "2 2"
    rows = {name: record.answer_rows() for name, record in records.items()}
    kept = rows["whole"].turn != 1
    for field in ("position", "target_id", "target_logit", "logsumexp"):
        assert np.array_equal(getattr(rows["whole"], field)[kept], getattr(rows["part"], field))


def test_summary_is_true(teacher, data, tmp_path):
    run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(samples_per_shard=8, question_fraction=0.5))
    summary = summarize(open_cache(tmp_path))
    samples = mixed_samples(20)
    encoded = [teacher.encode(sample) for sample in samples]
    assert (summary.cached, summary.skipped, summary.shards) == (20, 0, (3, 3))
    assert summary.answer_tokens == sum(sum(item.answer_lengths) for item in encoded)
    assert summary.question_tokens == sum(sum(item.question_lengths) for item in encoded)
    assert summary.images == sum(len(sample.images) for sample in samples)
    assert summary.turns == sum(len(sample.answers) for sample in samples)
    assert summary.categories == {"test": 20} and summary.sources == {"made": 20}
    assert 0 < summary.with_question < 20
    on_disk = {tier: sum(p.stat().st_size for p in (tmp_path / tier).iterdir()) for tier in ("samples", "questions")}
    assert {tier: summary.bytes[f"{tier} tars"] for tier in on_disk} == on_disk


def test_two_runs_give_the_same_bytes_and_a_third_does_nothing(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=8)
    for name in ("a", "b"):
        run_cache_job(teacher, open_samples([data]), tmp_path / name, options)
    before = tree(tmp_path / "a")
    assert before == tree(tmp_path / "b")
    report = run_cache_job(teacher, open_samples([data]), tmp_path / "a", options)
    assert (report.shards_done, report.shards_found, report.cached) == (0, 3, 20)
    assert tree(tmp_path / "a") == before


@pytest.mark.parametrize("lost", ["manifest/00001.parquet", "samples/00001.tar", "cut"])
def test_only_what_is_missing_is_done_again(teacher, data, tmp_path, lost):
    options = CacheOptions(samples_per_shard=8)
    run_cache_job(teacher, open_samples([data]), tmp_path, options)
    before = tree(tmp_path)
    if lost == "cut":
        path = tmp_path / "samples/00001.tar"
        path.write_bytes(path.read_bytes()[:3000])
    else:
        (tmp_path / lost).unlink()
    report = run_cache_job(teacher, open_samples([data]), tmp_path, options)
    assert (report.shards_done, report.shards_found) == (1, 2)
    assert tree(tmp_path) == before


def test_sampled_targets_are_written_beside_the_top_k(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=8, top_k=7, draws=20)
    for name in ("a", "b"):
        run_cache_job(teacher, open_samples([data]), tmp_path / name, options)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    run_cache_job(teacher, open_samples([data]), tmp_path / "without", CacheOptions(samples_per_shard=8, top_k=7))
    cache, without = open_cache(tmp_path / "a"), open_cache(tmp_path / "without")
    assert (cache.draws, without.draws) == (20, 0)
    for record, other in zip(cache, without, strict=True):
        added = set(record.answer.column_names) - set(other.answer.column_names)
        assert added == {"sample_ids", "sample_counts", "entropy"}
        assert record.answer.drop_columns(sorted(added)).equals(other.answer)
    live = LiveTeacher(teacher, top_k=7, draws=20)
    for record in cache:
        (made,) = live.records([record.sample], questions=[False])
        rows, stored = made.answer.sampled, record.answer_rows().sampled
        same = (rows.ids == stored.ids).all(1) & (rows.counts == stored.counts).all(1)
        assert same.sum() >= len(same) - 1  # the batch's width moves float32 sums in their last digits
        assert np.allclose(rows.entropy, stored.entropy, atol=1e-5)


def test_a_cache_says_whose_answers_it_holds(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=8)
    run_cache_job(teacher, open_samples([data], limit=8), tmp_path, options)
    assert open_cache(tmp_path).description["answers"] == {"kind": "given"}
    assert not open_cache(tmp_path).answers.written_by_teacher
    greedy = dataclasses.replace(options, answers=AnswerSource(kind="greedy", max_tokens=9))
    with pytest.raises(UsageError, match=r"answers was {'kind': 'given'}, now {'kind': 'greedy', 'max_tokens': 9}"):
        run_cache_job(teacher, open_samples([data], limit=8), tmp_path, greedy)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "guessed"}, "kind 'guessed': expected one of given, greedy, sampled"),
        ({"kind": "greedy", "max_tokens": 1}, "--max-answer-tokens 1: expected at least 2"),
        ({"kind": "sampled", "max_tokens": 9}, "--generate-temperature 0.0: expected a number above 0"),
        ({"kind": "sampled", "max_tokens": 9, "temperature": 1.0, "top_p": 1.5}, "--generate-top-p 1.5: expected"),
    ],
)
def test_answers_that_cannot_be_written_so_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        AnswerSource(**settings)
    with pytest.raises(ValueError, match="kind|expected"):
        AnswerSource.from_json(settings)


def test_answer_sources_say_what_they_are():
    sampled = AnswerSource(kind="sampled", max_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    for source in (AnswerSource(), AnswerSource(kind="greedy", max_tokens=9), sampled):
        assert AnswerSource.from_json(json.loads(json.dumps(source.to_json()))) == source
    assert str(sampled) == "the teacher's own, sampled, temperature 0.7, top-p 0.9, seed 3, up to 9 tokens"
    for wrong in (None, {}, {"kind": "greedy"}, {"kind": "given", "max_tokens": 9}, sampled.to_json() | {"seed": 0.5}):
        with pytest.raises(ValueError, match="expected|not a number"):
            AnswerSource.from_json(wrong)


@pytest.mark.parametrize("draws", [-1, 2**16])
def test_more_draws_than_a_count_can_hold_are_refused(draws):
    with pytest.raises(UsageError, match=rf"--targets sample:{draws}: expected 1 to 65535"):
        CacheOptions(draws=draws)


def test_question_tier_may_be_deleted_after_stage_1(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=8)
    run_cache_job(teacher, open_samples([data]), tmp_path, options)
    for path in (tmp_path / "questions").iterdir():
        path.unlink()
    assert run_cache_job(teacher, open_samples([data]), tmp_path, options).shards_done == 0
    assert open_cache(tmp_path)[0].record(question=False).question is None


def test_no_question_tier(teacher, data, tmp_path):
    run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(question_codec="none"))
    assert not (tmp_path / "questions").exists()
    assert not any(record.has_question for record in open_cache(tmp_path))


@pytest.mark.parametrize("seed", [0, 1])
def test_question_fraction_is_a_pure_choice_by_key(seed):
    options = CacheOptions(question_fraction=0.3, question_seed=seed)
    kept = [options.keeps_question(f"{i:08d}") for i in range(4000)]
    assert kept == [options.keeps_question(f"{i:08d}") for i in range(4000)]
    assert abs(np.mean(kept) - 0.3) < 0.03
    more = CacheOptions(question_fraction=0.6, question_seed=seed)
    assert all(more.keeps_question(f"{i:08d}") for i, keep in enumerate(kept) if keep)  # a larger share adds


def spoil(data, folder, *indices):
    """A copy of the data in which some records cannot be used."""
    records = json.loads(data.read_text())
    for record in records:
        record["image"] = [str(data.parent / name) for name in record.get("image", [])]
    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    for index in indices:
        records[index]["image"] = [str(broken)]
        records[index]["conversations"] = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    path = folder / "spoilt.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def test_bad_samples_are_skipped_with_their_reason_and_counted(teacher, data, tmp_path):
    records = json.loads(spoil(data, tmp_path, 3, 11).read_text())
    del records[5]["conversations"][1]
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(records, indent=1))
    options = CacheOptions(samples_per_shard=8, max_skip=0.2)
    report = run_cache_job(teacher, open_samples([path]), tmp_path / "cache", options)
    assert (report.cached, report.skipped) == (17, 3)
    table = open_cache(tmp_path / "cache").manifest().to_pylist()
    assert [row["status"] for row in table].count("skipped") == 3 and len(table) == 20
    for index, reason in (
        (3, "cannot be decoded"),
        (5, "turns alternate"),
        (11, "cannot be decoded"),
    ):
        assert table[index]["status"] == "skipped"
        assert table[index]["reason"].startswith(f"{path}:")
        import re

        assert re.search(reason, table[index]["reason"])
    assert sum(summarize(open_cache(tmp_path / "cache")).skip_reasons.values()) == 3


def test_too_many_bad_samples_fail_the_job_naming_reasons(teacher, data, tmp_path):
    path = spoil(data, tmp_path, 3, 11)
    with pytest.raises(DataError, match=r"of 20 samples.*--max-skip.*cannot be decoded"):
        run_cache_job(teacher, open_samples([path]), tmp_path / "cache", CacheOptions(samples_per_shard=8))


def test_long_conversations_are_skipped(teacher, data, tmp_path):
    lengths = [len(teacher.encode(sample)) for sample in mixed_samples(20)]
    limit = sorted(lengths)[10]
    report = run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(max_tokens=limit, max_skip=1.0))
    assert report.skipped == sum(length > limit for length in lengths) > 0


def test_another_job_in_the_same_directory_is_refused(teacher, data, tmp_path, tiny):
    run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(samples_per_shard=8))
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="top_k was 64, now 5"):
        run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions(samples_per_shard=8, top_k=5))
    with pytest.raises(UsageError, match="num_samples was 20, now 4"):
        run_cache_job(teacher, open_samples([data], limit=4), tmp_path, CacheOptions(samples_per_shard=8))
    other = HFTeacher.load(tiny("internvl_qwen2"), dtype=torch.float32)
    with pytest.raises(UsageError, match="teacher was"):
        run_cache_job(other, open_samples([data]), tmp_path, CacheOptions(samples_per_shard=8))
    assert tree(tmp_path) == before


def test_head_of_a_job_that_was_cut_off_before_its_description_is_not_kept(teacher, data, tmp_path, tiny):
    """Killed between head.safetensors and cache.json, then run with another teacher: the head is the other's."""
    HFTeacher.load(tiny("internvl_qwen2"), dtype=torch.float32).head.save(tmp_path / "head.safetensors")
    run_cache_job(teacher, open_samples([data]), tmp_path, CacheOptions())
    assert torch.equal(open_cache(tmp_path).head().weight, teacher.head.weight)


def test_a_teacher_that_is_not_what_it_is_taken_for_is_refused_before_anything_is_written(data, tmp_path, tiny):
    """Its head is swapped after loading: states and logits no longer belong together."""
    broken = HFTeacher.load(tiny("qwen2_5_vl"), dtype=torch.float32)
    head = torch.nn.Linear(*reversed(broken.vlm.head.weight.shape), bias=False)
    broken.vlm = dataclasses.replace(broken.vlm, head=head)
    with pytest.raises(ModelError, match="would not reproduce this teacher"):
        run_cache_job(broken, open_samples([data]), tmp_path, CacheOptions())
    assert not list(tmp_path.glob("manifest/*")) and not list(tmp_path.glob("samples/*"))


def test_batches_hold_like_lengths_within_the_budget():
    lengths = dict(enumerate(np.random.default_rng(0).integers(5, 100, 200).tolist()))
    batches = list(batches_by_length(lengths, 300))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 300 for batch in batches)
    assert list(batches_by_length({0: 5, 1: 1000}, 100)) == [[1], [0]]  # a long one goes alone, and first


def test_fidelity_of_every_shard_stands_in_its_manifest(teacher, data, tmp_path):
    run_cache_job(teacher, open_samples([data]), tmp_path / "lossy", CacheOptions(samples_per_shard=8))
    lossless = CacheOptions(samples_per_shard=8, answer_codec="bf16", question_codec="bf16")
    run_cache_job(teacher, open_samples([data]), tmp_path / "lossless", lossless)
    lossy, exact = open_cache(tmp_path / "lossy"), open_cache(tmp_path / "lossless")
    for facts in lossy.shard_facts.values():
        answer, question = facts["fidelity"]["answer"], facts["fidelity"]["question"]
        assert 0 < answer["kl_mean"] < question["kl_mean"] < 1
        assert answer["cosine"] > 0.999 and question["cosine"] > 0.98
    assert all(facts["fidelity"]["answer"]["kl_mean"] == 0 for facts in exact.shard_facts.values())
    states = [np.concatenate([record.hidden() for record in cache]) for cache in (exact, lossy)]
    relative = np.linalg.norm(states[1] - states[0]) / np.linalg.norm(states[0])
    shown = summarize(lossy).fidelity
    each = [facts["fidelity"]["answer"] for facts in lossy.shard_facts.values()]
    assert shown["answer"].kl_mean == pytest.approx(
        np.average([f["kl_mean"] for f in each], weights=[f["rows"] for f in each])
    )
    assert shown["question"].kl_p99 == max(f["fidelity"]["question"]["kl_p99"] for f in lossy.shard_facts.values())
    assert summarize(exact).fidelity == {}
    assert relative == pytest.approx(lossy.shard_facts[0]["fidelity"]["answer"]["relative_l2"], rel=0.3)


def test_a_codec_over_the_kl_budget_writes_no_shard(teacher, data, tmp_path):
    options = CacheOptions(samples_per_shard=8, answer_codec="int4", kl_budget=1e-6)
    with pytest.raises(
        DataError, match=r"shard \d: answer states as int4 cost a mean KL of .* over the budget of 1e-06"
    ):
        run_cache_job(teacher, open_samples([data]), tmp_path, options)
    assert not list(tmp_path.glob("manifest/*")) and not list(tmp_path.glob("*/*.tar"))
