"""What this machine and environment have, and what each command lacks here (`genrecal doctor`).

Packages and the versions they must have are read from genrecal's own metadata. Each is really imported, in a process of its
own, since an installed package may still fail to load (built for another torch, a system library missing).
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import genrecal
from genrecal.progress import human_bytes

SHARED_MEMORY = Path("/dev/shm")
SHARES = " (shared memory: what training reads ahead)"
IMPORT_SECONDS = 180  # that an import may take; vLLM's first takes a minute on a slow disk
# The module that a package is imported by, where the names differ.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "lmms-eval": "lmms_eval", "flash-attn": "flash_attn"}
# What each extra is for. Extras that are not listed are no user's concern.
EXTRAS = {
    "vllm": "cache --backend vllm",
    "ray": "cache --ray",
    "deepspeed": "train with engine zero1, zero2 or zero3",
    "s3": "caches at s3:// URLs",
    "report": "demo, report, and inspect --sql",
    "eval": "evaluate --harness lmms-eval",
}
# Used if they are there; no extra asks for them.
OPTIONAL = {
    "torchvision": "AutoProcessor for most families' exported students; pictures resized as their processors were used",
    "flash-attn": "attention = flash_attention_2",
}


@dataclass(frozen=True)
class Package:
    """One package: `version` is None if it is not installed, `fault` why it cannot be used, empty if it can."""

    name: str
    version: str | None
    wanted: str
    fault: str


@dataclass(frozen=True)
class Need:
    """What a command or setting needs. `missing` says what it lacks, empty if it is ready; `remedy` what to do."""

    what: str
    missing: str
    remedy: str


@dataclass(frozen=True)
class Device:
    """A GPU as torch sees it; memory in bytes."""

    name: str
    memory: int
    bfloat16: bool


@dataclass(frozen=True)
class Report:
    """Everything that `genrecal doctor` says; sizes in bytes."""

    genrecal: str
    python: str
    system: str
    cores: int
    memory: int
    devices: list[Device]
    distributed: list[str]
    disk: dict[str, int]
    packages: list[Package]
    needs: list[Need]

    @property
    def healthy(self) -> bool:
        """Whether the commands that need no extra can run."""
        return not self.needs[0].missing

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(folder: Path = Path()) -> Report:
    """Look at this environment. Imports run side by side in processes of their own; nothing is changed.

    Args:
        folder: of the disk whose free space is told, beside those of temporary files, of the hub's cache and of shared memory.
    """
    base, extras = requirements()
    wanted = [*base, *(item for name in EXTRAS for item in extras.get(name, [])), *map(Requirement, OPTIONAL)]
    names = {item.name: item for item in wanted}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        packages = dict(zip(names, pool.map(check_package, names.values()), strict=True))
    blame_torchvision(packages)
    devices, distributed = _torch() if not packages["torch"].fault else ([], [])
    return Report(
        genrecal=genrecal.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        devices=devices,
        distributed=distributed,
        disk={str(path): shutil.disk_usage(path).free for path in _disks(folder)},
        packages=list(packages.values()),
        needs=[
            _need("every command", base, packages, "pip install --upgrade genrecal"),
            *(
                _need(what, extras.get(name, []), packages, f'pip install "genrecal[{name}]"')
                for name, what in EXTRAS.items()
            ),
            *(_need(what, [Requirement(name)], packages, _remedy(name)) for name, what in OPTIONAL.items()),
        ],
    )


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """genrecal's own requirements for this Python, and those of each extra, from its metadata."""
    base: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires("genrecal") or []:
        item = Requirement(text)
        found = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        if item.marker is None or (found is None and item.marker.evaluate()):
            base.append(item)
        elif found and item.marker.evaluate({"extra": found[1]}):
            extras.setdefault(found[1], []).append(item)
    return base, extras


