"""A cache of nine million samples, manifests only: opening it, ordering it, resuming, reading one row; time and memory.

    python benchmarks/scale.py [--samples 1000000 9000000] [--folder DIR]

Each row of the table is a process of its own that opens the cache; memory is that process's peak, less what it held
after its imports. "shuffle" is the order of a whole epoch, "resume" the samples of one global batch at a random step of
the third epoch, by a new process's fresh order. The files have just been written, so they come from the page cache.

A second table has whole commands on the finished cache: "cache" is what `genrecal cache` does when it is given again and
every shard is there (each manifest is read, the tars' sizes are checked, the index and the totals are written), "inspect"
is `genrecal inspect`, "inspect key" `genrecal inspect --key` of a key that no sample has. The tars are sparse files.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrecal.shards.index import INDEX_FILE, Scan, index_bytes, index_columns
from genrecal.shards.layout import CACHE_FILE, TIERS, manifest_name, tar_name
from genrecal.shards.manifest import DIGEST, METADATA_KEY, SCHEMA
from genrecal.shards.storage import open_store

PER_SHARD = 256
GLOBAL_BATCH = 64
RUNS = 5
COMMANDS = ("cache", "inspect", "inspect key")
MAX_WITHOUT_INDEX = 1_000_000  # reading every manifest of more takes minutes


def make(folder: Path, samples: int) -> None:
    """A finished cache's manifests, index and cache.json, with values spread as in a mix of data sets."""
    (folder / "manifest").mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards = -(-samples // PER_SHARD)
    categories = np.array([f"category {i}" for i in range(12)])
    scanned = Scan()
    for tier in TIERS:
        (folder / tier).mkdir()
    for shard in range(shards):
        numbers = np.arange(shard * PER_SHARD, min(samples, (shard + 1) * PER_SHARD))
        table, path = _manifest(rng, shard, numbers, categories, folder)
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)
        facts = json.loads(table.schema.metadata[METADATA_KEY])
        scanned.add(index_columns(table.replace_schema_metadata(None)), facts)
        for tier in TIERS:
            with (folder / tar_name(tier, shard)).open("wb") as tar:
                tar.truncate(2**34)
    store = open_store(folder)
    content = {
        "format_version": 1, "answer_codec": "int8", "question_codec": "int4", "hidden_size": 8192, "num_shards": shards,
        "num_samples": samples, "samples_per_shard": PER_SHARD, "question_fraction": 1.0, "question_seed": 0, "totals": {},
        "head_rows": 152_064, "vocab_size": 151_936, "top_k": 64, "image_backend": "pil",
        "teacher": {"name": "made", "dtype": "bfloat16"},
    }  # fmt: skip
    store.write(CACHE_FILE, json.dumps(content).encode())
    store.write(INDEX_FILE, index_bytes(scanned))


def _manifest(
    rng: np.random.Generator, shard: int, numbers: np.ndarray, categories: np.ndarray, folder: Path
) -> tuple[pa.Table, Path]:
    rows = len(numbers)
    keys = [f"{n:08d}-sample-{n}" for n in numbers]
    sizes = np.stack([rng.integers(500, 3000, rows), rng.integers(30_000, 300_000, rows),
                      rng.integers(100_000, 2_000_000, rows), rng.integers(10**6, 10**7, rows)], axis=1)  # fmt: skip
    suffixes = ("json", "0.jpg", "answer.arrow", "question.arrow")
    members = pa.ListArray.from_arrays(
        pa.array(np.arange(rows + 1) * 4, pa.int32()),
        pa.StructArray.from_arrays(
            [
                pa.array([f"{key}.{suffix}" for key in keys for suffix in suffixes]),
                pa.array(["samples", "samples", "samples", "questions"] * rows),
                pa.array(np.cumsum(sizes), pa.int64()),
                pa.array(sizes.ravel(), pa.int64()),
                pa.array(rng.integers(0, 2**63, 4 * rows).astype(np.uint64)),
            ],
            fields=list(SCHEMA.field("members").type.value_type),
        ),
    )
    columns = {
        "key": keys, "sample_id": keys, "status": ["cached"] * rows, "reason": pa.nulls(rows, pa.string()),
        "shard": np.full(rows, shard, np.int32), "members": members, "category": categories[rng.integers(12, size=rows)],
        "source": ["mix"] * rows, "turns": rng.integers(1, 8, rows), "images": np.ones(rows),
        "question_tokens": rng.integers(300, 4000, rows), "answer_tokens": rng.integers(5, 600, rows),
        "entropy": rng.random(rows), "log_prob": -rng.random(rows), "top1_agreement": rng.random(rows),
        "has_question": np.ones(rows, bool),
    }  # fmt: skip
    facts = {
        "format_version": 1, "shard": shard, "rows": rows, "cached": rows, "skipped": 0, "codecs": {"answer": "int8"},
        "fidelity": {}, "sha256": {"samples": "0" * 64, "questions": "0" * 64}, DIGEST: f"{shard:016x}",
    }  # fmt: skip
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values).cast(SCHEMA.field(name).type)
        for name, values in columns.items()
    ]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}), folder / manifest_name(shard)


