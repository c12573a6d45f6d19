"""The forecast against what a real run writes, and the known teachers' sizes against what is known of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SROIE, mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.plan import CARDS, Card, PlanOptions, counted, human_bytes, make_plan, plan_text
from genrecal.cache.teacher import HFTeacher
from genrecal.cache.teacher_shape import KNOWN, qwen2_vl_tokens, teacher_shape, tiles
from genrecal.cli import main
from genrecal.demo.data import write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.errors import DataError, ModelError, UsageError
from genrecal.samples import open_samples
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.reader import open_cache
from genrecal.train.config import objectives_by_store
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.shape import patches_of, shape_of


@pytest.fixture(scope="module")
def teacher():
    return HFTeacher.load(ASSETS / "teacher")


def bytes_written(cache: Path) -> dict[str, int]:
    parts = {tier: sum(p.stat().st_size for p in (cache / tier).glob("*")) for tier in ("samples", "questions")}
    parts["manifest"] = sum(p.stat().st_size for p in (cache / "manifest").iterdir())
    return parts | {
        "index": (cache / "index.parquet").stat().st_size,
        "head": (cache / "head.safetensors").stat().st_size,
    }


def check_forecast(teacher, data, out, options, *, probe=10_000):
    """Within 3 % of all bytes, 5 % of the larger tier, and exact counts where every record was probed."""
    samples = open_samples([data])
    plan = make_plan(
        shape_of(ASSETS / "teacher"), teacher.vlm.renderer, samples, options, PlanOptions(probe=probe), out=str(out)
    )
    run_cache_job(teacher, samples, out, options)
    written, description = bytes_written(out), open_cache(out).description
    total = sum(written.values())
    assert plan.total_bytes == pytest.approx(total, rel=0.03), (plan.bytes, written)
    larger = max(("samples", "questions"), key=lambda tier: written[tier])
    assert plan.bytes[larger] == pytest.approx(written[larger], rel=0.05), (plan.bytes, written)
    assert plan.num_shards == description["num_shards"]
    if probe >= len(samples):
        for name in ("question_tokens", "answer_tokens", "skipped"):
            assert getattr(plan, name) == description["totals"][name]
    return plan, written


OPTIONS = [
    CacheOptions(samples_per_shard=128),
    CacheOptions(samples_per_shard=64, answer_codec="bf16", question_codec="bf16", question_fraction=0.5),
    CacheOptions(samples_per_shard=100, answer_codec="int4", question_codec="none", draws=20, top_k=16),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "bf16", "int4-draws"])
def test_the_demos_bytes(teacher, tmp_path, options):
    data = write_dataset(tmp_path / "data", num_samples=256, split="train", seed=0)
    check_forecast(teacher, data, tmp_path / "cache", options)


@pytest.mark.slow
def test_the_demos_bytes_from_a_part_of_it(teacher, tmp_path):
    data = write_dataset(tmp_path / "data", num_samples=256, split="train", seed=1)
    plan, written = check_forecast(teacher, data, tmp_path / "cache", CacheOptions(), probe=150)
    assert 0 < plan.error_bytes < 0.03 * plan.total_bytes


def test_what_writing_the_answers_costs(teacher, tmp_path, monkeypatch):
    """The demo's teacher answers like the data, so the forecast's lengths are almost those of what it writes."""
    data = write_dataset(tmp_path / "data", num_samples=40, split="train", seed=2)
    options = CacheOptions(samples_per_shard=20, batch_tokens=1000, answers=AnswerSource(kind="greedy", max_tokens=64))
    shape, samples, assumed = shape_of(ASSETS / "teacher"), open_samples([data]), PlanOptions()
    monkeypatch.setitem(CARDS, "h100", Card(989, 80, 1e-3))
    plan = make_plan(shape, teacher.vlm.renderer, samples, options, assumed)
    report = run_cache_job(teacher, samples, tmp_path / "cache", options)
    assert plan.total_bytes == pytest.approx(sum(bytes_written(tmp_path / "cache").values()), rel=0.03)
    answers = plan.answers
    assert answers.turns == report.counts["answers"] and answers.most_tokens == 64 * answers.turns
    assert answers.tokens == pytest.approx(
        open_cache(tmp_path / "cache").description["totals"]["answer_tokens"], rel=0.1
    )
    # Slowly: token by token, every step of a batch reading the weights of the layers and the head.
    flops, prompts = 0.0, []
    for sample in samples:
        encoded = teacher.encode(sample)
        patches = patches_of(encoded.inputs, teacher.renderer.processor)
        for start, end, is_answer in encoded.segments():
            if is_answer:
                prompts.append(start)
                flops += shape.flops(start, 1, patches)
                for position in range(start, end):
                    flops += 2 * shape.text_parameters + 4 * shape.layers * shape.attention_width * position
                    flops += 2 * shape.head_rows * shape.hidden_size
    assert answers.flops == pytest.approx(flops, rel=0.02)
    assert answers.at_once == int(1000 // (np.mean(prompts) + 64))
    weights = (shape.text_parameters + shape.head_rows * shape.hidden_size) * shape.value_bytes
    steps = answers.most_tokens / answers.at_once
    assert answers.most_gpu_hours == pytest.approx(
        steps * weights / 1e6 / 3600, rel=0.01
    )  # nothing else counts at 1 MB/s
    assert f"{answers.turns} written, {answers.at_once} at once" in plan_text(plan, objectives_by_store())
    assert make_plan(shape, teacher.vlm.renderer, samples, CacheOptions(), assumed).answers is None


@pytest.mark.slow
@pytest.mark.skipif(not SROIE.exists(), reason="the receipts are not here")
def test_the_receipts_bytes(teacher, tmp_path):
    check_forecast(teacher, SROIE, tmp_path / "cache", CacheOptions(samples_per_shard=16))


def test_skipped_records_are_forecast_with_their_reasons(tiny, tmp_path):
    data = write_llava(tmp_path / "d", mixed_samples(20))
    records = json.loads(data.read_text())
    for record in records[:5]:
        record["conversations"][-1]["value"] = " "
    data.write_text(json.dumps(records))
    folder = tiny("qwen2_vl")
    renderer, shape = Renderer(load_processor(folder)), shape_of(folder)
    plan = make_plan(shape, renderer, open_samples([data]), CacheOptions(), PlanOptions(num_samples=4000))
    assert plan.skipped == 1000 and sum(plan.reasons.values()) == 5
    assert all("empty answer" in reason for reason in plan.reasons)
    assert "empty answer" in plan_text(plan, objectives_by_store())
    with pytest.raises(DataError, match="none of 5 probed records can be used: .*empty answer"):
        make_plan(shape, renderer, open_samples([data], limit=5), CacheOptions(), PlanOptions())


FAMILIES = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl_qwen2",
    "internvl_llama",
    "llava_onevision",
    "idefics3",
    "gemma3",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(tiny, family):
    """Counted on the loaded model, of which the forecast reads no weights."""
    shape, vlm = shape_of(tiny(family)), HFTeacher.load(tiny(family)).vlm
    assert (shape.head_rows, shape.hidden_size) == tuple(vlm.head.weight.shape)
    assert shape.parameters == sum(p.numel() for p in vlm.model.parameters())
    embeddings = vlm.model.get_input_embeddings().weight.numel()
    tied = vlm.head.weight is vlm.model.get_input_embeddings().weight
    expected = shape.text_parameters + shape.vision_parameters + embeddings + (0 if tied else vlm.head.weight.numel())
    assert expected == shape.parameters
    assert shape.layers == 2 and shape.vision_layers >= 1 and shape.vision_width == 32


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl_qwen2", "internvl_llama"])
def test_flops_are_those_that_torch_counts(tiny, family):
    """A real forward under torch's own counter, which takes the text's attention for a full square."""
    from torch.utils.flop_counter import FlopCounterMode

    teacher = HFTeacher.load(tiny(family), dtype=torch.float32, attention="eager")
    shape = shape_of(tiny(family))
    for sample in mixed_samples(4):
        encoded = teacher.encode(sample)
        counts = counted(teacher.vlm.renderer, sample)
        tokens, targets = counts["question_tokens"] + counts["answer_tokens"], counts["answer_tokens"] + 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            teacher.vlm.hidden(teacher.vlm.renderer.collate([encoded]))
        square = 2.0 * shape.layers * shape.attention_width * tokens**2
        ours = shape.flops(tokens, 0, counts["patches"]) + square
        # Biases and norms are parameters, but no products; the projector meets fewer tokens than the encoder patches.
        assert 0.8 < counter.get_total_flops() / ours < 1.05
        assert shape.flops(tokens, targets, ()) - shape.flops(tokens, 0, ()) == 2 * targets * shape.head_rows * 32


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2-vl-72b", 73.4), ("internvl2-76b", 76.3), ("internvl2.5-78b", 78.4), ("nvlm-d-72b", 79.4)],
)
def test_known_teachers_have_their_published_sizes(name, billions):
    assert KNOWN[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_qwens_rule_is_its_processors():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(np.log(30), np.log(6000), (200, 2))).round().astype(int).tolist():
        if max(width, height) / min(width, height) > 199:
            continue
        rows, columns = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12_845_056)
        assert qwen2_vl_tokens(width, height) == (rows * columns // 784 + 2, [rows * columns // 196])


def test_the_tiles_are_internvls():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(0)
    for most in (6, 12):
        for width, height in np.exp(rng.uniform(np.log(30), np.log(6000), (200, 2))).round().astype(int).tolist():
            columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            count = columns * rows + (columns * rows > 1)
            assert tiles(most)(width, height) == (256 * count + 2, [1025] * count)


def test_a_known_teacher_needs_no_folder(tmp_path, capsys):
    data = write_llava(tmp_path / "d", mixed_samples(8))
    words = ["plan", "--teacher", "Qwen2-VL-72B", "--data", str(data), "--out", str(tmp_path / "c"), "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--num-samples", "1000"])
    plan = json.loads(capsys.readouterr().out)
    free = shutil.disk_usage(tmp_path).free
    assert stop.value.code == (0 if plan["total_bytes"] <= free else 1)
    assert plan["by_rule"] and plan["num_shards"] == 4 and plan["least_gpus"] == 2
    assert plan["fits"] is (stop.value.code == 0)
    # Head and states are what there is of an 8,192 wide teacher: 2.5 GB, and half a byte a channel in int4, less what zstd
    # finds in codes that are not all equally frequent.
    assert plan["bytes"]["head"] == 152_064 * 8192 * 2
    assert 0.45 < plan["bytes_by_codec"]["int4"]["question"] / plan["question_tokens"] / 8192 < 0.53
    assert 1.0 < plan["bytes_by_codec"]["int8"]["question"] / plan["question_tokens"] / 8192 < 1.1
    assert not (tmp_path / "c").exists()


def test_a_disk_that_is_too_small_is_said_and_fails(tmp_path, capsys):
    data = write_llava(tmp_path / "d", mixed_samples(4))
    words = ["plan", "--teacher", "nvlm-d-72b", "--data", str(data), "--out", str(tmp_path / "c")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--num-samples", "9000000000", "--gpu", "h200", "--gpus", "8", "--price", "2.5"])
    text = capsys.readouterr().out
    assert stop.value.code == 1 and "disk" in text and "NOT enough" in text and "PB" in text
    assert "GPU-hours on h200 at 40% of 989 TFLOP/s; its weights need 2 cards of 141 GB" in text
    hours, cost = re.search(r"time +(\S+) hours on 8 h200; costs (\S+)", text).groups()
    assert float(cost.replace(",", "")) == pytest.approx(8 * 2.5 * float(hours), rel=0.01)


def test_hours_and_price_follow_from_the_card(teacher, tmp_path):
    shape = shape_of(ASSETS / "teacher")
    samples = open_samples([write_llava(tmp_path / "d", mixed_samples(4))])
    assumed = PlanOptions(gpu="a100", gpus=4, price=2.0)
    answers = AnswerSource(kind="greedy", max_tokens=64)
    plan = make_plan(shape, teacher.vlm.renderer, samples, CacheOptions(answers=answers), assumed)
    assert plan.gpu_hours == pytest.approx(plan.flops / (0.4 * 312e12 * 3600))
    assert plan.hours == pytest.approx((plan.gpu_hours + plan.answers.gpu_hours) / 4) and plan.least_gpus == 1
    assert plan.cost == pytest.approx(2.0 * 4 * plan.hours)
    big = make_plan(KNOWN["qwen2-vl-72b"], None, samples, CacheOptions(), PlanOptions(gpu="rtx4090", gpus=4))
    assert big.least_gpus == 7 and "NOT enough for the weights, which need 7" in plan_text(big, objectives_by_store())


def test_a_teacher_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="its sizes cannot be told from its config.*qwen2-vl-72b"):
        teacher_shape(tmp_path)


@pytest.mark.parametrize(
    "wrong", [dict(probe=0), dict(num_samples=-1), dict(gpu="h1000"), dict(gpus=-1), dict(price=-1), dict(train_rate=0)]
)
def test_wrong_assumptions_are_refused(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        PlanOptions(**wrong)


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 999, 1500, 2.5e12, 3e15)] == ["0 B", "999 B", "1.5 kB", "2.5 TB", "3 PB"]
