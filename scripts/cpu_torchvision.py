"""Lets `import torchvision` work beside a CPU build of torch; scripts/make_vllm_env and make_eval_env put it into theirs.

The registry's torchvision is built against CUDA. Beside a CPU torch its compiled operators are missing and importing it
fails, though the image transforms that processors use are plain Python. Declaring the operators' names is enough. In an
environment's site-packages, with a .pth file that imports it, it works in every process, vLLM's spawned workers too.
"""

import importlib.abc
import importlib.machinery
import pathlib
import re
import sys
from typing import Any

KEPT: list[Any] = []  # torch forgets the operators with the object that declared them


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before torchvision is imported for the first time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            _declare((pathlib.Path(spec.origin).parent / "_meta_registrations.py").read_text())
        return spec


def _declare(source: str) -> None:
    import torch

    if torch.cuda.is_available():
        return
    names = re.findall(r'register_meta\("(\w+)"\)', source) + re.findall(
        r'register_fake\("torchvision::(\w+)"\)', source
    )
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in dict.fromkeys(names):
        library.define(f"{name}(Tensor a) -> Tensor")
    KEPT.append(library)


sys.meta_path.insert(0, DeclareOperators())