def measure(folder: Path, seed: int) -> dict[str, float]:
    """In this process: seconds of each step, and peak memory in bytes."""
    import genrecal
    import genrecal.shards.reader
    from genrecal.shards.order import SampleOrder, micro_batches

    before = memory("VmRSS")
    times, last = {}, time.perf_counter()

    def step(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[name], last = now - last, now

    cache = genrecal.open_cache(folder)
    step("open")
    shards = cache.column("shard")
    lengths = cache.column("question_tokens") + cache.column("answer_tokens")
    step("columns")
    rng = np.random.default_rng(seed)
    place = 2 * len(cache) + int(rng.integers(len(cache) // GLOBAL_BATCH)) * GLOBAL_BATCH
    order = SampleOrder(shards, seed=seed)
    batch = order.slice(place, place + GLOBAL_BATCH)
    micro_batches(batch, lengths, batch_size=4)
    step("resume")
    assert len(np.unique(order.epoch(0))) == len(cache)
    step("shuffle")
    rows = [cache[int(i)].row["members"] for i in rng.integers(len(cache), size=20)]
    assert all(len(members) == 4 for members in rows)
    step("row")
    times["row"] /= 20
    return times | {"memory": memory("VmHWM") - before}


def run_command(name: str, folder: Path) -> dict[str, float]:
    """In this process: seconds of a whole command, its imports included, and peak memory in bytes."""
    from genrecal.cache.job import run_job
    from genrecal.cache.options import CacheOptions, WorkOptions
    from genrecal.cli import main as genrecal_main
    from genrecal.shards.layout import read_cache_json

    start = time.perf_counter()
    if name == "cache":
        store = open_store(folder)
        samples: Any = range(read_cache_json(store)["num_samples"])
        report = run_job(lambda *_: {}, samples, store, CacheOptions(samples_per_shard=PER_SHARD), WorkOptions())
        assert report.cached == len(samples)
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
            genrecal_main(["inspect", str(folder), *(["--key", "none"] if name == "inspect key" else [])])
    return {"seconds": time.perf_counter() - start, "memory": memory("VmHWM")}


def memory(name: str) -> int:
    """Bytes; of Linux's own count, since a new process's rusage begins with its parent's peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 9_000_000])
    parser.add_argument("--folder", type=Path, help="where to write; else a temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command:
        print(json.dumps(run_command(options.command, options.measure)))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.seed)))
        return
    from genrecal.report.summary import markdown_table

    table, commands = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        for samples in options.samples:
            folder = Path(root) / str(samples)
            make(folder, samples)
            index = (folder / INDEX_FILE).stat().st_size
            for name in COMMANDS:
                command = [sys.executable, __file__, "--measure", str(folder), "--command", name]
                run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                commands.append([f"{samples:,}", name, f"{run['seconds']:.0f} s", f"{run['memory'] / 1e6:.0f} MB"])
                print(commands[-1], file=sys.stderr)
            for label in ("index", "manifests"):
                if label == "manifests" and samples > MAX_WITHOUT_INDEX:
                    continue
                if label == "manifests":
                    (folder / INDEX_FILE).unlink()
                command = [sys.executable, __file__, "--measure", str(folder), "--seed"]
                runs = [
                    json.loads(subprocess.run([*command, str(seed)], check=True, capture_output=True).stdout)
                    for seed in range(RUNS if label == "index" else 3)
                ]
                middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                table.append([
                    f"{samples:,}", f"{label}, {index / 1e6:.0f} MB" if label == "index" else label,
                    *(f"{middle[name]:.2f} s" for name in ("open", "columns", "shuffle")),
                    f"{middle['resume'] * 1e3:.0f} ms", f"{middle['row'] * 1e3:.1f} ms", f"{middle['memory'] / 1e6:.0f} MB",
                ])  # fmt: skip
                print(table[-1], file=sys.stderr)
    header = "samples,opened from,open,two lengths and shards,shuffle an epoch,resume,a record's row,memory".split(",")
    print(markdown_table(header, table))
    print()
    print(markdown_table(["samples", "command", "time", "memory"], commands))


if __name__ == "__main__":
    main()
