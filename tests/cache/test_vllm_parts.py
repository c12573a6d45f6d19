"""What of the vllm backend runs without vLLM: rows cut out and packed on the worker, options, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples, picture, write_llava

import genrecal
from genrecal.cache.extract import answer_positions, answer_targets, states_of
from genrecal.cache.teacher import HFTeacher
from genrecal.cache.vllm_teacher import EnginePrompt, VLLMTeacher, engine_arguments, engine_reason
from genrecal.cache.vllm_worker import (
    REQUEST_KEY,
    RowsHead,
    RowsRequest,
    compute_rows,
    pack_states,
    unpack_rows,
    unpack_states,
)
from genrecal.cli import main
from genrecal.errors import SampleError, UsageError

no_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def teacher(request, tiny):
    return HFTeacher.load(tiny("qwen2_vl_padded_head"), dtype=request.param)


def request_for(encoded, *, questions, draws=0):
    return RowsRequest(
        key=encoded.key,
        answer_positions=answer_positions(encoded)[0].tolist(),
        target_id=answer_targets(encoded)["target_id"].tolist(),
        question_spans=[(start, end) for start, end, is_answer in encoded.segments() if questions and not is_answer],
        top_k=6,
        draws=draws,
    )


@pytest.mark.parametrize("draws", [0, 12])
@pytest.mark.parametrize("questions", [False, True])
def test_rows_of_the_worker_are_those_of_hf(teacher, questions, draws):
    for sample in mixed_samples(4):
        encoded = teacher.encode(sample)
        with torch.inference_mode():
            hidden = teacher.vlm.hidden(teacher.renderer.collate([encoded]))[0]
            (want,) = teacher.states([encoded], questions=[questions], top_k=6, draws=draws)
            packed = compute_rows(hidden, request_for(encoded, questions=questions, draws=draws), teacher.head)
        rows = unpack_rows(packed)
        assert packed.dtype == torch.uint8 and rows.num_states == len(encoded)
        assert rows.answer.dtype == teacher.head.weight.dtype
        got = states_of(encoded, rows.answer, rows.found, rows.question if questions else None)
        for name in ("turn", "position", "token_id", "hidden", "target_id", "topk_ids", "topk_logits", "logsumexp"):
            assert np.array_equal(getattr(want.answer, name), getattr(got.answer, name))
        if draws:
            for name in ("ids", "counts", "entropy"):
                assert np.array_equal(getattr(want.answer.sampled, name), getattr(got.answer.sampled, name))
        else:
            assert got.answer.sampled is None
        if questions:
            assert np.array_equal(want.question.hidden, got.question.hidden)
        else:
            assert rows.question.shape == (0, hidden.shape[1])  # they stay on the worker


def test_only_the_rows_of_a_record_cross(teacher):
    """The answer's rows and a few thousand bytes of the packing, however long the prompt is."""
    encoded = teacher.encode(conversation(("What is it? " * 60, "yes"), images={0: 2}))
    with torch.inference_mode():
        hidden = teacher.vlm.hidden(teacher.renderer.collate([encoded]))[0]
    packed = compute_rows(hidden, request_for(encoded, questions=False), teacher.head)
    rows = len(answer_positions(encoded)[0])
    assert packed.numel() < rows * (hidden.shape[1] * hidden.element_size() + 6 * 8 + 8) + 1000
    assert packed.numel() < hidden.numel() * hidden.element_size() / 4


def test_a_step_of_the_engine(teacher):
    """Requests whose prefill is not finished give nothing; a rank whose output is not read computes nothing."""

    class Params:
        def __init__(self, request):
            self.extra_kwargs = {REQUEST_KEY: vars(request)}

    class Metadata:
        pooling_params: list = []

    encoded = teacher.encode(mixed_samples(1)[0])
    hidden = torch.randn(len(encoded), teacher.vlm.hidden_size).to(teacher.head.weight.dtype)
    Metadata.pooling_params = [Params(request_for(encoded, questions=True))] * 2
    first, second = RowsHead(teacher.head)([None, hidden], Metadata)
    assert first is None and unpack_rows(second).num_states == len(encoded)
    first, second = RowsHead(None)([None, hidden], Metadata)
    assert first is None and second.numel() == 0


