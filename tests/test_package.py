"""The package as pip and a shell meet it: what it needs, what it imports when, what the wheel holds."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import mixed_samples, write_llava
from packaging.requirements import Requirement

import genrecal
from genrecal.doctor import MODULES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BIN = Path(sys.executable).parent
UV = shutil.which("uv", path=f"{BIN}:{os.environ['PATH']}") or "uv"
HEAVY = set("torch transformers peft pyarrow numpy ray vllm deepspeed duckdb rich typer".split())


# ------------------------------------------------------------------------------------------------------- dependencies


def names(requirements):
    return {Requirement(text).name for text in requirements}


def imported():
    """Top-level names of other packages that the code imports, anywhere in it, by the package's own file."""
    found = {}
    for path in Path(genrecal.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            for module in modules:
                found.setdefault(module.partition(".")[0], set()).add(path.name)
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | {"genrecal"}}


def test_what_is_installed_is_what_is_imported():
    """No more: every requirement is imported somewhere. No less: every import is required, or an extra that has a hint."""
    needed = names(PROJECT["dependencies"])
    extras = {name for items in PROJECT["optional-dependencies"].values() for name in names(items)}
    package_of = {module: package for package, module in MODULES.items()}
    packages = {package_of.get(module, module) for module in imported()}
    assert needed - packages == {"tensorboard"}  # torch.utils.tensorboard writes with it, and torch does not require it
    # By transformers, Jinja and vLLM, as parts of their interfaces.
    brought = {"huggingface_hub", "markupsafe", "tokenizers", "tqdm"}
    assert packages - needed - extras - brought == set()


def test_importing_genrecal_imports_nothing_heavy(tmp_path):
    code = "import genrecal, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert HEAVY & set(done.stdout.split()) == set()


# -------------------------------------------------------------------------------------------------------------- shells


@pytest.fixture
def shell(tmp_path):
    """Runs a line in bash, in a home of its own, with `genrecal` on the path."""
    home = tmp_path / "home"
    home.mkdir()
    path = f"{BIN}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(home), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    def run(line):
        done = subprocess.run(
            ["bash", "--norc", "-c", line], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.home = home
    return run


def test_bash_completes_commands_and_options(shell):
    """What `--install-completion` leaves in a new home works in the next shell."""
    assert "completion installed" in shell("genrecal --install-completion bash")
    complete = "_genrecal_completion genrecal; echo ${COMPREPLY[@]}"
    shown = shell(f"source ~/.bashrc; COMP_WORDS=(genrecal ex) COMP_CWORD=1; {complete}")
    assert shown.split() == ["export"]
    shown = shell(f"source ~/.bashrc; COMP_WORDS=(genrecal train --st) COMP_CWORD=2; {complete}")
    assert set(shown.split()) == {"--student", "--stages"}
    shown = shell(f"{sys.executable} -m genrecal --show-completion zsh")  # names the command, however it was started
    assert "_GENRECAL_COMPLETE" in shown and "python" not in shown


# --------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist, both by the real build tool in an environment of its own."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run([UV, "build", "-q", "--out-dir", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return path


def uv(*words):
    links = ["--find-links", os.environ["PIP_FIND_LINKS"]] if os.environ.get("PIP_FIND_LINKS") else []
    done = subprocess.run([UV, *words, *(links if words[0] == "pip" else [])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = Path(genrecal.__file__).parent
    files = {f"genrecal/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    assert held == {name for name in files if "__pycache__" not in name}
    needed = ("py.typed", "recipes/paper.toml", "demo/assets/teacher/model.safetensors")
    assert {f"genrecal/{name}" for name in needed} <= held


WITH_EXTRAS = ("genrecal.demo.data", "genrecal.cache.ray_job", "genrecal.cache.vllm_worker")
CLEAN = """
import importlib, pkgutil
import genrecal
from genrecal.cli import main
from genrecal.demo.pipeline import ASSETS

for module in pkgutil.walk_packages(genrecal.__path__, "genrecal."):
    if module.name not in {with_extras} + ("genrecal.__main__",):
        importlib.import_module(module.name)

def command(*words):
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        assert not stop.code, words

small = [f"stage{{n}}.{{key}}" for n in (1, 2, 3) for key in ("accumulation=1", "batch_size=2")]
settings = [word for setting in small + ["precision=fp32"] for word in ("--set", setting)]
command("cache", "--teacher", ASSETS / "teacher", "--data", {data!r}, "--out", "cache", "--max-skip", "0.5")
command("train", "--cache", "cache", "--student", ASSETS / "student", "--out", "run", "--config", "paper", *settings)
command("export", "run", "--out", "student")
command("evaluate", "--model", "student", "--data", {data!r}, "--max-new-tokens", "4")
print(genrecal.__path__[0])
"""


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_a_clean_environment_reads_trains_and_exports(wheel, tmp_path):
    """The wheel with its own requirements alone, outside of the repository: every module loads, every step runs."""
    python = tmp_path / "env/bin/python"
    uv("venv", "-q", "--python", sys.executable, tmp_path / "env")
    uv("pip", "install", "-q", "--python", python, "--constraint", ROOT / "constraints.txt", wheel)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*words):
        done = subprocess.run(
            [python, *map(str, words)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    data = write_llava(tmp_path / "data", mixed_samples(8))
    script = tmp_path / "script.py"
    script.write_text(CLEAN.format(data=str(data), with_extras=WITH_EXTRAS))
    assert run(script).splitlines()[-1].startswith(str(tmp_path / "env"))
    code = "import genrecal, sys; r = genrecal.open_cache('cache')[0]; r.answer_rows(); r.images; print('torch' in sys.modules)"
    assert run("-c", code) == "False\n"


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("extra", ["vllm", "eval"])
def test_extras_that_dev_lacks_can_be_installed(wheel, extra, tmp_path):
    """Their versions exist and agree with the package's; nothing is installed. The environment of the tests has the others."""
    uv("venv", "-q", "--python", sys.executable, tmp_path / "env")
    shown = uv("pip", "install", "--dry-run", "--python", tmp_path / "env/bin/python", f"{wheel}[{extra}]")
    found = set(re.findall(r"^ \+ ([\w-]+)", shown, flags=re.MULTILINE))
    assert names(PROJECT["optional-dependencies"][extra]) <= found
