"""Every objective a student may be trained on: what it is, whose it is, and what it asks of teacher, student and cache.

`objective = "NAME"` in a run's settings picks one of OBJECTIVES. docs/method.md has the equations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from genrecal.errors import UsageError

if TYPE_CHECKING:
    from genrecal.shards.reader import Cache
    from genrecal.vlm.pair import Finding, Pair, SharedTokens
    from genrecal.vlm.rendering import PromptOptions


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective.

    Args:
        what: in a few words. source: who proposed it.
        stages: those that it has.
        recalibrates: whether stages 1 and 2 have a Recalibrator; stage 3 is then the student's own cross-entropy alone.
        targets: what it can take from the teacher (`loss.target`); none where it reads no row of the teacher.
        beside: which of the student's rows the teacher's are compared with (`genrecal.train.batches.Wanted`).
        own_answers: whether the cache's answers must be the teacher's own.
        terms: of its loss, as they are logged, besides `sft`, the student's own cross-entropy.
    """

    what: str
    source: str
    stages: tuple[int, ...] = (2, 3)
    recalibrates: bool = False
    targets: tuple[str, ...] = ()
    beside: str = ""
    own_answers: bool = False
    terms: tuple[str, ...] = ()

    @property
    def one_tokenizer(self) -> bool:
        """Whether teacher and student must give an answer the same tokens."""
        return self.beside == "same"

    @property
    def direct(self) -> bool:
        """Whether the student is compared with the teacher in every stage, without a Recalibrator."""
        return bool(self.targets) and not self.recalibrates


OBJECTIVES = {
    "genrecal": Objective(
        what="the Recalibrator's states, read by the teacher's head",
        source="GenRecal, arXiv 2506.15681",
        stages=(1, 2, 3),
        recalibrates=True,
        targets=("topk", "exact", "sample"),
        terms=("ce", "kl", "reg_ce", "reg_kl"),
    ),
    "genrecal-aligned": Objective(
        what="the Recalibrator's states, also over the student's own answer, where both have read the same bytes",
        source="ours, beside GenRecal's losses",
        stages=(1, 2, 3),
        recalibrates=True,
        targets=("topk", "exact", "sample"),
        terms=("ce", "kl", "reg_ce", "reg_kl", "aligned_ce", "aligned_kl"),
    ),
    "sft": Objective(
        what="the student's own cross-entropy, in its own tokens",
        source="supervised fine-tuning, the baseline of arXiv 2506.15681",
    ),
    "seqkd": Objective(
        what="sft on answers that the teacher wrote",
        source="sequence-level knowledge distillation, Kim and Rush, arXiv 1606.07947",
        own_answers=True,
    ),
    "kl": Objective(
        what="KL(teacher || student) of every answer token",
        source="LLaVA-KD, arXiv 2410.16236; Hinton et al., arXiv 1503.02531",
        targets=("topk", "exact", "sample"),
        beside="same",
        terms=("kl",),
    ),
    "reverse-kl": Objective(
        what="KL(student || teacher) of every answer token",
        source="MiniLLM, arXiv 2306.08543, off-policy: on the cache's answers, not on the student's",
        targets=("topk", "exact"),
        beside="same",
        terms=("reverse_kl",),
    ),
    "skewed-kl": Objective(
        what="KL(teacher || a mixture of teacher and student) of every answer token",
        source="DistiLLM, arXiv 2402.03898, off-policy",
        targets=("topk", "exact"),
        beside="same",
        terms=("skewed_kl",),
    ),
    "uld": Objective(
        what="distance of the sorted probabilities, token by token up to the shorter answer",
        source="Universal Logit Distillation, arXiv 2402.12030",
        targets=("topk", "exact"),
        beside="places",
        terms=("uld",),
    ),
    "dskd": Objective(
        what="each side's states projected for the other side's head, aligned by attention",
        source="Dual-Space Knowledge Distillation, arXiv 2406.17328",
        targets=("topk", "exact", "sample"),
        beside="turns",
        terms=("t2s_ce", "t2s_kl", "s2t_kl"),
    ),
}
TERMS = ("sft", *dict.fromkeys(term for objective in OBJECTIVES.values() for term in objective.terms))


def objective_named(name: str) -> Objective:
    """Raises UsageError, with the names there are."""
    if name not in OBJECTIVES:
        raise UsageError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def check_target(name: str, target: str) -> None:
    """Raises UsageError if the objective cannot take what `loss.target` says."""
    allowed = objective_named(name).targets
    if allowed and target not in allowed:
        raise UsageError(
            f"loss.target {target!r}: objective {name} needs the teacher's probabilities themselves, of which draws say too "
            f"little; expected {' or '.join(allowed)}"
        )


def check_cache(name: str, cache: "Cache") -> None:
    """Raises UsageError if the cache's answers are not of the kind that the objective trains on."""
    if objective_named(name).own_answers and cache.answers.kind == "given":
        raise UsageError(
            f"--cache {cache.path}: objective {name} trains on the teacher's own answers, and this cache has the given ones; "
            "make one with `genrecal cache --generate`, or train with objective sft"
        )


def check_pair(
    name: str, cache: "Cache", student: str, *, prompt: "PromptOptions | None" = None, trust_remote_code: bool = False
) -> None:
    """Find out, from tokenizers alone, whether the objective applies to the cache's teacher and the student.

    Raises UsageError that says what differs and which objectives apply.
    """
    if objective_named(name).one_tokenizer:
        shared = shared_with(cache, student, prompt=prompt, trust_remote_code=trust_remote_code)
        if shared.differences:
            others = [other for other, objective in OBJECTIVES.items() if not objective.one_tokenizer]
            raise UsageError(
                f"objective {name} needs one tokenizer, and those of the teacher ({cache.description['teacher']['name']}) and "
                f"the student ({student}) differ: {'; '.join(shared.differences)}. Any pair can take {', '.join(others)}"
            )


def shared_with(
    cache: "Cache", student: str, *, prompt: "PromptOptions | None" = None, trust_remote_code: bool = False
) -> "SharedTokens":
    """What the tokenizers of a cache's teacher and a student have in common."""
    from genrecal.vlm.cached_teacher import teacher_renderer
    from genrecal.vlm.loading import load_renderer
    from genrecal.vlm.pair import shared_tokens

    own = load_renderer(student, prompt, trust_remote_code=trust_remote_code)
    return shared_tokens(teacher_renderer(cache), own)


def findings(pair: "Pair") -> "list[Finding]":
    """Whether each objective applies to a pair, and why."""
    from genrecal.vlm.pair import Finding

    differences = "; ".join(pair.shared.differences)
    found = []
    for name, objective in OBJECTIVES.items():
        if not objective.one_tokenizer:
            why = f"any pair: {objective.what}"
            if name == "genrecal-aligned":
                why += f": {len(pair.aligned)} of the teacher's {len(pair.teacher.ids)} tokens of the text"
        elif differences:
            why = f"needs one tokenizer, and these differ: {differences}"
        else:
            rows = pair.teacher.head_rows, pair.student.head_rows
            why = f"one tokenizer: {objective.what}"
            ids = min(pair.shared.ids, *rows)  # Gemma 3's tokenizer knows one more than its head
            if set(rows) != {ids}:
                why += f", over the {ids} ids in common of the heads' {rows[0]} and {rows[1]} rows"
        found.append(Finding(name=name, holds=not (objective.one_tokenizer and differences), why=why))
    return found
