"""SQL over a cache's manifest, with DuckDB."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from genrecal.errors import DamageError, UsageError
from genrecal.shards.manifest import SCHEMA
from genrecal.shards.reader import Cache

SETTINGS = {
    "memory_limit": "'4GiB'",  # beside the manifests, which DuckDB reads where they are
    "temp_directory": "''",  # or what is over it would go into the working directory
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "enable_external_access": "false",
    "lock_configuration": "true",
}


@dataclass(frozen=True, kw_only=True)
class SqlResult:
    """A query's rows; `types` are DuckDB's names. Equal column names are told apart: `n`, `n_1`."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One object per row, as `--json` prints them."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class _ManifestStream:
    """The manifests as an Arrow stream, begun anew for each scan of a query, so that they are never all in memory."""

    cache: Cache
    damage: list[DamageError] = field(default_factory=list)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for manifest in self.cache.manifests():
                yield from manifest.table.to_batches()
        except DamageError as error:  # Arrow would wrap it into its own message, with the traceback
            self.damage.append(error)
            raise

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return pa.RecordBatchReader.from_batches(SCHEMA, self._batches()).__arrow_c_stream__(requested_schema)


def run_sql(cache: Cache, query: str) -> SqlResult:
    """Run a DuckDB query over the manifest, all input records, as the table `manifest`; nothing else can be reached.

    It cannot read or write files, load extensions, change these settings or take more than 4 GiB.

    Raises UsageError if DuckDB is not installed, or with DuckDB's message if it cannot run the query.
    """
    try:
        import duckdb
    except ImportError:
        raise UsageError(
            "--sql needs DuckDB, which is not installed: `pip install duckdb`, or genrecal with its extra `report`"
        ) from None
    with duckdb.connect(":memory:") as connection:
        manifest = _ManifestStream(cache)
        connection.register("manifest", manifest)
        for setting, value in SETTINGS.items():
            connection.execute(f"SET {setting} = {value}")
        try:
            result = connection.execute(query)
            if result is None or result.description is None:
                raise UsageError(f"--sql {query!r}: expected a query, such as SELECT count(*) FROM manifest")
            described = [(str(column[0]), str(column[1])) for column in result.description]
            rows = tuple(result.fetchall())
        except duckdb.Error as error:
            if manifest.damage:
                raise manifest.damage[0] from None
            message = re.split(r"\n+LINE \d|\nTraceback", str(error))[0]
            raise UsageError(f"--sql: {message}; the table is `manifest`") from None
    names: list[str] = []
    for name, _ in described:
        unique, count = name, 0
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return SqlResult(columns=tuple(names), types=tuple(kind for _, kind in described), rows=rows)
