"""Bytes against KL: what each way of writing hidden states costs, through a head.

    python benchmarks/codecs.py [--out docs/images]

Two kinds of states, all methods on the same rows in one run:
- the demo's trained teacher (D = 128), on its own held-out questions, through its own head;
- made states with the outlier channels of large models (D = 4096): Gaussian channels whose scales are log-normal, four
  channels 30 to 300 times the rest and always of one sign, through a random head with logits of a standard deviation 4.

Prints a Markdown table of bytes a value (as an Arrow file has them: zstd, but for int8), relative L2, cosine, KL through
the head (mean, 99th percentile), and top-1 agreement. With --out it also draws the curve.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from genrecal.cache.teacher import HFTeacher
from genrecal.demo.data import write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.report.summary import markdown_table
from genrecal.samples import open_samples
from genrecal.shards.codecs import CODECS, decode, round_to_bf16
from genrecal.shards.fidelity import compare
from genrecal.shards.head import FrozenHead

Columns = dict[str, np.ndarray]


def file_bytes(columns: Columns, compression: str | None) -> int:
    """Bytes of the columns in an Arrow file with buffers compressed like that, less what an empty one takes."""

    def size(arrays: Columns) -> int:
        table = pa.table(
            {n: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(a)) for n, a in arrays.items()}
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)
        return sink.getvalue().size

    return size(columns) - size({name: array[:1] for name, array in columns.items()})


def fp8(states: np.ndarray) -> tuple[Columns, np.ndarray]:
    """float8 e4m3 with one float32 scale a row."""
    x = torch.from_numpy(states)
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    coded = (x / scale).to(torch.float8_e4m3fn)
    return {"q": coded.view(torch.uint8).numpy(), "scale": scale.numpy()}, (coded.float() * scale).numpy()


def coded(name: str, states: np.ndarray, **changes: int) -> tuple[Columns, np.ndarray]:
    """A codec of ours, perhaps with another block: block 1 is the same quantiser without the rotation."""
    codec = CODECS[name]
    facts = codec.facts(states.shape[1]) | changes
    columns = codec.encode(states, facts)
    return columns, decode(columns, facts).numpy()


METHODS = {
    "bf16": lambda states: coded("bf16", states),
    "fp8 e4m3, scale a row": fp8,
    "int8, groups of 128, not rotated": lambda states: coded("int8", states, block=1),
    "int8": lambda states: coded("int8", states),
    "int4, groups of 128, not rotated": lambda states: coded("int4", states, block=1),
    "int4": lambda states: coded("int4", states),
}


def teacher_states(count: int) -> tuple[FrozenHead, np.ndarray]:
    teacher = HFTeacher.load(ASSETS / "teacher", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder), num_samples=count, split="test", seed=0)
        samples = list(open_samples([data]))
        encoded = [teacher.encode(sample) for sample in samples]
        rows = []
        for start in range(0, count, 32):
            part = encoded[start : start + 32]
            rows += [s.answer.hidden for s in teacher.states(part, questions=[False] * len(part), top_k=1)]
    return teacher.head, np.concatenate(rows)


def outlier_states(rows: int, width: int, vocab: int) -> tuple[FrozenHead, np.ndarray]:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(rows, width)) * np.exp(0.5 * rng.normal(size=width))
    for channel, size in zip(rng.choice(width, 4, replace=False), (30, 60, 150, 300), strict=True):
        states[:, channel] = size * (1 + 0.1 * rng.normal(size=rows)) * rng.choice([-1, 1])
    states = round_to_bf16(states.astype(np.float32))
    weight = rng.normal(size=(vocab, width)).astype(np.float32)
    weight[:, np.abs(states).mean(0) > 20] *= (
        0.02  # heads barely read such channels; otherwise they would be the logits
    )
    weight *= 4 / (states @ weight[:256].T).std()
    return FrozenHead(weight=torch.from_numpy(weight), vocab_size=vocab), states


def measure(head: FrozenHead, states: np.ndarray) -> list[tuple[str, float, dict[str, float]]]:
    results = []
    for name, method in METHODS.items():
        columns, decoded = method(states)
        compression = CODECS["int8"].compression if name.startswith("int8") else "zstd"
        results.append(
            (name, file_bytes(columns, compression) / states[1:].size, compare(head, states, decoded).to_json())
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the drawing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    curves = {}
    for title, (head, states) in {
        "demo teacher": teacher_states(300),
        "outlier channels": outlier_states(1024, 4096, 8192),
    }.items():
        results = measure(head, states)
        curves[title] = results
        print(f"\n{title}: {states.shape[0]} rows, D = {states.shape[1]}, V = {head.weight.shape[0]}\n")
        header = ["method", "bytes a value", "relative L2", "cosine", "KL mean", "KL p99", "top-1 agreement"]
        rows = [
            [name, f"{size:.3f}", f"{m['relative_l2']:.4f}", f"{m['cosine']:.6f}", f"{m['kl_mean']:.2e}",
             f"{m['kl_p99']:.2e}", f"{m['top1_agreement']:.2%}"]
            for name, size, m in results
        ]  # fmt: skip
        print(markdown_table(header, rows))
    if arguments.out:
        draw(curves, arguments.out / "codecs.svg")


def draw(curves: dict[str, list[tuple[str, float, dict[str, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(curves), sharex=True)
    for axis, (title, results) in zip(axes, curves.items(), strict=True):
        for name, size, measured in results:
            if measured["kl_mean"] > 0:
                axis.plot(
                    size, measured["kl_mean"], "o" if "not" not in name and "fp8" not in name else "x", label=name
                )
        axis.set(yscale="log", xlabel="bytes a value", ylabel="mean KL, nats", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
