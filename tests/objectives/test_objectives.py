"""Every objective from one cache: what each trains on, on the real loss path, and what is refused before anything loads."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import UsageError
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.base import map_tensors
from genrecal.objectives.cells import TokenMap
from genrecal.objectives.pairs import shared_with
from genrecal.objectives.uld import rows_by_place
from genrecal.samples import open_samples
from genrecal.shards.head import FrozenHead
from genrecal.shards.mixture import open_caches
from genrecal.shards.reader import open_cache
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import load_config
from genrecal.train.logs import read_metrics
from genrecal.train.loop import build_distiller, open_for, train
from genrecal.train.run import Run
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import load_processor, load_vlm
from genrecal.vlm.rendering import Renderer

SMALL = "batch_size=4 accumulation=1 max_steps=2 lr=1e-3 lr_end=1e-3 checkpoint_every=0".split()
SETTINGS = ["data.workers=0", "lora.dropout=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]
SAME, OTHER = "qwen2_vl", "internvl_llama"  # students: the teacher's tokenizer with a head not padded, and another
DIRECT = ["byte-kl", "kl", "reverse-kl", "skewed-kl", "uld", "dskd"]


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    """A teacher whose head has 24 rows more than its tokenizer."""
    folder = tmp_path_factory.mktemp("objectives")
    data = write_llava(folder / "d", mixed_samples(8))
    teacher = HFTeacher.load(tiny("qwen2_vl_padded_head"), dtype=torch.float32)
    options = CacheOptions(samples_per_shard=8, draws=12, top_k=16, answer_codec="bf16", question_fraction=0.0)
    run_cache_job(teacher, open_samples([data]), folder / "c", options)
    return folder / "c"


@pytest.fixture
def run_of(tiny, cache, tmp_path):
    def make(objective, *settings, student=None, name="run"):
        student = student or (SAME if OBJECTIVES[objective].one_tokenizer else OTHER)
        config = load_config(None, [*SETTINGS, f"objective={objective}", *settings])
        return Run(path=tmp_path / name, config=config, student=str(tiny(student)), caches=(str(cache),))

    return make


def micro_batch(run, stage, distiller, places=range(8)):
    builder = BatchBuilder(ShardSource(open_caches(run.caches)), distiller.student.renderer, distiller.objective)
    loaded = builder[list(places)]
    assert not loaded.skipped and loaded.error is None
    return loaded.batch


def distiller_of(run, stage=2):
    torch.manual_seed(5)
    return build_distiller(run, open_caches(run.caches), stage, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "objective",
    [name if name in ("byte-kl", "kl", "dskd") else pytest.param(name, marks=pytest.mark.slow) for name in DIRECT],
)
def test_both_stages_train_on_every_term(run_of, objective, capsys):
    run = run_of(objective)
    train(run)
    terms = {"sft", *OBJECTIVES[objective].logs}
    lines = read_metrics(run.path)
    assert [(line["stage"], line["step"]) for line in lines] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    for line in lines:
        assert {f"{term}{part}" for term in terms for part in ("", "_first", "_later")} <= line.keys()
        if objective in ("kl", "reverse-kl", "skewed-kl"):  # the others' rows are not all the teacher's
            assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-4)
    assert f"objective {objective} has no stage 1" in capsys.readouterr().err
    losses = [sum(line[term] for term in terms) for line in lines]  # per row: batches have other numbers of rows
    assert losses[1] < losses[0] and losses[3] < losses[2]


def test_byte_kl_of_one_tokenizer_is_kl(run_of):
    """In value and gradient, with a teacher whose head is padded and a student whose is not."""
    found = []
    for name in ("kl", "byte-kl"):
        distiller = distiller_of(run_of(name, student=SAME, name=name))
        batch = micro_batch(run_of(name, student=SAME, name=name), 2, distiller)
        output = distiller(batch, len(batch.student_ids))
        output.loss.backward()
        gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
        found.append((output.loss.detach(), torch.cat([g.flatten() for g in gradients])))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_caches_of_two_teachers_train_as_by_hand(run_of, tiny, cache, tmp_path):
    """The first step's loss over all samples of both, worked out row by row with each teacher's own tokenizer."""
    data, other = write_llava(tmp_path / "d", mixed_samples(4)), tmp_path / "other"
    options = CacheOptions(samples_per_shard=8, draws=12, top_k=16, question_fraction=0.0)
    run_cache_job(HFTeacher.load(tiny(OTHER), dtype=torch.float32), open_samples([data]), other, options)
    weights = ["loss.ce_weight=0.5", "loss.kl_weight=2.0", "stage2.batch_size=12", "stage2.max_steps=1"]
    run = replace(run_of("byte-kl", *weights, student=SAME), caches=(str(cache), str(other)))
    train(run, stages=[2])
    student = load_vlm(tiny(SAME), dtype=torch.float32)
    loss, tokens, compared = 0.0, 0, []
    for path in run.caches:
        table = TokenMap(
            teacher_renderer(open_cache(path)),
            student.renderer,
            student_rows=len(student.renderer.tokenizer),
            same=path == str(cache),
        )
        for record in open_cache(path):
            encoded = student.renderer.encode(record.sample)
            with torch.no_grad():
                states = student.hidden(student.renderer.collate([encoded]))[0]
                own = torch.cat([states[s - 1 : e - 1] for s, e, is_answer in encoded.segments() if is_answer])
                log_q = student.transform(student.head(own)).double().log_softmax(-1).numpy()
            ids = np.concatenate([answer.ids for answer in encoded.answers])
            answer = record.answer_rows()
            tokens += answer.predicts.sum()
            cells = table.cells(answer, encoded.answers, [text.encode() for text in record.sample.answers])
            compared += cells.valid.tolist()
            for row, valid in enumerate(cells.valid):
                loss -= 0.5 * log_q[row, ids[row]]
                if not valid:
                    continue
                left = 1.0
                for cell in np.flatnonzero(cells.cell_rows == row):
                    q = np.exp(log_q[row, cells.pair_ids[cells.pair_cells == cell]]).sum()
                    left -= q
                    loss += 2.0 * math.exp(cells.log_p[cell]) * (cells.log_p[cell] - math.log(q))
                loss += 2.0 * math.exp(cells.log_rest[row]) * (cells.log_rest[row] - math.log(left))
    first = read_metrics(run.path)[0]
    assert (first["stage"], first["step"], first["samples"]) == (2, 0, 12)
    assert first["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert first["compared"] == pytest.approx(np.mean(compared), rel=1e-4)


@pytest.mark.parametrize("objective", ["genrecal", "kl", "dskd", "uld"])
def test_objectives_that_need_one_teacher_refuse_caches_of_two(tiny, run_of, cache, tmp_path, objective):
    other = shutil.copytree(cache, tmp_path / "other")
    content = json.loads((other / "cache.json").read_text())
    content["teacher"]["head_xxh3"] = "0" * 32
    (other / "cache.json").write_text(json.dumps(content))
    run = run_of(objective, "loss.target=exact")
    with pytest.raises(
        UsageError, match="the teacher's head: .*; objectives that read neither states nor the .* take several"
    ):
        open_for(replace(run, caches=(str(cache), str(other))), [2])
    if objective == "uld":  # without the head it takes them
        run = run_of(objective, "loss.target=topk", name="topk")
        assert len(open_for(replace(run, caches=(str(cache), str(other))), [2]).caches) == 2


@pytest.mark.parametrize("target", ["topk", "exact", "sample"])
def test_kl_is_the_dense_formula_over_the_models_own_logits(run_of, target):
    """From files of a cache to the loss: the KL of whole distributions, worked out anew from the two models' logits."""
    run = run_of("kl", f"loss.target={target}", "loss.ce_weight=0.5", "loss.kl_weight=2.0")
    distiller, cache = distiller_of(run), open_caches(run.caches)
    batch = micro_batch(run, 2, distiller)
    rows = len(batch.student_ids)
    output = distiller(batch, rows)
    head, student = cache.head(), distiller.student
    shared = len(student.renderer.tokenizer)
    assert (head.weight.shape[0], student.head.out_features, distiller.objective.shared_ids) == (
        shared + 24,
        shared,
        shared,
    )
    assert (distiller.objective.head is not None) == (target == "exact")
    kl, ce = 0.0, 0.0
    for record in cache:
        encoded = student.renderer.encode(record.sample)
        with torch.no_grad():
            states = student.hidden(student.renderer.collate([encoded]))[0]
        answers = record.answer_rows()
        own = torch.cat([states[s - 1 : e - 1] for s, e, is_answer in encoded.segments() if is_answer])
        log_q = student.transform(student.head(own)).double().log_softmax(-1).detach()
        teacher = head.logits(torch.from_numpy(answers.hidden[answers.predicts])).double()
        p = teacher[:, :shared].softmax(-1)
        kl += (p * (p.log() - log_q)).sum().item()
        ids = torch.from_numpy(answers.target_id[answers.predicts]).long()
        ce -= log_q.gather(1, ids[:, None]).sum().item()
    within = {"topk": 0.2, "exact": 1e-4, "sample": 0.2}[target]  # a bucket is below, 12 draws a row are about it
    assert output.sums["kl"].item() == pytest.approx(kl, rel=within)
    assert target != "topk" or output.sums["kl"].item() < kl
    assert output.sums["sft"].item() == pytest.approx(ce, rel=1e-4)
    expected = (0.5 * output.sums["sft"] + 2.0 * output.sums["kl"]) / rows
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["kl", "reverse-kl", "skewed-kl"])
def test_a_teacher_that_is_the_student_has_no_divergence(tiny, cache, tmp_path, objective):
    """From capture to loss, with heads of different sizes: one row off and it would not be 0."""
    folder = shutil.copytree(cache, tmp_path / "same")
    student = tiny("qwen2_vl_padded_head")
    config = load_config(None, [*SETTINGS, f"objective={objective}", "loss.target=exact"])
    run = Run(path=tmp_path / "run", config=config, student=str(student), caches=(str(folder),))
    distiller = distiller_of(run)
    batch = micro_batch(run, 2, distiller)
    output = distiller(batch, 1)
    (term,) = OBJECTIVES[objective].logs
    assert output.sums[term].abs().item() / output.counts[term] < 1e-3  # bf16's rounding of the states
    batch.target = map_tensors(batch.target, lambda t: t.roll(1, 0))
    assert distiller(batch, 1).sums[term].item() / len(batch.student_ids) > 0.1


