"""Files of all formats as one sequence of samples, and what is taken of it."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import xxhash

from genrecal.errors import DataError, SampleError, UsageError
from genrecal.progress import Progress
from genrecal.samples.data_files import DATA_SUFFIXES, Source, find_sources
from genrecal.samples.fields import FieldMap
from genrecal.samples.record import parse_record, record_names
from genrecal.samples.sample import BadRecord, Sample
from genrecal.samples.table_file import TABLE_SUFFIXES, RowGroups, TableFile, open_table
from genrecal.samples.tar_file import TarFile
from genrecal.samples.text_file import TEXT_SUFFIXES, TextFile, data_suffix

OPENERS = 8  # files that are indexed at once
SHOWN_CATEGORIES = 20


RecordFile = TextFile | TarFile | TableFile  # its records in a fixed order; each may be read by several threads at once


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which records are taken: a pure function of each record's category and name.

    Args:
        include_categories: only these; empty for all. exclude_categories: none of these. A broken record has the
            category "".
        split: records whose place in [0, 1) is from the first number up to below the second. The place is a hash of seed
            and id, so that it depends on no other record, records of one id are never apart, and splits that share a seed
            and no number share no record. A record without an id is hashed by its place in the input.
        split_seed: another seed gives other places.
    """

    include_categories: tuple[str, ...] = ()
    exclude_categories: tuple[str, ...] = ()
    split: tuple[float, float] = (0.0, 1.0)
    split_seed: int = 0

    def __post_init__(self) -> None:
        start, end = self.split
        if not 0 <= start < end <= 1:
            raise UsageError(f"--split {start}:{end}: expected two shares from 0 to 1, the first below the second")

    @property
    def takes_all(self) -> bool:
        return not self.include_categories and not self.exclude_categories and self.split == (0.0, 1.0)

    def takes(self, names: dict[str, str]) -> bool:
        """Whether a record of these names (`record_names`) is taken."""
        category = names["category"]
        if self.include_categories and category not in self.include_categories:
            return False
        name = names["sample_id"] or names["key"]
        place = xxhash.xxh3_64_intdigest(f"split:{self.split_seed}:{name}".encode()) / 2**64
        return category not in self.exclude_categories and self.split[0] <= min(place, BELOW_ONE) < self.split[1]

    def to_json(self) -> dict[str, Any] | None:
        """As `cache.json` holds it; None where all is taken."""
        return None if self.takes_all else json.loads(json.dumps(asdict(self)))


BELOW_ONE = math.nextafter(1.0, 0.0)  # hashes near 2**64 round up


def parse_split(text: str) -> tuple[float, float]:
    """ "0.0:0.95" -> its two numbers. Raises UsageError for anything else."""
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError:
        raise UsageError(
            f"--split {text!r}: expected two shares such as 0.0:0.95 (and 0.95:1.0 for the rest)"
        ) from None


@dataclass
class SampleSet(Sequence[Sample | BadRecord]):
    """All records of one or more files in order; indexing parses one record and checks that its images exist.

    A record that is no sample comes back as a `BadRecord`, so every input record keeps its place and its key, which says
    where it stands in the whole input, whatever is selected.
    """

    files: Sequence[RecordFile]
    names: Sequence[str]  # where the files come from; a remote one is read from a copy
    image_root: Path | str | None = None
    limit: int | None = None
    selection: Selection = field(default_factory=Selection)
    fields: FieldMap = field(default_factory=FieldMap)
    _starts: np.ndarray = field(init=False, repr=False)
    _taken: np.ndarray | None = field(init=False, repr=False)  # int64, places in the input; None for all

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(file) for file in self.files])
        self._taken = None if self.selection.takes_all else self._select()

    def __len__(self) -> int:
        total = int(self._starts[-1]) if self._taken is None else len(self._taken)
        return total if self.limit is None else min(total, self.limit)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = int(index % len(self)) if self._taken is None else int(self._taken[index % len(self)])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        file, row = self.files[number], place - int(self._starts[number])
        name = self.names[number]
        location = file.location(row).replace(str(file.path), name, 1)
        record: Any = None
        try:
            record = file.record(row)
            remote = name.rpartition("/")[0] if "://" in name else None
            root = self.image_root or remote or file.path.parent
            return parse_record(record, index=place, location=location, image_root=root, fields=self.fields)
        except SampleError as error:
            names = record_names(record, index=place, fields=self.fields)
            return BadRecord(location=location, reason=str(error), **names)

    def describe_files(self) -> list[dict[str, str]]:
        """Each file's name and digest, and of a remote one its URL, which has the commit of a data set of the hub."""
        return [
            {"name": file.path.name, "sha256": file.sha256()} | ({"url": name} if "://" in name else {})
            for file, name in zip(self.files, self.names, strict=True)
        ]

    def __iter__(self) -> Iterator[Sample | BadRecord]:
        return (self[i] for i in range(len(self)))

    def _select(self) -> np.ndarray:
        """Places of the records that are taken. Raises UsageError for a category that no record has."""
        known: set[str] = set()
        taken: list[int] = []
        for start, file in zip(self._starts, self.files, strict=False):
            for row, label in enumerate(file.labels()):
                names = record_names(label, index=int(start) + row, fields=self.fields)
                known.add(names["category"])
                if self.selection.takes(names):
                    taken.append(int(start) + row)
        for option in ("include", "exclude"):
            for category in getattr(self.selection, f"{option}_categories"):
                if category not in known:
                    shown = ", ".join(repr(name) for name in sorted(known)[:SHOWN_CATEGORIES])
                    more = ", ..." if len(known) > SHOWN_CATEGORIES else ""
                    raise UsageError(f"--{option}-category {category!r}: no record has it; the data have {shown}{more}")
        return np.array(taken, np.int64)


