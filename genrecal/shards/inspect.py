"""What a cache holds, in numbers that are read from it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genrecal.shards.layout import TIERS, tar_path
from genrecal.shards.manifest import SKIPPED
from genrecal.shards.reader import Cache


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over a cache's finished shards; bytes as they are on disk."""

    path: str
    teacher: dict[str, Any]
    format_version: int
    hidden_size: int
    head_rows: int
    top_k: int
    codecs: dict[str, str]
    shards: tuple[int, int]  # finished, planned
    cached: int
    skipped: int
    skip_reasons: dict[str, int]
    categories: dict[str, int]
    sources: dict[str, int]
    turns: int
    images: int
    question_tokens: int
    answer_tokens: int
    with_question: int
    bytes: dict[str, int] = field(default_factory=dict)
    entropy: float  # nats, mean over target rows
    log_prob: float
    top1_agreement: float


def summarize(cache: Cache) -> Summary:
    """A true summary of a cache; what is not finished is not counted."""
    table = cache.manifest()
    reasons = Counter(
        (row["reason"] or "").split(": ", 1)[-1]
        for row in table.select(["status", "reason"]).to_pylist()
        if row["status"] == SKIPPED
    )
    weights = cache.column("answer_tokens").astype(np.float64)

    def total(name: str) -> int:
        return int(cache.column(name).sum())

    def over_tokens(name: str) -> float:
        return float(np.average(cache.column(name), weights=weights)) if len(cache) else float("nan")

    description = cache.description
    return Summary(
        path=str(cache.path),
        teacher=description["teacher"],
        format_version=description["format_version"],
        hidden_size=description["hidden_size"],
        head_rows=description["head_rows"],
        top_k=description["top_k"],
        codecs={"answer": description["answer_codec"], "question": description["question_codec"]},
        shards=(len(cache.shards), cache.num_shards),
        cached=len(cache),
        skipped=len(table) - len(cache),
        skip_reasons=dict(reasons.most_common()),
        categories=dict(Counter(cache.column("category").tolist()).most_common()),
        sources=dict(Counter(cache.column("source").tolist()).most_common()),
        turns=total("turns"),
        images=total("images"),
        question_tokens=total("question_tokens"),
        answer_tokens=total("answer_tokens"),
        with_question=int(cache.column("has_question").sum()),
        bytes=_bytes(cache),
        entropy=over_tokens("entropy"),
        log_prob=over_tokens("log_prob"),
        top1_agreement=over_tokens("top1_agreement"),
    )


def _bytes(cache: Cache) -> dict[str, int]:
    """Bytes by what they are: pictures, conversations, answer states, question states, and the tars as files."""
    sizes: Counter[str] = Counter()
    kinds = {".json": "conversations", ".answer.arrow": "answer states", ".question.arrow": "question states"}
    for row in cache.cached.select(["key", "members"]).to_pylist():
        for member in row["members"]:
            sizes[kinds.get(member["name"].removeprefix(row["key"]), "images")] += member["size"]
    for tier in TIERS:
        files = [tar_path(cache.path, tier, shard) for shard in cache.shards]
        sizes[f"{tier} tars"] = sum(file.stat().st_size for file in files if file.exists())
    return dict(sizes)
