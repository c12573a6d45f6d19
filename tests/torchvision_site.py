"""torchvision beside the torch that the tests run with, in a folder of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SHIM = Path(__file__).parents[1] / "scripts" / "cpu_torchvision.py"


def torchvision_path(folder: Path, *others: str) -> str:
    """A PYTHONPATH with torchvision, and `others` such as num2words, installed into `folder`.

    pip chooses the torchvision of this torch, as `genrecal doctor` advises. Where torch is built for the CPU, the registry's
    torchvision needs the shim of scripts/cpu_torchvision.py, which every process then imports at its start.
    """
    release = torch.__version__.partition("+")[0]
    wanted = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--report", "-", "torchvision", f"torch=={release}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (version,) = (
        item["metadata"]["version"]
        for item in json.loads(wanted.stdout)["install"]
        if item["metadata"]["name"] == "torchvision"
    )
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, f"torchvision=={version}", *others], check=True)
    if torch.version.cuda is None:
        shutil.copyfile(SHIM, folder / "sitecustomize.py")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
