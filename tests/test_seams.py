"""scripts/seams: a suite is due until it passed with the files as they are."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout", allow_module_level=True)
SUITES = tomllib.loads((ROOT / ".ci/seams.toml").read_text())
GUARDED = {"vllm": "vllm", "lmms_eval": "eval", "ray": "ray"}  # module -> suite


def seams(root, *words):
    done = subprocess.run([sys.executable, root / "scripts/seams", *words], capture_output=True, text=True)
    return done.returncode, done.stdout.split(), done.stderr


def matched(suite):
    command = ["git", "ls-files", "--", *(f":(glob){glob}" for glob in SUITES[suite]["files"])]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def test_every_glob_matches_and_every_use_of_a_guarded_package_is_matched():
    status, due, errors = seams(ROOT, "due")
    assert status == 0 and set(due) <= set(SUITES), errors
    for path in (ROOT / "genrecal").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for package in {name.partition(".")[0] for name in names} & GUARDED.keys():
                assert str(path.relative_to(ROOT)) in matched(GUARDED[package])


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / ".ci").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / ".ci/seams.toml").write_text(
        '# [b] passed = ""\n\n[a]\nfiles = ["one/**", "two.txt"]\npassed = ""\n\n[b]\nfiles = [\n  "two.*",\n]\npassed = ""\n'
    )
    (root / "one/deep").mkdir(parents=True)
    for name in ("one/deep/x.py", "two.txt", "other.txt"):
        (root / name).write_text(name)
    commit(root, "init", "-q")
    return root


def commit(root, *first):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (first, ("add", "-A"), ("commit", "-q", "-m", "m")):
        if words:
            subprocess.run([*git, *words], cwd=root, check=True)


def test_a_pass_is_recorded_until_a_matched_file_changes(repository, tmp_path):
    assert seams(repository, "due")[:2] == (0, ["a", "b"])
    assert seams(repository, "run", "a", "false")[0] == 1
    assert seams(repository, "due")[1] == ["a", "b"]
    assert seams(repository, "run", "a", "true")[0] == 0
    assert seams(repository, "due")[1] == ["b"]
    assert seams(repository, "run", "b", "true")[0] == 0
    commit(repository)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", repository, clone], check=True)
    assert seams(clone, "due")[:2] == (0, [])
    (clone / "other.txt").write_text("changed")
    assert seams(clone, "due")[1] == []
    (clone / "one/new.py").write_text("not yet added")
    assert seams(clone, "due")[1] == ["a"]
    (clone / "one/new.py").unlink()
    (clone / "two.txt").write_text("changed")
    assert seams(clone, "due")[1] == ["a", "b"]


def test_files_changed_during_a_run_are_not_taken_for_tested(repository):
    seams(repository, "run", "b", "bash", "-c", f"echo more >> {repository}/two.txt")
    assert "b" in seams(repository, "due")[1]


def test_wrong_use_and_a_glob_without_a_file(repository):
    for words in ((), ("run", "c", "true"), ("run", "a"), ("due", "a")):
        status, _, errors = seams(repository, *words)
        assert status == 1 and "Suites: a, b" in errors
    (repository / "two.txt").unlink()
    status, due, errors = seams(repository, "due")
    assert status == 1 and due == [] and "no file matches 'two.txt'" in errors
