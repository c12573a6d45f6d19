"""Compression of Arrow's buffers against that of the whole member: bytes and time of one sample's answer states.

    python benchmarks/compression.py [--rows 150] [--top-k 64]

Made states with outlier channels, as in benchmarks/codecs.py, and the largest k of made Gaussian logits. Times are
medians on one thread, from the Arrow table to the member's bytes and back; the codec's own arithmetic is not in them.
Also prints what a member's schema, batch header and footer take.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import zstandard

from genrecal.report.summary import markdown_table
from genrecal.shards.codecs import CODECS, round_to_bf16
from genrecal.shards.record import NO_TARGET, AnswerRows, to_arrow

WIDTHS = (4096, 8192)
LEVELS = (1, 3)
VOCABULARY = 152_064


def made_rows(rows: int, width: int, top_k: int) -> AnswerRows:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(rows, width)) * np.exp(0.5 * rng.normal(size=width))
    for channel, size in zip(rng.choice(width, 4, replace=False), (30, 60, 150, 300), strict=True):
        states[:, channel] = size * (1 + 0.1 * rng.normal(size=rows)) * rng.choice([-1, 1])
    logits = (4 * rng.normal(size=(rows, VOCABULARY))).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :top_k].astype(np.int32)
    target = ids[:, 0].copy()
    target[-1] = NO_TARGET
    place = np.arange(rows, dtype=np.int32)
    values = np.take_along_axis(logits, ids, axis=1)
    return AnswerRows(
        turn=np.zeros(rows, np.int32),
        position=place + 700,
        token_id=np.roll(target, 1),
        states=round_to_bf16(states.astype(np.float32)),
        target_id=target,
        target_start=4 * place,
        target_end=4 * place + 4,
        target_logit=values[:, 0],
        topk_ids=ids,
        topk_logits=values,
        logsumexp=np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32),
    )


def written(table: pa.Table, compression: pa.Codec | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read(data: bytes) -> pa.Table:
    return pa.ipc.open_file(data, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()


def overhead(data: bytes) -> dict[str, int]:
    """Bytes of an Arrow file that are no buffers: schema, batch header (a place and a length of each buffer), footer."""
    schema = int.from_bytes(data[12:16], "little")  # after the magic and the continuation mark
    batch = int.from_bytes(data[16 + schema + 4 : 16 + schema + 8], "little")
    footer = int.from_bytes(data[-10:-6], "little")
    return {"schema": schema + 8, "batch header": batch + 8, "footer": footer + 10}


def milliseconds(function: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--top-k", type=int, default=64)
    arguments = parser.parse_args()
    lines, costs = [], []
    for width in WIDTHS:
        rows = made_rows(arguments.rows, width, arguments.top_k)
        for name, codec in CODECS.items():
            table = read(to_arrow(rows, codec))
            ways: dict[str, tuple[Callable[[], bytes], Callable[[bytes], pa.Table]]] = {
                "none": (lambda t=table: written(t, None), read),
                "buffers, lz4": (lambda t=table: written(t, pa.Codec("lz4")), read),
            }
            for level in LEVELS:
                ours = pa.Codec("zstd", compression_level=level)
                whole, back = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
                ways[f"buffers, zstd {level}"] = (lambda o=ours, t=table: written(t, o), read)
                ways[f"whole, zstd {level}"] = (
                    lambda w=whole, t=table: w.compress(written(t, None)),
                    lambda data, b=back: read(b.decompress(data)),
                )
            for way, (encode, decode) in ways.items():
                data = encode()
                assert decode(data).equals(table)
                encoding, decoding = milliseconds(encode), milliseconds(lambda d=data, f=decode: f(d))
                lines.append([str(width), name, way, f"{len(data):,}", f"{encoding:.2f}", f"{decoding:.2f}"])
            costs.append((width, name, overhead(to_arrow(rows, codec))))
    print(markdown_table(["D", "codec", "compression", "bytes", "encode, ms", "decode, ms"], lines))
    print()
    for width, name, parts in costs:
        print(f"D = {width}, {name}: {sum(parts.values())} bytes that are no data: {parts}")


if __name__ == "__main__":
    main()
