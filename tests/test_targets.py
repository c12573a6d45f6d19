"""Every option of every command, with a path that is missing, of a wrong kind, not writable or on a full disk.

Made from the commands themselves: an option that is added is tried too. Whatever becomes of it, it is done, or one line says
why not; nobody meets a traceback.
"""

import contextlib
import io
import os
import re
import shutil
import stat
import subprocess
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import app, main
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.loop import train
from genrecal.train.run import Run

COMMANDS = {info.name or info.callback.__name__: info.callback for info in app.registered_commands if info.callback}
# With a path as its value, this one would wait for a cluster that is not there.
LEFT_OUT = {("cache", "ray")}
SETTINGS = [
    "data.workers=0", "measure.samples=0", "lora.rank=2",
    *(f"stage{n}.{s}" for n in (1, 2, 3) for s in ("batch_size=2", "accumulation=1", "max_steps=1")),
]  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option or argument of a command that takes text."""

    command: str
    name: str
    is_path: bool
    is_argument: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.rstrip('_').replace('_', '-')}"


def options() -> Iterator[Option]:
    for command, function in COMMANDS.items():
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            if typing.get_origin(hint) is not typing.Annotated or (command, name) in LEFT_OUT:
                continue
            kind, info = typing.get_args(hint)[:2]
            kinds = {
                kind,
                *typing.get_args(kind),
                *(k for part in typing.get_args(kind) for k in typing.get_args(part)),
            }
            if kinds & {str, Path}:
                said = re.search(r"folder|director|file|URL|jsonl|data\b|cache\b", info.help or "", flags=re.IGNORECASE)
                yield Option(command, name, Path in kinds or bool(said), isinstance(info, typer.models.ArgumentInfo))


@pytest.fixture(scope="module")
def base(tiny, teacher, tmp_path_factory):
    """Words of each command that would do its work, with OUT in the place of what it writes."""
    folder = tmp_path_factory.mktemp("targets")
    data = write_llava(folder / "data", mixed_samples(4))
    run_cache_job(teacher, open_samples([data]), folder / "cache", CacheOptions())
    student, cache = tiny("internvl_qwen2"), folder / "cache"
    run = Run(path=folder / "run", config=load_config(None, SETTINGS), student=str(student), caches=(str(cache),))
    train(run, stages=(1, 2))
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    models = ["--teacher", tiny("qwen2_vl"), "--data", data]
    learn = ["--cache", cache, "--student", student, "--out", "OUT"]
    words = {
        "plan": [*models],
        "cache": [*models, "--out", "OUT", "--dtype", "float32"],
        "inspect": [cache],
        "pair": [tiny("qwen2_vl"), student],
        "verify": [cache],
        "train": [*learn, "--stages", "1", *sets],
        "export": [folder / "run", "--out", "OUT"],
        "convert": [tiny("qwen2_vl"), "--processor", student, "--out", "OUT"],
        "evaluate": ["--model", student, "--data", data, "--max-new-tokens", "1"],
        "compare": [*learn, "--data", data, "--try", "sft", "--stages", "2", "--seeds", "0", *sets, "--max-new-tokens", "1"],
        "report": [folder / "run", "--out", "OUT.html"],
        "doctor": [],
        "demo": ["--out", "OUT"],
    }  # fmt: skip
    assert words.keys() == COMMANDS.keys()
    return {command: [str(word) for word in of] for command, of in words.items()}


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory):
    """Paths on a full disk, on one with little room and on one that cannot be written, and a device that is always full, as
    far as this process may make them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("full", "read-only", "small")}
    mounted = []
    with contextlib.ExitStack() as stack:
        for folder, options in zip(folders.values(), ("size=64k", "ro", "size=192k"), strict=True):
            if (
                os.geteuid() == 0
                and not subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True
                ).returncode
            ):
                mounted.append(folder)
                stack.callback(subprocess.run, ["umount", "-l", folder], check=True)
        if folders["full"] in mounted:
            (folders["full"] / "one file").write_bytes(bytes(2**16))
        found = {name: folder / "new" for name, folder in folders.items() if folder in mounted}
        with contextlib.suppress(OSError):
            device = tmp_path_factory.mktemp("device") / "full"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.stat("/dev/full").st_rdev)
            found["device"] = device
        yield found


