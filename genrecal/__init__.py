"""Offline teacher caches and a lightweight trainer for distilling large vision-language models into small ones."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genrecal.shards.reader import open_cache as open_cache
    from genrecal.shards.webdataset_pipeline import webdataset_pipeline as webdataset_pipeline

__version__ = "0.1.0"
_MODULES = {"open_cache": "reader", "webdataset_pipeline": "webdataset_pipeline"}  # imported when first asked for
__all__ = ["open_cache", "webdataset_pipeline"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"genrecal.shards.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'genrecal' has no attribute {name!r}")
