"""Compiled loops of the int8 and int4 codecs: Hadamard transforms at the speed of memory. Compiled when first used.

`genrecal.shards.rotation.hadamard_reference` is the same in a few readable lines of numpy; a test holds them together.
Indices are unsigned, since numba otherwise looks at each for a negative one, and then nothing is vectorised. Every pass
reads one array and writes another for the same reason.
"""

import numba
import numpy as np

GROUP = 128  # codes that share a step; the seven lowest bits of a channel's number
PIECE, PITCH = 1024, 1040  # channels; pieces that stood 4096 bytes apart would push each other out of the nearest cache
BIAS = np.int16(128)  # a code and this is not below zero; nor is a sum of n codes and n times this
EVEN, DOUBLE_EVEN = np.uint64(0x0000_FFFF_0000_FFFF), np.uint64(0x0000_0100_0000_0100)
LOWER, FOURFOLD_LOWER = np.uint64(0x0000_0000_FFFF_FFFF), np.uint64(0x0000_0000_0200_0200)
EIGHTFOLD, SIXTEENFOLD = np.uint64(0x0400_0400_0400_0400), np.uint64(0x0800_0800_0800_0800)
AFTER = np.uint16(16 * 128)

# Without reassociation: the same sums in the same order on every machine. Contraction would join no sums here.
compiled = numba.njit(boundscheck=False, nogil=True, cache=True)
i16, u16, u64, f32, u = np.int16, np.uint16, np.uint64, np.float32, np.uintp


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
    biased, a, b = _rooms(block)
    for row in range(codes.shape[0]):
        for start in range(0, codes.shape[1], block):
            end = start + block
            for i in range(block):
                k = u(i)
                biased[k] = u16(i16(codes[row, u(start) + k]) + BIAS)
            _rotate_back(biased, steps[row, start // GROUP : end // GROUP], signs[start:end], a, b, out[row, start:end])


@compiled
def decode4(packed: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, out: np.ndarray) -> None:
    """`decode8` for int4 codes, two in a byte: uint8 `[R, D / 2]`, the lower channel in the low bits, 8 more than they are."""
    biased, a, b = _rooms(block)
    for row in range(packed.shape[0]):
        for start in range(0, 2 * packed.shape[1], block):
            end = start + block
            for i in range(block // 2):
                k = u(i)
                byte = packed[row, u(start // 2) + k]
                biased[u(2) * k] = u16(byte & 15) + u16(BIAS - 8)
                biased[u(2) * k + u(1)] = u16(byte >> 4) + u16(BIAS - 8)
            _rotate_back(biased, steps[row, start // GROUP : end // GROUP], signs[start:end], a, b, out[row, start:end])


@compiled
def _rooms(block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a block's codes, and twice for its values, whose pieces stand a little apart."""
    room = -(-block // PIECE) * PITCH
    return np.empty(block, np.uint16), np.empty(room, np.float32), np.empty(room, np.float32)


@compiled
def _rotate_back(
    biased: np.ndarray, steps: np.ndarray, signs: np.ndarray, a: np.ndarray, b: np.ndarray, out: np.ndarray
) -> None:
    """One block: in whole numbers within groups, which have one step, and then in float32.

    A piece of 1024 channels stays in the nearest cache until its own bits are done.
    """
    block = len(out)
    norm = f32(1 / np.sqrt(block))
    piece = min(block, PIECE)
    for number in range(block // piece):
        start, at = number * piece, number * PITCH
        _sums_of_16(biased[start : start + piece].view(np.uint64))
        _sums_of_128(biased[start : start + piece], steps[start // GROUP : (start + piece) // GROUP], norm, a[at:])
        if piece == 8 * GROUP:
            _butterflies8(a[at : at + piece], b[at : at + piece], GROUP)
        elif piece == 4 * GROUP:
            _butterflies4(a[at : at + piece], b[at : at + piece], GROUP)
        elif piece == 2 * GROUP:
            _butterflies2(a[at : at + piece], b[at : at + piece], GROUP)
        else:
            b[at : at + piece] = a[at : at + piece]
    together = block // piece
    while together > 8:
        _butterflies2(b, a, together // 2 * PITCH)
        a, b = b, a
        together //= 2
    for first in range(0, block // piece, together):
        _between_pieces(b[first * PITCH :], together, piece, signs[first * piece :], out[first * piece :])


@compiled
def _between_pieces(x: np.ndarray, together: int, piece: int, signs: np.ndarray, out: np.ndarray) -> None:
    """The last bits, between 1, 2, 4 or 8 pieces, and the signs; a strip of each piece at a time."""
    strip = np.empty(8 * GROUP, np.float32)
    p = u(PITCH)
    for start in range(0, piece, GROUP):
        for j in range(GROUP):
            k, i = u(start + j), u(j)
            if together == 8:
                a0, a1, a2, a3 = x[k], x[k + p], x[k + u(2) * p], x[k + u(3) * p]
                a4, a5, a6, a7 = x[k + u(4) * p], x[k + u(5) * p], x[k + u(6) * p], x[k + u(7) * p]
                b0, b1, b2, b3, b4, b5, b6, b7 = a0 + a4, a1 + a5, a2 + a6, a3 + a7, a0 - a4, a1 - a5, a2 - a6, a3 - a7
                a0, a1, a2, a3, a4, a5, a6, a7 = b0 + b2, b1 + b3, b0 - b2, b1 - b3, b4 + b6, b5 + b7, b4 - b6, b5 - b7
                strip[i], strip[i + u(128)], strip[i + u(256)], strip[i + u(384)] = a0 + a1, a0 - a1, a2 + a3, a2 - a3
                strip[i + u(512)], strip[i + u(640)] = a4 + a5, a4 - a5
                strip[i + u(768)], strip[i + u(896)] = a6 + a7, a6 - a7
            elif together == 4:
                e, f = x[k] + x[k + p], x[k] - x[k + p]
                g, h = x[k + u(2) * p] + x[k + u(3) * p], x[k + u(2) * p] - x[k + u(3) * p]
                strip[i], strip[i + u(128)], strip[i + u(256)], strip[i + u(384)] = e + g, f + h, e - g, f - h
            elif together == 2:
                strip[i], strip[i + u(128)] = x[k] + x[k + p], x[k] - x[k + p]
            else:
                strip[i] = x[k]
        for number in range(together):
            at, of = u(number * piece + start), u(number * GROUP)
            for j in range(GROUP):
                out[at + u(j)] = strip[of + u(j)] * signs[at + u(j)]


# Sums of up to 128 codes fit into 16 bits. A bias keeps them from going below zero, so that four of them can be added in
# one 64-bit word without a borrow from one into the next.


@compiled
def _sums_of_16(words: np.ndarray) -> None:
    """Bits 0 to 3 of the channel's number, four codes in a word: first within each word, then between four of them."""
    for i in range(len(words)):
        k = u(i)
        w = words[k]
        low, high = w & EVEN, (w >> u64(16)) & EVEN
        w = (low + high) | ((low + DOUBLE_EVEN - high) << u64(16))
        low, high = w & LOWER, w >> u64(32)
        words[k] = (low + high) | ((low + FOURFOLD_LOWER - high) << u64(32))
    for i in range(len(words) // 4):
        k = u(4 * i)
        a, b, c, d = words[k], words[k + u(1)], words[k + u(2)], words[k + u(3)]
        e, f, g, h = a + b, a + EIGHTFOLD - b, c + d, c + EIGHTFOLD - d
        words[k], words[k + u(1)], words[k + u(2)], words[k + u(3)] = (
            e + g,
            f + h,
            e + SIXTEENFOLD - g,
            f + SIXTEENFOLD - h,
        )


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
