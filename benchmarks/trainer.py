"""A training step from shards, with a live teacher beside it, and with all of its input already in memory.

    python benchmarks/trainer.py [--shape tiny] [--repeat 3]
    python benchmarks/trainer.py --device cuda --shape 7b-2b --batch 4 --accumulation 4 --peak-tflops 989

Models are randomly initialised, with the tokenizers, processors and pictures of the demo (or, `--shape demo`, are the
demo's). Every measurement is a process of its own that trains with `genrecal.train.loop.train` as the command does; the
sources take turns, and a figure is the median of `--repeat` processes, each the median of its steps but the first two.

- step s: from one step to the next, with loading and computing.
- waits: share of a step spent waiting for the next micro-batches; with a live teacher that is its forward pass.
- peak MB: of the training process, less what it held after its imports; on CUDA the allocator's.
- TFLOPs: of a step's matrix products, counted while it runs without checkpointing; MFU is their rate against
  `--peak-tflops`.

"memory" holds finished micro-batches: what is slower than that is reading, decoding and rendering. The last columns are
against shards, the median of the rounds' ratios: the step's time, and "bound", the FLOPs: what leaving out the teacher can
save.
"""

import argparse
import copy
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher, LiveTeacher
from genrecal.demo.data import write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.base import map_tensors
from genrecal.report.summary import markdown_table
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.shards.reader import open_cache
from genrecal.train import loop
from genrecal.train.batches import BatchBuilder, ShardSource
from genrecal.train.config import load_config
from genrecal.train.logs import read_metrics
from genrecal.train.run import Run
from genrecal.vlm.loading import load_renderer, load_vlm

SOURCES = ("shards", "memory", "live")
SKIPPED_STEPS = 2  # compile, fill caches and queues

# What differs from the configs of the demo's two models.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def wide(width: int, heads: int) -> dict[str, Any]:
    return {
        "text_config": {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 1,
                        "num_attention_heads": heads, "num_key_value_heads": 4,
                        "rope_parameters": ROPE | {"mrope_section": [16, 24, 24]}},
        "vision_config": {"hidden_size": width, "embed_dim": 192, "depth": 1},
    }  # fmt: skip


SHAPES: dict[str, Any] = {
    "demo": None,
    # 9:1 in parameters; the student is deep and narrow, as a real one is next to the Recalibrator's two blocks.
    "tiny": {
        "teacher": {
            "text_config": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
                            "num_attention_heads": 8, "num_key_value_heads": 4,
                            "rope_parameters": ROPE | {"mrope_section": [8, 12, 12]}},
            "vision_config": {"hidden_size": 512, "embed_dim": 192, "depth": 4},
        },
        "student": {
            "text_config": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 20,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": ROPE},
            "vision_config": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
                              "num_attention_heads": 3},
        },
    },
    # Qwen2-VL-72B and InternVL2.5-8B, the paper's 9:1, with their depths and an eighth of every width, the vocabulary's
    # too: each matrix product has the share of a step that it has there.
    "72b-8b/8": {
        "teacher": {
            "text_config": {"hidden_size": 1024, "intermediate_size": 3696, "num_hidden_layers": 80,
                            "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 19_008,
                            "rope_parameters": ROPE | {"mrope_section": [8, 12, 12]}},
            "vision_config": {"hidden_size": 1024, "embed_dim": 160, "depth": 32, "num_heads": 4, "mlp_ratio": 4},
        },
        "student": {
            "text_config": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 32,
                            "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 11_569,
                            "rope_parameters": ROPE},
            "vision_config": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 24,
                              "num_attention_heads": 4},
        },
    },
    # Qwen2-VL-7B's and InternVL2-2B's widths and depths, pictures of 256 tokens.
    "7b-2b": {
        "teacher": {
            "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
                            "rope_parameters": ROPE | {"mrope_section": [16, 24, 24]}},
            "vision_config": {"hidden_size": 3584, "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4,
                              "patch_size": 14},
            "processor": {"patch_size": 14, "size": {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}},
        },
        "student": {
            "text_config": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                            "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 92_553,
                            "rope_parameters": ROPE},
            "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                              "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]},
            "image_seq_length": 256,
            "processor": {"size": {"height": 448, "width": 448}},
        },
    },
}  # fmt: skip

