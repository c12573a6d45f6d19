"""The settings that objectives read."""

from dataclasses import dataclass
from typing import Protocol

from genrecal.errors import UsageError

TARGETS = ("topk", "exact", "sample")


@dataclass(frozen=True, kw_only=True)
class RecalibratorConfig:
    """The Recalibrator: `layers` decoder blocks; 0 for none, projections alone."""

    layers: int = 2


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms, and what the KL is taken from.

    Args:
        ce_weight, kl_weight: of the Recalibrator's cross-entropy and KL, in every pass; with an objective that compares the
            student itself with the teacher, of its own cross-entropy and of what it is compared by.
        splice_weight: of the passes that are given the teacher's answer states, the regularisation's included; 0 leaves
            them out (objective genrecal-aligned).
        reg_weight: of the regularisation pass (stage 1).
        aligned_weight: of the pass over the student's states alone (objective genrecal-aligned).
        sft_weight: of the student's own cross-entropy (stage 2).
        first_token_weight: of the first token of each answer, in every term of every stage; the others' is 1.
        target: "topk", the stored logits and one bucket for the rest; "exact", recomputed from the cached state;
            "sample", the stored draws, whose KL is unbiased (a cache made with `--targets sample:K`).
        skew: of objective skewed-kl: the teacher's share in the mixture that it is compared with.
        chunk_rows: rows of logits that exist at once; 0 for as many as take 256 MiB.
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    splice_weight: float = 1.0
    reg_weight: float = 1.0
    aligned_weight: float = 1.0
    sft_weight: float = 1.0
    first_token_weight: float = 1.0
    target: str = "topk"
    skew: float = 0.1
    chunk_rows: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"loss.target {self.target!r}: expected topk, exact or sample")
        if not 0 < self.skew < 1:
            raise UsageError(f"loss.skew {self.skew}: expected a share between 0 and 1")


class Settings(Protocol):
    """What an objective is given of a run's settings; a `TrainConfig` is one."""

    @property
    def loss(self) -> LossConfig: ...

    @property
    def recalibrator(self) -> RecalibratorConfig: ...

    @property
    def attention(self) -> str: ...
