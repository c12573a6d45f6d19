"""The benchmarks' rules for right answers, each against worked examples and a plain reference."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal.train.scores import (
    METRICS,
    anls,
    as_number,
    chosen_letter,
    exact_match,
    levenshtein,
    metric_for,
    multiple_choice,
    relaxed_accuracy,
)

texts = st.text(max_size=8)
short = st.text("ab ", max_size=6)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Red", "red", 1),
        ("  a  red\nsquare. ", "A red square", 1),
        ("red", "red.", 1),
        ("red!", "red", 0),
        ("redder", "red", 0),
        ("", "red", 0),
        ("12.0", "12", 0),
        ("9.00", "9.00", 1),
    ],
)
def test_exact(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("100", "105.3", 0),  # 5 % of the right answer, not of the prediction
        ("-95", "-100", 1),
        ("-105.1", "-100", 0),
        ("100", "-100", 0),
        ("0", "0", 1),
        ("0.00", "0", 1),
        ("0.01", "0", 0),
        ("12 %", "0.12", 1),
        ("12 %", "12", 0),
        ("12%", "12.5%", 1),
        ("1,234,567", "1234567", 1),
        ("$1,200.", "1200", 1),
        ("€ 5", "5", 1),
        ("RM 5", "5", 0),
        ("about 100", "100", 0),
        ("Norway.", "norway", 1),
        ("Sweden", "Norway", 0),
        ("100", "Norway", 0),
        ("", "100", 0),
        ("1e2", "100", 0),
        ("nan", "nan", 1),
        ("inf", "5", 0),
    ],
)
def test_relaxed(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, answer) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [("-1,000.5", -1000.5), ("+3", 3.0), (".5", 0.5), ("7.", 7.0), ("£2", 2.0), ("45%", 0.45)]
    + [(text, None) for text in ("", ".", "-", "1-2", "25/12/2018", "1.2.3", "five", "５ 5", "3 apples")],
)
def test_as_number(text: str, number: float | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Hello World", "hello  world.", 1),
        ("abcd", "abce", 0.75),
        ("ab", "ac", 0.5),
        ("abc", "axy", 0),  # a third alike is below the half
        ("abcde", "abcdefghij", 0.5),
        ("abcd", "abcdefghij", 0),
        ("", "abc", 0),
        ("abc", "", 0),
        ("", "", 1),
        (" . ", "", 1),
    ],
)
def test_anls(prediction: str, answer: str, score: float) -> None:
    assert anls(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    "prediction",
    ["B", " B ", "B.", "B)", "(B)", "(B", "B: red", "B. red", "(B) a red square", "B, as shown", "B\nbecause", "B red"]
    + ["The answer is B", "the answer is (B).", "So the answer: B", "Answer: B", "Answer B", "The answer is: B", "It is (B)"]
    + ["A close look shows that the answer is B", "I think that the answer is B"],
)  # fmt: skip
def test_the_letter_of_a_choice(prediction: str) -> None:
    assert chosen_letter(prediction) == "B"
    assert multiple_choice(prediction, "B") == multiple_choice(prediction, "(B)") == 1
    assert multiple_choice(prediction, "C") == multiple_choice(prediction, "A") == 0


@pytest.mark.parametrize("text", ["", "red", "Blue", "Because", "A red square", "I do not know", "K", "BC", "b"])
def test_no_letter_is_never_right(text: str) -> None:
    assert chosen_letter(text) is None
    assert multiple_choice(text, "B") == multiple_choice(text, text) == 0


@pytest.mark.parametrize(
    ("question", "answer", "metric"),
    [
        ("Which?\nA. red\nB. blue", "B", "choice"),
        ("Which? (A) red (B) blue", "(B)", "choice"),
        ("Which?\nA) red\nB) blue", "A.", "choice"),
        ("Which letter is shown?", "B", "exact"),
        ("Which?\nA. red\nB. blue", "blue", "exact"),
        ("How many?", "12", "relaxed"),
        ("What share?", "-3.5%", "relaxed"),
        ("What total?", "$1,200.00", "relaxed"),
        ("When?", "25/12/2018", "exact"),
        ("Who?", "one two three four five", "exact"),
        ("Who?", "one two three four five six", "anls"),
        ("Where?", "x" * 39, "exact"),
        ("Where?", "x" * 40, "anls"),
        ("What?", "", "exact"),
    ],
)
def test_the_metric_follows_the_form_of_question_and_answer(question: str, answer: str, metric: str) -> None:
    assert metric_for(question, answer) == metric
    assert metric in METRICS


def reference_distance(a: str, b: str) -> int:
    """Levenshtein's own recursion."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(a), len(b))


@settings(deadline=None)
@given(texts | short, texts | short)
def test_levenshtein_is_the_recursive_one(a: str, b: str) -> None:
    assert levenshtein(a, b) == reference_distance(a, b)


@settings(deadline=None)
@given(short, short, short)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@settings(deadline=None)
@given(texts | short, texts | short)
def test_scores_are_shares_and_text_rules_are_symmetric(a: str, b: str) -> None:
    assert all(0 <= score(a, b) <= 1 for score in METRICS.values())
    assert exact_match(a, b) == exact_match(b, a) and anls(a, b) == anls(b, a)
    assert exact_match(a, a) == relaxed_accuracy(a, a) == anls(a, a) == 1
    assert exact_match(a, b) <= anls(a, b) and exact_match(a, b) <= relaxed_accuracy(a, b)
