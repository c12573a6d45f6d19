"""The benchmarks' rules for right answers, each against worked examples and a plain reference."""

import functools
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecal.evaluate.scores import (
    METRICS,
    anls,
    as_number,
    chosen_option,
    exact_match,
    levenshtein,
    metric_for,
    multiple_choice,
    number_match,
    options_of,
    relaxed_accuracy,
    score,
    vqa_match,
    vqa_normalised,
)

texts = st.text(max_size=8)
short = st.text("ab ", max_size=6)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Red", "red", 1), ("  a  red\nsquare. ", "A red square", 1), ("red", "red.", 1), ("red!", "red", 0),
        ("redder", "red", 0), ("", "red", 0), ("12.0", "12", 0), ("9.00", "9.00", 1),
    ],
)  # fmt: skip
def test_exact(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, answer) == score


# ChartQA's own rule: the values are those of lmms-eval 0.7.3's `relaxed_correctness`.
RELAXED = [
    ("100", "100", 1), ("105", "100", 1), ("105.1", "100", 0), ("94.9", "100", 0),
    ("100", "105.3", 0),  # 5 % of the right answer, not of the prediction
    ("-95", "-100", 1), ("100", "-100", 0), ("0", "0", 1), ("0.00", "0", 0), ("12%", "0.12", 1), ("12%", "12", 0),
    ("12%", "12.5%", 1), ("12 %", "0.12", 1), ("1,234", "1234", 0), ("$5", "5", 0), ("9.00.", "9.00", 0),
    ("2020", "2019", 1), ("1e2", "100", 1), ("norway", "Norway", 1), ("Norway.", "Norway", 0),
    ("Sweden", "Norway", 0), ("", "100", 0), ("%", "5", 0), ("inf", "5", 0),
]  # fmt: skip
ANLS = [
    ("Hello World", "hello  world", 1), ("red.", "red", 0.75), ("abcd", "abce", 0.75), ("ab", "ac", 0.5),
    ("abc", "axy", 0),  # a third alike is below the half
    ("abcde", "abcdefghij", 0.5), ("abcd", "abcdefghij", 0), ("", "abc", 0), ("abc", "", 0), ("", "", 1),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "answer", "score"), RELAXED)
def test_relaxed(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("2019", "2019", 1), ("2020", "2019", 0), ("9.30", "9.00", 0), ("9", "9.00", 1), ("21", "20", 0),
        ("20.0", "20", 1), ("1,249.99", "1249.99", 1), ("1249.99.", "$1,249.99", 1), ("1.249,99", "1249.99", 0),
        ("1,2", "12", 0), ("5", "-5", 0), ("\N{MINUS SIGN}5", "-5", 1),
        # Ids and telephone numbers are no amounts.
        ("5551234568", "5551234567", 0), ("0123456", "123456", 0), ("0123456", "0123456", 1),
        ("03-1234 5679", "03-1234 5678", 0),
        # Currencies and units: one side may leave them out.
        ("RM 9.00", "9.00", 1), ("9.00", "RM9.00", 1), ("9.00 MYR", "RM 9", 1), ("RM 9.00", "$9.00", 0),
        ("RM 9.30", "9.00", 0), ("$5", "5 dollars", 1), ("US$5", "USD 5", 1), ("S$5", "US$5", 0), ("-$5", "$-5", 1),
        ("€1,200", "1200 euros", 1), ("5 kg", "5", 1), ("5kg", "5 kilograms", 1), ("5 kg", "5 g", 0),
        ("5 inches", "5", 1), ("3 h", "3 hours", 1), ("5 m", "5 million", 0), ("45%", "45", 1),
        ("45", "45 percent", 1), ("0.45", "45%", 1), ("45 %", "0.45", 1), ("1", "100%", 0), ("4.5%", "45%", 0),
        # What changes the number is no unit.
        ("20 million", "20", 0), ("20 million", "20 Million", 1), ("1990s", "1990", 0), ("9 pm", "9", 0),
        ("9pm", "9 PM.", 1), ("1st", "1", 0), ("Day 5", "5 days", 0), ("20 apples", "20", 0),
        # Times and dates are compared as text.
        ("9:30", "9.30", 0), ("25/12/2018", "25/12/2018", 1), ("26/12/2018", "25/12/2018", 0), ("seven", "7", 1),
        ("Two.", "2", 1), ("two cats", "2", 0), ("1e5", "100000", 0), ("", "5", 0),
    ],
)  # fmt: skip
def test_number(prediction: str, answer: str, score: float) -> None:
    assert number_match(prediction, answer) == number_match(answer, prediction) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [("-1,000.5", ("-1000.5", "")), ("+3", ("3", "")), (".5", ("0.5", "")), ("7.", ("7", "")), ("£2", ("2", "pounds"))]
    + [("45 %", ("45", "percent")), ("zero", ("0", "")), ("3 apples", ("3", "apples")), ("0.10", ("0.10", ""))]
    + [(text, None) for text in ("", ".", "-", "1-2", "25/12/2018", "1.2.3", "twenty", "５ 5", "$5 €", "007", "1 234")],
)
def test_as_number(text: str, number: tuple[str, str] | None) -> None:
    assert as_number(text) == (number and (Decimal(number[0]), number[1]))


