"""`head.safetensors`: the teacher's frozen head and what follows it.

Kept apart from the model it came from: the trainer loads this file and never the teacher.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrecal.errors import FormatError
from genrecal.shards.strict_json import strict_json

if TYPE_CHECKING:
    import torch

HEAD_FILE = "head.safetensors"
MAX_HEADER_BYTES = 2**20
WIDENED = 2**20  # values of a narrow weight that are float32 at once: 4 MiB


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to its head's output: `logits = softcap * tanh(scale * x / divisor / softcap)`.

    `scale` and `divisor` are kept apart, and a step that does nothing is left out, so that the result is the model's
    own bit for bit. `softcap` None: no cap.
    """

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, x: "torch.Tensor") -> "torch.Tensor":
        """Head outputs `[..., V]` -> logits `[..., V]`, same dtype."""
        if self.divisor != 1.0:
            x = x / self.divisor
        if self.scale != 1.0:
            x = x * self.scale
        if self.softcap is not None:
            x = (x / self.softcap).tanh() * self.softcap
        return x

    def slope(self, logits: "torch.Tensor") -> "torch.Tensor | float":
        """d logits / d head output, from the logits themselves."""
        linear = self.scale / self.divisor
        return linear if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1).mul_(linear)


@dataclass(frozen=True, kw_only=True)
class FrozenHead:
    """The teacher's language-model head.

    Args:
        weight: `[V, D]`, in the teacher's dtype. V counts every row, also those past the tokenizer's vocabulary, since
            the model's own softmax runs over them.
        bias: `[V]` or None.
        transform: what follows the head.
        vocab_size: number of ids the tokenizer knows; at most V.
    """

    weight: "torch.Tensor"
    bias: "torch.Tensor | None" = None
    transform: LogitTransform = dataclasses.field(default_factory=LogitTransform)
    vocab_size: int

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Hidden states `[N, D]` -> float32 logits `[N, V]`, whole vocabulary at once; products accumulate in float32."""
        x = linear_float32(hidden, self.weight)
        if self.bias is not None:
            x = x + self.bias.float()
        return self.transform(x)

    def to(self, device: "torch.device | str") -> "FrozenHead":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def fingerprint(self) -> str:
        """XXH3-128, in hex, of the weight's and bias's bytes and of what follows them: the same head gives the same."""
        import torch
        import xxhash

        facts = dataclasses.asdict(self.transform) | {"vocab_size": self.vocab_size, "dtype": str(self.weight.dtype)}
        digest = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(str(list(tensor.shape)).encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The content of the head's file. The same head gives the same bytes."""
        from safetensors.torch import save

        tensors = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().cpu().contiguous()
        facts: dict[str, Any] = dataclasses.asdict(self.transform) | {"vocab_size": self.vocab_size}
        return save(tensors, metadata={"genrecal": json.dumps(facts, sort_keys=True)})

    def save(self, path: Path) -> None:
        """Write the head to `path`."""
        path.write_bytes(self.to_bytes())  # safetensors' own writing leaves a file of its own where it is killed

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "FrozenHead":
        """Read a head's file. Raises FormatError when it is missing or not ours; sizes are checked before they are read."""
        from safetensors import SafetensorError, safe_open

        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:  # it is parsed whole
                raise ValueError(f"a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
            with safe_open(path, framework="pt", device=device) as opened:
                facts = _checked_facts(opened)
                tensors = {name: opened.get_tensor(name) for name in ("weight", "bias") if name in opened.keys()}
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{path}: expected a head written by genrecal, got {error!r}") from None
        vocab_size = facts.pop("vocab_size")
        return cls(**tensors, transform=LogitTransform(**facts), vocab_size=vocab_size)


def _checked_facts(file: Any) -> dict[str, Any]:
    """The metadata of an open head, checked against its tensors' shapes, none of which is read.

    Raises KeyError, TypeError or ValueError for what no head has.
    """
    facts = strict_json((file.metadata() or {})["genrecal"], MAX_HEADER_BYTES)
    slices = {name: file.get_slice(name) for name in ("weight", "bias") if name in file.keys()}
    shapes, dtypes = {n: s.get_shape() for n, s in slices.items()}, {s.get_dtype() for s in slices.values()}
    rows, width = shapes["weight"]
    if not dtypes <= {"F32", "BF16", "F16"} or shapes.get("bias", [rows]) != [rows] or not rows or not width:
        raise ValueError(f"tensors of {shapes}, {', '.join(sorted(dtypes))}")
    if set(facts) != {"scale", "divisor", "softcap", "vocab_size"}:
        raise ValueError(f"metadata of {sorted(facts)}")
    if type(facts["vocab_size"]) is not int or not 0 <= facts["vocab_size"] <= rows:
        raise ValueError(f"vocab_size {facts['vocab_size']!r} of a head of {rows} rows")
    for name in ("scale", "divisor", *(["softcap"] if facts["softcap"] is not None else [])):
        if type(facts[name]) not in (int, float) or not 0 < facts[name] < 1e30:
            raise ValueError(f"{name} {facts[name]!r}: not a number from 0 to 1e30")
    return dict(facts)


def linear_float32(x: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """`x @ weight.T` in float32: `[N, D]`, `[V, D]` -> `[N, V]`.

    A bf16 result would round a logit of 20 by up to 0.06. On CUDA the inputs stay as narrow as the weight and only the
    sums are float32; elsewhere both are widened first, the weight in blocks that stay in a processor's cache, so that a
    narrow head takes neither more memory nor more time than a wide one.
    """
    import torch

    x = x.to(weight.device)  # of a model split over devices, the head may stand apart from the last layer
    if x.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    x = x.float()
    if weight.dtype == torch.float32 or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return torch.nn.functional.linear(x, weight.float())
    result = x.new_empty(len(x), len(weight))
    size = max(1, WIDENED // weight.shape[1])
    for start in range(0, len(weight), size):
        block = weight[start : start + size].float()
        torch.mm(x, block.t(), out=result[:, start : start + size])
    return result
