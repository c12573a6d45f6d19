"""The teacher's own answers, with the demo's teacher: what is written, that it is cached like given answers, and when not."""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_cache import tree
from tokenizers import AddedToken

import genrecal.demo.data
from genrecal.cache.answers import up_to_turn
from genrecal.cache.draws import uniforms
from genrecal.cache.generate import answer_numbers, answer_text, choose
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.errors import DamageError, DataError, SampleError
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.shards.verify import verify_cache
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

TEACHER = Path(genrecal.demo.data.__file__).parent / "assets" / "teacher"
GREEDY = AnswerSource(kind="greedy", max_tokens=64)
SAMPLED = AnswerSource(kind="sampled", max_tokens=64, temperature=1.5, top_p=0.9, seed=7)
OPTIONS = CacheOptions(answers=GREEDY, samples_per_shard=4, batch_tokens=1500, top_k=6)


@pytest.fixture(scope="module")
def teacher():
    return HFTeacher.load(TEACHER, dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations of one turn and several, some with a picture, some with two; the given answers are all wrong."""
    folder = tmp_path_factory.mktemp("data")
    path = genrecal.demo.data.write_dataset(folder, num_samples=9, split="train", seed=4)
    records = json.loads(path.read_text())
    for record in records:
        for number, turn in enumerate(record["conversations"]):
            if turn["from"] == "gpt":
                turn["value"] = f"{record['id']} has no answer {number}"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def cache(request, teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    report = run_cache_job(
        teacher, open_samples([data]), out, dataclasses.replace(OPTIONS, answers=request.param), WorkOptions(threads=2)
    )
    assert (report.cached, report.skipped) == (9, 0)
    assert report.counts["answers"] == sum(len(sample.answers) for sample in open_samples([data]))
    return open_cache(out)


def members(cache, suffix):
    """Bytes of the members of that suffix, by name."""
    found = {}
    for path in sorted(Path(cache.path).glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(suffix):
                    found[member.name] = tar.extractfile(member).read()
    return found


def test_the_states_are_those_of_a_data_file_with_these_answers(teacher, cache, data, tmp_path):
    records = json.loads(data.read_text())
    for record, cached in zip(records, cache, strict=True):
        left = list(cached.sample.answers)
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = left.pop(0)
        assert not left
    path = data.with_name(f"answered-{tmp_path.name}.json")
    path.write_text(json.dumps(records))
    options = dataclasses.replace(OPTIONS, answers=AnswerSource())
    run_cache_job(teacher, open_samples([path]), tmp_path / "cache", options)
    other = open_cache(tmp_path / "cache")
    for suffix in (".answer.arrow", ".question.arrow", ".png"):
        ours = members(cache, suffix)
        assert ours and ours == members(other, suffix)
    columns = ["key", "turns", "images", "question_tokens", "answer_tokens", "entropy", "log_prob", "top1_agreement"]
    assert cache.manifest().select(columns).equals(other.manifest().select(columns))


def test_given_answers_are_kept_beside_the_teachers(cache, data):
    given = [sample.answers for sample in open_samples([data])]
    assert [record.sample.given_answers for record in cache] == given
    assert not {text for record in cache for text in record.sample.answers} & {
        text for texts in given for text in texts
    }
    assert verify_cache(cache.path, deep=True).whole


def test_a_cache_that_denies_who_wrote_its_answers_is_found_out(teacher, data, tmp_path):
    run_cache_job(teacher, open_samples([data], limit=3), tmp_path, OPTIONS)
    description = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(description | {"answers": {"kind": "given"}}))
    assert "cache.json: content_xxh3" in "".join(map(str, verify_cache(tmp_path).findings))


def slowly(teacher, sample, how):
    """One conversation's answers, token by token, each by a whole forward pass over one conversation without padding."""
    vlm, renderer = teacher.vlm, teacher.renderer
    answers = []
    for turn in range(len(sample.answers)):
        prompt = renderer.without_last_answer(teacher.encode(up_to_turn(sample, answers)))
        inputs, ids = dict(prompt.inputs), []
        numbers = answer_numbers(sample.key, turn, how)
        for number in numbers:
            with torch.inference_mode():
                logits = vlm.model(**inputs, use_cache=False).logits[0, -1].double().numpy()
            token = int(logits.argmax())
            if how.kind == "sampled":
                p = np.exp((logits - logits.max()) / how.temperature)
                p /= p.sum()
                order = np.argsort(-p, kind="stable")
                nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), how.top_p)) + 1]
                p[np.setdiff1d(np.arange(len(p)), nucleus)] = 0
                running = np.cumsum(p)
                token = int(np.searchsorted(running, number * running[-1], side="right"))
            if token == renderer.marks.end_of_turn_id:
                break
            ids.append(token)
            for name in renderer.text_keys:
                more = token if name == "input_ids" else inputs["attention_mask"][0, -1] if "mask" in name else 0
                inputs[name] = torch.cat([inputs[name], torch.full((1, 1), more, dtype=inputs[name].dtype)], dim=1)
        answers.append(renderer.answer_text(ids))
    return tuple(answers)


