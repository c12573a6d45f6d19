"""Whose a folder is: locks, those left behind, and folders that hold something else."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from genrecal.errors import UsageError
from genrecal.files import machine_name
from genrecal.folders import FolderLock, process_identity, refuse_other_content


def lock_in(folder: Path) -> FolderLock:
    return FolderLock(folder / "lock.json", "training in")


def test_one_process_at_a_time_and_the_lock_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with lock_in(folder):
        owner = json.loads((folder / "lock.json").read_text())
        assert owner["pid"] == os.getpid() and owner["process"] == process_identity(os.getpid())
        with pytest.raises(
            UsageError, match=rf"process {os.getpid()} on .*, since 20.*, is training in this folder; wait"
        ):
            lock_in(folder)
    assert not list(folder.iterdir())
    with pytest.raises(KeyError), lock_in(folder):
        raise KeyError
    assert not list(folder.iterdir())


@pytest.mark.parametrize("left", ["killed", "zombie", "number reused", "machine restarted"])
def test_a_lock_that_was_left_behind_is_explained_and_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    code = f"""from genrecal.folders import FolderLock; from pathlib import Path; import time
FolderLock(Path({str(tmp_path)!r}) / 'lock.json', 'training in'); print('held', flush=True); time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {process.pid} on "):
            lock_in(tmp_path)
        if left == "killed":
            process.kill()
            process.wait()
        elif left == "zombie":  # killed, and its parent has not asked yet
            process.kill()
            while process_identity(process.pid) is not None:
                time.sleep(0.01)
        else:
            owner = json.loads((tmp_path / "lock.json").read_text())
            boot, _, start = owner["process"].partition(" ")
            owner["process"] = f"{boot} {int(start) - 1}" if left == "number reused" else f"other {start}"
            (tmp_path / "lock.json").write_text(json.dumps(owner))
        with lock_in(tmp_path):
            err = capsys.readouterr().err
            assert f"lock.json: taken over from process {process.pid} on " in err and "it no longer runs" in err
            assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        process.kill()


def test_a_lock_of_another_machine_is_refused_and_the_message_says_what_to_delete(tmp_path: Path) -> None:
    with lock_in(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
    for content in (json.dumps(owner | {"host": "elsewhere", "machine": "elsewhere-1"}), "", "{}", "[1]"):
        (tmp_path / "lock.json").write_text(content)
        with pytest.raises(
            UsageError, match=rf"If it was killed, delete {tmp_path}/lock\.json and run the same"
        ) as error:
            lock_in(tmp_path)
        assert ("on elsewhere" in str(error.value)) == ("elsewhere" in content)
    (tmp_path / "lock.json").unlink()  # what the message says
    with lock_in(tmp_path):
        pass


def test_a_slurm_job_that_was_requeued_goes_on_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with lock_in(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text()) | {"machine": "elsewhere-1"}
    (tmp_path / "lock.json").write_text(json.dumps(owner))
    with pytest.raises(UsageError, match="is training in this folder"):  # another step of this very start
        lock_in(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock_in(tmp_path):
        pass
    (tmp_path / "lock.json").write_text(json.dumps(owner))
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(UsageError, match="is training in this folder"):
        lock_in(tmp_path)


def _race(folder: Path, barrier, results) -> None:  # type: ignore[no-untyped-def]
    with ExitStack() as held:
        barrier.wait()
        try:
            held.enter_context(lock_in(folder))
            results.put("held")
        except UsageError:
            results.put("refused")
        barrier.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_at_once_gets_the_lock(tmp_path: Path, stale: bool) -> None:
    context, count = multiprocessing.get_context("fork"), 8
    left = {"host": "h", "machine": machine_name(), "pid": 1, "process": "x", "job": None, "since": "t"}
    for folder in (tmp_path / str(number) for number in range(5)):
        folder.mkdir()
        if stale:
            (folder / "lock.json").write_text(json.dumps(left))
        barrier, results = context.Barrier(count), context.Queue()
        processes = [context.Process(target=_race, args=(folder, barrier, results)) for _ in range(count)]
        for process in processes:
            process.start()
        assert sorted(results.get(timeout=600) for _ in processes) == ["held"] + ["refused"] * (count - 1)
        for process in processes:
            process.join()
        assert not list(folder.iterdir())


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    for name, found in {
        "cache.json": "a cache", "run.json": "a run", "config.json": "a model", "thesis.txt": "other files"
    }.items():  # fmt: skip
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        refuse_other_content(folder, "a run")
        (folder / ".DS_Store").touch()
        (folder / "output.txt").touch()
        refuse_other_content(folder, "a run", ours=("output.txt",))
        (folder / name).touch()
        with pytest.raises(UsageError, match=rf"expected a run or an empty folder, found {found} \({name}\)"):
            refuse_other_content(folder, "a run", ours=("output.txt",))
    with pytest.raises(UsageError, match="expected a folder, but .*cache.json is a file"):
        refuse_other_content(tmp_path / "cache-json" / "cache.json", "a run")
    refuse_other_content(tmp_path / "new", "a run")