# TextVQA's and VQAv2's own normalisation: the values are those of lmms-eval 0.7.3's `EvalAIAnswerProcessor`.
VQA = [
    ("Yes!", "yes"), ("The  red bus.", "red bus"), ("two dogs, a cat", "2 dogs cat"), ("none", "0"),
    ("1,000", "1000"), ("9.00", "9.00"), ("dont know", "don't know"), ("couldn'tve", "couldn't've"),
    ("he's", "he 's"), ("hot-dog", "hot dog"), ("hot - dog", "hot dog"), ("(left)", "left"), ("4/5", "4 5"),
    ("a", ""), ("12%", "12%"), ("$5", "$5"), ("What?\nNo", "what no"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "normalised"), VQA)
def test_vqa(text: str, normalised: str) -> None:
    assert vqa_normalised(text) == normalised
    assert vqa_match(text, normalised) == 1


def test_vqa_compares_what_is_left() -> None:
    assert vqa_match("Two", "2") == vqa_match("the bus", "Bus") == 1
    assert vqa_match("3", "2") == vqa_match("20", "21") == vqa_match("RM 9", "9") == 0


def test_a_sentence_with_another_number_is_wrong() -> None:
    right = "The receipt lists a total of RM 9.30, paid on 2019-03-17 in cash"
    assert metric_for("What?", right) == "prose" and score("prose", right.lower(), right) == 1
    assert score("prose", right.replace("lists", "shows"), right) > 0.9
    for wrong in (right.replace("9.30", "9.00"), right.replace("2019", "2020"), right.replace("RM 9.30", "money")):
        assert score("prose", wrong, right) == 0


@pytest.mark.parametrize(("prediction", "answer", "score"), ANLS)
def test_anls(prediction: str, answer: str, score: float) -> None:
    assert anls(prediction, answer) == pytest.approx(score)


@pytest.mark.eval
def test_the_benchmarks_rules_are_lmms_evals() -> None:
    """The values of the tables above, from the code that the field's scores are made with."""
    from lmms_eval.api.metrics import anls as official_anls
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    assert [relaxed_correctness(prediction, answer) for prediction, answer, _ in RELAXED] == [s for *_, s in RELAXED]
    scores = [official_anls([answer], [prediction])["anls"] for prediction, answer, _ in ANLS]
    assert scores == pytest.approx([score for *_, score in ANLS])
    assert [EvalAIAnswerProcessor()(text) for text, _ in VQA] == [normalised for _, normalised in VQA]
    assert [extract_mcq_answer(text, list("ABCD")) for text in OFFICIAL_FORMS] == ["B"] * len(OFFICIAL_FORMS)


QUESTION = "Which?\nA. cat\nB. red square\nC. dog\nD. blue hat"
# All of these are B to lmms-eval too.
OFFICIAL_FORMS = [
    "B", " B ", "B.", "B)", "(B)", "(B", "B: red square", "B. red square", "(B) a red square", "B, as shown", "B\nbecause",
    "**B**", '"B"', "The answer is B", "the answer is (B).", "So the answer: B", "Answer: B", "Answer B", "The answer is: B",
    "It is (B)", "I think that the answer is B", "Option B", "(A) is wrong, so (B)", "The correct option is **B**.", "答案是B",
]  # fmt: skip
OUR_FORMS = [
    "b", "(b)", "b. red square", "**B.** red", "A close look shows that the answer is B", "答案：B。", "选B", "（B）",
]  # fmt: skip


@pytest.mark.parametrize("prediction", OFFICIAL_FORMS + OUR_FORMS)
def test_the_letter_of_a_choice(prediction: str) -> None:
    for question in (QUESTION, ""):
        assert chosen_option(prediction, options_of(question)) == "B"
        assert multiple_choice(prediction, "B", question) == multiple_choice(prediction, "(B)", question) == 1
        assert multiple_choice(prediction, "C", question) == multiple_choice(prediction, "A", question) == 0


@pytest.mark.parametrize(
    "prediction", ["B red square", "red square", "Red square.", "It is the red square here.", "I think B", "It is B."]
)
def test_an_option_by_its_text_or_beside_other_words(prediction: str) -> None:
    assert multiple_choice(prediction, "B", QUESTION) == multiple_choice(prediction, "red square", QUESTION) == 1
    assert multiple_choice(prediction, "C", QUESTION) == multiple_choice(prediction, "dog", QUESTION) == 0