# Little but the width of a 7B's or a 72B's states: what reading and decoding them costs beside a small step.
for size, heads in ((3584, 28), (8192, 64)):
    SHAPES[f"d{size}"] = {"teacher": wide(size, heads), "student": SHAPES["tiny"]["student"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed, in each measurement")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--words", type=int, default=0, help="put before each first question")
    parser.add_argument("--answer-words", type=int, default=0, help="put behind each first answer")
    parser.add_argument("--vocab", type=int, default=0, help="rows of both heads, in place of the shape's")
    parser.add_argument("--question-fraction", type=float, default=1.0, help="as of `genrecal cache`")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a setting of `genrecal train`")
    parser.add_argument("--peak-tflops", type=float, default=0.0)
    options = parser.parse_args()
    facts, rows = compare(options)
    print(facts + "\n")
    print(markdown_table(HEADER, rows))
    print("\n" + markdown_table(LOADING, options.loading))


HEADER = ["stage", "source", "step s", "waits", "peak MB", "TFLOPs", "TFLOP/s", "MFU", "step", "bound"]


def compare(options: argparse.Namespace) -> tuple[str, list[list[str]]]:
    with tempfile.TemporaryDirectory(prefix="trainer-") as work:
        options.work = Path(work)
        prepared = child(prepare, options)
        stages = [int(stage) for stage in options.stages.split(",")]
        flops = {
            (stage, live): child(measure, f"flops {'live' if live else 'shards'}", stage, options)["flops"]
            for stage in stages
            for live in (False, True)
        }
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(options.repeat):
            for stage in stages:
                for source in SOURCES:
                    found.setdefault((stage, source), []).append(child(measure, source, stage, options))
                    sys.stderr.write(f"{stage} {source} {found[stage, source][-1]}\n")
        options.loading = [child(loading, stage, options) for stage in stages]
    facts = (
        f"{options.shape}, {options.device}, batch {options.batch} x {options.accumulation}: N_t {prepared['teacher']:,}, "
        f"N_s {prepared['student']:,} parameters, (N_t + N_s) / N_s = {1 + prepared['teacher'] / prepared['student']:.2f}; "
        f"a sample is {prepared['teacher_tokens']:.0f} teacher tokens, of them {prepared['answer_tokens']:.0f} in answers; "
        f"questions cached: {options.question_fraction:.0%}"
    )
    rows = []
    for (stage, source), measured in found.items():
        middle = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        beside = found[stage, "shards"]  # of the same rounds: a machine's speed changes within the hour
        ratio = statistics.median(one["step"] / other["step"] for one, other in zip(measured, beside, strict=True))
        tflops = flops[stage, source == "live"] / 1e12
        rate = tflops / middle["step"]
        rows.append(
            [
                str(stage),
                source,
                f"{middle['step']:.3f}",
                f"{middle['wait']:.1%}",
                f"{middle['peak'] / 1e6:,.0f}",
                f"{tflops:.4g}",
                f"{rate:.3g}",
                f"{rate / options.peak_tflops:.1%}" if options.peak_tflops else "",
                f"{ratio:.2f}x",
                f"{flops[stage, source == 'live'] / flops[stage, False]:.2f}x",
            ]
        )
    return facts, rows


def child(function: Any, *arguments: Any) -> Any:
    """A function's result, from a process of its own that has all imports already."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


# ------------------------------------------------------------------------------------------------ models, data and cache


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """Write both models, the data and the cache; the models' parameters and the mean length of a sample."""
    torch.set_num_threads(1)
    for role in ("teacher", "student"):
        make_model(options.work / role, role, options)
    samples = options.batch * options.accumulation * (options.steps + SKIPPED_STEPS)
    data = write_dataset(options.work / "data", num_samples=samples, split="train", seed=0)
    records = json.loads(data.read_text())
    for record in records:
        for turn, words in enumerate((options.words, options.answer_words)):
            more = " ".join(["the", "red", "bar", "is"][n % 4] for n in range(words))
            record["conversations"][turn]["value"] += f" {more}" if words else ""
    data.write_text(json.dumps(records))
    teacher = HFTeacher.load(options.work / "teacher", dtype=dtype_of(options), device=options.device)
    asked = CacheOptions(samples_per_shard=64, question_fraction=options.question_fraction)
    run_cache_job(teacher, open_samples([data]), options.work / "cache", asked)
    cache = open_cache(options.work / "cache")
    answers = float(cache.column("answer_tokens").mean())
    return {
        "teacher": sum(p.numel() for p in teacher.vlm.model.parameters()),
        "student": sum(p.numel() for p in load_vlm(options.work / "student").model.parameters()),
        "teacher_tokens": float(cache.column("question_tokens").mean()) + answers,
        "answer_tokens": answers,
    }


def make_model(folder: Path, role: str, options: argparse.Namespace) -> None:
    shutil.copytree(ASSETS / role, folder)
    if SHAPES[options.shape] is None and not options.vocab:
        return
    changes = copy.deepcopy((SHAPES[options.shape] or {}).get(role, {}))
    edit(folder / "processor_config.json", processor_changes(changes))
    if options.vocab:
        changes.setdefault("text_config", {})["vocab_size"] = options.vocab
    if layers := changes.get("text_config", {}).get("num_hidden_layers"):
        changes["text_config"]["layer_types"] = ["full_attention"] * layers
    edit(folder / "config.json", changes)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    processor = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.save_pretrained(folder)
    for name, content in processor.items():
        if name != "config.json":
            (folder / name).write_bytes(content)


def processor_changes(changes: dict[str, Any]) -> dict[str, Any]:
    found = {"image_processor": changes.pop("processor", {})}
    if "image_seq_length" in changes:
        found["image_seq_length"] = changes["image_seq_length"]
    return found


def edit(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text())

    def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
        for name, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(name), dict) and name != "rope_parameters":
                merge(old[name], value)
            else:
                old[name] = value

    merge(content, changes)
    path.write_text(json.dumps(content, indent=2))


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device.startswith("cuda") else torch.float32


