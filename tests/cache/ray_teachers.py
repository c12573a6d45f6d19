"""Loaders of teachers for tests/cache/test_ray.py; actors of a cluster import this module."""

import os
import time
from pathlib import Path

import torch

from genrecal.cache.teacher import HFTeacher


class Teacher(HFTeacher):
    """Writes to `folder` on which node it works, and waits while there is a `folder.wait`.

    `fault` happens with samples whose key holds `key`.
    """

    folder: Path
    fault: str = ""
    key: str = ""

    def states(self, batch, **options):
        import ray

        (self.folder / f"{ray.get_runtime_context().get_node_id()}-{time.time_ns()}").touch()
        while self.folder.with_suffix(".wait").exists():
            time.sleep(0.02)
        if self.fault and any(self.key in encoded.key for encoded in batch):
            if self.fault == "killed":
                os._exit(9)
            raise RuntimeError(self.fault)
        return super().states(batch, **options)


def load(model, folder, fault="", key=""):
    torch.set_num_threads(1)
    teacher = Teacher.load(model, dtype=torch.float32)
    teacher.folder, teacher.fault, teacher.key = Path(folder), fault, key
    return teacher
