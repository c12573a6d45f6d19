"""Which objectives apply to a cache or a pair of models, found out from tokenizers alone."""

from genrecal.errors import UsageError
from genrecal.objectives import OBJECTIVES, objective_named
from genrecal.shards.reader import Cache
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


def findings(pair: Pair) -> list[Finding]:
    """Whether each objective applies to a pair, and why."""
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
