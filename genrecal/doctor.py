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
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import genrecal
from genrecal.progress import human_bytes

SHARED_MEMORY = "/dev/shm"
IMPORT_SECONDS = 180  # that an import may take; vLLM's first takes a minute on a slow disk
# The module that a package is imported by, where the names differ.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "lmms-eval": "lmms_eval", "flash-attn": "flash_attn"}
# What each extra is for. Extras that are not listed are for developers.
EXTRAS = {
    "vllm": "cache --backend vllm",
    "ray": "cache --ray",
    "deepspeed": "train with engine zero1, zero2 or zero3",
    "s3": "caches at s3:// URLs",
    "report": "demo, report, and inspect --sql",
    "eval": "evaluate --harness lmms-eval",
}
# Packages that are used if they are installed; no extra asks for them.
OPTIONAL = {
    "torchvision": "AutoProcessor for most families' exported students; images resized as their processors were used",
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
class Report:
    """Everything that `genrecal doctor` prints; sizes in bytes. `devices`: name, memory and bfloat16 of each GPU."""

    genrecal: str
    python: str
    system: str
    cores: int
    memory: int
    devices: list[dict[str, Any]]
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
        folder: on the disk whose free space is shown, beside those of temporary files, the hub's cache and shared memory.
    """
    base, extras = requirements()
    wanted = [*base, *(item for name in EXTRAS for item in extras.get(name, [])), *map(Requirement, OPTIONAL)]
    names = {item.name: item for item in wanted}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        packages = dict(zip(names, pool.map(check_package, names.values()), strict=True))
    blame_torchvision(packages)

    def need(what: str, items: list[Requirement], remedy: str) -> Need:
        missing = [f"{item.name}: {fault}" for item in items if (fault := packages[item.name].fault)]
        return Need(what, "; ".join(missing), remedy if missing else "")

    devices, distributed = ([], []) if packages["torch"].fault else _torch()
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    disks = [
        path for path in (folder.resolve(), Path(tempfile.gettempdir()), hub, Path(SHARED_MEMORY)) if path.is_dir()
    ]
    return Report(
        genrecal=genrecal.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        devices=devices,
        distributed=distributed,
        disk={str(path): shutil.disk_usage(path).free for path in disks},
        packages=list(packages.values()),
        needs=[
            need("every command", base, "pip install --upgrade genrecal"),
            *(need(what, extras.get(name, []), f'pip install "genrecal[{name}]"') for name, what in EXTRAS.items()),
            *(need(what, [Requirement(name)], _remedy(name)) for name, what in OPTIONAL.items()),
        ],
    )


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """genrecal's own requirements for this Python, and those of each extra, from its metadata."""
    base: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires("genrecal") or []:
        item = Requirement(text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        if item.marker is None or item.marker.evaluate({"extra": extra[1] if extra else ""}):
            (extras.setdefault(extra[1], []) if extra else base).append(item)
    return base, extras


def blame_torchvision(packages: dict[str, Package]) -> None:
    """Blame torchvision where a package would load without it: transformers imports one that is installed, and one built for
    another torch takes transformers, peft and all else with it."""
    if not (packages.get("torchvision") and packages["torchvision"].version and packages["torchvision"].fault):
        return
    for name, package in packages.items():
        if package.fault.startswith("cannot be imported") and name != "torchvision":
            if not check_package(Requirement(name), without="torchvision").fault:
                fault = "does not load beside this torchvision: pip uninstall torchvision, or install the one for this torch"
                packages[name] = replace(package, fault=fault)


def _remedy(name: str) -> str:
    """How to install an optional package. torchvision must be of torch's release and build: pip sees to it if torch is named
    in the same command."""
    if name != "torchvision":
        return f"pip install {name}"
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "pip install torch torchvision"
    build = torch.partition("+")[2]
    index = f" --index-url INDEX, where INDEX is that of torch's {build} builds (pytorch.org, Get started)"
    return f'pip install torchvision "torch=={torch}"{index if build else ""}'


def check_package(wanted: Requirement, *, without: str = "") -> Package:
    """Whether a package is installed, of a version that will do, and can be imported (`without` another one, if given)."""

    def found(version: str | None, fault: str) -> Package:
        return Package(wanted.name, version, str(wanted.specifier), fault)

    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return found(None, "not installed")
    if not wanted.specifier.contains(version, prereleases=True):
        return found(version, f"expected {wanted.specifier}, got {version}")
    code = f"import sys; sys.modules[{without!r}] = None; " if without else ""
    code += f"import {MODULES.get(wanted.name, wanted.name.replace('-', '_'))}"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return found(version, f"importing it takes more than {IMPORT_SECONDS} s")
    lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
    return found(version, f"cannot be imported: {lines[-1][:200]}" if done.returncode else "")


def _torch() -> tuple[list[dict[str, Any]], list[str]]:
    import torch

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    devices = [{"name": gpu.name, "memory": gpu.total_memory, "bfloat16": gpu.major >= 8} for gpu in gpus]
    backends = ("gloo", "nccl") if torch.distributed.is_available() else ()
    return devices, [name for name in backends if getattr(torch.distributed, f"is_{name}_available")()]


def report_text(report: Report) -> str:
    """The report for people."""
    from genrecal.report.summary import markdown_table

    devices = [
        f"{device['name']}, {device['memory'] / 1e9:.0f} GB{'' if device['bfloat16'] else ', no bfloat16'}"
        for device in report.devices
    ]
    packages = [[item.name, item.version or "-", item.wanted or "any", item.fault or "ok"] for item in report.packages]
    shared = " (shared memory: what training reads ahead)"
    return "\n".join([
        f"genrecal  {report.genrecal}, Python {report.python}, {report.system}",
        f"machine   {report.cores} cores, {report.memory / 1e9:.0f} GB of memory",
        f"devices   {'; '.join(devices) or 'no GPU that torch can use: everything runs on the CPU'}",
        f"processes {', '.join(report.distributed) or 'none'} (torch.distributed, for engine ddp)",
        *(f"disk      {human_bytes(free)} free at {path}{shared if path == SHARED_MEMORY else ''}"
          for path, free in report.disk.items()),
        "",
        markdown_table(["package", "version", "wanted", ""], packages),
        "",
        *(f"- {need.what}: {need.missing} ({need.remedy})" if need.missing else f"+ {need.what}: ready"
          for need in report.needs),
    ])  # fmt: skip