@pytest.mark.parametrize(
    "text", ["", "red", "Blue", "Because", "I do not know", "K", "BC", "B+", "C#", "A square", "k"]
)
def test_no_letter_is_never_right(text: str) -> None:
    for question in (QUESTION, ""):
        assert chosen_option(text, options_of(question)) is None
        assert multiple_choice(text, "B", question) == multiple_choice(text, text, question) == 0


def test_two_options_in_one_answer_are_none() -> None:
    assert chosen_option("a dog and a cat", options_of(QUESTION)) is None
    assert chosen_option("a hot dog", {"A": "dog", "B": "hot dog"}) is None
    assert chosen_option("hot dog", {"A": "dog", "B": "hot dog"}) == "B"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, {"A": "cat", "B": "red square", "C": "dog", "D": "blue hat"}),
        ("Which? (A) red (B) blue", {"A": "red", "B": "blue"}),
        ("A. Smith asks: which?\nA) red\nB) blue\nAnswer with the letter.", {"A": "red", "B": "blue"}),
        ("哪个？\nA. 红\nB. 蓝", {"A": "红", "B": "蓝"}), ("Is it A. or B?", {}), ("How many?", {}),
    ],
)  # fmt: skip
def test_the_options_of_a_question(question: str, options: dict[str, str]) -> None:
    assert options_of(question) == options


@pytest.mark.parametrize(
    ("question", "answer", "metric"),
    [
        ("Which?\nA. red\nB. blue", "B", "choice"), ("Which? (A) red (B) blue", "(B)", "choice"),
        ("Which?\nA) red\nB) blue", "A.", "choice"), ("Which?\nA. red\nB. blue", "blue", "choice"),
        ("Which?\nA. 4\nB. 5", "5", "choice"), ("Which letter is shown?", "B", "choice"),
        ("Which?\nA. red\nB. blue", "green", "exact"), ("How many?", "12", "number"),
        ("Which year?", "2019", "number"), ("What share?", "-3.5%", "number"), ("What total?", "$1,200.00", "number"),
        ("What total?", "RM 9.00", "number"), ("When?", "25/12/2018", "exact"),
        ("Which number?", "03-1234 5678", "exact"), ("Which code?", "007", "exact"),
        ("Who?", "one two three four five", "exact"), ("Who?", "one two three four five six", "prose"),
        ("Where?", "x" * 39, "exact"), ("Where?", "x" * 40, "prose"), ("Which?", "1, 2, 3, 4, 5, 6", "exact"),
        ("Hash?", "3f2a9c1e77" * 4, "exact"), ("IBAN?", "GB29 NWBK 6016 1331 9268 19", "exact"),
        ("Where?", "12 Main Street, Springfield, IL 62704 USA", "exact"), ("What?", "", "exact"),
    ],
)  # fmt: skip
def test_the_metric_follows_the_form_of_question_and_answer(question: str, answer: str, metric: str) -> None:
    assert metric_for(question, answer) == metric_for(question, answer, "", "my charts") == metric
    assert metric in METRICS


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        (("", "ChartQA"), "relaxed"), (("Chart & Document", "chart_qa/train/7.png"), "relaxed"),
        (("ChartQA-Pro", ""), "number"), (("chart", "charts"), "number"), (("DocVQA", ""), "anls"),
        (("", "lmms-lab/textvqa"), "vqa"), (("VQAv2", ""), "vqa"), (("sroie", "receipts"), "number"),
    ],
)  # fmt: skip
def test_a_benchmark_that_is_named_brings_its_rule(names: tuple[str, str], metric: str) -> None:
    assert metric_for("How many?", "2019", *names) == metric
    assert score(metric, "2020", "2019") == {"relaxed": 1, "anls": 0.5}.get(metric, 0)


def reference_distance(a: str, b: str) -> int:
    """Levenshtein's own recursion."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(a), len(b))


@given(texts | short, texts | short)
def test_levenshtein_is_the_recursive_one(a: str, b: str) -> None:
    assert levenshtein(a, b) == reference_distance(a, b)


@given(short, short, short)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@given(texts | short, texts | short)
def test_scores_are_shares_and_text_rules_are_symmetric(a: str, b: str) -> None:
    assert all(0 <= score(a, b) <= 1 for score in METRICS.values())
    assert exact_match(a, b) == exact_match(b, a) and anls(a, b) == anls(b, a)
    assert exact_match(a, a) == number_match(a, a) == vqa_match(a, a) == anls(a, a) == 1
    assert exact_match(a, b) <= number_match(a, b) and number_match(a, b) == number_match(b, a)
