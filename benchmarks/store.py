"""The shard store against the ways that others keep teacher states: bytes, writing, reading, random access, one core.

    python benchmarks/store.py [--records 96] [--tokens 150] [--width 8192]

The same records (states, top-64, conversation, a picture) in every store; the states are bfloat16 and made, with outlier
channels as large models have them. A measurement is the sum over the records of each one's median over several passes,
which alternate between the stores, in seconds of the processor: what other processes take goes into none but by what they
do to caches and memory. Writing and the cold pass, which wait for the disk, are in seconds of the clock.
A pass reads every record whole into memory: "as stored" stops at what the store gives (bfloat16 tensors; ours codes and
scales, which a trainer decodes on its device), "float32" goes on to float32 states, each record's in new memory, and "float32
of a batch" reads four at a time as the trainer does (`ShardSource.fetch`), for the others into memory that is used again.
"cold" is the first pass after the files were dropped from the page cache. The limits are copying the float32 states: all of
them from one array to another that is there already ("of copying"), and each record's to the batch's memory, which the
processor's cache may hold ("of copying to the batch").

MosaicML streaming is measured if it is installed; it pins another transformers, so beside genrecal it needs
`pip install --no-deps mosaicml-streaming brotli zstd python-snappy cramjam catalogue`.
"""

import argparse
import importlib.machinery
import io
import json
import os
import sys
import tempfile
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import genrecal
from genrecal.objectives.base import Tier
from genrecal.report.summary import markdown_table
from genrecal.samples import ImageRef, ImageSource, Message, Sample
from genrecal.shards.codecs import CODECS, CodedStates, round_to_bf16
from genrecal.shards.layout import write_cache_json
from genrecal.shards.record import NO_TARGET, AnswerRows, Record
from genrecal.shards.storage import open_store
from genrecal.shards.writer import ShardWriter
from genrecal.train.batches import ShardSource

VOCABULARY, TOP_K, PER_SHARD, BATCH = 152_064, 64, 32, 4
PLAIN = (
    "turn", "position", "token_id", "target_id", "target_start", "target_end", "target_logit", "topk_ids", "topk_logits",
    "logsumexp",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the records


@dataclass(frozen=True)
class Made:
    """One record; `states` are the bits of bfloat16 values, uint16 `[R, D]`."""

    sample: Sample
    rows: AnswerRows  # without states
    states: np.ndarray
    picture: bytes

    def record(self) -> Record:
        hidden = (self.states.astype(np.uint32) << 16).view(np.float32)
        return Record(sample=self.sample, answer=replace(self.rows, states=hidden), question=None)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self.rows, name) for name in PLAIN}

    @property
    def conversation(self) -> bytes:
        return json.dumps(self.sample.to_json()).encode()


def make_records(count: int, tokens: int, width: int) -> list[Made]:
    rng = np.random.default_rng(0)
    size = np.exp(0.5 * rng.normal(size=width)).astype(np.float32)
    size[rng.choice(width, 4, replace=False)] = (30, 60, 150, 300)
    made = []
    for number in range(count):
        states = round_to_bf16(rng.normal(size=(tokens + 1, width)).astype(np.float32) * size)
        logits = np.sort(4 * rng.normal(size=(tokens + 1, 4096)).astype(np.float32))[:, : -TOP_K - 1 : -1]
        ids = np.minimum(rng.geometric(2e-4, size=(tokens + 1, TOP_K)), VOCABULARY - 1).astype(np.int32)  # as words are
        target = ids[:, 0].copy()
        target[-1] = NO_TARGET
        place = np.arange(tokens + 1, dtype=np.int32)
        rows = AnswerRows(
            turn=np.zeros(tokens + 1, np.int32), position=place + 700, token_id=np.roll(target, 1),
            states=None, target_id=target, target_start=4 * place, target_end=4 * place + 4,
            target_logit=logits[:, 0].copy(), topk_ids=ids, topk_logits=logits.copy(), logsumexp=logits[:, 0] + 1,
        )  # fmt: skip
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (448, 448, 3), dtype=np.uint8)).save(stream, "JPEG")
        question = Message(role="user", parts=(ImageRef(0), "What does the picture show?"))
        sample = Sample(
            key=f"{number:08d}", sample_id=str(number), category="made", source="made",
            messages=(question, Message(role="assistant", parts=("word " * tokens,))),
            images=(ImageSource(data=stream.getvalue(), suffix="jpg"),),
        )  # fmt: skip
        bits = (states.view(np.uint32) >> 16).astype(np.uint16)
        made.append(Made(sample, rows, bits, stream.getvalue()))
    return made


