"""What a codec costs: states as they come back against states as they were, measured on every shard's own rows."""

from dataclasses import asdict, dataclass, field

import numpy as np

from genrecal.shards.codecs import Codec, decode
from genrecal.shards.head import FrozenHead

ROWS_PER_SHARD = 512  # measured of each tier; the head's product over every row would cost as much as the encoding
ROWS_PER_SAMPLE = 8
CHUNK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Of decoded states h' against the captured h.

    rows: how many were measured. relative_l2: ||h' - h|| / ||h|| over all of them. cosine: mean over rows. kl_mean,
    kl_p99: KL(softmax(head(h)) || softmax(head(h'))), nats. top1_agreement: share of rows with the same most probable token.
    """

    rows: int
    relative_l2: float
    cosine: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class FidelityMeter:
    """Gathers a shard's rows and measures a codec on them; a few rows of every sample, spread over it."""

    codec: Codec
    _rows: list[np.ndarray] = field(default_factory=list)
    _count: int = 0

    def pick(self, hidden: np.ndarray) -> np.ndarray | None:
        """The rows of one sample's states, float32 `[R, D]`, that `add` may take; None where none are needed."""
        if self.codec.lossless:
            return None
        return hidden[np.linspace(0, len(hidden) - 1, min(ROWS_PER_SAMPLE, len(hidden))).round().astype(int)]

    def add(self, picked: np.ndarray | None) -> None:
        """Take picked rows, sample after sample, until the shard has enough."""
        if picked is not None and self._count < ROWS_PER_SHARD:
            self._rows.append(picked[: ROWS_PER_SHARD - self._count])
            self._count += len(self._rows[-1])

    def measure(self, head: FrozenHead) -> Fidelity:
        """Encode, decode and compare what was gathered. A lossless codec is not measured: nothing can differ."""
        if not self._rows:
            return Fidelity(rows=0, relative_l2=0.0, cosine=1.0, kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0)
        states = np.concatenate(self._rows)
        decoded = decode(self.codec.encode(states), self.codec.facts(states.shape[1]))
        return compare(head, states, decoded.numpy())


def compare(head: FrozenHead, states: np.ndarray, decoded: np.ndarray) -> Fidelity:
    """Fidelity of `decoded` against `states`, both float32 `[R, D]`, through the head a few rows at a time."""
    import torch

    def log_probs(rows: np.ndarray) -> torch.Tensor:
        # A copy is in memory of torch's own, which begins at 64 bytes: elsewhere a product of float32 may round in another
        # way, and a shard's bytes hold these figures.
        return head.logits(torch.from_numpy(rows).clone().to(head.weight.device)).log_softmax(-1)

    divergences, agreements = [], []
    for start in range(0, len(states), CHUNK_ROWS):
        log_p, log_q = (log_probs(side[start : start + CHUNK_ROWS]) for side in (states, decoded))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).cpu().numpy())
        agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu().numpy())
    kl = np.concatenate(divergences)
    a, b = states.astype(np.float64), decoded.astype(np.float64)
    # Summed in numpy's own order: BLAS sums in one that depends on the number of threads.
    squares = {name: np.square(values).sum(1) for name, values in (("a", a), ("b", b), ("difference", a - b))}
    lengths = np.sqrt(squares["a"] * squares["b"])
    cosine = np.divide((a * b).sum(1), lengths, out=np.ones(len(a)), where=lengths > 0)
    return Fidelity(
        rows=len(states),
        relative_l2=float(np.sqrt(squares["difference"].sum() / max(squares["a"].sum(), np.finfo(np.float64).tiny))),
        cosine=float(cosine.mean()),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(np.concatenate(agreements).mean()),
    )
