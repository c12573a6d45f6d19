"""Runs pytest with a torchvision that was installed beside a CPU build of torch.

The registry's torchvision is built against CUDA. Beside a CPU torch its compiled operators are missing and importing it
fails, though the image transforms that processors use are plain Python. Declaring the operators' names is enough.
"""

import importlib.util
import pathlib
import re
import sys

import pytest
import torch


def declare_operators() -> torch.library.Library:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    source = (pathlib.Path(spec.origin).parent / "_meta_registrations.py").read_text()
    names = re.findall(r'register_meta\("(\w+)"\)', source) + re.findall(
        r'register_fake\("torchvision::(\w+)"\)', source
    )
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in dict.fromkeys(names):
        library.define(f"{name}(Tensor a) -> Tensor")
    return library


if __name__ == "__main__":
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        kept = declare_operators()
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
    from transformers.utils import is_torchvision_available

    assert is_torchvision_available()
    sys.exit(pytest.main(sys.argv[1:]))