def open_samples(
    paths: Sequence[Path | str],
    *,
    image_root: Path | str | None = None,
    limit: int | None = None,
    selection: Selection | None = None,
    fields: FieldMap | None = None,
) -> SampleSet:
    """Open files of any format as one sequence of samples.

    Args:
        paths: files; folders of tars, of Parquet files or of a Hugging Face dataset; URLs; `REPO:SPLIT` of the hub. See
            `genrecal.samples.data_files`. `{000..015}` and `*` are expanded.
        image_root: a folder or a URL where relative image paths start, or else at the folder of their file.
        limit: of what is selected, the first so many.
        selection: needs every record to be looked at once.
        fields: what the records' fields and roles are, where they have none of the known names.

    Raises DataError for a file that cannot be read, holds nothing, or breaks off where later records cannot be found, and
    if nothing is selected.
    """
    sources = [source for path in paths for source in find_sources(str(path))]
    openers, groups = [_opener(source.path) for source in sources], RowGroups()
    remote = sum(source.remote for source in sources)
    progress = Progress("fetch", remote, "files", shown=remote > 0)

    def open_file(opener: Opener, source: Source) -> RecordFile:
        path = source.fetch()
        progress.advance(source.remote)
        try:
            path.open("rb").close()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        return opener(path, groups)

    enough = limit if limit is not None and (selection or Selection()).takes_all else math.inf
    opened: list[RecordFile] = []
    with ThreadPoolExecutor(OPENERS) as pool, progress:
        while len(opened) < len(sources) and sum(map(len, opened)) < enough:
            some = slice(len(opened), len(opened) + OPENERS)
            opened += pool.map(open_file, openers[some], sources[some])
    named = ", ".join(map(str, paths))
    if not sum(map(len, opened)):
        raise DataError(f"no records in {named}")
    root = image_root if image_root is None or "://" in str(image_root) else Path(image_root)
    samples = SampleSet(
        files=opened,
        names=[source.name for source in sources[: len(opened)]],
        image_root=root,
        limit=limit,
        selection=selection or Selection(),
        fields=fields or FieldMap(),
    )
    if not len(samples):
        raise DataError(f"no record of {named} is left by the categories and the split asked for")
    return samples


Opener = Callable[[Path, RowGroups], RecordFile]


def _opener(path: PurePath) -> Opener:
    suffix = data_suffix(path)
    if suffix.startswith(TEXT_SUFFIXES):
        return lambda file, _: TextFile.open(file)
    if suffix == ".tar":
        return lambda file, _: TarFile.open(file)
    if suffix in TABLE_SUFFIXES:
        return open_table
    if re.search(r"\.(tgz|tar\.\w+)$", path.name.lower()):
        raise DataError(f"{path}: a compressed tar, whose members cannot be read one by one; unpack it to a .tar first")
    raise DataError(f"{path}: expected one of {', '.join(DATA_SUFFIXES)}, or a folder; got {path.name!r}")
