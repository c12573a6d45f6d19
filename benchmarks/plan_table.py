"""What `genrecal plan` says of 100k, 1M and 9M samples for the known teachers, from their configs alone.

    python benchmarks/plan_table.py [--width 800 --height 600]

Every sample is one conversation of one JPEG picture, a question of 120 characters and an answer of 600 (150 tokens by the
forecast's rule of four bytes a token). Codecs and the other options are the defaults.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from genrecal.cache.options import CacheOptions
from genrecal.cache.plan import PlanOptions, human_bytes, make_plan
from genrecal.cache.teacher_shape import KNOWN
from genrecal.report.summary import markdown_table
from genrecal.samples import open_samples

COUNTS = {"100k": 100_000, "1M": 1_000_000, "9M": 9_000_000}


def make_data(folder: Path, width: int, height: int) -> Path:
    """One record: a picture with about as much detail as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=75)
    (folder / "0.jpg").write_bytes(stream.getvalue())
    turns = [{"from": "human", "value": "<image>\n" + "question " * 13}, {"from": "gpt", "value": "answers. " * 67}]
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "0", "image": "0.jpg", "conversations": turns}]))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--height", type=int, default=600)
    words = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        samples = open_samples([make_data(Path(name), words.width, words.height)])
        picture = (Path(name) / "0.jpg").stat().st_size
        for shape in KNOWN.values():
            for label, count in COUNTS.items():
                plan = make_plan(shape, None, samples, CacheOptions(), PlanOptions(num_samples=count))
                tokens = (plan.question_tokens + plan.answer_tokens) // count
                by_codec = {name: sizes["answer"] for name, sizes in plan.bytes_by_codec.items()}
                rows.append(
                    [
                        shape.name,
                        label,
                        f"{tokens}",
                        human_bytes(plan.bytes["samples"]),
                        *(human_bytes(by_codec[codec]) for codec in ("bf16", "int8", "int4")),
                        human_bytes(plan.bytes["questions"]),
                        f"{plan.num_shards}",
                        f"{plan.flops:.2g}",
                        f"{plan.gpu_hours:,.0f}",
                    ]
                )
    heads = [
        "teacher", "samples", "tokens a sample", "samples tier", "answers bf16", "answers int8", "answers int4",
        "questions tier, int4", "shards", "FLOPs", "GPU-hours",
    ]  # fmt: skip
    print(f"pictures of {words.width} x {words.height}, {human_bytes(picture)}")
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
