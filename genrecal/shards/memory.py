"""Memory for what is read and decoded: new each time, or a batch's, which the next batch uses again."""

from collections.abc import Callable

import numpy as np

LINE = 64  # bytes of the processor's cache; states that begin with one are decoded a tenth faster
Empty = Callable[[int, int], np.ndarray]  # rows, D -> C-contiguous float32 [rows, D] to write to


def _empty_lines(size: int) -> np.ndarray:
    """uint8 `[size]` that begins a cache line; numpy's own arrays begin anywhere."""
    room = np.empty(size + LINE, np.uint8)
    return room[-room.ctypes.data % LINE :][:size]


class Memory:
    """New memory for each that asks."""

    def room(self, size: int) -> np.ndarray:
        """uint8 `[size]` to write to, from the beginning of a cache line on."""
        return _empty_lines(size)

    def states(self, rows: int, width: int) -> np.ndarray:
        """float32 `[R, D]` to write to: an `Empty`."""
        return self.room(4 * rows * width).view(np.float32).reshape(rows, width)


class BatchMemory(Memory):
    """A batch's memory, used again for the next: the system need not find and clear its pages anew.

    What it gave is overwritten after `clear`. It grows to what was asked of it between two of these.
    """

    def __init__(self) -> None:
        self._memory, self._used = _empty_lines(0), 0

    def room(self, size: int) -> np.ndarray:
        start, self._used = self._used, self._used + size + -size % LINE
        return super().room(size) if self._used > len(self._memory) else self._memory[start : start + size]

    def clear(self) -> None:
        """Take back all that was given."""
        if self._used > len(self._memory):
            self._memory = _empty_lines(self._used + self._used // 4)
        self._used = 0


NEW = Memory()
empty_states = NEW.states
