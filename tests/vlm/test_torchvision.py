"""The same rendering and loading tests where torchvision is installed: another image backend, whole processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pair_runs import NEED_TORCHVISION, note_pair
from transformers.utils import is_torchvision_available

HERE = Path(__file__).parent
VERSIONS = {"2.13": "0.28.0"}  # torch -> the torchvision made for it


@pytest.mark.slow
@pytest.mark.skipif(is_torchvision_available(), reason="the other tests run with torchvision already")
def test_rendering_loading_and_smolvlm_with_torchvision(tmp_path, record_property):
    import torch

    version = VERSIONS[torch.__version__.rsplit(".", 1)[0]]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, f"torchvision=={version}", "num2words==0.5.14"], check=True)
    names = ("test_rendering.py", "test_loading.py", "test_demo_assets.py")
    pairs = HERE.parent / "end_to_end/test_pairs.py::test_pairs_that_need_torchvision"
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "torchvision_runner.py"),
            "-q",
            "-p",
            "no:cacheprovider",
            *(str(HERE / name) for name in names),
            str(pairs),
        ],
        env=os.environ | {"PYTHONPATH": path},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    for teacher, student in NEED_TORCHVISION:
        note_pair(record_property, teacher, student)
