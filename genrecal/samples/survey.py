"""A look over the records before anything expensive is done with them: images, fields that are not read, bad records."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from genrecal.errors import DataError
from genrecal.progress import Progress, counted
from genrecal.samples.sample import BadRecord, Sample
from genrecal.samples.sample_set import SampleSet
from genrecal.samples.tar_file import TarFile

MAX_RECORDS, MAX_BYTES = 100_000, 2e9  # that are looked at; of more, parts are drawn
PART_RECORDS = 256  # that are looked at together
READERS = 8
SHOWN_KINDS = 10
SHOWN_FROM = 10_000  # records, from which on progress is shown


@dataclass
class Reasons:
    """Why records cannot be used: how often, by kind of reason, and the first of each kind in full."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, count: int = 1) -> None:
        kind = reason_kind(reason)
        self.counts[kind] += count
        self.examples.setdefault(kind, reason)

    @classmethod
    def of(cls, reasons: "Iterable[str] | Counter[str]") -> "Reasons":
        found = cls()
        for reason, count in reasons.items() if isinstance(reasons, Counter) else ((reason, 1) for reason in reasons):
            found.add(reason, count)
        return found

    def lines(self, shown: int = SHOWN_KINDS) -> Iterator[str]:
        """The most frequent kinds, each by its example."""
        for kind, count in self.counts.most_common(shown):
            yield f"{count} like {self.examples[kind]}" if count > 1 else self.examples[kind]
        if rest := list(self.counts.most_common())[shown:]:
            yield f"{sum(count for _, count in rest)} of {len(rest)} other kinds"


def reason_kind(reason: str) -> str:
    """`FILE:LINE: image a/7.png does not exist` -> `image … does not exist`: the place and the particulars left out.

    Names of fields, members and tags stay: they say what is not read.
    """
    why = re.sub(r"\A(.*?(:\d+| row \d+)|\S*\.tar:\S*): ", "", reason, flags=re.DOTALL)
    kind = re.sub(
        r"(?<!field )(?<!member )(?<!tag )'[^']*'|\"[^\"]*\"|[^\s(]*[/\d][^\s]*?(?=[:;,.)]*(?:\s|\Z))", "…", why
    )
    return re.sub(r"…(?:\s…)+", "…", kind)


@dataclass
class Survey:
    """Counts over the records; no image is opened.

    Args:
        records: of the whole input. surveyed: that were looked at, in `parts` pieces; all of them, or a drawn part.
        bad: of these, that cannot be used. with_images: samples that have images, and images: of all samples.
        unread: how many records have what is not read. beside: what stands beside the list of records, by file.
    """

    records: int
    surveyed: int = 0
    parts: int = 0
    bad: int = 0
    with_images: int = 0
    images: int = 0
    reasons: Reasons = field(default_factory=Reasons)
    unread: Counter[str] = field(default_factory=Counter)
    beside: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def over(self, max_skip: float) -> bool:
        """Whether it is certain that more than this share of the input is bad; of drawn parts, with six standard errors."""
        share = self.bad / max(self.surveyed, 1)
        error = 0.0 if self.surveyed == self.records else math.sqrt(share * (1 - share) / max(self.parts, 1))
        return self.bad > max_skip * self.records or share - 6 * error > max_skip

    def lines(self, max_skip: float | None = None) -> Iterator[str]:
        """The survey in words, images first; bad records only of a job that may skip so many."""
        drawn = "" if self.surveyed == self.records else f" (of {self.surveyed} of {self.records} records, drawn)"
        yield f"{self.with_images} of {self.surveyed - self.bad} samples have images ({counted(self.images, 'image')}){drawn}"
        for what, count in self.unread.most_common(SHOWN_KINDS):
            verb = "are" if what.startswith("turns") else "is"
            result = "is read as its text" if what.startswith("a number under") else f"{verb} not read"
            yield f"{count} record{'s have' if count > 1 else ' has'} {what}, which {result}"
        if rest := self.unread.most_common()[SHOWN_KINDS:]:
            yield f"{len(rest)} other fields are not read: {', '.join(what for what, _ in rest)[:400]}"
        for name, fields in self.beside.items():
            yield f"{name}: {', '.join(map(repr, fields))} beside the list of records is not read"
        if self.bad and max_skip is not None:
            stops = f", the job will stop at --max-skip {max_skip:.2%}" * self.over(max_skip)
            yield f"{self.bad} of {self.surveyed} records cannot be used{stops}:"
            yield from (f"  {line}" for line in self.reasons.lines())

    def check(self, max_skip: float) -> None:
        """Raises DataError if too many records are bad for the job to finish."""
        if self.over(max_skip):
            raise too_many_bad(self.bad, self.surveyed, max_skip, self.reasons)

    def to_json(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        reasons = {"reasons": dict(self.reasons.counts.most_common()), "examples": self.reasons.examples}
        return numbers | {"unread": dict(self.unread.most_common()), "beside": self.beside} | reasons


def too_many_bad(bad: int, records: int, max_skip: float, reasons: Reasons) -> DataError:
    """The error, with the most frequent reasons."""
    most = "; ".join(reasons.lines(3)) or "`genrecal inspect` on the cache lists the reasons"
    return DataError(
        f"{bad} of {records} samples cannot be used, over the limit of {max_skip:.2%} (--max-skip): {most}"
    )


def survey(samples: SampleSet) -> Survey:
    """Parse all records, or of more than MAX_RECORDS or MAX_BYTES as many, drawn in parts that lie together."""
    parts = [range(len(samples))[start : start + PART_RECORDS] for start in range(0, len(samples), PART_RECORDS)]
    read = sum(
        file.path.stat().st_size for file in samples.files if not isinstance(file, TarFile)
    )  # of a tar, JSON alone
    limit = min(MAX_RECORDS, MAX_BYTES * sum(map(len, samples.files)) / max(read, 1))
    if len(samples) > limit:
        parts = random.Random(0).sample(parts, max(1, int(limit / PART_RECORDS)))
    indices = [index for part in sorted(parts, key=lambda part: part.start) for index in part]
    found = Survey(records=len(samples), surveyed=len(indices), parts=len(parts))
    for file, name in zip(samples.files, samples.names, strict=True):
        if unread := getattr(file, "unread", ()):
            found.beside[name] = unread
    with (
        ThreadPoolExecutor(READERS) as pool,
        Progress("look over the data", len(indices), "records", shown=len(indices) > SHOWN_FROM) as progress,
    ):
        for reason, images, unread in pool.map(lambda index: _look_at(samples[index]), indices):
            progress.advance(1)
            found.with_images += images > 0
            found.images += images
            found.unread.update(unread)
            if reason:
                found.bad += 1
                found.reasons.add(reason)
    return found


def _look_at(sample: Sample | BadRecord) -> tuple[str, int, tuple[str, ...]]:
    """Why a record cannot be used, or ""; how many images it has; what of it is not read."""
    if isinstance(sample, BadRecord):
        return f"{sample.location}: {sample.reason}", 0, ()
    return "", len(sample.images), sample.unread
