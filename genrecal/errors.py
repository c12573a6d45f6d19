"""Errors that genrecal raises for a user's mistake or for corrupt data.

The command line prints them as one line and exits with `exit_status`; any other exception is a bug and keeps its traceback. A
message says what is wrong, where (file, shard, key, field), what was expected, what was found, and what to do.
"""

from typing import ClassVar


class GenrecalError(Exception):
    """Base class; exit status 1: the command failed or found corrupt data."""

    exit_status: ClassVar[int] = 1


class UsageError(GenrecalError, ValueError):
    """A wrong option or setting; exit status 2."""

    exit_status: ClassVar[int] = 2


class DataError(GenrecalError, ValueError):
    """The input data cannot be read, or too much of it is bad."""


class SampleError(GenrecalError, ValueError):
    """One sample cannot be used; the cache job skips it, with this reason, and counts it."""


class ModelError(GenrecalError, ValueError):
    """genrecal cannot handle a model, processor or chat template; the message is the reason."""


class FormatError(GenrecalError, ValueError):
    """A cache has a format version, codec or schema that this reader does not know."""


class DamageError(GenrecalError, ValueError):
    """Bytes of a cache differ from what its manifest says."""


class StorageError(GenrecalError, RuntimeError):
    """A remote store keeps failing: a connection, a server's error, or a refusal other than of access."""


class TrainingError(GenrecalError, RuntimeError):
    """Training cannot continue: non-finite numbers, or a checkpoint of another run."""


class StoppedError(GenrecalError):
    """A signal stopped the run, which has saved a checkpoint. The exit status is that of SIGTERM in shells."""

    exit_status: ClassVar[int] = 143


class OtherRankError(GenrecalError):
    """Another process of this run prints the error; this one ends with the same status."""

    def __init__(self, message: str, exit_status: int = 1):
        super().__init__(message)
        self.exit_status = exit_status  # type: ignore[misc]

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.exit_status)