# ------------------------------------------------------------------------------------------------------- one measurement


LOADING = ["stage", "CPU ms per sample, records", "with rendering, as a batch", "bytes per answer row"]


def loading(stage: int, options: argparse.Namespace) -> list[str]:
    """What a loader process spends on a sample, and the teacher's bytes that it hands over; in stage 1 with question states."""
    torch.set_num_threads(1)
    cache = open_caches([options.work / "cache"])
    objective = OBJECTIVES["genrecal"](stage, load_config(None, options.set))
    source = ShardSource(cache)
    builder = BatchBuilder(source, load_renderer(options.work / "student"), objective)
    batches = [range(start, start + 4) for start in range(0, min(len(cache), 64) - 3, 4)]
    times = []
    for _ in range(5):
        start = time.process_time()
        for indices in batches:
            source.fetch(indices, objective.tier)
        middle = time.process_time()
        built = [builder[indices].batch for indices in batches]
        times.append((middle - start, time.process_time() - middle))
    sizes: list[int] = []
    for batch in built:
        batch.student_inputs = {}
        map_tensors(batch, lambda tensor: sizes.append(tensor.nbytes))
    samples, rows = 4 * len(batches), sum(len(cache[i].answer_rows()) for indices in batches for i in indices)
    read, whole = (statistics.median(part) / samples * 1e3 for part in zip(*times, strict=True))
    return [str(stage), f"{read:.2f}", f"{whole:.2f}", f"{sum(sizes) / rows:,.0f}"]


def measure(what: str, stage: int, options: argparse.Namespace) -> dict[str, float]:
    """Train up to a stage with its micro-batches from `what`; the medians of its steps."""
    torch.set_num_threads(1)
    counting, source = what.startswith("flops"), what.split()[-1]
    device = torch.device(options.device)
    before = resident("VmRSS")
    live = None
    if source == "live":
        cache = open_cache(options.work / "cache")
        teacher = HFTeacher.load(options.work / "teacher", dtype=dtype_of(options), device=options.device)
        live = LiveTeacher(teacher, top_k=cache.description["top_k"])
    steps = 1 if counting else options.steps + SKIPPED_STEPS
    settings = [
        f"device={options.device}", f"data.workers={0 if counting else options.workers}",
        f"gradient_checkpointing={'false' if counting or options.device == 'cpu' else 'true'}",
        *(f"stage{n}.batch_size={options.batch}" for n in (1, 2)),
        *(f"stage{n}.accumulation={options.accumulation}" for n in (1, 2)),
        f"stage1.max_steps={steps if stage == 1 else 1}", f"stage2.max_steps={steps}", "data.max_skip=0",
        "measure.samples=0", *options.set,
    ]  # fmt: skip
    watch = Watch(source, device, loop.micro_batch_stream)
    loop.micro_batch_stream = watch  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=options.work) as out:
        run = Run(
            path=Path(out) / "run",
            config=load_config(None, settings),
            student=str(options.work / "student"),
            caches=(str(options.work / "cache"),),
        )
        if stage == 2:
            loop.train(run, stages=[1])
        if counting:
            with FlopCounterMode(display=False) as counter:
                loop.train(run, stages=[stage], live_teacher=live)
            return {"flops": counter.get_total_flops()}
        loop.train(run, stages=[stage], live_teacher=live)
        found = figures(run.path, stage)
    return found | {"peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before}


class Watch:
    """Stands for `micro_batch_stream`: of source "memory" all micro-batches are read before the first step."""

    def __init__(self, source: str, device: torch.device, stream: Any):
        self.source, self.device, self.stream = source, device, stream

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        loaded = self.stream(*args, **kwargs)
        if self.source == "memory":
            loaded = iter(list(loaded))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # what loading took is not what training takes
        yield from loaded


def figures(run: Path, stage: int) -> dict[str, float]:
    """Medians over a stage's steps but the first ones, as the run logged them."""
    lines = [line for line in read_metrics(run) if line["stage"] == stage][SKIPPED_STEPS:]
    return {
        "step": statistics.median(line["seconds"] for line in lines),
        "wait": statistics.fmean(line["data_wait"] for line in lines),
    }


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
