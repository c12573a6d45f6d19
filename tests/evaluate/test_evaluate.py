"""Evaluation on tiny real models, against the model's own generation and logits one prompt at a time."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import conversation, mixed_samples
from hypothesis import given
from hypothesis import strategies as st

from genrecal.errors import DataError, ModelError, UsageError
from genrecal.evaluate.evaluate import (
    Evaluation,
    Prediction,
    _score,
    evaluate,
    is_out_of_memory,
    prompts_of,
    save_evaluation,
)
from genrecal.evaluate.scores import metric_for, score
from genrecal.samples import BadRecord, ImageSource, Sample, decode_image
from genrecal.vlm.loading import VLM, load_vlm

NEW_TOKENS = 6
SAMPLES = [dataclasses.replace(sample, category=f"c{i % 2}") for i, sample in enumerate(mixed_samples(5))]


@pytest.fixture(scope="module", params=["internvl_qwen2", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> VLM:
    return load_vlm(tiny(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def result(model: VLM) -> Evaluation:
    """Batches of three: prompts of one batch differ in length, turns and pictures."""
    return evaluate(model, SAMPLES, batch_size=3, max_new_tokens=NEW_TOKENS)


def prompts(model: VLM, sample: Sample) -> list[dict[str, torch.Tensor]]:
    return prompts_of(model, sample, [decode_image(image.read()) for image in sample.images])


@torch.inference_mode()
def generated_alone(model: VLM, prompt: dict[str, torch.Tensor]) -> str:
    """Greedy decoding of one prompt, without padding, by transformers alone."""
    tokenizer = model.renderer.tokenizer
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=stop
    )
    ids = model.model.generate(**prompt, generation_config=config)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@torch.inference_mode()
def log_losses_alone(model: VLM, sample: Sample) -> list[float]:
    """-log p of each answer from the model's own logits: its tokens stand between its prompt's end and <|im_end|>."""
    inputs = model.renderer.encode(sample).inputs
    ids = inputs["input_ids"][0]
    log_probs = model.model(**inputs).logits[0].double().log_softmax(-1)
    stop = model.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    losses = []
    for prompt in prompts(model, sample):
        position, loss = prompt["input_ids"].shape[1], 0.0
        assert torch.equal(ids[:position], prompt["input_ids"][0])
        while True:
            loss -= log_probs[position - 1, ids[position]].item()
            if ids[position] == stop:
                break
            position += 1
        losses.append(loss)
    return losses


def test_there_is_one_prediction_for_each_answer_in_order(result: Evaluation) -> None:
    asked = [(s.key, turn, s.category, answer) for s in SAMPLES for turn, answer in enumerate(s.answers)]
    assert [(p.key, p.turn, p.category, p.answer) for p in result.predictions] == asked
    questions = [m.text for s in SAMPLES for m in s.messages if m.role == "user"]
    assert [p.question for p in result.predictions] == questions
    assert result.skipped == [] and len(asked) == 8


def test_padding_changes_no_generated_text(model: VLM, result: Evaluation) -> None:
    alone = [generated_alone(model, prompt) for sample in SAMPLES for prompt in prompts(model, sample)]
    assert [p.prediction for p in result.predictions] == alone
    assert len(set(alone)) > 3  # a model that always says the same would prove nothing


def test_log_losses_are_those_of_the_models_own_logits(model: VLM, result: Evaluation) -> None:
    alone = [loss for sample in SAMPLES for loss in log_losses_alone(model, sample)]
    assert [p.log_loss for p in result.predictions] == pytest.approx(alone, rel=1e-4)


def test_scores_follow_the_metrics_and_their_means(result: Evaluation) -> None:
    for p in result.predictions:
        assert p.metric == metric_for(p.question, p.answer)
        assert p.score == score(p.metric, p.prediction, p.answer, p.question)
    assert list(result.by_category) == ["c0", "c1"]
    assert sum(score.n for score in result.by_category.values()) == result.overall.n == len(result.predictions)
    assert result.overall.log_loss == pytest.approx(np.mean([p.log_loss for p in result.predictions]))
    first = [p.log_loss for p in result.predictions if p.category == "c0"]
    assert result.by_category["c0"].log_loss == pytest.approx(np.mean(first))


def test_predictions_are_saved_as_json_lines(result: Evaluation, tmp_path: Path) -> None:
    save_evaluation(result, tmp_path / "deep" / "predictions.jsonl")
    lines = (tmp_path / "deep" / "predictions.jsonl").read_text().splitlines()
    assert [Prediction(**json.loads(line)) for line in lines] == result.predictions


def test_the_metric_asked_for_is_used_for_every_question(model: VLM) -> None:
    result = evaluate(model, SAMPLES[:2], metric="anls", max_new_tokens=2)
    assert result.rules() == {"anls": 3} and result.rules("c1") == {"anls": 2}


def test_a_source_that_names_a_benchmark_brings_its_rule(model: VLM) -> None:
    chart, other = (dataclasses.replace(conversation(("How many?", "20")), source=s) for s in ("ChartQA", "other"))
    result = evaluate(model, [chart, other], max_new_tokens=2)
    assert result.rules() == {"relaxed": 1, "number": 1}


def test_no_more_prompts_at_a_time_than_the_batch_size(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns count one by one: twelve of one conversation are six calls of two."""
    sizes, plain = [], model.model.generate

    def generate(**inputs: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        return plain(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    long = conversation(*((f"question {turn}", "a") for turn in range(12)), images={0: 1, 7: 1})
    for batch_size, calls in ((2, [2] * 6), (8, [8, 4])):
        sizes.clear()
        result = evaluate(model, [long], batch_size=batch_size, max_new_tokens=2)
        assert sizes == calls and [p.turn for p in result.predictions] == list(range(12))


def test_a_long_answers_log_loss_is_summed_in_parts(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [conversation(("q", "a long answer of several words"), images={0: 1})]
    whole = evaluate(model, samples, max_new_tokens=2).overall.log_loss
    monkeypatch.setattr("genrecal.evaluate.evaluate.LOGIT_ROWS", 3)
    assert evaluate(model, samples, max_new_tokens=2).overall.log_loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nmore"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_kind_of_failed_allocation_is_known(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("something else"))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_out_of_memory_is_one_line(model: VLM, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """An allocation that really fails; a smaller batch is proposed where there is one."""
    monkeypatch.setattr(model.model, "generate", lambda **_: torch.empty(2**60))
    with pytest.raises(ModelError, match="evaluation is out of memory: .*--max-new-tokens") as raised:
        evaluate(model, SAMPLES, batch_size=batch_size)
    assert ("a lower --batch-size than 4" in str(raised.value)) == (batch_size == 4)
    assert "\n" not in str(raised.value)


def test_a_right_answer_scores_one(model: VLM, result: Evaluation) -> None:
    """Given what the model says as the right answer of one of two conversations, it is right in one of two."""
    said = next(p.prediction for p in result.predictions if p.key == SAMPLES[0].key)
    right = dataclasses.replace(SAMPLES[0], messages=conversation(("What is shown?", said), images={0: 1}).messages)
    again = evaluate(model, [right, SAMPLES[2]], metric="exact", max_new_tokens=NEW_TOKENS)
    assert [p.score for p in again.predictions] == [1, 0]
    assert (again.overall.accuracy, again.overall.accuracy_error) == (0.5, 0.5)
    assert again.by_category["c0"].n == 2


BAD = BadRecord(key="k", sample_id="", location="data.json:7", reason="broken JSON: oops")
DAMAGED = dataclasses.replace(
    conversation(("q", "a"), images={0: 1}), images=(ImageSource(data=b"no picture"),), location="data.json:8"
)
SPECIAL = dataclasses.replace(conversation(("q", "<|im_end|>")), location="data.json:9")


def test_what_cannot_be_asked_is_reported_and_costs_no_other(model: VLM) -> None:
    good = conversation(("q", "a"))
    result = evaluate(model, [BAD, DAMAGED, good, SPECIAL], batch_size=2, max_new_tokens=2)
    assert [p.key for p in result.predictions] == [good.key]
    assert [where for where, _ in result.skipped] == ["data.json:7", "data.json:8", "data.json:9"]
    broken, picture, special = (why for _, why in result.skipped)
    assert broken == BAD.reason and "cannot be decoded" in picture and "special token" in special
    assert math.isnan(result.overall.accuracy_error)  # one conversation has no spread


def test_nothing_to_ask_is_an_error_with_the_first_reason(model: VLM) -> None:
    with pytest.raises(DataError, match=r"nothing to evaluate: data\.json:7: broken JSON: oops"):
        evaluate(model, [BAD, DAMAGED])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(model, [])


def test_an_unknown_metric_is_a_usage_error(model: VLM) -> None:
    with pytest.raises(
        UsageError, match="--metric 'bleu': expected auto or one of exact, number, relaxed, anls, prose, vqa, choice"
    ):
        evaluate(model, SAMPLES, metric="bleu")


# -------------------------------------------------------------------------------------------------------- standard errors


def predictions(scores: list[float], *, turns: int = 1) -> list[Prediction]:
    """Conversation i has `turns` turns, each with the score and log-loss `scores[i]`."""
    rest = dict(category="", question="", answer="", prediction="", metric="exact")
    return [
        Prediction(key=str(i), turn=turn, score=score, log_loss=score, **rest)
        for i, score in enumerate(scores)
        for turn in range(turns)
    ]


some_scores = st.lists(st.floats(0, 1), min_size=2, max_size=20)


@given(some_scores)
def test_the_standard_error_of_single_turns_is_the_usual_one(scores: list[float]) -> None:
    result = _score(predictions(scores))
    expected = np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert (result.accuracy, result.accuracy_error) == pytest.approx((np.mean(scores), expected), abs=1e-9)
    assert result.log_loss_error == result.accuracy_error


@given(some_scores, st.integers(2, 4))
def test_turns_that_say_the_same_again_do_not_shrink_the_error(scores: list[float], turns: int) -> None:
    once, again = _score(predictions(scores)), _score(predictions(scores, turns=turns))
    assert again.n == turns * once.n
    assert (again.accuracy, again.accuracy_error) == pytest.approx((once.accuracy, once.accuracy_error), abs=1e-9)
