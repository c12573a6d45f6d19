"""What each stage trains, and that a loss does not depend on how its global batch is cut."""

import numpy as np
import pytest
import tiny_models
import torch
from conftest import conversation, mixed_samples, write_llava
from naive_align import align_turn_naive

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.losses import TopK, head_losses_naive
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import LoraConfig, LossConfig, TrainConfig
from genrecal.train.stages import Distiller, add_lora, merge_lora, select_trainable
from genrecal.vlm.loading import load_processor, load_vlm
from genrecal.vlm.rendering import Renderer

FAMILIES = sorted(set(tiny_models.FAMILIES) - {"qwen2_vl_padded_head"})


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    # The student's tokenizer cuts the last answer where the teacher's does not, and the other way round.
    samples = [*mixed_samples(11), conversation(("Who is shown?", "system users"), key="00000011")]
    data = write_llava(folder / "d", samples)
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=5, question_fraction=0.6))
    return open_caches([folder / "c"])


@pytest.fixture
def student(tiny):
    return load_vlm(tiny("internvl_llama"), dtype=torch.float32)


def distiller_of(stage, student, cache, *, objective="genrecal-aligned", **loss):
    torch.manual_seed(3)
    made = OBJECTIVES[objective](stage, TrainConfig(loss=LossConfig(**loss), objective="sft"))
    modules = made.modules(student.model.config, cache.hidden_size)
    made.prepare(student, cache, np.arange(len(cache)), modules)
    return Distiller(student, made, modules)


def batch_of(distiller, cache, indices=range(12)):
    return BatchBuilder(ShardSource(cache), distiller.student.renderer, distiller.objective)[list(indices)].batch


def gradients(distiller, batches, tokens=10):
    """The loss and every gradient of a global batch cut into `batches`."""
    parameters = trained_parameters(distiller)
    distiller.zero_grad()
    total = 0.0
    for batch in batches:
        loss = distiller(batch, tokens).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_cutting_a_batch_differently_changes_nothing(student, cache, stage):
    select_trainable(stage, student, LoraConfig(rank=0))
    distiller = distiller_of(stage, student, cache, first_token_weight=3.0)
    whole = gradients(distiller, [batch_of(distiller, cache)])
    for cuts in ([range(0, 5), range(5, 12)], [range(i, i + 1) for i in range(11, -1, -1)]):
        cut = gradients(distiller, [batch_of(distiller, cache, part) for part in cuts])
        assert cut[0] == pytest.approx(whole[0], rel=1e-5)
        for name, gradient in whole[1].items():
            assert torch.allclose(cut[1][name], gradient, rtol=1e-3, atol=1e-5), name


def test_stage_1_loss_is_the_four_terms_written_out(student, cache):
    """Algorithms 1 and 2 over single conversations with plain indexing, against the batched module."""
    select_trainable(1, student, LoraConfig())
    distiller = distiller_of(1, student, cache, objective="genrecal")
    batch = batch_of(distiller, cache)
    output = distiller(batch, len(batch.target_ids))
    head, rec = cache.head(), distiller.recalibrator
    sums = dict.fromkeys(("ce", "kl", "reg_ce", "reg_kl"), 0.0)
    for record in cache:
        rows = record.answer_rows()
        encoded = student.renderer.encode(record.sample)
        with torch.no_grad():
            states = student.hidden(student.renderer.collate([encoded]))[0]
        own = [states[s:e] for s, e, is_answer in encoded.segments() if not is_answer]
        passes = [("", own)]
        if record.has_question:
            question = record.question_rows()
            turns = [rec.rec_proj_pre(torch.from_numpy(question.hidden[question.turn == t])) for t in range(len(own))]
            passes.append(("reg_", turns))
        for prefix, questions in passes:
            pieces, predicts = [], []
            for turn, part in enumerate(questions):
                answer = rec.rec_proj_pre(torch.from_numpy(rows.hidden[rows.turn == turn][1:]))
                at = sum(map(len, pieces)) + len(part) - 1
                pieces += [part, answer]
                predicts += range(at, at + len(answer))
            keep = rows.predicts
            target = TopK(
                ids=torch.from_numpy(rows.topk_ids[keep]).long(),
                log_probs=torch.from_numpy(rows.topk_logits[keep] - rows.logsumexp[keep, None]),
            )
            ids = torch.from_numpy(rows.target_id[keep]).long()
            losses = head_losses_naive(rec(torch.cat(pieces)[None])[0][predicts], head, ids, target)
            sums[prefix + "ce"] += losses.ce.sum().item()
            sums[prefix + "kl"] += losses.kl.sum().item()
    for name, value in sums.items():
        assert output.sums[name].item() == pytest.approx(value, rel=1e-4), name
    fraction = cache.column("has_question").mean()
    assert 0 < fraction < 1
    expected = (sums["ce"] + sums["kl"] + (sums["reg_ce"] + sums["reg_kl"]) / fraction) / len(batch.target_ids)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