def test_answers_are_those_of_one_conversation_at_a_time(teacher, cache, data):
    """Batches, left padding, the key-value cache and the other conversations change nothing."""
    for sample, record in zip(open_samples([data]), cache, strict=True):
        assert record.sample.answers == slowly(teacher, sample, cache.answers)
    if cache.answers.kind == "greedy":
        assert cache.column("top1_agreement").min() == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_workers_and_other_batches_write_the_same_answers(teacher, data, tmp_path, how):
    samples, options = open_samples([data]), dataclasses.replace(OPTIONS, answers=how)
    run_cache_job(teacher, samples, tmp_path / "one", options)
    for worker in (1, 0):
        run_cache_job(teacher, samples, tmp_path / "two", options, WorkOptions(workers=2, worker=worker, threads=3))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    other = dataclasses.replace(options, samples_per_shard=9, batch_tokens=400)
    run_cache_job(teacher, samples, tmp_path / "other", other)
    one, other = open_cache(tmp_path / "one"), open_cache(tmp_path / "other")
    assert [r.sample.answers for r in one] == [r.sample.answers for r in other]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["answers", "a broken line", "half a file", "a manifest"])
def test_only_what_is_missing_is_written_again(teacher, data, tmp_path, lost):
    run_cache_job(teacher, open_samples([data]), tmp_path, OPTIONS)
    before = tree(tmp_path)
    answers, manifest = tmp_path / "answers/00001.jsonl", tmp_path / "manifest/00001.parquet"
    text = answers.read_text()
    manifest.unlink()
    if lost == "answers":
        answers.unlink()
    elif lost == "a broken line":
        answers.write_text(text.replace('"answers"', '"answer"', 1))
    elif lost == "half a file":
        answers.write_text(text[: len(text) // 2])
    else:
        answers.write_text(text.replace('": ["', '": ["Oh, ', 1))  # what is there is taken
    report = run_cache_job(teacher, open_samples([data]), tmp_path, OPTIONS)
    assert (report.shards_done, report.shards_found) == (1, 2)
    assert bool(report.counts["answers"]) == (lost != "a manifest")
    assert (tree(tmp_path) == before) == (lost != "a manifest")


def test_written_answers_are_what_the_tokenizer_decodes(tiny):
    """Of a sentencepiece-like tokenizer with runs of spaces as added tokens; ids that no text tokenises to included."""
    processor = load_processor(tiny("internvl_llama"))
    processor.tokenizer.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("<b>", special=False)])
    renderer = Renderer(processor)
    end, rng = renderer.marks.end_of_turn_id, np.random.default_rng(0)
    vocabulary, before = len(renderer.tokenizer), renderer.tokenizer("a", add_special_tokens=False)["input_ids"]
    runs = [renderer.tokenizer.convert_tokens_to_ids(token) for token in ("▁▁", "▁", "<b>")]
    right = 0
    for _ in range(300):
        ids = [int(rng.choice(runs) if rng.random() < 0.3 else rng.integers(vocabulary)) for _ in range(6)]
        decoded = renderer.tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False)[1:]
        found = answer_text(renderer, [*ids, end], [end], 0, GREEDY)
        if isinstance(found, SampleError):
            assert "\ufffd" in decoded or not decoded.strip() or end in ids
        else:
            assert found == (decoded if end not in ids else decoded[: len(found)]) and "▁" not in found
            right += "  " in found
    assert right > 20


def test_answers_of_another_conversation_are_refused(teacher, data, tmp_path):
    run_cache_job(teacher, open_samples([data]), tmp_path, OPTIONS)
    (tmp_path / "answers/00001.jsonl").write_bytes((tmp_path / "answers/00000.jsonl").read_bytes())
    (tmp_path / "manifest/00001.parquet").unlink()
    with pytest.raises(DamageError, match=r"answers/00001\.jsonl: expected the answers of 00000004"):
        run_cache_job(teacher, open_samples([data]), tmp_path, OPTIONS)