def test_uld_pairs_rows_at_the_same_place_of_a_turn(run_of):
    assert rows_by_place([3, 1], [2, 4]).tolist() == [0, 1, -1, 2]
    run = run_of("uld", "loss.target=exact", "loss.ce_weight=0.0")
    distiller, cache = distiller_of(run), open_caches(run.caches)
    batch = micro_batch(run, 2, distiller)
    rows = len(batch.student_ids)
    output = distiller(batch, rows)
    student, head, total, count = distiller.student, cache.head(), 0.0, 0
    for record in cache:
        encoded = student.renderer.encode(record.sample)
        with torch.no_grad():
            states = student.hidden(student.renderer.collate([encoded]))[0]
        answers, turn = record.answer_rows(), 0
        for start, end, is_answer in encoded.segments():
            if not is_answer:
                continue
            q = student.transform(student.head(states[start - 1 : end - 1])).double().softmax(-1).detach()
            p = head.logits(torch.from_numpy(answers.hidden[answers.turn == turn][:-1])).double().softmax(-1)
            for mine, its in zip(q, p, strict=False):  # up to the shorter answer
                mine, its = (sorted(side.tolist(), reverse=True) + [0.0] * 200 for side in (mine, its))
                total += sum(abs(a - b) for a, b in zip(mine, its, strict=False))
                count += 1
            turn += 1
    assert output.counts["uld"] == count < rows
    assert output.sums["uld"].item() == pytest.approx(total, rel=1e-4)
    assert output.loss.item() == pytest.approx(total / rows, rel=1e-4)