def targets(folder: Path, disks: dict[str, Path]) -> dict[str, Path | str]:
    """Paths that are not what any option wants."""
    (folder / "garbage").write_bytes(bytes(range(256)) * 9)
    (folder / "text.txt").write_text("not what was asked for\n")
    (folder / "empty.json").touch()
    (folder / "empty").mkdir()
    (folder / "wrong").mkdir()
    for name in ("config.json", "cache.json", "run.json", "compare.json", "tokenizer.json"):
        (folder / "wrong" / name).write_text('{"a": [1]}')
    (folder / "broken").mkdir()
    for name in ("config.json", "cache.json", "run.json", "compare.json"):
        (folder / "broken" / name).write_text("{")
    found: dict[str, Path | str] = {
        "missing": folder / "no" / "such",
        "garbage": folder / "garbage",
        "text": folder / "text.txt",
        "empty file": folder / "empty.json",
        "empty folder": folder / "empty",
        "wrong folder": folder / "wrong",
        "broken folder": folder / "broken",
        "through a file": folder / "text.txt" / "x",
        "too long": folder / ("x" * 300),
        "nothing": "",
    }
    return found | disks


def ended(words: list[str]) -> tuple[object, str]:
    """The exit status and standard error of a command in this process; a bug's own exception is no end."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code, err.getvalue()


NOT_WRITABLE = ("full", "read-only", "device", "through a file", "too long")
SLOW = ("compare", "demo", "doctor")
OUTPUTS = ("out", "html", "save_images", "status_file")


@pytest.mark.parametrize(
    "option",
    [pytest.param(each, marks=pytest.mark.slow) if each.command in SLOW else each for each in options()],
    ids=lambda option: f"{option.command} {option.flag}",
)
def test_a_bad_target_is_one_line(base, small_disks, tmp_path, monkeypatch, option):
    """Files that were there before a command that failed are there afterwards, and none is left beside them."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tried = targets(tmp_path, small_disks)
    inside = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if not option.is_path:
        tried = {name: tried[name] for name in ("missing", "nothing")}
    for name, target in tried.items():
        if option.name == "out" and (
            name in ("missing", "empty folder") or (name == "nothing" and option.command == "demo")
        ):
            continue  # a place to write to like any other
        if name == "device" and option.name not in OUTPUTS:
            continue  # to be read, it has no end
        words = [word.replace("OUT", str(tmp_path / "out")) for word in base[option.command]]
        if option.is_argument:
            words = [str(target), *words[1:]]
        elif option.flag in words and option.flag != "--set":
            words[words.index(option.flag) + 1] = str(target)
        else:
            words += [option.flag, str(target)]
        if option.name == "save_images":
            words += ["--key", "00000000-s0"]
        status, err = ended([option.command, *words])
        errors = [line for line in err.splitlines() if line.startswith("genrecal: error: ")]
        assert status in (0, 1, 2) and "Traceback" not in err, (name, words, err)
        if status in (1, 2):
            assert len(errors) == 1 or (not err and option.command in ("verify", "plan", "doctor")), (name, words, err)
        if option.name in OUTPUTS and option.command != "doctor" and name in NOT_WRITABLE:
            assert status != 0, (name, words)
        left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        left = {path: data for path, data in left.items() if (tmp_path / "out") not in path.parents}
        assert status == 0 or left == inside, (name, words)
        inside = left
        for place in (tmp_path / "out", *(disk for disk in small_disks.values() if not disk.is_char_device())):
            shutil.rmtree(place, ignore_errors=True)
