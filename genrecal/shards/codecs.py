"""Hidden states <-> columns of bytes. Format version 1 knows `bf16`; the page docs/shard-format.md has the layouts.

A codec turns `[R, D]` float32 states into named uint8 columns and back. What its decoder needs besides the columns goes
into the Arrow schema's metadata.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from genrecal.errors import FormatError, UsageError


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How hidden states are written.

    Args:
        name: as cache.json and the Arrow metadata call it.
        columns: the columns that hold a state, in order.
        encode: float32 `[R, D]` -> columns.
        decode: columns, D -> float32 `[R, D]`.
    """

    name: str
    columns: tuple[str, ...]
    encode: Callable[[np.ndarray], dict[str, np.ndarray]]
    decode: Callable[[Mapping[str, np.ndarray], int], np.ndarray]


def round_to_bf16(hidden: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16 (ties to even), returned as float32. NaN and Inf stay what they are."""
    bits = np.ascontiguousarray(hidden, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(hidden), rounded.view(np.float32), hidden)


def _encode_bf16(hidden: np.ndarray) -> dict[str, np.ndarray]:
    """Two byte planes: the exponents compress well once they stand apart from the mantissas."""
    bits = np.ascontiguousarray(hidden, np.float32).view(np.uint32)
    assert not (bits & np.uint32(0xFFFF)).any(), "bf16 states must be rounded when they are captured"
    return {"hidden_hi": (bits >> 24).astype(np.uint8), "hidden_lo": (bits >> 16).astype(np.uint8)}


def _decode_bf16(columns: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    high, low = columns["hidden_hi"], columns["hidden_lo"]
    _expect_width(high, width, "hidden_hi")
    _expect_width(low, width, "hidden_lo")
    bits = np.empty(high.shape, np.uint32)
    np.left_shift(high, np.uint32(24), out=bits, dtype=np.uint32)
    bits |= low.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


def _expect_width(column: np.ndarray, width: int, name: str) -> None:
    if column.ndim != 2 or column.shape[1] != width:
        raise FormatError(f"column {name}: expected [rows, {width}], got {list(column.shape)}")


CODECS = {
    codec.name: codec
    for codec in (Codec(name="bf16", columns=("hidden_hi", "hidden_lo"), encode=_encode_bf16, decode=_decode_bf16),)
}


def codec_named(name: str, *, where: str = "") -> Codec:
    """The codec of that name. Raises FormatError (reading) for one that this version does not know."""
    if name not in CODECS:
        raise FormatError(
            f"{where or 'cache'}: codec {name!r} is not one this genrecal knows ({', '.join(CODECS)}); use a newer one"
        )
    return CODECS[name]


def check_codec_option(option: str, name: str) -> None:
    """Raises UsageError for a codec that cannot be written."""
    if name not in CODECS:
        raise UsageError(f"{option} {name!r}: expected one of {', '.join(CODECS)}")
