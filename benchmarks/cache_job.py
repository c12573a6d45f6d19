"""Wall time of the cache job against the bare teacher forward over the same batches, and where the time goes.

    python benchmarks/cache_job.py [--samples 160]
    python benchmarks/cache_job.py --backend vllm [--samples 160]            in an environment with vLLM
    python benchmarks/cache_job.py --shape 7b --device cuda --dtype bfloat16 --samples 512 --peak-tflops 989

A randomly initialised Qwen2-VL: `small` runs on a CPU in about two minutes, `7b` has the sizes of Qwen2-VL-7B and is for
whoever has the card. Three times are taken over the same batches: the body alone; body, head and top k (what a backend
gives); and the whole job, from files to a finished cache. On a CPU the job's threads take their time from the teacher's
own cores, so the job also runs once with a teacher that waits for as long as the forward took and gives what it gave: what
is left over is the job's own, as it is beside an accelerator.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genrecal.cache.batching import batches_by_length
from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.plan import PlanOptions, human_bytes, make_plan
from genrecal.cache.teacher import HFTeacher, Teacher
from genrecal.demo.pipeline import ASSETS
from genrecal.report.summary import markdown_table
from genrecal.samples import SampleSet, open_samples
from genrecal.vlm.loading import load_processor, processor_files, split_vlm
from genrecal.vlm.rendering import Encoded, Renderer
from genrecal.vlm.shape import shape_of

# Text: width, MLP width, layers, heads, key heads, head rows. Vision: width, layers, heads. A picture's side in pixels.
SHAPES = {
    "small": dict(text=(256, 704, 6, 8, 2, 8000), vision=(128, 4, 4), picture=336),
    "7b": dict(text=(3584, 18_944, 28, 28, 4, 152_064), vision=(1280, 32, 16), picture=1008),
}


def make_folder(shape: str, folder: Path) -> Path:
    """Config and processor of a Qwen2-VL of that shape, with the demo's tokenizer; no weights."""
    from transformers import AutoConfig

    sizes: Any = SHAPES[shape]
    width, mlp, layers, heads, kv_heads, rows = sizes["text"]
    folder.mkdir(parents=True)
    for file in processor_files(ASSETS / "teacher"):
        shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(ASSETS / "teacher")
    head = width // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16]}
    text = dict(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=rows, rope_parameters=rope, max_position_embeddings=32_768,
        layer_types=["full_attention"] * layers,
    )  # fmt: skip
    for name, value in text.items():
        setattr(config.text_config, name, value)
    vision_width, depth, vision_heads = sizes["vision"]
    vision = dict(embed_dim=vision_width, depth=depth, num_heads=vision_heads, hidden_size=width, mlp_ratio=4)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    config.save_pretrained(folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": 1024, "longest_edge": sizes["picture"] ** 2}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def hf_teacher(folder: Path, device: str, dtype: torch.dtype) -> Teacher:
    model = random_model(folder, device, dtype)
    return HFTeacher(split_vlm(model.eval(), Renderer(load_processor(folder)), path=str(folder)))


def vllm_teacher(folder: Path, device: str, dtype: torch.dtype) -> Teacher:
    """The engine in this process, so that its memory is measured."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    random_model(folder, device, dtype).save_pretrained(folder)
    from genrecal.cache.vllm_teacher import VLLMTeacher

    return VLLMTeacher(folder, dtype=dtype, engine_args={"max_model_len": 4096})


def random_model(folder: Path, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


TEACHERS: dict[str, Callable[[Path, str, torch.dtype], Teacher]] = {"hf": hf_teacher, "vllm": vllm_teacher}


def make_data(folder: Path, count: int, side: int) -> Path:
    """Conversations about one JPEG picture each, of several lengths."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        size = (side, int(side * rng.uniform(0.5, 1)))
        stream = io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        (folder / "images" / f"{number}.jpg").write_bytes(stream.getvalue())
        words = " ".join(rng.choice(["red", "blue", "square", "chart", "3", "17", "left", "of"], rng.integers(20, 120)))
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@contextmanager
def measured(device: str) -> Iterator[dict[str, float]]:
    """Seconds, and the peaks of this process's memory and of the device's while they passed, in bytes."""
    found, stop = {"peak": 0.0}, threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found["peak"] = max(found["peak"], 4096.0 * pages)

    watcher = threading.Thread(target=look)
    watcher.start()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        yield found
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            found["device peak"] = float(torch.cuda.max_memory_allocated())
        found["seconds"] = time.perf_counter() - start
    finally:
        stop.set()
        watcher.join()


class Waiting:
    """A teacher that takes as long as another did over the same batch, and gives the same, with the processor idle."""

    def __init__(self, teacher: Teacher, known: dict[tuple[str, ...], tuple[float, Any]]):
        self.teacher, self.known = teacher, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def encode(self, sample: Any, *, max_tokens: int | None) -> Encoded:
        return self.teacher.encode(sample, max_tokens=max_tokens)

    def states(self, batch: Sequence[Encoded], **options: Any) -> Any:
        keys = tuple(item.key for item in batch)
        if keys not in self.known:  # of the proof
            return self.teacher.states(batch, **options)
        seconds, states = self.known[keys]
        time.sleep(seconds)
        return states


def shard_batches(samples: SampleSet, teacher: Teacher, options: CacheOptions) -> Iterator[list[Encoded]]:
    """The job's batches, a shard at a time in memory."""
    for shard in range(options.num_shards(len(samples))):
        encoded = [teacher.encode(samples[i], max_tokens=None) for i in options.records(shard, len(samples))]
        for batch in batches_by_length({i: len(item) for i, item in enumerate(encoded)}, options.batch_tokens):
            yield [encoded[i] for i in batch]


def run_bare(
    samples: SampleSet, teacher: Teacher, options: CacheOptions, device: str
) -> tuple[dict[str, float], dict[str, float], dict[tuple[str, ...], tuple[float, Any]], int]:
    """The body alone, and with head and top k, over the job's batches; what each batch took and gave; the tokens."""
    body, whole, known, tokens = {"seconds": 0.0}, {"seconds": 0.0, "peak": 0.0}, {}, 0
    for batch in shard_batches(samples, teacher, options):
        tokens += sum(map(len, batch))
        if isinstance(teacher, HFTeacher):
            with measured(device) as found, torch.inference_mode():
                teacher.vlm.hidden(teacher.vlm.renderer.collate(batch))
            body["seconds"] += found["seconds"]
        questions = [options.keeps_question(item.key) for item in batch]
        with measured(device) as found:
            states = teacher.states(batch, questions=questions, top_k=options.top_k)
        for name in found.keys() - {"seconds"}:
            whole[name] = max(whole.get(name, 0.0), found[name])
        whole["seconds"] += found["seconds"]
        known[tuple(item.key for item in batch)] = found["seconds"], states
    return body, whole, known, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--backend", choices=TEACHERS, default="hf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--samples-per-shard", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0, help="of the job; 0 for the machine's cores less one")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for MFU")
    words = parser.parse_args()
    options = CacheOptions(samples_per_shard=words.samples_per_shard, batch_tokens=words.batch_tokens)
    side: Any = SHAPES[words.shape]["picture"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_folder(words.shape, folder / "teacher")
        samples = open_samples([make_data(folder / "data", words.samples, side)])
        teacher = TEACHERS[words.backend](model, words.device, getattr(torch, words.dtype))
        work = WorkOptions(threads=words.threads)
        run_cache_job(teacher, open_samples([folder / "data/data.json"], limit=8), folder / "warm", options, work)
        body, whole, known, tokens = run_bare(samples, teacher, options, words.device)
        with measured(words.device) as job:
            report = run_cache_job(teacher, samples, folder / "cache", options, work)
        with measured(words.device) as beside:
            waiting = run_cache_job(Waiting(teacher, known), samples, folder / "beside", options, work)
        same = all(
            path.read_bytes() == (folder / "beside" / path.relative_to(folder / "cache")).read_bytes()
            for path in (folder / "cache").rglob("*")
            if path.is_file()
        )
        plan = make_plan(shape_of(model), Renderer(load_processor(model)), samples, options, PlanOptions())
        rows = []
        for label, found in (
            *([("body alone", body)] if body["seconds"] else []),
            ("body, head, top k", whole),
            ("cache job", job),
            ("cache job, teacher waiting", beside),
        ):
            seconds = found["seconds"]
            mfu = plan.flops / seconds / (words.peak_tflops * 1e12) if words.peak_tflops else None
            rows.append(
                [
                    label,
                    f"{seconds:.1f}",
                    f"{seconds / whole['seconds']:.3f}",
                    f"{tokens / seconds:.0f}",
                    "" if mfu is None else f"{mfu:.1%}",
                    "" if label.startswith("body") else f"{report.counts['bytes'] / 1e6 / seconds:.1f}",
                    human_bytes(int(found["peak"])) if found.get("peak") else "",
                    human_bytes(int(found["device peak"])) if "device peak" in found else "",
                ]
            )
        print(
            f"{words.shape}, {words.backend}, {words.device}, {words.dtype}: {len(samples)} samples, {tokens} tokens, "
            f"{len(known)} batches, {plan.flops:.3g} FLOPs, {work.num_threads} rendering threads, "
            f"{torch.get_num_threads()} of torch"
        )
        heads = ["", "seconds", "against body, head, top k", "tokens/s", "MFU", "MB/s", "peak memory", "peak of device"]
        print(markdown_table(heads, rows))
        for label, run, found in (("cache job", report, job), ("teacher waiting", waiting, beside)):
            ratio = found["seconds"] / run.seconds["teacher"]
            print(f"{label}: wall time {ratio:.3f} times what the teacher worked in the same run")
        shares = [
            [part, *(f"{r.seconds[part] / t['seconds']:.1%}" for r, t in ((report, job), (waiting, beside)))]
            for part in report.seconds
        ]
        print(markdown_table(["part, summed over threads, of the wall time", "job", "teacher waiting"], shares))
        print(f"the two caches are {'the same bytes' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
