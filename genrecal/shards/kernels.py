"""Compiled loops of the int8 and int4 codecs: Hadamard transforms at the speed of memory. Compiled when first used.

`genrecal.shards.rotation.hadamard_reference` is the same in a few readable lines of numpy; a test holds them together.
Indices are unsigned, since numba otherwise looks at each for a negative one, and then nothing is vectorised.

Decoding is written in vectors of 256 bits, as LLVM's own instructions (numba's `intrinsic`): a compiler makes no vectors of
butterflies between neighbours by itself. LLVM makes of them what the processor has: AVX2 and AVX-512 have such registers,
SSE and NEON use two.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

GROUP = 128  # codes that share a step; the seven lowest bits of a channel's number
PAST_CACHE = 2**16  # float32: 256 kB, more than is left of them in a core's own cache when they are used
STRIP, VECTOR = 16, 8  # channels of each group that are taken on together, a cache line of float32; float32 in a vector

# Without reassociation: the same sums in the same order on every machine. Contraction would join no sums here.
compiled = numba.njit(boundscheck=False, nogil=True, cache=True)
f32, u = np.float32, np.uintp
MAGNITUDE, ROUNDING = np.int32(0x7FFF_FFFF), f32(1.5 * 2**23)


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
def largest_of_groups(x: np.ndarray, group: int, largest: np.ndarray) -> None:
    """Of float32 `[R, D]`, each group's value of largest magnitude, the first of equals, into `[R, ceil(D / group)]`.

    Magnitudes are compared as whole numbers, which order them as they are, and which a compiler may take many at a time.
    """
    for row in range(x.shape[0]):
        bits = x[row].view(np.int32)
        for number in range(largest.shape[1]):
            start, end = number * group, min((number + 1) * group, x.shape[1])
            most = np.int32(0)
            for i in range(u(start), u(end)):
                most = max(most, bits[i] & MAGNITUDE)
            at = u(start)
            while bits[at] & MAGNITUDE != most:
                at += u(1)
            largest[row, number] = x[row, at]


@compiled
def quantise(x: np.ndarray, steps: np.ndarray, group: int, low: float, high: float, codes: np.ndarray) -> None:
    """float32 `[R, D]` in their groups' steps, to the nearest whole number, ties to even, from `low` to `high`: int8 codes.

    A group whose step is 0 has codes 0. Adding 1.5 * 2^23 leaves no room for a fraction, so the sum is rounded as
    np.rint rounds.
    """
    for row in range(x.shape[0]):
        for number in range(steps.shape[1]):
            step = steps[row, number]
            for i in range(u(number * group), u(min((number + 1) * group, x.shape[1]))):
                ratio = x[row, i] / step if step != f32(0) else f32(0)
                codes[row, i] = np.int8(min(max((ratio + ROUNDING) - ROUNDING, low), high))


# ------------------------------------------------------------------------------------------- in LLVM's own instructions

# `b` is the builder that takes them down.
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
SHORTS, INTS, FLOATS = ir.VectorType(I16, 16), ir.VectorType(I32, VECTOR), ir.VectorType(F32, VECTOR)


def _lanes(kind: ir.Type, values: Iterable[int]) -> ir.Constant:
    values = list(values)
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _address(context: Any, b: ir.IRBuilder, array_type: Any, array: Any, index: Any, vector: ir.Type) -> Any:
    """Of the vector that begins at an array's value `index`."""
    data = context.make_array(array_type)(context, b, array).data
    return b.bitcast(b.gep(data, [index]), vector.as_pointer())


def _butterflies(values: list[Any], add: Callable[..., Any], subtract: Callable[..., Any]) -> list[Any]:
    """The Hadamard transform of 2^n vectors, lane by lane."""
    height = len(values)
    while height > 1:
        height //= 2
        for i in range(len(values)):
            if not i & height:
                x, y = values[i], values[i + height]
                values[i], values[i + height] = add(x, y), subtract(x, y)
    return values


