"""Answer rows, question rows and their targets against the words of the format, over real tiny models."""

import functools

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples

from genrecal.cache import extract
from genrecal.cache.draws import uniforms
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import SampleError
from genrecal.shards.codecs import round_to_bf16
from genrecal.shards.record import NO_TARGET
from genrecal.vlm.loading import VLM

FAMILIES = ["qwen2_vl", "qwen2_vl_padded_head", "internvl_llama", "idefics3"]


@pytest.fixture(scope="module")
def teacher_of(tiny):
    return functools.cache(lambda family: HFTeacher.load(tiny(family), dtype=torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_models_own(teacher_of, family):
    """Batched capture against one plain forward a sample, position by position."""
    teacher = teacher_of(family)
    encoded = [teacher.encode(sample) for sample in mixed_samples(4)]
    results = teacher.states(encoded, questions=[True] * 4, top_k=5)
    for item, states in zip(encoded, results, strict=True):
        ids = item.input_ids
        with torch.no_grad():
            output = teacher.vlm.model(**teacher.vlm.renderer.collate([item]), output_hidden_states=True)
        logits = output.logits[0]
        hidden = teacher.vlm.hidden(teacher.vlm.renderer.collate([item]))[0].detach()
        expected_positions, expected_turns, targets = [], [], []
        questions = []
        for number, (start, end, is_answer) in enumerate(item.segments()):
            if is_answer:
                expected_positions += range(start - 1, end)
                expected_turns += [number // 2] * (end - start + 1)
                targets += [*ids[start:end].tolist(), NO_TARGET]
            else:
                questions += range(start, end)
        answer, question = states.answer, states.question
        assert answer.position.tolist() == expected_positions
        assert answer.turn.tolist() == expected_turns
        assert answer.target_id.tolist() == targets
        assert answer.token_id.tolist() == ids[expected_positions].tolist()
        assert question.position.tolist() == questions
        assert question.token_id.tolist() == ids[questions].tolist()
        # Rounding to bfloat16 may fall either way where a batch of another width moves the last digit.
        close = dict(rtol=0.01, atol=1e-4)
        assert np.allclose(answer.hidden, round_to_bf16(hidden[expected_positions].numpy()), **close)
        assert np.allclose(question.hidden, round_to_bf16(hidden[questions].numpy()), **close)
        rows = logits[expected_positions]
        values, top = rows.topk(5)
        assert np.allclose(answer.topk_logits, values.detach().numpy(), atol=1e-4)
        assert (answer.topk_ids == top.numpy()).mean() > 0.99
        assert np.allclose(answer.logsumexp, rows.logsumexp(-1).detach().numpy(), atol=1e-4)
        keep = answer.predicts
        wanted = rows.log_softmax(-1)[torch.from_numpy(keep)].gather(1, torch.tensor(targets)[keep, None])[:, 0]
        assert np.allclose(answer.target_log_prob[keep], wanted.detach().numpy(), atol=1e-4)


def test_head_of_the_hidden_state_gives_the_stored_logits(teacher_of):
    teacher = teacher_of("qwen2_vl")
    encoded = teacher.encode(mixed_samples(1)[0])
    answer = teacher.states([encoded], questions=[False], top_k=400)[0].answer
    assert answer.topk_ids.shape[1] == teacher.head.weight.shape[0]  # k is at most V
    logits = teacher.head.logits(torch.from_numpy(answer.hidden))
    stored = torch.zeros_like(logits).scatter(
        1, torch.from_numpy(answer.topk_ids).long(), torch.from_numpy(answer.topk_logits)
    )
    assert (logits - stored).abs().max() < 0.05  # bfloat16's rounding of the state


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_targets_are_drawn_from_each_rows_own_distribution(teacher_of, family):
    """The rule written out in numpy over the model's own logits, row by row; a shift by one row would not pass."""
    teacher = teacher_of(family)
    for encoded in [teacher.encode(sample) for sample in mixed_samples(4)]:
        answer = teacher.states([encoded], questions=[False], top_k=3, draws=40)[0].answer
        with torch.no_grad():
            logits = teacher.vlm.model(**teacher.vlm.renderer.collate([encoded])).logits[0].double().numpy()
        numbers, same = uniforms(encoded.key, len(answer), 40), 0
        for row, position in enumerate(answer.position):
            p = np.exp(logits[position] - logits[position].max())
            p /= p.sum()
            ids, counts = np.unique(np.searchsorted(np.cumsum(p), numbers[row], side="right"), return_counts=True)
            got = answer.sampled.counts[row] > 0
            assert answer.sampled.counts[row].sum() == 40
            same += answer.sampled.ids[row][got].tolist() == ids.tolist() and np.array_equal(
                answer.sampled.counts[row][got], counts
            )
            assert answer.sampled.entropy[row] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        assert same >= len(answer) - 1  # a logit's last digit may move a draw to the neighbouring id


def test_draws_depend_on_no_batch_chunk_or_other_target(teacher_of, monkeypatch):
    teacher = teacher_of("qwen2_vl")
    encoded = [teacher.encode(sample) for sample in mixed_samples(4)]
    together = [s.answer for s in teacher.states(encoded, questions=[False] * 4, top_k=3, draws=50)]
    without = [s.answer for s in teacher.states(encoded, questions=[False] * 4, top_k=3)]
    for one, other in zip(together, without, strict=True):
        assert other.sampled is None
        assert np.array_equal(one.topk_logits, other.topk_logits)  # the other targets keep their bytes
    monkeypatch.setattr(extract, "LOGIT_BUDGET", 2 * teacher.head.weight.shape[0])  # two rows a chunk
    for item, answer in zip(encoded, together, strict=True):
        alone = teacher.states([item], questions=[False], top_k=3, draws=50)[0].answer
        same = (alone.sampled.ids == answer.sampled.ids).all(1) & (alone.sampled.counts == answer.sampled.counts).all(1)
        assert same.sum() >= len(same) - 1  # other widths move float32 sums in their last digits
        assert np.allclose(alone.sampled.entropy, answer.sampled.entropy, atol=1e-5)


def test_byte_ranges_are_in_the_answer(teacher_of):
    teacher = teacher_of("internvl_llama")
    text = "中文 🙂 ok"
    encoded = teacher.encode(conversation(("q", text)))
    answer = teacher.states([encoded], questions=[False], top_k=2)[0].answer
    keep = answer.predicts
    pieces = [text.encode()[s:e] for s, e in zip(answer.target_start[keep], answer.target_end[keep], strict=True)]
    assert b"".join(pieces) == text.encode() and pieces[-1] == b""


def test_samples_go_through_the_head_together_and_a_bad_one_spoils_no_other(teacher_of, monkeypatch):
    teacher = teacher_of("qwen2_vl")
    batch = [teacher.encode(sample) for sample in mixed_samples(4)]
    hidden = [torch.randn(len(encoded), teacher.vlm.hidden_size) for encoded in batch]
    hidden[1][-2] = float("nan")

    def states(places, draws):
        monkeypatch.setattr(VLM, "states", lambda self, batch: [hidden[place] for place in places])
        return teacher.states([batch[i] for i in places], questions=[True] * len(places), top_k=4, draws=draws)

    for draws in (0, 9):
        together = states(range(4), draws)
        assert isinstance(together[1], SampleError) and "finite" in str(together[1])
        for place in (0, 2, 3):
            [alone], got = states([place], draws), together[place]
            for part in ("answer", "question"):
                for name, value in vars(getattr(alone, part)).items():
                    if isinstance(value, np.ndarray):
                        assert np.allclose(getattr(getattr(got, part), name), value, atol=1e-5), name
            assert (alone.answer.sampled is None) == (draws == 0)
            if draws:
                assert np.allclose(got.answer.sampled.entropy, alone.answer.sampled.entropy, atol=1e-5)
                assert (got.answer.sampled.ids != alone.answer.sampled.ids).any(1).sum() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, -1])  # of the question, and of the answer
def test_states_that_are_not_finite_are_refused(teacher_of, monkeypatch, bad, row):
    teacher = teacher_of("qwen2_vl")
    encoded = teacher.encode(conversation(("q", "an answer")))
    hidden = torch.randn(len(encoded), teacher.vlm.hidden_size)
    hidden[row, 3] = bad
    monkeypatch.setattr(VLM, "states", lambda self, batch: [hidden])
    [found] = teacher.states([encoded], questions=[True], top_k=4)
    assert isinstance(found, SampleError) and ("finite" in str(found) or "NaN" in str(found))