def test_states_that_are_not_finite_come_back_as_the_reason(teacher):
    encoded = teacher.encode(mixed_samples(1)[0])
    hidden = torch.full((len(encoded), teacher.vlm.hidden_size), float("nan"), dtype=teacher.head.weight.dtype)
    with pytest.raises(SampleError, match="not finite"):
        unpack_rows(compute_rows(hidden, request_for(encoded, questions=False), teacher.head))


def test_private_api_of_vllm_is_used_in_one_file():
    package = Path(genrecal.__file__).parent
    private = ("vllm.distributed", "vllm.v1", "llm_engine", "model_runner", "poolers_by_task", 'logits_processor"')
    found = {p.name for p in package.rglob("*.py") if any(word in p.read_text() for word in private)}
    assert found == {"vllm_worker.py"}


def test_states_as_bytes(teacher):
    states = torch.randn(3, 5).to(teacher.head.weight.dtype)
    assert torch.equal(unpack_states(pack_states(states)), states)


def test_engine_arguments_are_json_or_text():
    texts = [
        "gpu_memory_utilization=0.85",
        "enforce_eager=true",
        'limit_mm_per_prompt={"image": 4}',
        "load_format=dummy",
    ]
    assert engine_arguments(texts) == {
        "gpu_memory_utilization": 0.85,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 4},
        "load_format": "dummy",
    }
    for wrong in ("enforce_eager", "--dtype=x", "=3"):
        with pytest.raises(UsageError, match="--engine-arg .*expected name=value"):
            engine_arguments([wrong])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "1 validation error for VllmConfig\n  Value error, Total number of attention heads (2) must be divisible by tensor "
            "parallel size (3). [type=value_error, input_value=ArgsKwargs]\n    For further information visit pydantic",
            "Total number of attention heads (2) must be divisible by tensor parallel size (3).",
        ),
        ("Engine core initialization failed. See root cause above. Failed core proc(s): {}", "messages above"),
        ("", "RuntimeError"),
    ],
)
def test_what_vllm_says_is_passed_on_in_a_line(text, told):
    reason = engine_reason(RuntimeError(text))
    assert told in reason and "\n" not in reason and "type=" not in reason


@no_vllm
def test_without_vllm_it_says_how_to_get_it(tiny):
    with pytest.raises(UsageError, match=r"pip install 'genrecal\[vllm\]'.*or use --backend hf"):
        VLLMTeacher(tiny("qwen2_vl"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--backend", "tgi"], "--backend 'tgi': expected hf or vllm"),
        (["--tensor-parallel", "2"], "expected --backend vllm with them; --device split"),
        (["--compare-hf", "2"], "expected --backend vllm"),
        (["--backend", "vllm", "--device", "split"], "--device split: expected --tensor-parallel"),
        (["--backend", "vllm", "--engine-arg", "x"], "expected name=value"),
        (["--backend", "vllm", "--engine-arg", "dtype=half"], "--engine-arg dtype: is set by genrecal"),
    ],
)
def test_wrong_usage_is_one_line(tiny, tmp_path, capsys, words, reason):
    data = write_llava(tmp_path / "data", mixed_samples(1))
    command = ["cache", "--teacher", str(tiny("qwen2_vl")), "--data", str(data), "--out", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *words])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and reason in message and message.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_a_prompts_pictures_count_for_what_may_be_in_memory(teacher):
    """The job's windows close by these bytes; pictures that the engine prepares itself are no tensors yet."""
    encoded = teacher.encode(conversation(("What?", "a"), images={0: 1}), max_tokens=None)
    text = {name: encoded.inputs[name] for name in teacher.renderer.text_keys}
    fields = vars(encoded) | {"inputs": text}
    bare = EnginePrompt(**fields, raw_ids=[1], images=())
    pictured = EnginePrompt(**fields, raw_ids=[1], images=(picture(0, 90, 60), picture(1, 10, 20)))
    assert pictured.num_bytes == bare.num_bytes + 3 * (90 * 60 + 10 * 20)
    assert encoded.num_bytes == sum(value.nbytes for value in encoded.inputs.values()) > bare.num_bytes
