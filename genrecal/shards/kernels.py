"""Compiled loops of the int8 and int4 codecs: Hadamard transforms at the speed of memory. Compiled when first used.

`genrecal.shards.rotation.hadamard_reference` is the same in a few readable lines of numpy; a test holds them together.
Indices are unsigned, since numba otherwise looks at each for a negative one, and then nothing is vectorised. Every pass
reads one array and writes another for the same reason.
"""

import numba
import numpy as np

GROUP = 128  # codes that share a step; the seven lowest bits of a channel's number
BIAS = np.int16(512)  # 4 x 128: four codes added cannot go below zero
BIASES = np.uint64(0x0200_0200_0200_0200)
FIRST, SECOND = 2 * BIASES, 4 * BIASES  # of a difference of two biased sums, and of two of those
AFTER = np.uint16(4 * 512)  # the bias of sums of sixteen codes

# Without reassociation: the same sums in the same order on every machine. Contraction would join no sums here.
compiled = numba.njit(boundscheck=False, nogil=True, cache=True)
i16, u16, f32, u = np.int16, np.uint16, np.float32, np.uintp


@compiled
def hadamard(x: np.ndarray, block: int, out: np.ndarray) -> None:
    """H_block / sqrt(block) over each block of the last axis of `x` `[R, D]`, float32, into `out`. `x` may be `out`.

    Constant geometry: a pass joins neighbours and writes their sums to the first half, their differences to the second,
    so that each bit of a channel's number is lowest once, and after log2(block) of them all are where they were.
    """
    norm = f32(1 / np.sqrt(block))
    a, b = np.empty(block, np.float32), np.empty(block, np.float32)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], block):
            for i in range(block):
                a[i] = x[row, start + i] * norm
            size = block
            while size > 1:
                if size % 4 == 0:
                    _neighbours4(a, b)
                    size //= 4
                else:
                    _neighbours2(a, b)
                    size //= 2
                a, b = b, a
            for i in range(block):
                out[row, start + i] = a[i]