def test_dskd_is_its_three_terms_written_out(run_of):
    run = run_of("dskd", "loss.target=exact", "loss.ce_weight=0.5", "loss.kl_weight=2.0")
    distiller, cache = distiller_of(run), open_caches(run.caches)
    batch = micro_batch(run, 2, distiller)
    its = len(batch.target_ids)
    output = distiller(batch, its)
    output.loss.backward()
    sums, student, head = dict.fromkeys(("sft", "t2s_ce", "t2s_kl", "s2t_kl"), 0.0), distiller.student, cache.head()
    embed = student.model.get_input_embeddings()
    loss = torch.zeros(())
    for record in cache:
        encoded = student.renderer.encode(record.sample)
        states = student.hidden(student.renderer.collate([encoded]))[0]
        ids, answers, turn = torch.from_numpy(encoded.input_ids), record.answer_rows(), 0
        for start, end, is_answer in encoded.segments():
            if not is_answer:
                continue
            rows, of = states[start - 1 : end - 1], answers.turn == turn
            tokens = embed(torch.stack([ids[start - 1 : end - 1], ids[start:end]], 1)).detach()
            its_states, now, then = (
                torch.from_numpy(x[of][:-1]) for x in (answers.hidden, answers.token_id, answers.target_id)
            )
            its_tokens = head.weight[torch.stack([now, then], 1).long()]
            place = [torch.zeros(len(part), dtype=torch.int64) for part in (rows, its_states)]
            t2s, s2t = distiller.dual_space(rows, tokens, place[0], its_states, its_tokens, place[1])
            weight = student.head.weight.detach()
            log_q, log_t2s = (student.transform(x @ weight.T).log_softmax(-1) for x in (rows, t2s))
            targets = ids[start:end]
            sft, t2s_ce = (torch.nn.functional.nll_loss(x, targets, reduction="sum") for x in (log_q, log_t2s))
            p = log_t2s.detach()
            right = (p.argmax(-1) == targets).float()
            t2s_kl = (right * (p.exp() * (p - log_q)).sum(-1)).sum()
            log_p = head.logits(its_states).log_softmax(-1)
            s2t_kl = (log_p.exp() * (log_p - head.logits(s2t).log_softmax(-1))).sum()
            loss = loss + (0.5 * sft + 2 * t2s_ce + 2 * t2s_kl + 2 * s2t_kl) / its
            for name, value in zip(sums, (sft, t2s_ce, t2s_kl, s2t_kl), strict=True):
                sums[name] += value.item()
            turn += 1
    for name, value in sums.items():
        assert output.sums[name].item() == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    gradients = {name: p.grad.clone() for name, p in trained_parameters(distiller).items()}
    distiller.zero_grad()
    loss.backward()
    for name, parameter in trained_parameters(distiller).items():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-2, atol=1e-4), name
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in gradients.items())
    assert not any("lm_head" in name or "embed" in name for name in gradients)


