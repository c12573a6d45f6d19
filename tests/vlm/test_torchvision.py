"""The same rendering and loading tests where torchvision is installed: another image backend, whole processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pair_runs import NEED_TORCHVISION, note_pair
from torchvision_site import torchvision_path
from transformers.utils import is_torchvision_available

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(is_torchvision_available(), reason="the other tests run with torchvision already")
def test_rendering_loading_and_smolvlm_with_torchvision(tmp_path, record_property):
    names = ("test_rendering.py", "test_loading.py", "test_demo_assets.py")
    pairs = HERE.parent / "end_to_end/test_pairs.py::test_pairs_that_need_torchvision"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(str(HERE / name) for name in names),
            str(pairs),
        ],
        env=os.environ | {"PYTHONPATH": torchvision_path(tmp_path / "site", "num2words==0.5.14")},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    for teacher, student in NEED_TORCHVISION:
        note_pair(record_property, teacher, student)