def test_answers_that_do_not_end_are_skipped_and_counted(teacher, data, tmp_path):
    how = dataclasses.replace(GREEDY, max_tokens=4)
    options = dataclasses.replace(OPTIONS, answers=how, max_skip=0.9)
    report = run_cache_job(teacher, open_samples([data]), tmp_path / "cache", options)
    whole = [slowly(teacher, sample, GREEDY) for sample in open_samples([data])]
    lengths = [[len(teacher.renderer._tokenize_answer(answer).ids) for answer in answers] for answers in whole]
    kept = [answers for answers, tokens in zip(whole, lengths, strict=True) if max(tokens) <= 4]
    assert 0 < len(kept) < 9 and (report.cached, report.skipped) == (len(kept), 9 - len(kept))
    assert [record.sample.answers for record in open_cache(tmp_path / "cache")] == kept
    assert sum(report.reasons.values()) == report.skipped
    assert all("does not end within 4 tokens (--max-answer-tokens)" in reason for reason in report.reasons)
    with pytest.raises(DataError, match=r"samples cannot be used, over the limit of 1\.00%.*does not end within 4"):
        run_cache_job(teacher, open_samples([data]), tmp_path / "few", dataclasses.replace(options, max_skip=0.01))


def test_what_is_no_answer(teacher):
    renderer = teacher.renderer
    end = renderer.marks.end_of_turn_id
    ids = renderer.byte_tokenizer("two").ids.tolist()
    assert answer_text(renderer, [*ids, end, 5, 6], [end], 0, GREEDY) == "two"
    space, half = renderer.byte_tokenizer(" \n").ids.tolist(), renderer.byte_tokenizer("🙂").ids.tolist()[:-1]
    for wrong, reason in (
        ([end], "turn 2: the teacher's answer is empty"),
        ([*space, end], "turn 2: the teacher's answer is empty"),
        (ids, "turn 2: the teacher's answer does not end within 64 tokens"),
        ([*half, end], "turn 2: the teacher's answer is no text"),
        ([10**6, end], "turn 2: the teacher's answer has the token 1000000, which the tokenizer does not know"),
    ):
        found = answer_text(renderer, wrong, [end], 1, GREEDY)
        assert isinstance(found, SampleError) and str(found).startswith(reason), found


def test_draws_follow_the_nucleus():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=40).astype(np.float32) * 2)
    p = (logits.double() / 0.8).softmax(-1).numpy()
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), 0.7)) + 1
    expected = np.zeros(40)
    expected[order[:count]] = p[order[:count]] / p[order[:count]].sum()
    numbers = torch.from_numpy(uniforms("k", 40_000, 1)[:, 0])
    drawn = choose(logits.expand(40_000, -1), numbers, temperature=0.8, top_p=0.7).numpy()
    found = np.bincount(drawn, minlength=40) / 40_000
    assert 3 < count < 40 and set(np.flatnonzero(found)) == set(order[:count])
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 40_000)
    cold = choose(logits.expand(100, -1), numbers[:100], temperature=1e-6, top_p=1.0)
    assert (cold == logits.argmax()).all()
    assert (choose(logits.expand(100, -1), numbers[:100], temperature=5.0, top_p=1e-9) == logits.argmax()).all()


def test_the_command(data, tmp_path, capsys):
    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    words = ["cache", "--teacher", TEACHER, "--data", data, "--out", tmp_path / "cache", "--limit", 3]
    status, _, err = run(*words, "--generate-temperature", 0.5)
    assert status == 2 and "--generate-temperature 0.5: expected --generate with it" in err
    sampled = ["--generate", "--generate-temperature", 0.5, "--generate-seed", 3, "--max-answer-tokens", 60]
    status, out, err = run(*words, *sampled)
    assert status == 0, err
    assert "3 samples cached, 0 skipped" in out
    description = json.loads((tmp_path / "cache/cache.json").read_text())["answers"]
    assert description == {"kind": "sampled", "max_tokens": 60, "temperature": 0.5, "top_p": 1.0, "seed": 3}
    status, _, err = run(*words, "--generate")
    assert status == 2 and "holds a cache made by another job: answers was {'kind': 'sampled'" in err
    text = run("inspect", tmp_path / "cache")[1]
    assert "the teacher's own, sampled, temperature 0.5, top-p 1, seed 3, up to 60 tokens" in text
    assert "teacher on its own answers" in text
    record = open_cache(tmp_path / "cache")[0]
    assert (
        f"given answer: {record.sample.given_answers[0]}" in run("inspect", tmp_path / "cache", "--key", record.key)[1]
    )
