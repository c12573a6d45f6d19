"""Samples whose answers the teacher finds least likely: where wrong answers are found first."""

import numpy as np

from genrecal.inspect.sql import SqlResult
from genrecal.shards.reader import Cache

COLUMNS = {  # and their types, as DuckDB calls them
    "log_prob": "FLOAT",
    "answer_tokens": "INTEGER",
    "key": "VARCHAR",
    "sample_id": "VARCHAR",
    "category": "VARCHAR",
    "questions": "VARCHAR",
    "answers": "VARCHAR",
}


def least_likely(cache: Cache, count: int) -> SqlResult:
    """So many cached samples, those whose answers the teacher finds least likely first.

    `log_prob` is the mean log-probability per answer token, in nats; the texts of several turns are joined by " | ".
    """
    log_prob, rows = cache.column("log_prob"), []
    for index in np.argsort(log_prob, kind="stable")[:count].tolist():
        record = cache[index]
        sample = record.sample
        questions = [message.text for message in sample.messages if message.role == "user"]
        rows.append(
            (
                float(log_prob[index]),
                int(record.row["answer_tokens"]),
                record.key,
                sample.sample_id,
                sample.category,
                " | ".join(questions),
                " | ".join(sample.answers),
            )
        )
    return SqlResult(columns=tuple(COLUMNS), types=tuple(COLUMNS.values()), rows=tuple(rows))
