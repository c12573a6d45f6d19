"""Hidden states <-> columns: `bf16` (lossless), `int8` and `int4`. The page docs/shard-format.md has the layouts.

A codec turns `[R, D]` float32 states into named columns and back. What its decoder needs besides the columns goes into the
Arrow schema's metadata, as the codec's facts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from genrecal.errors import FormatError, SampleError, UsageError
from genrecal.shards.rotation import block_size, rotate, rotate_back, signs

GROUP = 128  # channels that share a scale
SEED = 0  # of the rotation's signs
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How hidden states are written.

    Args:
        name: as cache.json and the Arrow metadata call it.
        columns: the columns that hold a state, in order.
        compression: of the Arrow files' buffers, or None. 8-bit codes have nothing that a dictionary finds; an entropy coder
            takes at most 5 % off and then needs more time than all other decoding (docs/decisions.md).
        lossless: whether bfloat16 states come back bit for bit.
        facts: D -> what the decoder needs.
        encode: float32 `[R, D]`, facts -> columns. Raises SampleError for states that it cannot hold.
        decode: columns, facts -> float32 `[R, D]`. Raises FormatError for columns of another shape.
    """

    name: str
    columns: tuple[str, ...]
    compression: str | None
    lossless: bool
    facts: Callable[[int], dict[str, Any]]
    encode: Callable[[np.ndarray, Facts], dict[str, np.ndarray]]
    decode: Callable[..., np.ndarray]


