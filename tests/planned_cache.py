"""A cache of a 72B teacher as its manifests say it: sizes and lengths, and neither a state, a head nor a picture."""

from pathlib import Path

import numpy as np

from genrecal.shards.layout import manifest_name, write_cache_json
from genrecal.shards.manifest import CACHED, ManifestRow, Member, manifest_bytes
from genrecal.shards.mixture import Mixture, open_caches
from genrecal.shards.storage import open_store

ROWS = 64


def planned_cache(folder: Path, *, head_rows: int, categories: tuple[str, ...] = ("General VQA", "Chart")) -> Mixture:
    """64 samples of 300 to 3,500 teacher's tokens in one shard, D 8192."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        key = f"{number:08d}"
        question, answer = int(rng.integers(280, 3200)), int(rng.integers(4, 300))
        sizes = {"json": 900, "0.jpg": 150_000, "answer.arrow": 9000 * (answer + 1), "question.arrow": 4300 * question}
        members = [
            Member(
                name=f"{key}.{name}", tier="questions" if "question" in name else "samples", offset=0, size=size, xxh3=0
            )
            for name, size in sizes.items()
        ]
        rows.append(
            ManifestRow(
                key=key,
                sample_id=key,
                status=CACHED,
                shard=0,
                members=members,
                category=categories[number % len(categories)],
                turns=1,
                images=1,
                question_tokens=question,
                answer_tokens=answer,
                entropy=1.0,
                log_prob=-1.0,
                top1_agreement=0.5,
                has_question=True,
            )
        )
    facts = {
        "format_version": 1, "shard": 0, "rows": ROWS, "cached": ROWS, "skipped": 0,
        "codecs": {"samples": "int8", "questions": "int4"}, "sha256": {"samples": "0", "questions": "0"},
    }  # fmt: skip
    store = open_store(folder)
    store.write(manifest_name(0), manifest_bytes(rows, facts))
    description = {
        "format_version": 1, "software": {}, "teacher": {"name": "planned", "dtype": "bfloat16", "files_sha256": {}},
        "image_backend": "pil", "hidden_size": 8192, "head_rows": head_rows, "vocab_size": head_rows, "top_k": 64,
        "sampled_targets": 0, "answer_codec": "int8", "question_codec": "int4", "question_fraction": 1.0,
        "question_seed": 0, "samples_per_shard": 256, "batch_tokens": 0, "max_tokens": 0, "num_samples": ROWS,
        "num_shards": 1, "data": [],
    }  # fmt: skip
    write_cache_json(store, description)
    return open_caches([folder])