WEIGHTS = dict(splice_weight=0.5, reg_weight=2.0, aligned_weight=0.7, sft_weight=0.3, first_token_weight=3.0)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_aligned_pass_is_its_formula_in_value_and_gradient(tiny, student, cache, stage):
    """Conversation by conversation, the text before each token compared as bytes, whole logits and plain autograd."""
    select_trainable(stage, student, LoraConfig(rank=0))
    distiller = distiller_of(
        stage, student, cache, splice_weight=0.0, sft_weight=0.0, aligned_weight=0.7, kl_weight=2.0
    )
    batch = batch_of(distiller, cache)
    assert batch.splice is None and batch.regularisation is None
    tokens = len(batch.target_ids)
    output = distiller(batch, tokens)
    output.loss.backward()
    trained = trained_parameters(distiller)
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    distiller.zero_grad()

    teacher_tokens = Renderer(load_processor(tiny("qwen2_vl"))).byte_tokenizer
    own_tokens, head, sums, count = student.renderer.byte_tokenizer, cache.head(), 0.0, 0
    for record in cache:
        rows, encoded = record.answer_rows(), student.renderer.encode(record.sample)
        with torch.set_grad_enabled(stage > 1):
            states = student.body(**student.renderer.collate([encoded]), use_cache=False).last_hidden_state
        recalibrated = distiller.recalibrator(states)[0]
        turns = [segment for segment in encoded.segments() if segment[2]]
        for turn, (start, end, _) in enumerate(turns):
            (own,) = np.nonzero((rows.turn == turn) & rows.predicts)
            pieces = [[teacher_tokens.token_bytes(int(i)) for i in rows.target_id[own][:-1]]]
            pieces.append([own_tokens.token_bytes(int(i)) for i in encoded.input_ids[start : end - 1]])
            for row, place in align_turn_naive(*([*part, b""] for part in pieces)):
                at = own[row]
                log_probs = torch.from_numpy(rows.topk_logits[at] - rows.logsumexp[at])[None]
                target = TopK(ids=torch.tensor(rows.topk_ids[at]).long()[None], log_probs=log_probs)
                ids = torch.tensor([int(rows.target_id[at])])
                hidden = recalibrated[start - 1 + place][None]
                sums = sums + head_losses_naive(hidden, head, ids, target, kl_weight=2.0).weighted[0]
                count += 1
    assert count == len(batch.aligned_rows) < len(batch.target_ids)
    assert output.sums["aligned_share"] == count and output.counts["aligned_share"] == len(batch.target_ids)
    expected = 0.7 * sums / tokens
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, gradient in found.items():
        if trained[name].grad is not None:
            assert torch.allclose(gradient, trained[name].grad, rtol=1e-3, atol=1e-5), name
        else:
            assert not gradient.any(), name  # the student's own loss, of weight 0
    assert stage == 1 or any(name.startswith("model.") and found[name].abs().max() > 1e-4 for name in found)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_those_of_the_paths_and_of_first_tokens(student, cache, stage):
    select_trainable(stage, student, LoraConfig(rank=0))
    distiller = distiller_of(stage, student, cache, **WEIGHTS)
    with torch.no_grad():
        output = distiller(batch_of(distiller, cache), 7)

    def part(name):
        return (3.0 * output.sums[f"{name}_first"] + output.sums[f"{name}_later"]).item() / 7

    expected = 0.5 * (part("ce") + part("kl")) + 0.7 * (part("aligned_ce") + part("aligned_kl"))
    if stage == 1:
        expected += 0.5 * 2.0 / cache.column("has_question").mean() * (part("reg_ce") + part("reg_kl"))
    else:
        expected += 0.3 * part("sft")
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_aligned_pass_reaches_the_student_through_every_answer_position(student, cache):
    """What the paper's splice reaches are the last question positions and, less, those before; here all answer states too."""
    select_trainable(2, student, LoraConfig(rank=0))
    reached = {}
    for splice, aligned in ((1.0, 0.0), (0.0, 1.0)):
        distiller = distiller_of(2, student, cache, splice_weight=splice, aligned_weight=aligned, sft_weight=0.0)
        batch = batch_of(distiller, cache)
        kept = []

        def states_of(batch, distiller=distiller, kept=kept):
            states = type(distiller)._student_states(distiller, batch)
            states.retain_grad()
            kept.append(states)
            return states

        distiller._student_states = states_of
        distiller(batch, 9).loss.backward()
        reached[aligned] = kept[0].grad.flatten(0, 1).norm(dim=-1) > 0
    answers = batch.student_rows[~batch.student_first]  # positions of answer tokens that predict the next
    assert not reached[0.0][answers].any() and reached[1.0][answers].all()
    assert (
        reached[0.0][batch.student_rows[batch.student_first]].all()
        and reached[1.0][batch.student_rows[batch.student_first]].all()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained(tiny, family):
    student = load_vlm(tiny(family), dtype=torch.float32)
    every = {name for name, _ in student.model.named_parameters()}
    assert select_trainable(1, student, LoraConfig()) == []
    assert not any(p.requires_grad for p in student.model.parameters())
    stage3 = set(select_trainable(3, student, LoraConfig()))
    vision = every - stage3
    assert vision and all(tiny_models.is_vision_encoder(name) for name in vision)
    assert any("merger" in n or "projector" in n or "connector" in n for n in stage3), "the projector is trained"
    body = set(select_trainable(2, student, LoraConfig(rank=0)))
    assert body and all("layers" in name or name.endswith("norm.weight") for name in body) and body < stage3
    add_lora(student, LoraConfig(rank=4, alpha=4.0))
    lora = select_trainable(2, student, LoraConfig(rank=4))
    assert lora and all("lora_" in name for name in lora)
    assert not any(tiny_models.is_vision_encoder(name) or "merger" in name or "projector" in name for name in lora)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_computes_the_same(tiny, family):
    torch.manual_seed(0)
    student = load_vlm(tiny(family), dtype=torch.float32)
    names = list(student.model.state_dict())
    inputs = student.renderer.collate([student.renderer.encode(conversation(("What?", "a b c"), images={0: 1}))])
    with torch.no_grad():
        before = student.hidden(inputs)
        add_lora(student, LoraConfig(rank=4, alpha=8.0))
        assert torch.equal(student.hidden(inputs), before)  # LoRA begins as nothing
        for name in select_trainable(2, student, LoraConfig(rank=4)):
            student.model.get_parameter(name).normal_(0, 0.3)
        student.model.eval()
        with_lora = student.hidden(inputs)
        merge_lora(student)
        merged = student.hidden(inputs)
    assert not torch.allclose(with_lora, before, atol=1e-2)
    assert (merged - with_lora).abs().max() < 1e-3 * with_lora.abs().max()  # float32's rounding, through the layers
    assert list(student.model.state_dict()) == names


def test_samples_without_questions_take_no_part_in_the_regularisation(student, cache):
    select_trainable(1, student, LoraConfig())
    distiller = distiller_of(1, student, cache, objective="genrecal")
    batch = batch_of(distiller, cache)
    with_question = [record.has_question for record in cache]
    assert 0 < sum(with_question) < 12
    rows = np.concatenate([np.full(r.row["answer_tokens"], q) for r, q in zip(cache, with_question, strict=True)])
    assert batch.regularisation.which.tolist() == np.flatnonzero(rows).tolist()
    none = batch_of(distiller, cache, [i for i, q in enumerate(with_question) if not q])
    assert len(none.regularisation.which) == 0 and distiller(none, 1).counts["reg_kl"] == 0
