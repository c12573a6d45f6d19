"""The vllm backend against the hf backend, row by row, with the real engine on a CPU.

`make test-vllm` runs these in an environment of their own (scripts/make_vllm_env).
"""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that tests can break it
    "VLLM_LOGGING_LEVEL": "ERROR",
}

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm` runs these in an environment of their own")

import real_runs
import tiny_models
import torch
from conftest import conversation, mixed_samples, write_llava
from pair_runs import STUDENTS, note_pair, train_and_check

import genrecal.demo
from genrecal.cache import vllm_teacher
from genrecal.cache.answers import up_to_turn
from genrecal.cache.extract import States
from genrecal.cache.job import CacheOptions, run_cache_job
from genrecal.cache.proof import blank_check, compare_backends, prove
from genrecal.cache.teacher import HFTeacher
from genrecal.cache.vllm_teacher import VLLMTeacher
from genrecal.cli import main
from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.vlm.convert import convert_internvl
from genrecal.vlm.loading import split_vlm
from genrecal.vlm.rendering import Renderer

pytestmark = pytest.mark.vllm

SMALL = {"max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
# Prompts of 30 to 80 tokens come in several pieces, and share their beginnings with prompts before.
PIECES = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "enable_prefix_caching": True}
LOGIT = 2e-4  # largest difference of a float32 logit; 5e-5 was measured, and logits reach 15
# Pictures that InternVL's two layouts do not resize: they do it with different libraries.
WHOLE_TILE = (56, 56)


@contextlib.contextmanager
def without_numba():
    """vLLM for CPUs searches every module's objects for kernels and fails at one of numba's, if it is loaded."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "llvmlite.binding.ffi"}
    try:
        yield
    finally:
        sys.modules.update(hidden)


def start(path, **options):
    """A teacher."""
    with without_numba():
        return VLLMTeacher(path, **options)


class Pair:
    """The two backends of one model, and where it lies."""

    def __init__(self, path, reference, dtype=torch.float32, **options):
        self.path = path
        self.vllm = start(path, dtype=dtype, **options)
        self.hf = HFTeacher.load(reference, dtype=dtype)


class WithPixels:
    """NVLM-D's tokens with the pixels that transformers prepares for InternVL, whose class can then run its weights."""

    def __init__(self, processor, image_processor):
        self.processor, self.image_processor = processor, image_processor
        self.tokenizer, self.chat_template = processor.tokenizer, processor.chat_template
        self.apply_chat_template, self.raw_ids = processor.apply_chat_template, processor.raw_ids

    def __call__(self, text, images=None, **_):
        inputs = self.processor(text, images)
        if images:
            inputs["pixel_values"] = self.image_processor(images[0], return_tensors="pt")["pixel_values"]
        return inputs


@pytest.fixture(
    scope="module",
    params=[
        "qwen2_vl",
        "qwen2_5_vl",
        "internvl",
        "internvl_chat",
        "internvl2_76b",
        "internlm2",
        "nvlm_d",
        "qwen2_vl_bf16",
    ],
)
def pair(request, tiny, tmp_path_factory):
    name = request.param
    if name in ("internvl_chat", "internvl2_76b"):
        native = tiny("internvl_wide" if name == "internvl_chat" else "internvl2_76b_wide")
        path = tiny_models.make_original(native, tmp_path_factory.mktemp("chat") / "internvl_chat")
        made = Pair(path, native, engine_args=SMALL, trust_remote_code=True)
    elif name == "internlm2":
        # vLLM runs the original, transformers what was converted from it: each checks the other.
        native, folder = tiny("internlm2_native_wide"), tmp_path_factory.mktemp("internlm2")
        path = tiny_models.make_original(native, folder / "original")
        convert_internvl(path, folder / "converted", processor=native)
        shutil.copy(native / "tokenizer.json", path)  # in the place of the checkpoint's own code
        (path / "tokenizer.model").unlink()
        made = Pair(path, folder / "converted", engine_args=SMALL, trust_remote_code=True)
    elif name == "nvlm_d":
        native = tiny("nvlm_d_native_wide")
        path = tiny_models.make_original(native, tmp_path_factory.mktemp("nvlm") / "nvlm_d", nvlm=True)
        made = Pair(path, native, engine_args=SMALL, trust_remote_code=True)
        processor = WithPixels(made.vllm.renderer.processor, made.hf.renderer.processor.image_processor)
        made.hf = HFTeacher(split_vlm(made.hf.vlm.model, Renderer(processor)))
    elif name == "qwen2_vl_bf16":
        made = Pair(tiny("qwen2_vl_wide"), tiny("qwen2_vl_wide"), torch.bfloat16, engine_args=SMALL)
    else:
        path = tiny(f"{name}_wide")
        made = Pair(path, path, engine_args=SMALL | (PIECES if name == "qwen2_vl" else {}))
    made.name = name
    yield made
    made.vllm.close()


def only(*names):
    """Run a test with these models' pairs alone."""
    return pytest.mark.parametrize("pair", names, indirect=True)


float32 = only("qwen2_vl", "qwen2_5_vl", "internvl", "internvl_chat", "internvl2_76b", "internlm2", "nvlm_d")
qwen2_vl = only("qwen2_vl")


def kinds(pair):
    """Conversations of every kind, with questions for half of them."""
    samples = mixed_samples(12)
    if pair.name in ("internvl_chat", "internvl2_76b", "internlm2", "nvlm_d"):
        samples = [resized(sample, WHOLE_TILE) for sample in samples]
    return samples


def resized(sample, size):
    import io

    from PIL import Image

    from genrecal.samples import ImageSource

    images = []
    for image in sample.images:
        stream = io.BytesIO()
        Image.open(io.BytesIO(image.read())).resize(size).save(stream, "PNG")
        images.append(ImageSource(data=stream.getvalue(), suffix="png"))
    return dataclasses.replace(sample, images=tuple(images))


def run(teacher, samples, **options):
    options = {"questions": [i % 2 == 0 for i in range(len(samples))], "top_k": 8, "draws": 20} | options
    encoded = [teacher.encode(sample) for sample in samples]
    return encoded, teacher.states(encoded, **options)


@float32
def test_rows_agree(pair):
    samples = kinds(pair)
    ours, expected = run(pair.hf, samples)
    theirs, found = run(pair.vllm, samples)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids) and a.segments() == b.segments()
        assert set(b.inputs) <= set(pair.vllm.renderer.text_keys)  # no pixels are kept
    drawn = []
    for want, got in zip(expected, found, strict=True):
        assert isinstance(got, States)
        for name in ("turn", "position", "token_id", "target_id", "target_start", "target_end"):
            assert np.array_equal(getattr(want.answer, name), getattr(got.answer, name))
        # A state is rounded to bfloat16, where the last digit of a float32 may decide.
        assert np.allclose(want.answer.hidden, got.answer.hidden, rtol=0.01, atol=1e-3)
        assert np.abs(want.answer.topk_logits - got.answer.topk_logits).max() < LOGIT
        assert np.abs(want.answer.logsumexp - got.answer.logsumexp).max() < LOGIT
        assert np.abs(want.answer.target_logit - got.answer.target_logit).max() < LOGIT
        assert np.abs(want.answer.sampled.entropy - got.answer.sampled.entropy).max() < LOGIT
        assert (want.answer.topk_ids[:, 0] == got.answer.topk_ids[:, 0]).all()
        drawn.append((want.answer.sampled.ids == got.answer.sampled.ids).all(1))
        assert (want.question is None) == (got.question is None)
        if want.question is not None:
            assert np.array_equal(want.question.position, got.question.position)
            assert np.array_equal(want.question.token_id, got.question.token_id)
            assert np.allclose(want.question.hidden, got.question.hidden, rtol=0.01, atol=1e-3)
    assert np.concatenate(drawn).mean() > 0.98  # a logit's last digit may move a draw to the neighbouring id


@float32
def test_the_proof_passes(pair):
    for sample in mixed_samples(4):
        encoded = pair.vllm.encode(sample)
        assert prove(pair.vllm, sample, encoded)
        evidence = pair.vllm.evidence(encoded)
        assert (evidence.image_tokens or None) == evidence.visual_embeddings
        assert evidence.norm is not None


@float32
def test_blank_pictures_cost_what_they_cost_with_hf(pair):
    samples = kinds(pair)
    ours, theirs = (blank_check(teacher, samples, 6) for teacher in (pair.hf, pair.vllm))
    assert theirs.fall == pytest.approx(ours.fall, abs=1e-3) and theirs.samples == 6


@only("internvl_chat", "nvlm_d")
def test_pictures_that_are_resized_differ_by_the_resizing_alone(pair):
    """PIL in vLLM's code for the original layout, torchvision in transformers': the same tokens and almost the same pixels."""
    ours, expected = run(pair.hf, mixed_samples(4))
    theirs, found = run(pair.vllm, mixed_samples(4))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
    distances = [
        np.linalg.norm(a.answer.hidden - b.answer.hidden, axis=1) / np.linalg.norm(a.answer.hidden, axis=1)
        for a, b in zip(expected, found, strict=True)
    ]
    print("resized pictures, mean distance", [d.mean() for d in distances])
    assert np.concatenate(distances).mean() < 0.1


@only("qwen2_vl_bf16")
def test_bfloat16_is_as_near_to_float32_as_transformers_own(pair, tiny):
    exact = HFTeacher.load(tiny("qwen2_vl_wide"), dtype=torch.float32)
    samples = mixed_samples(12)
    errors = {}
    for name, teacher in (("hf", pair.hf), ("vllm", pair.vllm)):
        pieces = []
        for want, got in zip(run(exact, samples)[1], run(teacher, samples)[1], strict=True):
            pieces.append(np.abs(want.answer.hidden - got.answer.hidden).mean())
        errors[name] = np.mean(pieces)
    print("bf16 against float32, mean error of a state", errors)
    assert errors["vllm"] < 1.5 * errors["hf"]
    assert prove(pair.vllm, samples[0], pair.vllm.encode(samples[0]))


@qwen2_vl
def test_caches_agree(pair, tmp_path):
    data = write_llava(tmp_path / "data", mixed_samples(10))
    options = CacheOptions(samples_per_shard=4, top_k=5, answer_codec="bf16", question_codec="bf16")
    for name, teacher in (("hf", pair.hf), ("vllm", pair.vllm)):
        run_cache_job(teacher, open_samples([data]), tmp_path / name, options)
    hf, vllm = (open_cache(tmp_path / name) for name in ("hf", "vllm"))
    assert (hf.description["backend"], vllm.description["backend"]) == ("hf", "vllm")
    assert "vllm" in vllm.description["software"] and "vllm" not in hf.description["software"]
    same = ("teacher", "head_rows", "vocab_size", "top_k", "data", "totals")
    assert {name: hf.description[name] for name in same} == {name: vllm.description[name] for name in same}
    for want, got in zip(hf, vllm, strict=True):
        assert np.abs(want.answer_rows().topk_logits - got.answer_rows().topk_logits).max() < LOGIT
    with pytest.raises(UsageError, match="backend was 'hf', now 'vllm'"):
        run_cache_job(pair.vllm, open_samples([data]), tmp_path / "hf", options)


@pytest.fixture(scope="module")
def nvlm_cache(pair, tmp_path_factory):
    """A cache of NVLM-D, which no other backend runs."""
    folder = tmp_path_factory.mktemp("nvlm_cache")
    run_cache_job(
        pair.vllm, open_samples([write_llava(folder / "data", mixed_samples(8))]), folder / "cache", CacheOptions()
    )
    assert len(open_cache(folder / "cache")) == 8
    return folder / "cache"


@only("nvlm_d")
@pytest.mark.parametrize("student", STUDENTS)
def test_the_papers_pairs_with_nvlm_d(nvlm_cache, tiny, tmp_path, record_property, student):
    note_pair(record_property, "nvlm_d_72b", student, "vllm")
    train_and_check(nvlm_cache, tiny(student), tmp_path)


@qwen2_vl
def test_samples_that_the_engine_does_not_take_are_skipped_with_why(pair):
    with pytest.raises(SampleError, match=r"tokens, over the limit of 1024"):
        pair.vllm.encode(conversation(("q " * 1200, "a")))
    with pytest.raises(SampleError, match="65 images, over the engine's limit of 64"):
        pair.vllm.encode(conversation(("q", "a"), images={0: 65}))


# What genrecal/cache/vllm_worker.py uses of vLLM without a promise that it stays.
PRIVATE_OF_ENGINE = ("llm_engine.model_config.max_model_len", "llm_engine.engine_core.shutdown", "collective_rpc")
PRIVATE_OF_WORKER = (
    "device", "model_runner.model", "model_runner.intermediate_tensors", "model_runner.max_num_tokens",
    "model_runner.dtype", "model_runner.device", "model_runner.model.make_empty_intermediate_tensors",
    "model_runner.model.pooler.poolers_by_task", "model_runner.model.embed_multimodal",
    "model_runner.model.compute_logits", "model_runner.model.get_language_model",
)  # fmt: skip
PRIVATE_OF_HEAD = ("weight_loader", "quant_method.process_weights_after_loading")


@qwen2_vl
def test_every_private_name_that_is_used_is_there(pair):
    """A vLLM that renames one fails here, by name, before anything else does."""
    import operator

    from vllm import distributed
    from vllm.model_executor.models import utils

    from genrecal.cache.vllm_worker import TASK, _logits_owner

    [worker] = pair.vllm.llm.collective_rpc(lambda worker: worker)
    owner, name = _logits_owner(worker.model_runner.model)
    head, processor = (owner._modules[part].__dict__["module"] for part in (name, "logits_processor"))
    wanted = [(pair.vllm.llm, path) for path in PRIVATE_OF_ENGINE] + [(worker, path) for path in PRIVATE_OF_WORKER]
    wanted += [(head, path) for path in PRIVATE_OF_HEAD] + [(processor, "scale"), (processor, "soft_cap")]
    wanted += [(distributed, name) for name in ("cleanup_dist_env_and_memory", "get_pp_group", "get_tp_group")]
    wanted += [(distributed.get_pp_group(), name) for name in ("is_first_rank", "is_last_rank")]
    wanted += [(distributed.get_tp_group(), "rank_in_group"), (utils, "PPMissingLayer")]
    missing = []
    for thing, path in wanted:
        try:
            operator.attrgetter(path)(thing)
        except AttributeError:
            missing.append(f"{type(thing).__name__}: {path}")
    assert missing == []
    assert hasattr(worker.model_runner.model.pooler.poolers_by_task[TASK], "head")


# --------------------------------------------------------------------------------------------------- broken teachers


def text_model(pair):
    """The text model inside the engine, which runs in this process."""
    return pair.vllm.llm.apply_model(lambda model: model.get_language_model().model)[0]


@qwen2_vl
def test_dropped_pictures_are_refused(pair, monkeypatch):
    """Ids that are expanded already, and no pictures: vLLM runs that without a word."""
    encode = pair.vllm.encode

    def blind(sample, *, max_tokens=None):
        encoded = encode(sample, max_tokens=max_tokens)
        return type(encoded)(**vars(encoded) | {"images": (), "raw_ids": encoded.input_ids.tolist()})

    monkeypatch.setattr(pair.vllm, "encode", blind)
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="pictures do not reach the model"):
        prove(pair.vllm, sample, pair.vllm.encode(sample))


@qwen2_vl
def test_placeholders_that_are_expanded_twice_are_refused(pair):
    encoded = pair.vllm.encode(mixed_samples(1)[0])
    twice = type(encoded)(**vars(encoded) | {"raw_ids": encoded.input_ids.tolist()})
    with pytest.raises(ModelError, match=r"vLLM's prompt has \d+ tokens, genrecal's \d+; they differ from token"):
        pair.vllm.states([twice], questions=[False], top_k=1)


@qwen2_vl
def test_a_norm_that_is_left_out_is_refused(pair, monkeypatch):
    norm = text_model(pair).norm
    monkeypatch.setattr(norm, "forward", lambda x, residual=None: (x if residual is None else x + residual, residual))
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="not what its final norm leaves"):
        prove(pair.vllm, sample, pair.vllm.encode(sample))


@qwen2_vl
def test_states_of_another_layer_are_refused(pair, monkeypatch):
    """vLLM has no second way to its last layer's states; the hf backend is one."""
    monkeypatch.setattr(text_model(pair).layers[-1], "forward", lambda positions, hidden, residual: (hidden, residual))
    with pytest.raises(ModelError, match="does not give the states of hf"):
        compare_backends(pair.vllm, pair.hf, mixed_samples(4), 2)


@qwen2_vl
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_span_is_refused(pair, monkeypatch, shift):
    right = vllm_teacher.answer_positions
    monkeypatch.setattr(vllm_teacher, "answer_positions", lambda e: (np.minimum(right(e)[0] + shift, len(e) - 1), 0))
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="is not that position's state"):
        prove(pair.vllm, sample, pair.vllm.encode(sample))


@qwen2_vl
def test_another_head_is_refused(pair, monkeypatch):
    head = pair.vllm.head
    other = type(head)(weight=head.weight.roll(1, 0), transform=head.transform, vocab_size=head.vocab_size)
    monkeypatch.setattr(pair.vllm, "head", other)
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="is not what vLLM's own logits"):
        prove(pair.vllm, sample, pair.vllm.encode(sample))


@qwen2_vl
def test_states_that_are_not_finite_skip_the_sample_alone(pair, monkeypatch):
    samples = mixed_samples(4)
    norm = text_model(pair).norm
    forward, calls = norm.forward, []

    def spoiled(x, residual=None):
        out = forward(x, residual)
        calls.append(len(x))
        (out[0] if isinstance(out, tuple) else out)[:] = float("nan")
        return out

    encoded = [pair.vllm.encode(sample) for sample in samples]
    monkeypatch.setattr(norm, "forward", spoiled)
    found = pair.vllm.states(encoded, questions=[False] * 4, top_k=2)
    assert calls and all(isinstance(item, SampleError) and "not finite" in str(item) for item in found)
    monkeypatch.setattr(norm, "forward", forward)
    assert all(isinstance(item, States) for item in pair.vllm.states(encoded, questions=[False] * 4, top_k=2))


@qwen2_vl
def test_an_engine_that_stops_says_why(pair, monkeypatch):
    def stops(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    encoded = pair.vllm.encode(mixed_samples(1)[0])
    monkeypatch.setattr(pair.vllm.llm, "encode", stops)
    with pytest.raises(ModelError, match="vLLM stopped on samples 00000000 to 00000000: CUDA out of memory.*are kept"):
        pair.vllm.states([encoded], questions=[False], top_k=1)


# ------------------------------------------------------------------------------------------------- answers of its own


def test_a_language_model_gives_the_rows_that_hf_gives(tiny, tmp_path):
    """A teacher without pictures, whose prompts go to vLLM as they are."""
    made = Pair(tiny("qwen2_wide"), tiny("qwen2_wide"), engine_args=SMALL)
    try:
        samples = [sample for sample in mixed_samples(12) if not sample.images]
        assert prove(made.vllm, samples[0], made.vllm.encode(samples[0]))
        for want, got in zip(run(made.hf, samples)[1], run(made.vllm, samples)[1], strict=True):
            assert np.allclose(want.answer.hidden, got.answer.hidden, rtol=0.01, atol=1e-3)
            assert np.abs(want.answer.logsumexp - got.answer.logsumexp).max() < LOGIT
            assert (want.answer.topk_ids[:, 0] == got.answer.topk_ids[:, 0]).all()
        with pytest.raises(SampleError, match="the conversation has pictures, and this is a language model"):
            made.vllm.encode(mixed_samples(1)[0])
    finally:
        made.vllm.close()


def test_answers_are_written_and_cached(tmp_path, monkeypatch):
    """The demo's teacher: greedy ones are those of hf; the engine that writes and the one that gives states take turns."""
    path = Path(genrecal.demo.__file__).parent / "assets" / "teacher"
    sums = [
        (f"What is {a} plus {b}?", "I am not told") for a, b in (("two", "three"), ("four", "zero"), ("one", "six"))
    ]
    shapes = [("Which shapes are in the picture?", "None"), ("What color is the circle?", "None")]
    kinds = [
        lambda i: ([sums[i]], {}),
        lambda i: (shapes, {0: 1}),
        lambda i: ([shapes[1], sums[i], shapes[0]], {0: 1, 2: 1}),
    ]
    made = [kinds[i % 3](i // 3 % 3) for i in range(12)]
    samples = [conversation(*turns, images=images, key=f"{i:08d}") for i, (turns, images) in enumerate(made)]
    data = write_llava(tmp_path / "data", samples)
    greedy = AnswerSource(kind="greedy", max_tokens=64)
    options = CacheOptions(samples_per_shard=5, top_k=5, answers=greedy)
    monkeypatch.setattr(VLLMTeacher, "_start", without_numba()(VLLMTeacher._start))  # the engines take turns
    teacher = start(path, dtype=torch.float32, engine_args=SMALL)
    try:
        run_cache_job(teacher, open_samples([data]), tmp_path / "vllm", options)
        sampled = AnswerSource(kind="sampled", max_tokens=64, temperature=1.5, top_p=0.95, seed=2)
        encoded = [teacher.encode(up_to_turn(sample, [])) for sample in open_samples([data])]
        together = teacher.write(encoded, turn=0, how=sampled, batch_tokens=10**6)
        alone = [teacher.write([item], turn=0, how=sampled, batch_tokens=10**6)[0] for item in encoded]
        assert list(map(str, together)) == list(map(str, alone)) and len(set(map(str, together))) > 3
        other = dataclasses.replace(sampled, seed=3)
        assert list(map(str, teacher.write(encoded, turn=0, how=other, batch_tokens=10**6))) != list(map(str, together))
        short = teacher.write(encoded, turn=0, how=dataclasses.replace(greedy, max_tokens=2), batch_tokens=10**6)
        assert any(
            isinstance(answer, SampleError) and "does not end within 2 tokens" in str(answer) for answer in short
        )
    finally:
        teacher.close()
    run_cache_job(HFTeacher.load(path, dtype=torch.float32), open_samples([data]), tmp_path / "hf", options)
    hf, vllm = (open_cache(tmp_path / name) for name in ("hf", "vllm"))
    assert len(vllm) == 12 and vllm.column("top1_agreement").min() == 1.0
    for want, got in zip(hf, vllm, strict=True):
        assert got.sample.answers == want.sample.answers and got.sample.given_answers == want.sample.given_answers
        assert np.abs(want.answer_rows().topk_logits - got.answer_rows().topk_logits).max() < LOGIT


# ------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.real
def test_real_states_are_proved(real):
    """In bfloat16, with the outliers that real states have; and broken ones are still refused."""
    made = Pair(real / "gemma3-270m", real / "gemma3-270m", torch.bfloat16, engine_args=SMALL)
    try:
        for sample in real_runs.SAMPLES:
            assert prove(made.vllm, sample, made.vllm.encode(sample))
        assert 0 < compare_backends(made.vllm, made.hf, real_runs.SAMPLES, 3).hidden < 0.05
        sample = real_runs.SAMPLES[0]
        model = made.vllm.llm.apply_model(lambda model: model.model)[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.norm, "forward", lambda x, residual=None: (x + residual, residual))
            with pytest.raises(ModelError, match="not what its final norm leaves"):
                prove(made.vllm, sample, made.vllm.encode(sample))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.layers[-1], "forward", lambda positions, hidden, residual, **_: (hidden, residual))
            with pytest.raises(ModelError, match="does not give the states of hf"):
                compare_backends(made.vllm, made.hf, real_runs.SAMPLES, 3)
    finally:
        made.vllm.close()


@pytest.mark.real
def test_real_answers_and_the_zero_test(real, tmp_path, monkeypatch, capsys):
    """The whole command in float32; then a student that is the teacher learns nothing in its first step."""
    model = real_runs.answering(real, tmp_path / "model")
    words = real_runs.generate_words(model, tmp_path, "--backend", "vllm", "--compare-hf", "3")
    for name, value in SMALL.items():
        words += ["--engine-arg", f"{name}={str(value).lower()}"]
    monkeypatch.setattr(VLLMTeacher, "_start", without_numba()(VLLMTeacher._start))
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "hf against vllm: 3 samples" in capsys.readouterr().out
    real_runs.check_answers(model, tmp_path / "cache")
    lines = real_runs.first_steps(tmp_path / "cache", model, tmp_path / "run", precision="float32")
    first, second = (line["kl"] for line in lines)
    print("float32, KL of the steps", first, second)
    assert abs(first) < 1e-6 and second > 1e-3


# ------------------------------------------------------------------------------------------------- refused at the start


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"engine_args": {"runner": "generate"}}, UsageError, "--engine-arg runner: is set by genrecal"),
        ({"engine_args": {"no_such_option": 1}}, ModelError, "no_such_option"),
        ({"engine_args": SMALL | {"max_model_len": 10**6}}, ModelError, "max_model_len"),
        ({"tensor_parallel": 3}, ModelError, "divisible by tensor parallel size"),
        ({"engine_args": SMALL | {"hf_overrides": {"text_config": {"num_hidden_layers": 1}}}}, ModelError, "layers"),
    ],
    ids=["ours", "unknown", "too long", "tensor parallel", "another depth"],
)
def test_what_cannot_be_is_refused_with_why(tiny, options, error, reason):
    with pytest.raises(error, match=reason):
        start(tiny("qwen2_vl_wide"), dtype=torch.float32, **options)


def test_code_of_the_checkpoint_is_not_run_unasked(tiny, tmp_path):
    path = tiny_models.make_original(tiny("internvl_wide"), tmp_path / "chat")
    with pytest.raises(ModelError, match="trust_remote_code|custom code"):
        start(path, dtype=torch.float32, engine_args=SMALL)


# ------------------------------------------------------------------------------------------------- several processes


CHECKS = ["--compare-hf", "3", "--blank-check", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["--tensor-parallel", "2", *CHECKS],
        ["--pipeline-parallel", "2", *CHECKS],
        ["--tensor-parallel", "2", "--ray", "local", "--ray-gpus", "0"],
    ],
    ids=["tensor parallel", "pipeline parallel", "tensor parallel in a Ray task"],
)
def test_two_workers_give_the_same_cache(tiny, tmp_path, words):
    """The command, with a worker process each for halves of the heads, or of the layers."""
    path = tiny("qwen2_5_vl_wide")
    data = write_llava(tmp_path / "data", mixed_samples(8))
    out = tmp_path / "cache"
    command = [
        sys.executable, "-m", "genrecal", "cache", "--teacher", str(path), "--data", str(data), "--out", str(out),
        "--backend", "vllm", "--dtype", "float32", "--answer-codec", "bf16", *words,
    ]  # fmt: skip
    for name, value in SMALL.items():
        command += ["--engine-arg", f"{name}={str(value).lower()}"]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }
    with contextlib.suppress(AttributeError):
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 samples cached, 0 skipped" in done.stdout
    if "--compare-hf" in words:
        assert "hf against vllm: 3 samples" in done.stdout and "the same top token in 100.00%" in done.stdout
        assert "blank check: with grey pictures" in done.stdout
    hf = HFTeacher.load(path, dtype=torch.float32)
    for record, sample in zip(open_cache(out), mixed_samples(8), strict=True):
        want, got = run(hf, [sample])[1][0].answer, record.answer_rows()
        assert np.abs(want.logsumexp - got.logsumexp).max() < LOGIT
        assert np.abs(want.target_logit - got.target_logit)[want.predicts].max() < LOGIT
