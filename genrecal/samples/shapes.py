"""The turns of a record, whatever its shape: conversations, pairs, or a question and an answer with what belongs to them.

All come out in one form, the chat shape's: a list of objects with a role and a content.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genrecal.errors import SampleError
from genrecal.samples.fields import PAIR_FIELDS, REFUSED_BESIDE_QUESTION, ROLE_NAMES, Fields, has_content

Open = Callable[[Mapping[str, Any], Mapping[str, Sequence[str]], str], Fields]


def turns_of(fields: Fields, open_object: Open) -> list[Any]:
    """The turns of a record. Raises SampleError if it has none, or if it is not clear which they are.

    Args:
        fields: the record's; those that are read are taken from it.
        open_object: gives the fields of an object within it.
    """
    names = fields.called("messages") or fields.called("texts")
    if not names and (named := [*fields.given.columns("messages"), *fields.given.columns("texts")]):
        raise SampleError(f"no turns under {named[0]!r}, which --field says they are")
    if names:
        listed = map(from_json, _non_empty(fields.left.pop(names[0]), names[0]))
        turns = [turn for item in listed for turn in (_pair(item, open_object) if _is_pair(item) else [item])]
    else:
        turns = [from_json(turn) for turn in _question_and_answer(fields)]
    system = fields.take("system")
    if not has_content(system):
        return turns
    if not isinstance(system, str):
        raise SampleError(f"expected text under 'system', got {type(system).__name__}")
    if _role(turns[0]) != "system":
        return [{"role": "system", "content": system}, *turns]
    if system not in turns[0].values():
        raise SampleError("two system messages, in the field 'system' and in the first turn; give one")
    return turns


def parse_json(data: bytes | str) -> Any:
    """A record's UTF-8 JSON. Raises SampleError if it is none.

    Half a surrogate pair is refused: such text has no UTF-8, so nothing could tokenise or store it.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        record = json.loads(text, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSON or UTF-8 errors, numbers of thousands of digits
        raise SampleError(f"broken JSON: {error}") from None
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two values under one name, one would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)[:80]!r} stands twice")
    return values


def from_json(value: Any) -> Any:
    """A list or an object that is written as JSON text, as the hub's Json() columns are; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except SampleError:
            pass
    return value


def _non_empty(value: Any, name: str) -> list[Any]:
    turns = from_json(value)
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        turns = _list_of_text(turns, name)
    if not isinstance(turns, list) or not turns:
        raise SampleError(f"expected a non-empty list under {name!r}, got {type(turns).__name__}")
    return turns


def _list_of_text(text: str, name: str) -> Any:
    """What a column of lists holds that was written as text."""
    try:
        return parse_json(text)
    except SampleError as error:
        raise SampleError(f"the field {name!r}: {error}") from None


def _is_pair(item: Any) -> bool:
    """Whether an entry is a question with its answer, as The Cauldron's and XTuner's are."""
    return isinstance(item, dict) and _role(item) is None and any(map(item.get, PAIR_FIELDS["user"]))


def _pair(pair: dict[str, Any], open_object: Open) -> list[dict[str, Any]]:
    fields = open_object(pair, PAIR_FIELDS, "texts[].")
    fields.left.pop("source", None)  # `record_names` has it
    turns = [{"role": role, "content": fields.take(role)} for role in PAIR_FIELDS]
    return turns if turns[0]["content"] else turns[1:]


def _question_and_answer(fields: Fields) -> list[Any]:
    questions, answers, more = (fields.called(name) for name in ("question", "answer", "input"))
    if more and (not questions or not (questions[0].lower() == "instruction" or fields.given.columns("input"))):
        questions, more = questions + more, []
    for what, found in (("question", questions), ("answer", answers)):
        if len(found) > 1:
            raise SampleError(
                f"{' and '.join(map(repr, found))} may all be the {what}; say which, as in --field {what}={found[0]}"
            )
    fields.refused = fields.refused | REFUSED_BESIDE_QUESTION
    if not questions or not answers:
        list(fields.finish(has_images=True))  # a field that is refused says more
        names = ", ".join(
            f"{name}{'' if has_content(fields.left[name]) else ' (empty)'}" for name in list(fields.left)[:20]
        )
        raise SampleError(
            "no conversation: expected a non-empty list under 'conversations' or 'messages', pairs under 'texts', or a "
            f"question and an answer; its fields are {names!r} (--field question=NAME --field answer=NAME)"
        )
    asked = _asked(fields.left.pop(questions[0]), fields.left.pop(more[0]) if more else "", questions[0])
    answer = fields.left.pop(answers[0])
    said = answer if answers[0].lower() == "label" else _in_words(answer)  # a label's number may be that of a class
    if said != answer:
        fields.notes.append(f"a number under {answers[0]!r}")
    answered = _answered(said, answers[0])
    if reasoning := fields.take("reasoning"):
        answered[-1] = {**answered[-1], "reasoning_content": reasoning}
    return _history(fields.take("history")) + asked + answered


def _asked(question: Any, more: Any, name: str) -> list[Any]:
    if not isinstance(more, str):
        raise SampleError(f"expected text under 'input', got {type(more).__name__}")
    if _are_turns(turns := from_json(question)) and not more:
        return [{**turn, "loss": False} for turn in turns]  # a prompt's answers are context
    if not isinstance(question, (str, list)):
        raise SampleError(f"expected text under {name!r}, got {type(question).__name__}")
    if isinstance(question, list) and len(question) > 1 and all(isinstance(text, str) for text in question):
        raise SampleError(f"{len(question)} questions under {name!r}; give each with its answer, as in 'texts'")
    if more:
        question = f"{question}\n{more}" if isinstance(question, str) else [*question, more]
    return [{"role": "user", "content": question}]


def _in_words(answer: Any) -> Any:
    """Numbers as their text, where there is one way to write them: 7.0 may stand for "7", and 1e+20 for anything."""
    if isinstance(answer, list):
        return list(map(_in_words, answer))
    plain = type(answer) is int or (type(answer) is float and not answer.is_integer() and "e" not in repr(answer))
    return str(answer) if plain else answer


def _answered(answer: Any, name: str) -> list[Any]:
    if _are_turns(turns := from_json(answer)):
        return list(turns)
    if isinstance(answer, str) and name.lower() == "answers" and answer.lstrip().startswith("["):
        answer = _list_of_text(answer, name)
    if isinstance(answer, list) and all(isinstance(text, str) for text in answer):
        if len(set(answer)) > 1:
            raise SampleError(f"{len(set(answer))} different answers under {name!r}; give the one to learn")
        answer = answer[0]
    if not isinstance(answer, str):
        raise SampleError(f"expected text under {name!r}, got {type(answer).__name__}; give the answer as it is said")
    return [{"role": "assistant", "content": answer}]


def _history(history: Any) -> list[Any]:
    pairs = from_json(history) if has_content(history) else []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SampleError("expected pairs of a question and an answer under 'history'")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_role(turn) is not None for turn in value)


def _role(turn: Any) -> str | None:
    """What a turn's role is, or None if it has none."""
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLE_NAMES.get(name.strip().lower(), name) if isinstance(name, str) else None
