"""Records -> one shard: two tars and a manifest, committed together.

The tars are written under temporary names, flushed and renamed; the manifest comes last and is the commit mark. The same
records give the same bytes: members have time 0 and owner 0, and nothing of the machine or the moment is written.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from genrecal.errors import DataError
from genrecal.samples import BadRecord, Sample
from genrecal.shards.codecs import Codec
from genrecal.shards.fidelity import FidelityMeter
from genrecal.shards.head import FrozenHead
from genrecal.shards.layout import FORMAT_VERSION, TIERS, manifest_name, tar_name
from genrecal.shards.manifest import CACHED, SKIPPED, ManifestRow, Member, manifest_bytes
from genrecal.shards.record import AnswerRows, Record, row_entropy, to_arrow
from genrecal.shards.storage import Store, open_store

BUFFER_BYTES = 2**20  # of a tar, between two writes to the disk


class ShardWriter:
    """Writes one shard. Use as a context manager and call `commit`; leaving without it leaves no trace.

    Args:
        cache: the cache, a directory or any fsspec URL.
        shard: its number.
        answer_codec, question_codec: how hidden states are coded; None stores none, and without question states there is
            no question tier.
        head: the teacher's, to measure what the codecs cost.
        kl_budget: the largest mean KL in nats, through the head, that a codec may cost on this shard.
    """

    def __init__(
        self,
        cache: "str | os.PathLike[str] | Store",
        shard: int,
        *,
        answer_codec: Codec | None,
        question_codec: Codec | None,
        head: FrozenHead | None = None,
        kl_budget: float = math.inf,
    ):
        self.store, self.shard = open_store(cache), shard
        self.codecs = {"answer": answer_codec, "question": question_codec}
        self.head, self.kl_budget = head, kl_budget
        self._meters = {tier: FidelityMeter(codec) for tier, codec in self.codecs.items() if codec is not None}
        self.rows: list[ManifestRow] = []
        self._not_read: Counter[str] = Counter()  # fields of the records, with the number of records that have them
        self.bytes = 0  # of the members written so far
        self._tars: dict[str, _Tar] = {}
        try:
            for tier in TIERS if question_codec is not None else ("samples",):
                self._tars[tier] = _Tar(self.store, tar_name(tier, shard))
        except BaseException:
            self._discard()
            raise

    def add(self, record: Record, images: list[bytes]) -> None:
        """Code a record and append it; see `code` and `append`."""
        self.append(self.code(record), images)

    def code(self, record: Record) -> "CodedRecord":
        """A record's members as they are written. Changes nothing here: several threads may do it.

        Raises SampleError if a codec cannot hold its states.
        """
        rows = {"answer": record.answer, "question": record.question}
        kept = {
            tier: found for tier, found in rows.items() if found is not None and (tier == "answer" or self.codecs[tier])
        }
        return CodedRecord(
            sample=record.sample,
            members={tier: to_arrow(found, self.codecs[tier]) for tier, found in kept.items()},
            picked={tier: meter.pick(kept[tier].hidden) for tier, meter in self._meters.items() if tier in kept},
            question_tokens=_question_tokens(record.answer),
            answer_tokens=int(record.answer.predicts.sum()),
            statistics=_answer_statistics(record.answer),
        )

    def append(self, coded: "CodedRecord", images: list[bytes]) -> None:
        """Append a coded record; `images` are the encoded bytes of the sample's images, written as they are."""
        sample = coded.sample
        self._not_read.update(set(sample.unread))
        for tier, rows in coded.picked.items():
            self._meters[tier].add(rows)
        content = json.dumps(sample.to_json(), sort_keys=True, ensure_ascii=False).encode()
        members = [self._member("samples", f"{sample.key}.json", content)]
        for number, (source, data) in enumerate(zip(sample.images, images, strict=True)):
            suffix = _image_suffix(source.suffix, data)
            members.append(self._member("samples", f"{sample.key}.{number}.{suffix}", data))
        members.append(self._member("samples", f"{sample.key}.answer.arrow", coded.members["answer"]))
        if "question" in coded.members:
            members.append(self._member("questions", f"{sample.key}.question.arrow", coded.members["question"]))
        self.rows.append(
            ManifestRow(
                key=sample.key,
                sample_id=sample.sample_id,
                status=CACHED,
                shard=self.shard,
                members=members,
                category=sample.category,
                source=sample.source,
                turns=len(sample.answers),
                images=len(images),
                question_tokens=coded.question_tokens,
                answer_tokens=coded.answer_tokens,
                has_question="question" in coded.members,
                **coded.statistics,
            )
        )

    def skip(self, sample: Sample | BadRecord, reason: str) -> None:
        """Note an input record that is not cached, with the reason and where it stands in the input."""
        self.rows.append(
            ManifestRow(
                key=sample.key,
                sample_id=sample.sample_id,
                status=SKIPPED,
                reason=f"{sample.location}: {reason}" if sample.location else reason,
                shard=self.shard,
                category=sample.category,
                source=sample.source,
            )
        )

    def commit(self) -> dict[str, Any]:
        """Put the shard in place and return its shard-level facts.

        Raises DataError, and leaves nothing in place, if a codec costs more than the KL budget.
        """
        fidelity = {tier: meter.measure(self.head) for tier, meter in self._meters.items() if self.head is not None}
        for tier, measured in fidelity.items():
            if measured.kl_mean > self.kl_budget:
                raise DataError(
                    f"shard {self.shard}: {tier} states as {self._meters[tier].codec.name} cost a mean KL of "
                    f"{measured.kl_mean:.3g} nats through the head, over the budget of {self.kl_budget:.3g} (--kl-budget); "
                    f"take a wider --{tier}-codec or a larger budget"
                )
        facts: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "shard": self.shard,
            "rows": len(self.rows),
            "cached": sum(row.status == CACHED for row in self.rows),
            "skipped": sum(row.status == SKIPPED for row in self.rows),
            "codecs": {tier: codec.name for tier, codec in self.codecs.items() if codec is not None},
            "fidelity": {tier: measured.to_json() for tier, measured in fidelity.items()},
            "not_read": dict(sorted(self._not_read.items())),
            "sha256": {},
        }
        for tier, tar in self._tars.items():
            facts["sha256"][tier] = tar.commit()
        self.store.write(manifest_name(self.shard), manifest_bytes(self.rows, facts))
        return facts

    def _member(self, tier: str, name: str, data: bytes) -> Member:
        offset = self._tars[tier].add(name, data)
        self.bytes += len(data)
        return Member(name=name, tier=tier, offset=offset, size=len(data), xxh3=xxhash.xxh3_64_intdigest(data))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        for tar in self._tars.values():
            tar.discard()


