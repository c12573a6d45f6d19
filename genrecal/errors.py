"""Every error genrecal raises for a user's mistake or for damaged data.

The command line prints these as one line and exits with `exit_status`; anything else is a bug of ours and keeps its
traceback. A message says what, where (file, shard, key, field), expected, got, and what to do.
"""

from typing import ClassVar


class GenrecalError(Exception):
    """Base of the tree; exit status 1: the command failed or found damage."""

    exit_status: ClassVar[int] = 1


class UsageError(GenrecalError, ValueError):
    """A wrong option or setting; exit status 2."""

    exit_status: ClassVar[int] = 2


class DataError(GenrecalError, ValueError):
    """The input data cannot be read, or too much of it is bad."""


class SampleError(GenrecalError, ValueError):
    """One sample cannot be used; the cache job skips it with this reason, and counts it."""


class ModelError(GenrecalError, ValueError):
    """A model, processor or chat template that genrecal cannot handle; the message is the reason."""


class FormatError(GenrecalError, ValueError):
    """A cache of a format version, codec or schema that this reader does not know."""


class DamageError(GenrecalError, ValueError):
    """Bytes of a cache that are not what its manifest says."""


class StorageError(GenrecalError, RuntimeError):
    """A remote store that goes on failing: a connection, a server's error, a refusal that is none of access."""


class TrainingError(GenrecalError, RuntimeError):
    """Training cannot go on: non-finite numbers, or a checkpoint of something else."""


class StoppedError(GenrecalError):
    """A signal asked the run to stop; it saved what it had and did. The status is what shells give for SIGTERM."""

    exit_status: ClassVar[int] = 143


class OtherRankError(GenrecalError):
    """Another process of the same run says what went wrong; this one only ends, with the same status."""

    def __init__(self, message: str, exit_status: int = 1):
        super().__init__(message)
        self.exit_status = exit_status  # type: ignore[misc]

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.exit_status)
