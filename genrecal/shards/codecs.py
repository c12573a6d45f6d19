"""Hidden states <-> columns: `bf16` (lossless), `int8` and `int4`. The page docs/shard-format.md has the layouts.

States stay coded until they are on the device: a record holds `Coded` columns as the file has them, a batch `CodedStates`,
and `decode` is the only decoder, for CPU and GPU.

Letters: R rows, D hidden size, G groups of channels that share a scale.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genrecal.errors import FormatError, SampleError, UsageError

if TYPE_CHECKING:
    import torch

GROUP = 128  # channels that share a scale
SEED = 0  # of the rotation's signs
FACTOR = 32  # rows of the largest Hadamard matrix that is multiplied with
ENCODED_ROWS = 64  # at once, in float64
MAX_WIDTH = 2**20  # channels of a state
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How hidden states are written.

    Args:
        name: as cache.json and the Arrow metadata call it.
        compression: of the Arrow file's buffers, or None. An entropy coder takes at most 5 % off 8-bit codes.
        lossless: whether bfloat16 states come back bit for bit.
    """

    name: str
    compression: str | None
    lossless: bool = False

    def facts(self, width: int) -> dict[str, Any]:
        """What the decoder needs besides the columns, for states of D = `width`; in the Arrow schema's metadata."""
        facts = {"codec": self.name, "hidden_size": width}
        return facts if self.lossless else facts | {"block": block_size(width), "group": GROUP, "seed": SEED}

    def columns(self, width: int) -> dict[str, tuple[str, int]]:
        """Each column's dtype and its values per row."""
        if self.lossless:
            return {"hidden_hi": ("uint8", width), "hidden_lo": ("uint8", width)}
        codes = ("int8", width) if self.name == "int8" else ("uint8", -(-width // 2))
        return {"hidden_q": codes, "hidden_scale": ("float16", -(-width // GROUP))}

    def encode(self, states: np.ndarray, facts: Facts | None = None) -> dict[str, np.ndarray]:
        """float32 `[R, D]` -> columns `[R, ...]`. The same states give the same bytes on every machine.

        Raises SampleError for states that the codec cannot hold.
        """
        facts = facts or self.facts(states.shape[1])
        if not self.lossless:
            return _quantise(states, self.name, facts)
        bits = np.ascontiguousarray(states, np.float32).view(np.uint32)
        assert not (bits & np.uint32(0xFFFF)).any(), "bf16 states must be rounded when they are captured"
        # Two planes: the exponents compress well once they stand apart from the mantissas.
        return {"hidden_hi": (bits >> 24).astype(np.uint8), "hidden_lo": (bits >> 16).astype(np.uint8)}


CODECS = {
    codec.name: codec
    for codec in (
        Codec(name="bf16", compression="zstd", lossless=True),
        Codec(name="int8", compression=None),
        Codec(name="int4", compression="zstd"),
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
    width = facts.get("hidden_size") if isinstance(facts, dict) else None
    if type(width) is not int or not 1 <= width <= MAX_WIDTH:
        raise FormatError(f"{where}: the Arrow metadata does not give codec and hidden size, got {facts!r}")
    for name, value in codec_named(str(facts.get("codec")), where=where).facts(width).items():
        got = facts.get(name)
        right = isinstance(got, int) and 0 <= got < 2**63 if name == "seed" else got == value
        if not right:
            raise FormatError(f"{where}: Arrow metadata {name}: expected {value!r}, got {got!r}")
    return facts  # type: ignore[no-any-return]


def compression_of(name: str) -> str | None:
    """Of the buffers of Arrow files with states in that codec, or "none" for files without states."""
    return "zstd" if name == "none" else codec_named(name).compression


def check_codec_option(option: str, name: str) -> None:
    """Raises UsageError for a codec that cannot be written."""
    if name not in CODECS:
        raise UsageError(f"{option} {name!r}: expected one of {', '.join(CODECS)}")


def round_to_bf16(hidden: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16 (ties to even), returned as float32. NaN and Inf stay NaN and Inf."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(hidden, np.float32)).bfloat16().float().numpy()


# ------------------------------------------------------------------------------------------------------- coded states


@dataclass(frozen=True, kw_only=True)
class Coded:
    """States `[R, D]` as they are stored: the codec's facts, and its columns `[R, ...]`, arrays or tensors."""

    facts: Facts
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> "Coded":
        return Coded(facts=self.facts, columns={name: column[rows] for name, column in self.columns.items()})

    @classmethod
    def plain(cls, states: "np.ndarray | torch.Tensor") -> "Coded":
        """States that were never coded, float32 `[R, D]`."""
        return cls(facts={"codec": "none", "hidden_size": states.shape[1]}, columns={"hidden": states})


@dataclass(frozen=True, kw_only=True)
class CodedStates:
    """Coded states of several records, in order, as tensors; neighbours of the same codec are one part."""

    parts: tuple[Coded, ...]

    @classmethod
    def joined(cls, states: Sequence[Coded]) -> "CodedStates":
        """The rows of all, one after another."""
        import torch

        parts = []
        for _, same in itertools.groupby(states, key=lambda coded: coded.facts):
            group = list(same)
            columns = {
                name: torch.from_numpy(np.concatenate([coded.columns[name] for coded in group]))
                for name in group[0].columns
            }
            parts.append(Coded(facts=group[0].facts, columns=columns))
        return cls(parts=tuple(parts))

    def roll(self, shifts: int, dims: int) -> "CodedStates":
        """As `torch.Tensor.roll`: the guards against misaligned rows spoil a batch with it."""
        return CodedStates(parts=(Coded.plain(self.decode().roll(shifts, dims)),))

    def decode(self) -> "torch.Tensor":
        """float32 `[R, D]`, on the device where the columns are."""
        import torch

        return torch.cat([decode(part.columns, part.facts) for part in self.parts])


def decode(columns: Mapping[str, Any], facts: Facts) -> "torch.Tensor":
    """Columns `[R, ...]`, tensors or arrays, of a codec with these facts -> float32 states `[R, D]` on the same device."""
    import torch

    tensors = {
        name: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        for name, value in columns.items()
    }
    if facts["codec"] == "none":
        return tensors["hidden"]
    if facts["codec"] == "bf16":
        pairs = torch.stack([tensors["hidden_lo"], tensors["hidden_hi"]], -1)  # little-endian
        return pairs.view(torch.bfloat16)[..., 0].float()
    codes, width = tensors["hidden_q"], facts["hidden_size"]
    if facts["codec"] == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :width].to(torch.int8) - 8
    with torch.autocast(codes.device.type, enabled=False):
        scales = tensors["hidden_scale"].float().repeat_interleave(facts["group"], 1)[:, :width]
        values = hadamard(codes.float() * scales, facts["block"])
        return values * sign_tensor(width, facts["seed"], values.dtype, values.device)


# ------------------------------------------------------------------------------------------------- the rotated codecs


def _quantise(states: np.ndarray, name: str, facts: Facts) -> dict[str, np.ndarray]:
    """Rotate, then round each group to steps of its own. In float64, whose rounding cannot reach a code.

    int8: a group's largest magnitude is 127 steps. int4: a group's value of largest magnitude is exactly -8 steps, the step
    taking its sign, so that none of the 16 levels is wasted (relative error 0.103 on Gaussian values, 0.117 with 7 steps
    either way).
    """
    import torch

    width, group = states.shape[1], facts["group"]
    low, high = (-127, 127) if name == "int8" else (-8, 7)
    all_codes, all_scales = [], []
    for part in torch.from_numpy(np.ascontiguousarray(states, np.float32)).split(ENCODED_ROWS):
        x = part.double() * sign_tensor(width, facts["seed"], torch.float64, part.device)
        x = hadamard(x, facts["block"])
        x = torch.nn.functional.pad(x, (0, -width % group)).unflatten(1, (-1, group))
        top, bottom = x.amax(-1), x.amin(-1)
        largest = torch.where(top >= -bottom, top, bottom)
        scales = _scales(largest.abs() / 127 if name == "int8" else largest / -8, name)
        steps = scales.double()[..., None]
        codes = torch.where(steps == 0, 0, x / steps).round().clamp(low, high)  # to the nearest step, ties to even
        all_codes.append(codes.to(torch.int8).flatten(1)[:, :width])
        all_scales.append(scales)
    codes, scales = torch.cat(all_codes), torch.cat(all_scales)
    if name == "int4":
        codes = torch.nn.functional.pad(codes, (0, width % 2)) + 8
        codes = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.uint8)
    return {"hidden_q": codes.contiguous().numpy(), "hidden_scale": scales.numpy()}


def _scales(wanted: "torch.Tensor", name: str) -> "torch.Tensor":
    """Wanted steps as float16; subnormal ones are rounded up, so that a group's largest value still has a code.

    Raises SampleError for steps too large for float16.
    """
    import torch

    unit = 2.0**-24  # float16's smallest subnormal
    raised = torch.copysign((wanted.abs() / unit).ceil() * unit, wanted)
    scales = torch.where(wanted.abs() < torch.finfo(torch.float16).tiny, raised, wanted).half()
    if not scales.isfinite().all():
        raise SampleError(
            f"a hidden state reaches {float(wanted.abs().max()):.3g} per step, more than {name}'s float16 scale holds"
        )
    return scales


# ------------------------------------------------------------------------------------------------------- the rotation
#
# A few channels of large models' states are hundreds of times the rest. Quantised as they stand, those channels take the
# whole range. A rotation spreads every channel over its block, after which values look Gaussian and a few bits go far.
# Signs are seeded, so that no fixed direction of a model can lie along the rotation's own.


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
    return np.where(bits, -1, 1).astype(np.float32)


@functools.lru_cache(maxsize=16)
def sign_tensor(width: int, seed: int, dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """`signs` on a device."""
    import torch

    return torch.from_numpy(signs(width, seed)).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _matrix(size: int, dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """The Hadamard matrix of `size` rows, a power of two, by Sylvester's construction."""
    import torch

    pair = torch.tensor([[1, 1], [1, -1]], dtype=dtype, device=device)
    ones = torch.ones(1, 1, dtype=dtype, device=device)
    return functools.reduce(torch.kron, [pair] * (size.bit_length() - 1), ones)


def hadamard(x: "torch.Tensor", block: int) -> "torch.Tensor":
    """H_block / sqrt(block) over each block of the channels of `[R, D]`; its own inverse.

    H_ab is the Kronecker product of H_a and H_b, so this is one product with a small matrix per factor of the block.
    """
    shape, inner = x.shape, block
    while inner > 1:
        size = min(FACTOR, inner)
        inner //= size
        matrix = _matrix(size, x.dtype, x.device)
        x = matrix @ x.reshape(-1, size, inner) if inner > 1 else x.reshape(-1, size) @ matrix
    return x.reshape(shape) * block**-0.5
