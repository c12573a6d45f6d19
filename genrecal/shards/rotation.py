"""The randomised Hadamard rotation of the int8 and int4 codecs.

Large language models' states have a few channels hundreds of times larger than the rest; quantised as they stand, those
channels take the whole range. A rotation spreads every channel over its block, after which values look Gaussian and a
few bits go far. Signs are seeded, so that no fixed direction of a model can lie along the rotation's own.
"""

import functools
import hashlib
import math

import numpy as np


def block_size(width: int) -> int:
    """The largest power of two that divides `width`: 3584 -> 512, 8192 -> 8192, an odd width -> 1 (no rotation)."""
    return width & -width


@functools.lru_cache(maxsize=16)
def signs(width: int, seed: int) -> np.ndarray:
    """float32 `[width]` of +1 and -1, from SHA-256 so that any language can make them again.

    Channel i takes bit i % 8 (lowest first) of byte (i // 8) % 32 of sha256(seed as 8 bytes, i // 256 as 8 bytes, both
    little-endian); a set bit is -1.
    """
    digests = [
        hashlib.sha256(seed.to_bytes(8, "little") + block.to_bytes(8, "little")).digest()
        for block in range(-(-width // 256))
    ]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8), bitorder="little")[:width]
    result = (1 - 2 * bits.astype(np.int8)).astype(np.float32)
    result.setflags(write=False)
    return result


def rotate(states: np.ndarray, *, block: int, seed: int) -> np.ndarray:
    """`[R, D]` float32 -> the rotated states: signs, then an orthonormal Hadamard transform of each block of channels."""
    return hadamard(states * signs(states.shape[1], seed), block)


def rotate_back(rotated: np.ndarray, *, block: int, seed: int) -> np.ndarray:
    """The inverse of `rotate` (the Hadamard matrix is its own): the transform, then the signs."""
    return hadamard(rotated, block) * signs(rotated.shape[1], seed)


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """H_block / sqrt(block) over each block of the last axis of float32 `[R, D]`."""
    from genrecal.shards import kernels

    out = np.empty(x.shape, np.float32)
    kernels.hadamard(np.ascontiguousarray(x, np.float32), block, out)
    return out


def hadamard_reference(x: np.ndarray, block: int) -> np.ndarray:
    """The same as a product with the whole matrix: slow, and plain to see."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])  # Sylvester's construction
    blocks = x.astype(np.float64).reshape(len(x), -1, block)
    return (blocks @ (matrix / math.sqrt(block))).reshape(x.shape).astype(np.float32)