def blame_torchvision(packages: dict[str, Package]) -> None:
    """Name torchvision in the place of packages that would load without it: transformers imports one that is installed,
    and one built for another torch takes transformers, peft and all else with it."""
    if not (packages.get("torchvision") and packages["torchvision"].version and packages["torchvision"].fault):
        return
    for name, package in packages.items():
        if package.fault.startswith("cannot be imported") and name != "torchvision":
            if not check_package(Requirement(name), without="torchvision").fault:
                fault = "does not load beside this torchvision: pip uninstall torchvision, or install the one for this torch"
                packages[name] = replace(package, fault=fault)


def _remedy(name: str) -> str:
    """How to install an optional package. torchvision must be of the same release and build as torch, which pip sees to where
    torch is named with it."""
    if name != "torchvision":
        return f"pip install {name}"
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "pip install torch torchvision"
    build = torch.partition("+")[2]
    index = (
        f" --index-url INDEX, where INDEX is that of torch's {build} builds (pytorch.org, Get started)" if build else ""
    )
    return f'pip install torchvision "torch=={torch}"{index}'


def check_package(wanted: Requirement, *, without: str = "") -> Package:
    """Whether a package is installed, of a version that will do, and can be imported, without another one perhaps."""
    text = str(wanted.specifier)
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Package(wanted.name, None, text, "not installed")
    if not wanted.specifier.contains(version, prereleases=True):
        return Package(wanted.name, version, text, f"expected {text}, got {version}")
    module = MODULES.get(wanted.name, wanted.name.replace("-", "_"))
    try:
        code = f"import sys; sys.modules[{without!r}] = None; import {module}" if without else f"import {module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return Package(wanted.name, version, text, f"importing it takes more than {IMPORT_SECONDS} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        return Package(wanted.name, version, text, f"cannot be imported: {lines[-1][:200]}")
    return Package(wanted.name, version, text, "")


def _need(what: str, wanted: list[Requirement], packages: dict[str, Package], remedy: str) -> Need:
    missing = [f"{name}: {fault}" for name in (item.name for item in wanted) if (fault := packages[name].fault)]
    return Need(what, "; ".join(missing), remedy if missing else "")


def _torch() -> tuple[list[Device], list[str]]:
    import torch

    devices = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        devices.append(Device(facts.name, facts.total_memory, facts.major >= 8))
    names = ("gloo", "nccl") if torch.distributed.is_available() else ()
    return devices, [name for name in names if getattr(torch.distributed, f"is_{name}_available")()]


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _disks(folder: Path) -> list[Path]:
    """The folder, those of temporary files and of models from the hub, and shared memory, as far as they exist."""
    import tempfile

    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = [folder.resolve(), Path(tempfile.gettempdir()), home, SHARED_MEMORY]
    return [path for path in dict.fromkeys(places) if path.is_dir()]


def report_text(report: Report) -> str:
    """The report for people."""
    from genrecal.report.summary import markdown_table

    devices = [
        f"{device.name}, {_gigabytes(device.memory)}{'' if device.bfloat16 else ', no bfloat16'}"
        for device in report.devices
    ]
    lines = [
        f"genrecal  {report.genrecal}, Python {report.python}, {report.system}",
        f"machine   {report.cores} cores, {_gigabytes(report.memory)} of memory",
        f"devices   {'; '.join(devices) or 'no GPU that torch can use: everything runs on the CPU'}",
        f"processes {', '.join(report.distributed) or 'none'} (torch.distributed, for engine ddp)",
        *(
            f"disk      {human_bytes(free)} free at {path}{SHARES if path == str(SHARED_MEMORY) else ''}"
            for path, free in report.disk.items()
        ),
        "",
        markdown_table(
            ["package", "version", "wanted", ""],
            [[item.name, item.version or "-", item.wanted or "any", item.fault or "ok"] for item in report.packages],
        ),
        "",
        *(
            f"{'-' if need.missing else '+'} {need.what}: "
            + (f"{need.missing} ({need.remedy})" if need.missing else "ready")
            for need in report.needs
        ),
    ]
    return "\n".join(lines)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.0f} GB"