def round_to_bf16(hidden: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16 (ties to even), returned as float32. NaN and Inf stay what they are."""
    bits = np.ascontiguousarray(hidden, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(hidden), rounded.view(np.float32), hidden)


def _expect(column: np.ndarray, width: int, name: str) -> None:
    if column.ndim != 2 or column.shape[1] != width:
        raise FormatError(f"column {name}: expected [rows, {width}], got {list(column.shape)}")


# ------------------------------------------------------------------------------------------------------------------- bf16


def _bf16_facts(width: int) -> dict[str, Any]:
    return {"codec": "bf16", "hidden_size": width}


def _encode_bf16(hidden: np.ndarray, facts: Facts) -> dict[str, np.ndarray]:
    """Two byte planes: the exponents compress well once they stand apart from the mantissas."""
    bits = np.ascontiguousarray(hidden, np.float32).view(np.uint32)
    assert not (bits & np.uint32(0xFFFF)).any(), "bf16 states must be rounded when they are captured"
    return {"hidden_hi": (bits >> 24).astype(np.uint8), "hidden_lo": (bits >> 16).astype(np.uint8)}


def _decode_bf16(columns: Mapping[str, np.ndarray], facts: Facts) -> np.ndarray:
    high, low = columns["hidden_hi"], columns["hidden_lo"]
    _expect(high, facts["hidden_size"], "hidden_hi")
    _expect(low, facts["hidden_size"], "hidden_lo")
    from genrecal.shards import kernels

    states = np.empty(high.shape, np.float32)
    kernels.join_planes(_flat(high), _flat(low), states.reshape(-1).view(np.uint32))
    return states


def _flat(column: np.ndarray) -> np.ndarray:
    """A column's values in one row, not to be written to, as Arrow gives them: numba compiles a loop for each kind of array."""
    flat = np.ascontiguousarray(column).reshape(-1)
    flat.flags.writeable = False
    return flat


# ----------------------------------------------------------------------------------------------------------- int8 and int4


def _rotated_facts(name: str, width: int) -> dict[str, Any]:
    return {"codec": name, "hidden_size": width, "block": block_size(width), "group": GROUP, "seed": SEED}


def _scales(wanted: np.ndarray, codec: str) -> np.ndarray:
    """Wanted steps as float16; subnormal ones are rounded up, so that a group's largest value still has a code.

    Raises SampleError for steps too large for float16.
    """
    unit, normal = float(np.finfo(np.float16).smallest_subnormal), float(np.finfo(np.float16).tiny)
    raised = np.copysign(np.ceil(np.abs(wanted) / unit) * unit, wanted)
    with np.errstate(over="ignore"):
        scales = np.where(np.abs(wanted) < normal, raised, wanted).astype(np.float16)
    if not np.isfinite(scales).all():
        raise SampleError(
            f"a hidden state reaches {np.abs(wanted).max():.3g} a step, more than {codec}'s float16 scale holds"
        )
    return scales


def _largest(rotated: np.ndarray, group: int) -> np.ndarray:
    """`[R, D]` -> `[R, G]`: each group's value of largest magnitude, the first of equals."""
    from genrecal.shards import kernels

    largest = np.empty((len(rotated), -(-rotated.shape[1] // group)), np.float32)
    kernels.largest_of_groups(rotated, group, largest)
    return largest


def _quantised(rotated: np.ndarray, scales: np.ndarray, group: int, low: int, high: int) -> np.ndarray:
    """int8 `[R, D]`: to the nearest step, ties to even, from `low` to `high`; 0 where the step is."""
    from genrecal.shards import kernels

    codes = np.empty(rotated.shape, np.int8)
    kernels.quantise(rotated, scales.astype(np.float32), group, np.float32(low), np.float32(high), codes)
    return codes


def _encode_int8(hidden: np.ndarray, facts: Facts) -> dict[str, np.ndarray]:
    """Rotated, then a group's largest magnitude is 127 steps."""
    rotated = rotate(hidden, block=facts["block"], seed=facts["seed"])
    scales = _scales(np.abs(_largest(rotated, facts["group"])) / 127, "int8")
    return {"hidden_q": _quantised(rotated, scales, facts["group"], -127, 127), "hidden_scale": scales}


def _decode_int8(columns: Mapping[str, np.ndarray], facts: Facts) -> np.ndarray:
    codes, scales = columns["hidden_q"], columns["hidden_scale"]
    _expect(codes, facts["hidden_size"], "hidden_q")
    if facts["block"] < facts["group"]:
        return _rescaled(codes, scales, facts)
    from genrecal.shards import kernels

    return _compiled(kernels.decode8, codes, scales, facts)


def _encode_int4(hidden: np.ndarray, facts: Facts) -> dict[str, np.ndarray]:
    """Rotated, then a group's value of largest magnitude is exactly -8 steps, the step taking its sign.

    16 levels have one more below zero than above; so none is wasted (relative error 0.103 on Gaussian values, against
    0.117 with 7 steps either way).
    """
    rotated = rotate(hidden, block=facts["block"], seed=facts["seed"])
    scales = _scales(_largest(rotated, facts["group"]) / -8, "int4")
    codes = _quantised(rotated, scales, facts["group"], -8, 7).view(np.uint8) + np.uint8(8)
    if codes.shape[1] % 2:
        codes = np.concatenate([codes, np.full((len(codes), 1), 8, np.uint8)], axis=1)
    return {"hidden_q": codes[:, 0::2] | (codes[:, 1::2] << 4), "hidden_scale": scales}


def _decode_int4(columns: Mapping[str, np.ndarray], facts: Facts) -> np.ndarray:
    packed, scales = columns["hidden_q"], columns["hidden_scale"]
    width = facts["hidden_size"]
    _expect(packed, -(-width // 2), "hidden_q")
    if facts["block"] >= facts["group"]:
        from genrecal.shards import kernels

        return _compiled(kernels.decode4, packed, scales, facts)
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.int8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return _rescaled(codes[:, :width] - np.int8(8), scales, facts)


def _compiled(kernel: Callable[..., None], codes: np.ndarray, scales: np.ndarray, facts: Facts) -> np.ndarray:
    """What `_rescaled` gives, by a compiled loop for blocks of whole groups."""
    width, group, block = facts["hidden_size"], facts["group"], facts["block"]
    _expect(scales, width // group, "hidden_scale")
    states = np.empty((len(codes), width), np.float32)
    kernel(
        _flat(codes).reshape(codes.shape),
        scales.astype(np.float32),
        _sign_strips(width, facts["seed"], block),
        block,
        states,
    )
    return states


@lru_cache(maxsize=16)
def _sign_strips(width: int, seed: int, block: int) -> np.ndarray:
    from genrecal.shards import kernels

    return kernels.strips(signs(width, seed).astype(np.int8), block)


def _rescaled(codes: np.ndarray, scales: np.ndarray, facts: Facts) -> np.ndarray:
    width, group = facts["hidden_size"], facts["group"]
    _expect(scales, -(-width // group), "hidden_scale")
    values = codes.astype(np.float32)
    values *= np.repeat(scales.astype(np.float32), group, axis=1)[:, :width]
    states = np.empty((len(codes), width), np.float32)
    states[:] = rotate_back(values, block=facts["block"], seed=facts["seed"])
    return states


CODECS = {
    codec.name: codec
    for codec in (
        Codec(
            name="bf16",
            columns=("hidden_hi", "hidden_lo"),
            compression="zstd",
            lossless=True,
            facts=_bf16_facts,
            encode=_encode_bf16,
            decode=_decode_bf16,
        ),
        Codec(
            name="int8",
            columns=("hidden_q", "hidden_scale"),
            compression=None,
            lossless=False,
            facts=lambda width: _rotated_facts("int8", width),
            encode=_encode_int8,
            decode=_decode_int8,
        ),
        Codec(
            name="int4",
            columns=("hidden_q", "hidden_scale"),
            compression="zstd",
            lossless=False,
            facts=lambda width: _rotated_facts("int4", width),
            encode=_encode_int4,
            decode=_decode_int4,
        ),
    )
}


def codec_named(name: str, *, where: str = "") -> Codec:
    """The codec of that name. Raises FormatError (reading) for one that this version does not know."""
    if name not in CODECS:
        raise FormatError(
            f"{where or 'cache'}: codec {name!r} is not one this genrecal knows ({', '.join(CODECS)}); use a newer one"
        )
    return CODECS[name]


def checked_facts(facts: Any, *, where: str) -> dict[str, Any]:
    """Facts as an Arrow file's metadata gives them. Raises FormatError unless its codec would have written just these."""
    if not isinstance(facts, dict) or type(facts.get("hidden_size")) is not int or facts["hidden_size"] < 1:
        raise FormatError(f"{where}: the Arrow metadata does not say codec and hidden size, got {facts!r}")
    for name, value in codec_named(str(facts.get("codec")), where=where).facts(facts["hidden_size"]).items():
        got = facts.get(name)
        right = isinstance(got, int) and 0 <= got < 2**63 if name == "seed" else got == value
        if not right:
            raise FormatError(f"{where}: Arrow metadata {name}: expected {value!r}, got {got!r}")
    return facts


def check_codec_option(option: str, name: str) -> None:
    """Raises UsageError for a codec that cannot be written."""
    if name not in CODECS:
        raise UsageError(f"{option} {name!r}: expected one of {', '.join(CODECS)}")
