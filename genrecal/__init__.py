"""Offline teacher caches and a lightweight trainer for distilling large vision-language models into small ones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genrecal.shards.reader import open_cache as open_cache

__version__ = "0.1.0"
__all__ = ["open_cache"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "open_cache":
        from genrecal.shards.reader import open_cache

        return open_cache
    raise AttributeError(f"module 'genrecal' has no attribute {name!r}")
