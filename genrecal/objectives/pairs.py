"""Which objectives apply to a cache or a pair of models, found out from tokenizers alone."""

from dataclasses import dataclass

import numpy as np

from genrecal.errors import UsageError
from genrecal.objectives import OBJECTIVES, objective_named
from genrecal.objectives.cells import TokenMap
from genrecal.samples import Message
from genrecal.shards.reader import Cache
from genrecal.shards.record import NO_TARGET, AnswerRows
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import load_renderer
from genrecal.vlm.pair import Finding, Pair, SharedTokens, shared_tokens
from genrecal.vlm.rendering import PromptOptions, Renderer


def check_pair(
    name: str, cache: Cache, student: str, *, prompt: PromptOptions | None = None, trust_remote_code: bool = False
) -> None:
    """Raises UsageError, saying what differs and which objectives apply, if the objective needs one tokenizer and the
    cache's teacher and the student have two."""
    if not objective_named(name).one_tokenizer:
        return
    shared = shared_with(cache, load_renderer(student, prompt, trust_remote_code=trust_remote_code))
    if shared.differences:
        others = [other for other, objective in OBJECTIVES.items() if not objective.one_tokenizer]
        raise UsageError(
            f"objective {name} needs one tokenizer, and those of the teacher ({cache.description['teacher']['name']}) and "
            f"the student ({student}) differ: {'; '.join(shared.differences)}. Any pair can take {', '.join(others)}"
        )


def shared_with(cache: Cache, student: Renderer) -> SharedTokens:
    """What the tokenizers of a cache's teacher and a student have in common."""
    return shared_tokens(teacher_renderer(cache), student)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a text `byte-kl` compares, for a teacher that is certain of each of its tokens.

    Args:
        positions: of the student, the end of turn included. compared: of them, those with a distribution of the teacher.
        mass: mean share of the teacher's mass that is in cells, not in the rest, at the compared positions.
    """

    positions: int
    compared: int
    mass: float

    def __str__(self) -> str:
        share = self.compared / self.positions
        return (
            f"compares {self.compared} of the student's {self.positions} positions of the text ({share:.1%}), with "
            f"{self.mass:.1%} of the mass of the teacher's own tokens there in cells"
        )


def coverage(teacher: Renderer, student: Renderer, text: str) -> Coverage:
    """Run `byte-kl`'s map from a teacher's tokens to a student's over a text. No weights are read."""
    tokens, own = (
        renderer.encode_messages([Message(role="user", parts=("Hi",)), Message(role="assistant", parts=(text,))], [])
        for renderer in (teacher, student)
    )
    answer = tokens.answers[0]
    last, certain = np.append(answer.ids, NO_TARGET), np.zeros(len(answer.ids) + 1, np.float32)
    rows = AnswerRows(
        turn=np.zeros(len(last), np.int32),
        position=np.arange(len(last), dtype=np.int32),
        token_id=last,
        states=None,  # byte-kl reads none
        target_id=last,
        target_start=np.append(answer.starts, NO_TARGET),
        target_end=np.append(answer.ends, NO_TARGET),
        target_logit=certain,
        topk_ids=last[:, None],
        topk_logits=certain[:, None],
        logsumexp=certain,
    )
    size = max(student.tokenizer.get_vocab().values()) + 1
    same = not shared_tokens(teacher, student, text=text).differences
    cells = TokenMap(teacher, student, student_rows=size, same=same).cells(rows, own.answers, [text.encode()])
    mass = 1 - np.exp(cells.log_rest[cells.valid])
    return Coverage(
        positions=len(cells.valid), compared=int(cells.valid.sum()), mass=float(mass.mean()) if len(mass) else 0.0
    )


def findings(pair: Pair, covered: Coverage) -> list[Finding]:
    """Whether each objective applies to a pair, and why."""
    differences = "; ".join(pair.shared.differences)
    found = []
    for name, objective in OBJECTIVES.items():
        if not objective.one_tokenizer:
            why = f"any pair: {objective.what}"
            if name == "genrecal-aligned":
                why += f": {len(pair.aligned)} of the teacher's {len(pair.teacher.ids)} tokens of the text"
            elif name == "byte-kl":
                why += f": {covered}"
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
