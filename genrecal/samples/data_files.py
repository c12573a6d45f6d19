"""What `--data` names: files, folders, patterns, URLs of any kind that fsspec knows, and data sets of the Hugging Face hub.

Remote files are copied to this machine, since records are read in any order: those of the hub into the hub's own cache,
others into `~/.cache/genrecal`. A copy is used again until the file changes.
"""

import contextlib
import glob
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from braceexpand import braceexpand

from genrecal.errors import DataError, GenrecalError, StorageError, UsageError
from genrecal.files import file_system, put_in_place
from genrecal.progress import Progress
from genrecal.samples.table_file import TABLE_SUFFIXES
from genrecal.samples.text_file import COMPRESSIONS, TEXT_SUFFIXES, data_suffix

DATA_SUFFIXES = (
    *TEXT_SUFFIXES,
    *(f"{text}{packed}" for text in TEXT_SUFFIXES for packed in COMPRESSIONS),
    ".tar",
    *TABLE_SUFFIXES,
)
DATASET, DATASETS = "state.json", "dataset_dict.json"  # of `datasets.save_to_disk`
HUB_SECONDS = 20.0  # to wait for the hub's answer
SHARDS = (".tar", ".parquet")  # of which a folder may be full
# A data set of the hub or of a folder: PLACE@REVISION:CONFIGURATION:SPLIT, all but the place optional.
DATASET_NAME = re.compile(
    r"(?P<place>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]+)(?=:))?(?::(?P<split>[^:]+))?"
)
HUB_URL = re.compile(r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<path>.+))?")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """One data file: its path or URL, and how to copy it to this machine if it is remote."""

    name: str
    get: Callable[[], Path] | None = None

    @property
    def remote(self) -> bool:
        return self.get is not None

    @property
    def path(self) -> PurePosixPath:
        """Its name without what a web address may hold after it."""
        return PurePosixPath(re.sub(r"^(https?://[^?#]*).*", r"\1", self.name))

    def fetch(self) -> Path:
        """The file, or its copy. Raises DataError if there is none, StorageError if it cannot be fetched."""
        try:
            return Path(self.name) if self.get is None else self.get()
        except FileNotFoundError:
            raise DataError(f"{self.name}: no such file") from None
        except Exception as error:
            raise StorageError(f"{self.name}: cannot be fetched: {_words(error)}; run the same command again") from None


def find_sources(text: str) -> list[Source]:
    """The files that a value of `--data` names, in order. Raises DataError or UsageError if there are none."""
    text = text.removeprefix("file://")
    if url := HUB_URL.fullmatch(text):
        return _of_hub(text, **url.groupdict())
    if "://" in text:
        return [source for url in _expanded(text) for source in _of_url(url)]
    if os.path.exists(text):
        return _local(_of_path(Path(text)))
    name = DATASET_NAME.fullmatch(text)
    if name and name["revision"] is None and os.path.isdir(name["place"]):
        return _local(_of_split(Path(name["place"]), name["config"], name["split"]))
    if name and REPOSITORY.fullmatch(name["place"]) and data_suffix(Path(name["place"])) not in DATA_SUFFIXES:
        return _of_hub(text, repo=name["place"], revision=name["revision"], config=name["config"], split=name["split"])
    paths: list[Path] = []
    for pattern in _expanded(text):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise DataError(f"{pattern}: no file matches")
        paths += [path for match in matches for path in _of_path(Path(match))]
    return _local(paths)


def _expanded(text: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError:  # a brace that is not closed
        return [text]


# ------------------------------------------------------------------------------------------------------------------ local


def _local(paths: Iterable[Path]) -> list[Source]:
    return [Source(str(path)) for path in paths]


def _of_path(path: Path) -> list[Path]:
    """A file, or the files of a folder, which must be of one kind and of one split."""
    if not os.path.isdir(path) or data_suffix(path) in DATA_SUFFIXES:
        return [path]
    if (path / DATASET).is_file():
        return _of_saved(path)
    splits = sorted(found.parent.name for found in path.glob(f"*/{DATASET}"))
    if (path / DATASETS).is_file() or splits:
        raise DataError(f"{path}: expected one split of a saved dataset; give {path}/SPLIT, of {', '.join(splits)}")
    names = [found.name for found in path.iterdir() if found.is_file()]
    if (path / "README.md").is_file() and not any(Path(name).suffix.lower() in SHARDS for name in names):
        return _of_split(path, None, None)
    return [path / name for name in _of_one_kind(str(path), names)]


def _of_saved(folder: Path) -> list[Path]:
    """The files of one split that `datasets` saved."""
    try:
        state = json.loads((folder / DATASET).read_bytes())
        return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / DATASET}: not a saved dataset's: {error}") from None


def _of_one_kind(folder: str, names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are its data."""
    found = {kind: sorted(name for name in names if Path(name).suffix.lower() == kind) for kind in SHARDS}
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) != 1:
        raise DataError(
            f"{folder}: expected a folder of .tar files, of .parquet files or of a saved Hugging Face dataset, found "
            f"{' and '.join(kinds) or 'none of them'} in it; give files, or {folder}:SPLIT for a data set that is laid out as "
            "on the hub"
        )
    files = found[kinds[0]]
    splits = sorted({name for file in files if (name := _split_in(os.path.basename(file)))})
    if len(splits) > 1:
        raise DataError(
            f"{folder}: holds several splits ({', '.join(splits)}); give one, as '{folder.rstrip('/')}/{splits[0]}-*'"
        )
    return files