@dataclass(frozen=True, kw_only=True)
class CodedRecord:
    """A record as its shard will hold it.

    Args:
        members: the Arrow files' bytes, of `answer` and, where its tier is kept, `question`.
        picked: rows that the codecs' cost is measured on, by tier, as `FidelityMeter.pick` gives them.
        statistics: the manifest's measurements.
    """

    sample: Sample
    members: dict[str, bytes]
    picked: dict[str, np.ndarray | None]
    question_tokens: int
    answer_tokens: int
    statistics: dict[str, Any]


class _HashingFile:
    """A file that is written from begin to end, with the sha256 of what was written."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256 = file, hashlib.sha256()
        self.tell, self.close = file.tell, file.close

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


class _Tar:
    """A tar file under a temporary name, written by webdataset's `TarWriter`."""

    def __init__(self, store: Store, name: str):
        from webdataset import TarWriter

        self.store, self.name, self.temporary = store, name, store.temporary(name)
        self._file = _HashingFile(self.temporary.open("wb", buffering=BUFFER_BYTES))
        # Time 0, owner 0, no names: nothing of this machine. Bytes are written as they are.
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its first byte."""
        key, _, suffix = name.partition(".")
        self._tar.write({"__key__": key, suffix: data})  # one at a time: it would sort a sample's members
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return int(self._tar.tarstream.offset) - padded

    def commit(self) -> str:
        """Close, put in place, and return the sha256."""
        self._tar.close()
        self._file.close()
        self.store.place(self.temporary, self.name)
        return self._file.sha256.hexdigest()

    def discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # else tarfile does so when it is deleted, with a traceback
            self._tar.close()
        with contextlib.suppress(OSError):  # what is still to be flushed may not fit on the disk
            self._file.close()
        with contextlib.suppress(OSError):  # the next start clears it away
            self.temporary.unlink(missing_ok=True)


def _image_suffix(suffix: str, data: bytes) -> str:
    """A name's suffix if it is an image's; else that of the format that the bytes are in, or `img`.

    WebDataset's readers choose a decoder by it: `0.pkl` they would unpickle, `0.jpgw800` hand on undecoded.
    """
    from PIL import Image, UnidentifiedImageError

    known = Image.registered_extensions()
    if f".{suffix}" in known:
        return suffix
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = str(image.format).lower()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError):
        return "img"
    return {"jpeg": "jpg"}.get(found, found) if f".{found}" in known else "img"


def _question_tokens(answer: AnswerRows) -> int:
    """Q tokens of a conversation, from the answer rows alone: all tokens up to the last row less the A tokens."""
    return int(answer.position[-1]) + 1 - int(answer.predicts.sum())


def _answer_statistics(answer: AnswerRows) -> dict[str, float]:
    """Entropy (tail as one token), log-probability of the given tokens, and top-1 agreement, means over target rows."""
    rows = answer.predicts
    log_probs = answer.topk_logits[rows].astype(np.float64) - answer.logsumexp[rows].astype(np.float64)[:, None]
    return {
        "entropy": float(row_entropy(log_probs)[0].mean()),
        "log_prob": float(answer.target_log_prob[rows].mean()),
        "top1_agreement": float((answer.topk_ids[rows, 0] == answer.target_id[rows]).mean()),
    }