@pytest.mark.parametrize(
    ("objective", "stage"),
    [
        ("uld", 2),
        ("dskd", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("reverse-kl", 3), ("dskd", 2))),
    ],
)
def test_cutting_a_batch_differently_changes_nothing(run_of, objective, stage):
    run = run_of(objective, "loss.chunk_rows=5")
    distiller = distiller_of(run, stage)
    found = []
    for cuts in ([range(8)], [range(0, 3), range(3, 8)], [[i] for i in range(7, -1, -1)]):
        distiller.zero_grad()
        batches = [micro_batch(run, stage, distiller, part) for part in cuts]
        total = 0.0
        for batch in batches:
            loss = distiller(batch, 10).loss
            loss.backward()
            total += loss.item()
        found.append(
            (total, {name: p.grad.clone() for name, p in trained_parameters(distiller).items() if p.grad is not None})
        )
    for total, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in found[0][1].items():
            assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=2e-5), name


def test_stage_3_goes_on_with_the_projections_of_stage_2(run_of):
    run = run_of("dskd")
    train(run, stages=(2,))
    learnt = run.load_result(2)
    names = [name for name in learnt if name.startswith("dual_space.")]
    distiller = distiller_of(run, 3)
    assert len(names) == 6
    for name in names:
        assert torch.equal(distiller.get_parameter(name), learnt[name])