def _split_in(name: str) -> str:
    """The split in a hub data set's file name: "train" of train-00000-of-00004.parquet."""
    split, _, rest = name.partition("-")
    return split if "-of-" in rest else ""


def _of_split(folder: Path, config: str | None, split: str | None) -> list[Path]:
    """The files of one split of a folder, as `datasets` finds them."""
    if split and (folder / split / DATASET).is_file():
        return _of_saved(folder / split)
    return [Path(file) for file in _split_files(str(folder), str(folder.absolute()), config, split)]


def _split_files(
    name: str, place: str, config: str | None, split: str | None, revision: str | None = None
) -> list[str]:
    """Paths or URLs of the files of one split of a data set of the hub or of a folder."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{name}: needs the datasets package: pip install 'genrecal[hub]'; or give files") from None
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        found = datasets.load_dataset_builder(place, config, revision=revision).config.data_files or {}
    except Exception as error:
        words = " ".join(str(error).partition("Example of usage")[0].split())
        raise DataError(
            f"{name}: expected a data set with files of one configuration and split: {words}; give NAME:CONFIGURATION:SPLIT, "
            "or its files"
        ) from None
    splits = {str(key): list(map(str, files)) for key, files in found.items()}
    if split is None and len(splits) == 1:
        [split] = splits
    if split not in splits:
        first = f"{name.partition(':')[0]}:{':'.join(filter(None, (config, next(iter(splits), 'SPLIT'))))}"
        got = "" if split is None else f", got {split!r}"
        raise DataError(f"{name}: expected one of its splits, {', '.join(splits) or 'none'}{got}; give {first}")
    files = [file for file in splits[split] if data_suffix(Path(file)) in DATA_SUFFIXES]
    kinds = sorted({data_suffix(Path(file)) for file in files or splits[split]})
    if not files or len(kinds) > 1:
        raise DataError(
            f"{name}: expected files of one kind, of {', '.join(DATA_SUFFIXES)}; got {', '.join(kinds)}; give files"
        )
    return files


# -------------------------------------------------------------------------------------------------------------------- hub


def _of_hub(
    text: str,
    *,
    repo: str,
    revision: str | None = None,
    path: str | None = None,
    config: str | None = None,
    split: str | None = None,
) -> list[Source]:
    """The files of a split, or those that a path names, at the commit that the revision stands for now."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    download = partial(hf_hub_download, repo, repo_type="dataset")
    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=HUB_SECONDS)
        commit, place, names = str(info.sha), repo, [file.rfilename for file in info.siblings or ()]
        with contextlib.suppress(Exception):
            download("README.md", revision=revision)  # notes the commit of the revision, for when there is no network
    except HfHubHTTPError as error:
        raise DataError(f"{text}: no file or folder here, and no data set of the hub: {_words(error)}") from None
    except Exception as error:
        try:
            folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
        except Exception:
            raise DataError(
                f"{text}: no file or folder here, and the Hugging Face hub cannot be asked for it: {_words(error)}"
            ) from None
        commit, place = folder.name, str(folder)
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        Progress("fetch", 0, "files").say(
            f"{text}: the hub cannot be asked; taking the files of {commit} that were fetched before"
        )
    if path is not None:
        chosen = [name for pattern in _expanded(path) for name in _named(text, pattern, names)]
    else:
        found = _split_files(text, place, config, split, commit if place == repo else None)
        chosen = [file.removeprefix(f"hf://datasets/{repo}@{commit}/").removeprefix(f"{place}/") for file in found]
        if place != repo:
            _check_shards(text, chosen)
    urls = [f"hf://datasets/{repo}@{commit}/{name}" for name in chosen]
    return [
        Source(url, lambda name=name: Path(download(name, revision=commit)))  # type: ignore[misc]
        for url, name in zip(urls, chosen, strict=True)
    ]


