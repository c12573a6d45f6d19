"""Whose answers a cache holds: those of the data, or ones that the teacher wrote itself, and how."""

import math
from dataclasses import dataclass
from typing import Any

from genrecal.errors import UsageError

GIVEN, GREEDY, SAMPLED = "given", "greedy", "sampled"
KEYS = {
    GIVEN: (),
    GREEDY: ("max_tokens",),
    SAMPLED: ("max_tokens", "temperature", "top_p", "seed"),
}  # of cache.json, by kind


@dataclass(frozen=True, kw_only=True)
class AnswerSource:
    """Whose answers a cache holds. Only what its kind has is compared and written.

    Args:
        kind: `given` (the data's own), `greedy` (the teacher's most probable token, each time) or `sampled` (from the
            teacher's distribution).
        max_tokens: greedy, sampled: most tokens of an answer, its end included; a longer one is not cached.
        temperature, top_p: sampled: logits are divided by the first; of the most probable tokens, the fewest that hold the
            second of the mass are drawn from.
        seed: sampled: of the draws, with the sample's key and the turn.
    """

    kind: str = GIVEN
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be."""
        if self.kind not in KEYS:
            raise UsageError(f"answers of kind {self.kind!r}: expected one of {', '.join(KEYS)}")
        if self.kind == GIVEN:
            return
        if self.max_tokens < 2:
            raise UsageError(
                f"--max-answer-tokens {self.max_tokens}: expected at least 2, a token and the answer's end"
            )
        if self.kind == SAMPLED and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UsageError(
                f"--generate-temperature {self.temperature}: expected a number above 0, or 0 for greedy answers"
            )
        if self.kind == SAMPLED and not 0 < self.top_p <= 1:
            raise UsageError(f"--generate-top-p {self.top_p}: expected a share above 0 and at most 1")

    @property
    def written_by_teacher(self) -> bool:
        """The answers are the teacher's own."""
        return self.kind != GIVEN

    def to_json(self) -> dict[str, Any]:
        """As `cache.json` has it, under `answers`."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in KEYS[self.kind]}}

    @classmethod
    def from_json(cls, content: Any) -> "AnswerSource":
        """The inverse of `to_json`. Raises ValueError for what that would not give."""
        kind = content.get("kind") if isinstance(content, dict) else None
        if not isinstance(kind, str) or kind not in KEYS or content.keys() != {"kind", *KEYS[kind]}:
            raise ValueError(f"{content!r}: expected a kind of {', '.join(KEYS)}, and what it has")
        for name in KEYS[kind]:
            if type(content[name]) not in ((int, float) if name in ("temperature", "top_p") else (int,)):
                raise ValueError(f"{name} is {content[name]!r}, not a number")
        try:
            return cls(**content)
        except UsageError as error:
            raise ValueError(str(error)) from None

    def __str__(self) -> str:
        if self.kind == GIVEN:
            return "given, the data's own"
        how = "greedy" if self.kind == GREEDY else f"sampled, temperature {self.temperature:g}, top-p {self.top_p:g}"
        seed = f", seed {self.seed}" if self.kind == SAMPLED else ""
        return f"the teacher's own, {how}{seed}, up to {self.max_tokens} tokens"