# ------------------------------------------------------------------------------------------- what is refused, and where


@pytest.mark.parametrize(
    ("objective", "target", "message"),
    [
        ("reverse-kl", "sample", r"loss.target 'sample': objective reverse-kl needs .*; expected topk or exact"),
        ("uld", "sample", "objective uld needs"),
        (
            "kd",
            "topk",
            r"objective 'kd': expected one of genrecal, genrecal-aligned, sft, seqkd, byte-kl, kl, reverse-kl",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(objective, target, message):
    with pytest.raises(UsageError, match=message):
        load_config(None, [f"objective={objective}", f"loss.target={target}"])


def test_another_tokenizer_is_refused_before_a_model_loads(run_of, monkeypatch):
    run = run_of("kl", student=OTHER)
    monkeypatch.setattr(Run, "load_student", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError) as refused:
        train(run)
    message = str(refused.value)
    assert message.startswith("objective kl needs one tokenizer, and those of the teacher (qwen2_vl_padded_head) and")
    assert "differ: id " in message and message.endswith(
        "Any pair can take genrecal, genrecal-aligned, sft, seqkd, byte-kl, uld, dskd"
    )
    assert not run.path.exists()
    open_for(run_of("uld", student=OTHER), (2,))


def test_what_tokenizers_have_in_common(cache, tiny, tmp_path):
    opened = open_cache(cache)
    same = shared_with(opened, Renderer(load_processor(tiny(SAME))))
    assert same.differences == () and same.ids == opened.description["vocab_size"]
    # A token of its own behind the others, as students have: answers hold none, and its row counts on neither side.
    folder = shutil.copytree(tiny(SAME), tmp_path / "more")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {"id": same.ids, "content": "<img>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert shared_with(opened, Renderer(load_processor(folder))) == same
    # Two entries exchanged: as many ids, another text.
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    moved = shared_with(opened, Renderer(load_processor(folder)))
    assert moved.ids == min(vocabulary["e"], vocabulary["t"]) and "tokens, " in moved.differences[-1]


def test_a_sample_with_other_tokens_is_left_out_and_named(run_of):
    run = run_of("kl")
    distiller = distiller_of(run)
    source = ShardSource(open_caches(run.caches))

    class Changed:
        def fetch(self, indices, tier):
            found = source.fetch(indices, tier)
            found[1][1].answer.target_id[0] += 1
            return found

    loaded = BatchBuilder(Changed(), distiller.student.renderer, distiller.objective)[[0, 1]]
    assert len(loaded.batch.keys) == 1 and "of the student that are not the same" in loaded.skipped[0]


def test_seqkd_wants_the_teachers_answers(run_of, cache, tmp_path):
    with pytest.raises(
        UsageError, match="seqkd trains on the teacher's own answers, and this cache has the given ones"
    ):
        train(run_of("seqkd"))
    made = shutil.copytree(cache, tmp_path / "made")
    content = json.loads((made / "cache.json").read_text())
    content["answers"] = {"kind": "greedy", "max_tokens": 64}
    (made / "cache.json").write_text(json.dumps(content))
    run = run_of("seqkd")
    open_for(Run(path=run.path, config=run.config, student=run.student, caches=(str(made),)), (2, 3))


def test_a_head_stays_as_it_was_where_it_is_not_trained(run_of):
    """Stage 2 trains LoRA alone, the head is frozen (and may be the embedding); in stage 3 it gets a gradient."""
    for stage in (2, 3):
        distiller = distiller_of(run_of("kl"), stage)
        batch = micro_batch(run_of("kl"), stage, distiller)
        distiller(batch, 1).loss.backward()
        weight = distiller.student.head.weight
        assert (weight.grad is not None) == weight.requires_grad == (stage == 3)
    assert isinstance(open_caches(run_of("kl").caches).first.head(), FrozenHead)