@compiled
def _neighbours2(x: np.ndarray, y: np.ndarray) -> None:
    half = u(len(x) // 2)
    for i in range(half):
        k = u(2 * i)
        y[u(i)], y[u(i) + half] = x[k] + x[k + u(1)], x[k] - x[k + u(1)]


@compiled
def _neighbours4(x: np.ndarray, y: np.ndarray) -> None:
    """Two passes of `_neighbours2`."""
    quarter = u(len(x) // 4)
    for i in range(quarter):
        k, j = u(4 * i), u(i)
        e, f = x[k] + x[k + u(1)], x[k] - x[k + u(1)]
        g, h = x[k + u(2)] + x[k + u(3)], x[k + u(2)] - x[k + u(3)]
        y[j], y[j + quarter], y[j + u(2) * quarter], y[j + u(3) * quarter] = e + g, f + h, e - g, f - h


@compiled
def join_planes(high: np.ndarray, low: np.ndarray, bits: np.ndarray) -> None:
    """bf16's two byte planes, uint8 `[n]`, -> the bits of float32 values, uint32 `[n]`."""
    for i in range(len(bits)):
        k = u(i)
        bits[k] = (np.uint32(high[k]) << np.uint32(24)) | (np.uint32(low[k]) << np.uint32(16))


@compiled
def decode8(codes: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, out: np.ndarray) -> None:
    """int8 codes `[R, D]` times their groups' steps, float32 `[R, D / 128]`, rotated back, into float32 `out` `[R, D]`.

    Args:
        signs: float32 `[D]`, those of the rotation.
        block: of the rotation, at least 128.
    """
    sums = np.empty(codes.shape[1], np.uint16)
    x, y = np.empty(block, np.float32), np.empty(block, np.float32)
    for row in range(codes.shape[0]):
        _sums_of_4_from_8(codes[row], sums)
        _rotate_sums_back(sums, steps[row], signs, block, x, y, out[row])


@compiled
def decode4(packed: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, out: np.ndarray) -> None:
    """`decode8` for int4 codes, two in a byte: uint8 `[R, D / 2]`, the lower channel in the low bits, 8 more than they are."""
    sums = np.empty(2 * packed.shape[1], np.uint16)
    x, y = np.empty(block, np.float32), np.empty(block, np.float32)
    for row in range(packed.shape[0]):
        _sums_of_4_from_4(packed[row], sums)
        _rotate_sums_back(sums, steps[row], signs, block, x, y, out[row])


@compiled
def _rotate_sums_back(
    sums: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, x: np.ndarray, y: np.ndarray, out: np.ndarray
) -> None:
    """The other bits of a row: in whole numbers within groups, which have one step, and then in float32."""
    _sums_of_16(sums.view(np.uint64))
    norm = f32(1 / np.sqrt(block))
    groups = block // GROUP
    for start in range(0, len(out), block):
        first = start // GROUP
        _sums_of_128(sums[start : start + block], steps[first : first + groups], norm, x)
        height = GROUP
        while height < block:
            left = block // height
            if left % 8 == 0:
                _butterflies8(x, y, height)
                height *= 8
            elif left % 4 == 0:
                _butterflies4(x, y, height)
                height *= 4
            else:
                _butterflies2(x, y, height)
                height *= 2
            x, y = y, x
        for i in range(block):
            k = u(i)
            out[u(start) + k] = x[k] * signs[u(start) + k]


# Sums of up to 128 codes fit into 16 bits. A bias keeps them from going below zero, so that four of them can be added in
# one 64-bit word without a borrow from one into the next.


@compiled
def _sums_of_4_from_8(codes: np.ndarray, sums: np.ndarray) -> None:
    """Bits 0 and 1 of the channel's number."""
    for i in range(len(sums) // 4):
        k = u(4 * i)
        a, b, c, d = i16(codes[k]), i16(codes[k + u(1)]), i16(codes[k + u(2)]), i16(codes[k + u(3)])
        e, f, g, h = i16(a + b), i16(a - b), i16(c + d), i16(c - d)
        sums[k] = u16(i16(e + g) + BIAS)
        sums[k + u(1)] = u16(i16(f + h) + BIAS)
        sums[k + u(2)] = u16(i16(e - g) + BIAS)
        sums[k + u(3)] = u16(i16(f - h) + BIAS)


@compiled
def _sums_of_4_from_4(packed: np.ndarray, sums: np.ndarray) -> None:
    for i in range(len(sums) // 4):
        k, j = u(4 * i), u(2 * i)
        a, b = i16(i16(packed[j] & 15) - 8), i16(i16(packed[j] >> 4) - 8)
        c, d = i16(i16(packed[j + u(1)] & 15) - 8), i16(i16(packed[j + u(1)] >> 4) - 8)
        e, f, g, h = i16(a + b), i16(a - b), i16(c + d), i16(c - d)
        sums[k] = u16(i16(e + g) + BIAS)
        sums[k + u(1)] = u16(i16(f + h) + BIAS)
        sums[k + u(2)] = u16(i16(e - g) + BIAS)
        sums[k + u(3)] = u16(i16(f - h) + BIAS)


@compiled
def _sums_of_16(words: np.ndarray) -> None:
    """Bits 2 and 3, four sums in a word."""
    for i in range(len(words) // 4):
        k = u(4 * i)
        a, b, c, d = words[k], words[k + u(1)], words[k + u(2)], words[k + u(3)]
        e, f, g, h = a + b, a + FIRST - b, c + d, c + FIRST - d
        words[k], words[k + u(1)], words[k + u(2)], words[k + u(3)] = e + g, f + h, e + SECOND - g, f + SECOND - h


@compiled
def _sums_of_128(sums: np.ndarray, steps: np.ndarray, norm: float, x: np.ndarray) -> None:
    """Bits 4 to 6, then the step."""
    for group in range(len(steps)):
        step = f32(steps[group] * norm)
        for j in range(16):
            k = u(group * GROUP + j)
            a0, a1 = i16(sums[k] - AFTER), i16(sums[k + u(16)] - AFTER)
            a2, a3 = i16(sums[k + u(32)] - AFTER), i16(sums[k + u(48)] - AFTER)
            a4, a5 = i16(sums[k + u(64)] - AFTER), i16(sums[k + u(80)] - AFTER)
            a6, a7 = i16(sums[k + u(96)] - AFTER), i16(sums[k + u(112)] - AFTER)
            b0, b1, b2, b3 = i16(a0 + a4), i16(a1 + a5), i16(a2 + a6), i16(a3 + a7)
            b4, b5, b6, b7 = i16(a0 - a4), i16(a1 - a5), i16(a2 - a6), i16(a3 - a7)
            a0, a1, a2, a3 = i16(b0 + b2), i16(b1 + b3), i16(b0 - b2), i16(b1 - b3)
            a4, a5, a6, a7 = i16(b4 + b6), i16(b5 + b7), i16(b4 - b6), i16(b5 - b7)
            x[k], x[k + u(16)] = f32(i16(a0 + a1)) * step, f32(i16(a0 - a1)) * step
            x[k + u(32)], x[k + u(48)] = f32(i16(a2 + a3)) * step, f32(i16(a2 - a3)) * step
            x[k + u(64)], x[k + u(80)] = f32(i16(a4 + a5)) * step, f32(i16(a4 - a5)) * step
            x[k + u(96)], x[k + u(112)] = f32(i16(a6 + a7)) * step, f32(i16(a6 - a7)) * step


@compiled
def _butterflies2(x: np.ndarray, y: np.ndarray, height: int) -> None:
    """The bit of 2 ** height: sums and differences of channels that far apart."""
    h = u(height)
    for start in range(0, len(x), 2 * height):
        for j in range(height):
            k = u(start + j)
            y[k], y[k + h] = x[k] + x[k + h], x[k] - x[k + h]


@compiled
def _butterflies4(x: np.ndarray, y: np.ndarray, height: int) -> None:
    """Two bits at once."""
    h = u(height)
    for start in range(0, len(x), 4 * height):
        for j in range(height):
            k = u(start + j)
            e, f = x[k] + x[k + h], x[k] - x[k + h]
            g, i = x[k + u(2) * h] + x[k + u(3) * h], x[k + u(2) * h] - x[k + u(3) * h]
            y[k], y[k + h], y[k + u(2) * h], y[k + u(3) * h] = e + g, f + i, e - g, f - i


@compiled
def _butterflies8(x: np.ndarray, y: np.ndarray, height: int) -> None:
    """Three bits at once."""
    h = u(height)
    for start in range(0, len(x), 8 * height):
        for j in range(height):
            k = u(start + j)
            a0, a1, a2, a3 = x[k], x[k + h], x[k + u(2) * h], x[k + u(3) * h]
            a4, a5, a6, a7 = x[k + u(4) * h], x[k + u(5) * h], x[k + u(6) * h], x[k + u(7) * h]
            b0, b1, b2, b3, b4, b5, b6, b7 = a0 + a4, a1 + a5, a2 + a6, a3 + a7, a0 - a4, a1 - a5, a2 - a6, a3 - a7
            a0, a1, a2, a3, a4, a5, a6, a7 = b0 + b2, b1 + b3, b0 - b2, b1 - b3, b4 + b6, b5 + b7, b4 - b6, b5 - b7
            y[k], y[k + h], y[k + u(2) * h], y[k + u(3) * h] = a0 + a1, a0 - a1, a2 + a3, a2 - a3
            y[k + u(4) * h], y[k + u(5) * h], y[k + u(6) * h], y[k + u(7) * h] = a4 + a5, a4 - a5, a6 + a7, a6 - a7