# ----------------------------------------------------------------------------------------------------------- the stores


class Stored(ABC):
    """One way to keep the records. `read` gives a record's parts, the states among them under "hidden"."""

    name: str

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def write(self, records: list[Made]) -> None: ...

    def open(self) -> None:  # noqa: B027
        """What is done once; for most, nothing."""

    def stream(self) -> Iterator[dict[str, Any]]:
        """All records, in order."""
        return (self.read(number) for number in range(self.count))

    def float32(self, parts: dict[str, Any]) -> torch.Tensor:
        """A record's states as float32."""
        return parts["hidden"].float()  # type: ignore[no-any-return]

    def batches(self) -> Iterator[dict[str, Any]]:
        """All records, in order, their states as float32."""
        for parts in self.stream():
            yield parts | {"hidden": self.float32(parts)}

    @abstractmethod
    def read(self, number: int) -> Any:
        """A record by its number; None where the format has no way to it."""


class Genrecal(Stored):
    def __init__(self, folder: Path, codec: str):
        super().__init__(folder)
        self.codec, self.name = codec, f"genrecal, {codec}"

    def write(self, records: list[Made]) -> None:
        store = open_store(self.folder)
        for shard in range(0, len(records), PER_SHARD):
            with ShardWriter(store, shard // PER_SHARD, answer_codec=CODECS[self.codec], question_codec=None) as writer:
                for made in records[shard : shard + PER_SHARD]:
                    writer.add(made.record(), [made.picture])
                writer.commit()
        write_cache_json(store, {
            "format_version": 1, "answer_codec": self.codec, "question_codec": "none", "num_samples": len(records),
            "hidden_size": records[0].states.shape[1], "num_shards": -(-len(records) // PER_SHARD),
            "samples_per_shard": PER_SHARD, "top_k": TOP_K, "head_rows": VOCABULARY,
            "vocab_size": VOCABULARY, "question_fraction": 0, "question_seed": 0, "image_backend": "pil",
            "teacher": {"name": "made", "dtype": "bfloat16"},
        })  # fmt: skip

    def open(self) -> None:
        self.cache = genrecal.open_cache(self.folder)
        self.count, self.source = len(self.cache), ShardSource(self.cache)

    def read(self, number: int) -> dict[str, Any]:
        return self._parts(self.cache[number].record(question=False))

    def batches(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.count, BATCH):
            batch = range(start, min(start + BATCH, self.count))
            for found in self.source.fetch(batch, Tier.STATES):
                assert isinstance(found, tuple) and found[1] is not None
                parts = self._parts(found[1])
                yield parts | {"hidden": self.float32(parts)}

    def float32(self, parts: dict[str, Any]) -> torch.Tensor:
        return parts["hidden"].decode()  # type: ignore[no-any-return]

    def _parts(self, record: Record) -> dict[str, Any]:
        parts = {name: getattr(record.answer, name) for name in PLAIN}
        picture = record.sample.images[0].data
        return parts | {"hidden": CodedStates.joined([record.answer.coded]), "json": record.sample, "jpg": picture}


def tensors_of(made: Made) -> dict[str, torch.Tensor]:
    """As tensors, the states as bfloat16, what is no array as bytes."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in made.arrays().items()}
    tensors["hidden"] = torch.from_numpy(made.states.view(np.int16)).view(torch.bfloat16)
    for name, data in (("json", made.conversation), ("jpg", made.picture)):
        tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensors


class Safetensors(Stored):
    """One file a sample, as speculators keeps hidden states."""

    name = "safetensors, a file a sample"

    def write(self, records: list[Made]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir()
        for number, made in enumerate(records):
            save_file(tensors_of(made), self.folder / f"hs_{number}.safetensors")

    def open(self) -> None:
        self.count = len(list(self.folder.iterdir()))

    def read(self, number: int) -> dict[str, Any]:
        from safetensors.torch import load

        # Not load_file: it maps the file, and nothing would be read before something is computed.
        parts: dict[str, Any] = load((self.folder / f"hs_{number}.safetensors").read_bytes())
        return parts | {"json": json.loads(parts["json"].numpy().tobytes())}


class TorchPickle(Safetensors):
    """One file a sample, as SpecForge keeps hidden states."""

    name = "torch.save, a file a sample"

    def write(self, records: list[Made]) -> None:
        self.folder.mkdir()
        for number, made in enumerate(records):
            torch.save(tensors_of(made), self.folder / f"data_{number}.ckpt")

    def read(self, number: int) -> dict[str, Any]:
        parts = torch.load(self.folder / f"data_{number}.ckpt", weights_only=True)
        return parts | {"json": json.loads(parts["json"].numpy().tobytes())}


class Webdataset(Stored):
    """webdataset's own writer, decoders and pipeline; arrays as .npy members."""

    name = "webdataset, its own pipeline"

    def write(self, records: list[Made]) -> None:
        import webdataset

        self.folder.mkdir()
        with webdataset.ShardWriter(f"{self.folder}/%05d.tar", maxcount=PER_SHARD, verbose=0) as sink:
            for made in records:
                arrays = {f"{name}.npy": values for name, values in made.arrays().items()}
                sink.write({"__key__": made.sample.key, "json": made.sample.to_json(), "jpg": made.picture,
                            "hidden.npy": made.states, **arrays})  # fmt: skip

    def stream(self) -> Iterator[dict[str, Any]]:
        import webdataset

        files = sorted(str(file) for file in self.folder.glob("*.tar"))
        for sample in webdataset.WebDataset(files, shardshuffle=False).decode():
            yield sample | {"hidden": torch.from_numpy(sample["hidden.npy"].view(np.int16)).view(torch.bfloat16)}

    def read(self, number: int) -> None:
        return None


class Mds(Stored):
    name = "MosaicML streaming, MDS"

    def write(self, records: list[Made]) -> None:
        streaming = import_streaming()
        kinds = {name: f"ndarray:{values.dtype}" for name, values in records[0].arrays().items()}
        columns = {"hidden": "ndarray:uint16", "json": "json", "jpg": "bytes", **kinds}
        with streaming.MDSWriter(out=str(self.folder), columns=columns) as sink:
            for made in records:
                arrays = {name: np.ascontiguousarray(values) for name, values in made.arrays().items()}
                sink.write({"hidden": made.states, "json": made.sample.to_json(), "jpg": made.picture, **arrays})

    def open(self) -> None:
        streaming = import_streaming()
        self.data = streaming.StreamingDataset(local=str(self.folder), shuffle=False, batch_size=1)
        self.count = self.data.num_samples

    def read(self, number: int) -> dict[str, Any]:
        sample = dict(self.data[number])
        return sample | {"hidden": torch.from_numpy(sample["hidden"].view(np.int16)).view(torch.bfloat16)}


def import_streaming() -> Any:
    """It imports torchvision for image data sets, which are not used here and may not be installed."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module: Any = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.VisionDataset, module.to_tensor = object, None
        sys.modules.setdefault(name, module)
    import streaming

    return streaming


class Parquet(Stored):
    """One row a sample, states as bytes, zstd, a row group a sample."""

    name = "Parquet, a row group a sample"

    def write(self, records: list[Made]) -> None:
        self.folder.mkdir()
        for shard in range(0, len(records), PER_SHARD):
            rows = [
                {name: np.ascontiguousarray(values).tobytes() for name, values in made.arrays().items()}
                | {
                    "json": made.conversation,
                    "jpg": made.picture,
                    "hidden": made.states.tobytes(),
                    "rows": len(made.states),
                }
                for made in records[shard : shard + PER_SHARD]
            ]
            file = self.folder / f"{shard // PER_SHARD:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1, compression="zstd", use_dictionary=False)
        self.kinds = {name: values.dtype for name, values in records[0].arrays().items()}

    def open(self) -> None:
        self.files = [pq.ParquetFile(file, pre_buffer=False) for file in sorted(self.folder.iterdir())]
        self.count = sum(file.metadata.num_rows for file in self.files)

    def read(self, number: int) -> dict[str, Any]:
        table = self.files[number // PER_SHARD].read_row_group(number % PER_SHARD, use_threads=False)
        row = {name: table.column(name)[0].as_buffer() for name in table.column_names if name != "rows"}
        count = table.column("rows")[0].as_py()
        parts: dict[str, Any] = {
            name: np.frombuffer(row[name], kind).reshape(count, -1).squeeze() for name, kind in self.kinds.items()
        }
        states = np.frombuffer(bytearray(row["hidden"]), np.int16).reshape(count, -1)
        hidden = torch.from_numpy(states).view(torch.bfloat16)
        return parts | {"hidden": hidden, "json": json.loads(row["json"].to_pybytes()), "jpg": row["jpg"].to_pybytes()}


# ------------------------------------------------------------------------------------------------------------ measuring


def timed(action: Any, clock: Any = time.process_time) -> float:
    start = clock()
    action()
    return float(clock() - start)


def read_all(stored: Stored, kind: str) -> list[float]:
    """Seconds of each record in a pass; `kind` is stored, float or batch. Those of a batch may all stand with its first."""
    seconds, start = [], time.process_time()
    for parts in stored.batches() if kind == "batch" else stored.stream():
        if kind == "float":
            stored.float32(parts)
        seconds.append(-start + (start := time.process_time()))
    return seconds


def read_some(stored: Stored, numbers: np.ndarray) -> list[float]:
    return [timed(lambda number=number: stored.float32(stored.read(int(number)))) for number in numbers]


def copy_each(states: np.ndarray, targets: np.ndarray | None) -> list[float]:
    """Each record's states, to the memory of `targets` in turn, or to new memory."""

    def copy(number: int) -> None:
        target = np.empty_like(states[number]) if targets is None else targets[number % len(targets)]
        np.copyto(target, states[number])

    return [timed(lambda number=number: copy(number)) for number in range(len(states))]


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check(stored: Stored, records: list[Made]) -> None:
    """What comes back is what was written; the lossy codecs within what they lose."""
    for parts, made in zip(stored.stream(), records, strict=True):
        expected = (made.states.astype(np.uint32) << 16).view(np.float32)
        difference = np.linalg.norm(stored.float32(parts).numpy() - expected) / np.linalg.norm(expected)
        assert difference < {"genrecal, int8": 0.01, "genrecal, int4": 0.15}.get(stored.name, 1e-9), stored.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write; else a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    records = make_records(options.records, options.tokens, options.width)
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        stores: list[Stored] = [Genrecal(Path(root) / codec, codec) for codec in ("int8", "int4", "bf16")]
        kinds: list[type[Stored]] = [Safetensors, TorchPickle, Webdataset, Parquet, Mds]
        stores += [kind(Path(root) / kind.__name__) for kind in kinds]
        written = {}
        for stored in list(stores):
            try:
                written[stored.name] = timed(lambda stored=stored: stored.write(records), time.perf_counter)
            except ImportError as error:
                print(f"{stored.name}: not measured: {error}", file=sys.stderr)
                stores.remove(stored)
        measure(stores, written, records, options.passes)


def measure(stores: list[Stored], written: dict[str, float], records: list[Made], passes: int) -> None:
    sizes, cold = {}, {}
    for stored in stores:
        sizes[stored.name] = sum(file.stat().st_size for file in stored.folder.rglob("*") if file.is_file())
        stored.open()
        check(stored, records)
        drop_from_page_cache(stored.folder)
        cold[stored.name] = timed(lambda stored=stored: read_all(stored, "float"), time.perf_counter)
    states = np.ones((len(records), *records[0].states.shape), np.float32)
    target = np.zeros_like(states)
    numbers = np.random.default_rng(1).permutation(len(records))[: len(records) // 2]
    times: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(passes):
        for kind, targets in (("all", target), ("batch", target[:BATCH]), ("new", None)):
            times.setdefault(("copy", kind), []).append(copy_each(states, targets))
        for stored in stores:
            for kind in ("stored", "float", "batch"):
                times.setdefault((stored.name, kind), []).append(read_all(stored, kind))
            if stored.read(0) is not None:
                times.setdefault((stored.name, "random"), []).append(read_some(stored, numbers))
    middle = {key: float(np.median(values, axis=0).sum()) for key, values in times.items()}
    table = []
    for stored in stores:
        name, batch = stored.name, middle[stored.name, "batch"]
        random = middle.get((name, "random"))
        table.append([
            name, f"{sizes[name] / len(records) / 1e6:.2f}", f"{len(records) / written[name]:.0f}",
            *(f"{len(records) / middle[name, kind]:.0f}" for kind in ("stored", "float", "batch")),
            f"{states.nbytes / batch / 1e9:.2f}", *(f"{middle['copy', kind] / batch:.2f}" for kind in ("all", "batch")),
            f"{len(records) / cold[name]:.0f}", f"{random / len(numbers) * 1e3:.2f}" if random else "none",
        ])  # fmt: skip
    header = [
        "store", "MB a record", "written/s", "read/s, as stored", "read/s, float32", "read/s, float32 of a batch", "GB/s",
        "of copying", "of copying to the batch", "cold read/s", "random read, ms",
    ]  # fmt: skip
    rows, width = records[0].states.shape
    rates = [f"{states.nbytes / middle['copy', kind] / 1e9:.2f}" for kind in ("all", "batch", "new")]
    print(
        f"{len(records)} records, {rows} rows, D = {width}; copying their float32 states: {rates[0]} GB/s, "
        f"{rates[1]} to the batch's memory, {rates[2]} to new memory"
    )
    print(markdown_table(header, table))


if __name__ == "__main__":
    main()