def _group_sums(b: ir.IRBuilder, vectors: list[Any], to: Any) -> None:
    """The transform of a group's 128 codes, eight vectors of int16, stored from the address `to` on.

    Exact, since no sum is past 2^14: bits 4 to 6 of the channel's number between the vectors, bits 0 to 3 within each.
    """
    undefined = ir.Constant(SHORTS, ir.Undefined)
    for number, x in enumerate(_butterflies(vectors, b.add, b.sub)):
        for bit in (1, 2, 4, 8):
            other = b.shuffle_vector(x, undefined, _lanes(I32, (i ^ bit for i in range(16))))
            x = b.add(other, b.mul(x, _lanes(I16, (-1 if i & bit else 1 for i in range(16)))))
        b.store(x, b.gep(to, [I32(number)]), align=2)


@intrinsic
def _sums_of_bytes(typing: Any, codes: Any, at: Any, sums: Any, to: Any) -> Any:
    """int8 codes from `at` on -> `_group_sums` in `sums`, from `to` on."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        kinds = signature.args
        source = _address(context, b, kinds[0], values[0], values[1], ir.VectorType(I8, 16))
        loaded = [b.load(b.gep(source, [I32(number)]), align=1) for number in range(8)]
        target = _address(context, b, kinds[2], values[2], values[3], SHORTS)
        _group_sums(b, [b.sext(x, SHORTS) for x in loaded], target)
        return context.get_dummy_value()

    return types.void(codes, types.uintp, sums, types.uintp), emit


@intrinsic
def _sums_of_nibbles(typing: Any, packed: Any, at: Any, sums: Any, to: Any) -> Any:
    """The same of int4 codes, two in a byte."""
    order = [place for i in range(8) for place in (i, 8 + i)]  # the low half of each byte, and then its high half

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        kinds, bytes8 = signature.args, ir.VectorType(I8, 8)
        source = _address(context, b, kinds[0], values[0], values[1], bytes8)
        vectors = []
        for number in range(8):
            x = b.load(b.gep(source, [I32(number)]), align=1)
            low, high = b.and_(x, _lanes(I8, [15] * 8)), b.lshr(x, _lanes(I8, [4] * 8))
            codes = b.sub(b.shuffle_vector(low, high, _lanes(I32, order)), _lanes(I8, [8] * 16))
            vectors.append(b.sext(codes, SHORTS))
        _group_sums(b, vectors, _address(context, b, kinds[2], values[2], values[3], SHORTS))
        return context.get_dummy_value()

    return types.void(packed, types.uintp, sums, types.uintp), emit


def _for_each_radix(b: ir.IRBuilder, radix: Any, emit: Callable[[int], None]) -> None:
    """The code for 1, 2, 4 or 8 vectors, whichever `radix` is at run time."""
    after = b.append_basic_block("joined")
    choice = b.switch(radix, after)
    for count in (1, 2, 4, 8):
        block = b.append_basic_block(f"join{count}")
        choice.add_case(radix.type(count), block)
        with b.goto_block(block):
            emit(count)
            b.branch(after)
    b.position_at_end(after)


@intrinsic
def _join_sums(
    typing: Any, radix: Any, apart: Any, sums: Any, column: Any, steps: Any, group: Any, room: Any, lane: Any
) -> Any:
    """Groups `group`, `group + apart`, ..., `radix` of them: their sums, from `column` on, times their steps, joined.

    From `lane` of each group's strip in `room` on.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        radix, apart, sums, column, steps, group, room, lane = values
        kinds = signature.args

        def join(count: int) -> None:
            groups = [b.add(group, b.mul(apart, apart.type(i))) for i in range(count)]
            scaled = []
            for number in groups:
                place = b.add(b.mul(number, number.type(GROUP)), column)
                x = b.load(_address(context, b, kinds[2], sums, place, ir.VectorType(I16, VECTOR)), align=2)
                step = b.load(_address(context, b, kinds[4], steps, number, F32), align=4)
                step = b.insert_element(ir.Constant(FLOATS, ir.Undefined), step, I32(0))
                step = b.shuffle_vector(step, step, _lanes(I32, [0] * VECTOR))
                scaled.append(b.fmul(b.sitofp(b.sext(x, INTS), FLOATS), step))
            for number, x in zip(groups, _butterflies(scaled, b.fadd, b.fsub), strict=True):
                place = b.add(b.mul(number, number.type(STRIP)), lane)
                b.store(x, _address(context, b, kinds[6], room, place, FLOATS), align=4)

        _for_each_radix(b, radix, join)
        return context.get_dummy_value()

    n = types.uintp
    return types.void(n, n, sums, n, steps, n, room, n), emit