def _check_shards(text: str, names: Sequence[str]) -> None:
    """Raises DataError if files such as train-00001-of-00004.parquet lack some: an earlier run may have fetched a part."""
    numbered = Counter(match[1] for name in names if (match := re.search(r"-of-(\d+)\.", name)))
    for total, count in numbered.items():
        if count % int(total):
            raise DataError(
                f"{text}: {count} of {total} files are here, and the hub cannot be asked for the others; fetch them"
            )


def _named(text: str, pattern: str, names: Sequence[str]) -> list[str]:
    """A repository's files that a path or pattern names."""
    if pattern in names:
        return [pattern]
    if inside := [name for name in names if os.path.dirname(name) == pattern.rstrip("/")]:
        return _of_one_kind(text, inside)
    matches = sorted(name for name in names if fnmatchcase(name, pattern))
    if not matches:
        raise DataError(f"{text}: no file matches")
    return matches


# ------------------------------------------------------------------------------------------------------------- other URLs


def _of_url(url: str) -> list[Source]:
    """The files that a URL names: itself, those of a folder, or those of a pattern."""
    fs, path = file_system(url)
    try:
        if glob.has_magic(path) and not path.startswith(("http://", "https://")):
            paths = sorted(fs.glob(path))
        elif fs.isdir(path) and data_suffix(Path(path)) not in DATA_SUFFIXES:
            paths = _of_one_kind(url, fs.find(path, maxdepth=1))
        else:
            paths = [path]
        if not paths:
            raise DataError(f"{url}: no file matches")
        return [Source(name, partial(_copy, fs, each, name)) for each in paths for name in [fs.unstrip_protocol(each)]]
    except GenrecalError:
        raise
    except Exception as error:
        raise StorageError(f"{url}: cannot be listed: {_words(error)}") from None


def _copy(fs: Any, path: str, name: str) -> Path:
    """A copy of a file as it is now."""
    info = fs.info(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genrecal"
    folder = cache / xxhash.xxh3_128_hexdigest(f"{name} {sorted(map(str, info.items()))}".encode())
    copy = folder / PurePosixPath(re.sub(r"[?#].*", "", path)).name
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary) / copy.name
            fs.get_file(path, str(part))
            if info.get("size") not in (None, part.stat().st_size):
                raise OSError(f"expected {info['size']} bytes, got {part.stat().st_size}")
            put_in_place(part, copy)
    return copy


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
