"""How close a predicted answer is to the right one, by the rules that the field's benchmarks use."""

import re
from collections.abc import Callable

CHOICES = "ABCDEFGHIJ"


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are equal but for case, outer white space and a closing full stop, else 0."""
    return float(_plain(prediction) == _plain(answer))


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """ChartQA's rule: a number may be off by 5 % of the right one; anything else must match exactly (Masry et al. 2022)."""
    got, wanted = as_number(prediction), as_number(answer)
    if got is not None and wanted is not None:
        return float(abs(got - wanted) <= 0.05 * abs(wanted))
    return exact_match(prediction, answer)


def anls(prediction: str, answer: str) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - distance / longer length, 0 below a half

    (Biten et al. 2019, DocVQA's measure).
    """
    a, b = _plain(prediction), _plain(answer)
    if not a and not b:
        return 1.0
    similarity = 1 - levenshtein(a, b) / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def multiple_choice(prediction: str, answer: str) -> float:
    """1 if the letter that the prediction names first is the right one: "B", "(B)", "B. red" or "the answer is B"."""
    return float(chosen_letter(prediction) == chosen_letter(answer) is not None)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact_match,
    "relaxed": relaxed_accuracy,
    "anls": anls,
    "choice": multiple_choice,
}


def metric_for(question: str, answer: str) -> str:
    """The rule that `--metric auto` takes: by the form of the question and its right answer.

    Lettered options with a letter as the answer: choice. A number: relaxed. Six words or more, or a text in a document's
    wording (40 characters or more): anls. Anything else: exact.
    """
    if (
        re.fullmatch(r"\(?[A-J]\)?\.?", answer.strip())
        and len(re.findall(r"(?m)(?:^|\s)\(?([A-J])[.):]\s", question)) >= 2
    ):
        return "choice"
    if as_number(answer) is not None:
        return "relaxed"
    if len(answer.split()) >= 6 or len(answer) >= 40:
        return "anls"
    return "exact"


def as_number(text: str) -> float | None:
    """A number, with thousands' commas and currency signs left out and a per cent sign as 1/100; None for other text."""
    plain = text.strip().rstrip(".").replace(",", "").strip("$€£").strip()
    number = plain.removesuffix("%").strip()
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", number):
        return None
    return float(number) / 100 if plain.endswith("%") else float(number)


def chosen_letter(text: str) -> str | None:
    """The option letter that a text names, or None."""
    text = text.strip()
    for pattern in (
        r"\(?([A-J])(?:[.):,]|\s*(?:\n|$))",
        r"([B-HJ])\s",  # "A" and "I" also begin sentences
        r".*\b[Aa]nswer(?: is)?:? \(?([A-J])\b",
        r".*?\(([A-J])\)",
    ):
        if match := re.match(pattern, text, flags=re.DOTALL):
            return match[1]
    return None


def levenshtein(a: str, b: str) -> int:
    """Edits (insert, delete, replace one character) that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (char != other))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").strip()