@intrinsic
def _write(typing: Any, radix: Any, done: Any, vector: Any, states: Any, to: Any, past: Any) -> Any:
    """Vectors `vector`, `vector + 1`, ..., `radix` of them, of a strip of every group, to the states, the strip's from `to` on.

    Past the cache if `past`: nothing is read for them then, and their place is a multiple of a vector's size.
    """
    in_strip = STRIP // VECTOR

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        radix, done, vector, states, to, past = values
        kinds = signature.args
        n = vector.type
        group, lane = b.udiv(vector, n(in_strip)), b.mul(b.urem(vector, n(in_strip)), n(VECTOR))
        to = b.add(to, b.add(b.mul(group, n(GROUP)), lane))

        def write(count: int, past_cache: bool) -> None:
            for i in range(count):
                at = b.mul(b.add(vector, n(i)), n(VECTOR))
                x = b.load(_address(context, b, kinds[1], done, at, FLOATS), align=4)
                place = b.add(to, n(i // in_strip * GROUP + i % in_strip * VECTOR))
                store = b.store(x, _address(context, b, kinds[3], states, place, FLOATS), align=4)
                if past_cache:
                    store.align = 4 * VECTOR
                    store.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

        with b.if_else(past) as (yes, no):
            with yes:
                _for_each_radix(b, radix, lambda count: write(count, True))
            with no:
                _for_each_radix(b, radix, lambda count: write(count, False))
        return context.get_dummy_value()

    n = types.uintp
    return types.void(n, done, n, states, n, types.boolean), emit


@intrinsic
def _fence(typing: Any) -> Any:
    """What was stored past the cache is there for every thread."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _join_last(typing: Any, radix: Any, group: Any, room: Any, lane: Any, signs: Any, at: Any, done: Any) -> Any:
    """Groups `group`, `group + 1`, ..., `radix` of them: joined, with their signs, to `done`.

    From `lane` of each group's strip on, in `room`, in `done` and, `at` further, in `signs`.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        radix, group, room, lane, signs, at, done = values
        kinds = signature.args

        def join(count: int) -> None:
            groups = [b.add(group, group.type(i)) for i in range(count)]
            places = [b.add(b.mul(number, number.type(STRIP)), lane) for number in groups]
            loaded = [b.load(_address(context, b, kinds[2], room, place, FLOATS), align=4) for place in places]
            joined = _butterflies(loaded, b.fadd, b.fsub)
            for place, x in zip(places, joined, strict=True):
                sign = b.load(
                    _address(context, b, kinds[4], signs, b.add(at, place), ir.VectorType(I8, VECTOR)), align=1
                )
                sign = b.and_(b.sext(sign, INTS), _lanes(I32, [-(2**31)] * VECTOR))
                x = b.bitcast(b.xor(b.bitcast(x, INTS), sign), FLOATS)
                b.store(x, _address(context, b, kinds[6], done, place, FLOATS), align=4)

        _for_each_radix(b, radix, join)
        return context.get_dummy_value()

    n = types.uintp
    return types.void(n, n, room, n, signs, n, done), emit


# --------------------------------------------------------------------------------------------------------------- decoding


def strips(values: np.ndarray, block: int) -> np.ndarray:
    """`[D]` in the order in which decoding comes to them: of each block strip by strip, of each strip group by group."""
    return np.ascontiguousarray(values.reshape(-1, block // GROUP, GROUP // STRIP, STRIP).swapaxes(1, 2)).reshape(-1)


@compiled
def decode8(codes: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, out: np.ndarray) -> None:
    """int8 codes `[R, D]` times their groups' steps, float32 `[R, D / 128]`, rotated back, into float32 `out` `[R, D]`.

    Args:
        signs: int8 `[D]`, those of the rotation, as `strips` orders them.
        block: of the rotation, at least 128.
    """
    sums, scaled, room, done = _rooms(block)
    states, width, past, before = out.reshape(-1), out.shape[1], _past_cache(out), u(0)
    for row in range(codes.shape[0]):
        for start in range(0, width, block):
            for at in range(0, block, GROUP):
                _sums_of_bytes(codes[row], u(start + at), sums, u(at))
            _scale(steps[row], start, scaled)
            before = _between_groups(sums, scaled, room, signs, u(start), done, before, states, u(row * width), past)
    if len(states):
        for vector in range(u(0), u(STRIP // VECTOR * len(scaled))):
            _write(u(1), done, vector, states, before, past)
    _fence()


@compiled
def decode4(packed: np.ndarray, steps: np.ndarray, signs: np.ndarray, block: int, out: np.ndarray) -> None:
    """`decode8` for int4 codes, two in a byte: uint8 `[R, D / 2]`, the lower channel in the low bits, 8 more than they are."""
    sums, scaled, room, done = _rooms(block)
    states, width, past, before = out.reshape(-1), out.shape[1], _past_cache(out), u(0)
    for row in range(packed.shape[0]):
        for start in range(0, width, block):
            for at in range(0, block, GROUP):
                _sums_of_nibbles(packed[row], u((start + at) // 2), sums, u(at))
            _scale(steps[row], start, scaled)
            before = _between_groups(sums, scaled, room, signs, u(start), done, before, states, u(row * width), past)
    if len(states):
        for vector in range(u(0), u(STRIP // VECTOR * len(scaled))):
            _write(u(1), done, vector, states, before, past)
    _fence()


@compiled
def _rooms(block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For a block's sums, its groups' steps, a strip of every group, and such a strip when it is done."""
    groups = block // GROUP
    room, done = np.empty(groups * STRIP, np.float32), np.zeros(groups * STRIP, np.float32)
    return np.empty(block, np.int16), np.empty(groups, np.float32), room, done


@compiled
def _past_cache(out: np.ndarray) -> bool:
    """Whether states are so many that they leave the cache before they are used: then they need not be in it."""
    return out.size >= PAST_CACHE and out.ctypes.data % (4 * VECTOR) == 0


@compiled
def _scale(steps: np.ndarray, start: int, scaled: np.ndarray) -> None:
    """A block's steps, with the transform's factor."""
    norm = f32(1 / np.sqrt(len(scaled) * GROUP))
    for group in range(len(scaled)):
        scaled[group] = steps[start // GROUP + group] * norm


@compiled
def _between_groups(
    sums: np.ndarray,
    steps: np.ndarray,
    room: np.ndarray,
    signs: np.ndarray,
    start: int,
    done: np.ndarray,
    before: int,
    states: np.ndarray,
    row: int,
    past: bool,
) -> int:
    """One block, from each group's sums on: the steps, the bits between groups from the highest down, and the signs.

    A strip of every group at a time, whose values stay in the nearest cache. A strip that is done waits in `done`, and
    goes to the states while the next one is worked out: written at once, it would wait for the memory, and the memory for
    the next one. So this begins with the block before's last strip, for the place `before`, and gives back its own last's.
    """
    groups = u(len(steps))
    # How many groups the first and the last pass join: at most 8, as many as there are registers for.
    first = last = u(1)
    while first * last < groups and last < u(8):
        if first == last:
            first *= u(2)
        else:
            last *= u(2)
    apart = groups // first
    for column in range(u(0), u(GROUP), u(STRIP)):
        written = u(0)
        for group in range(apart):
            for lane in range(u(0), u(STRIP), u(VECTOR)):
                _join_sums(first, apart, sums, column + lane, steps, group, room, lane)
            _write(first, done, written, states, before, past)
            written += first
        height = apart
        while height > last:
            height //= u(2)
            for group in range(groups):
                if not group & height:
                    for lane in range(u(STRIP)):
                        low, high = group * u(STRIP) + lane, (group + height) * u(STRIP) + lane
                        room[low], room[high] = room[low] + room[high], room[low] - room[high]
        for group in range(u(0), groups, last):
            _write(last, done, written, states, before, past)  # always ahead of what `done` gets here
            written += last
            for lane in range(u(0), u(STRIP), u(VECTOR)):
                _join_last(last, group, room, lane, signs, start + column * groups, done)
        before = row + start + column
    return before
