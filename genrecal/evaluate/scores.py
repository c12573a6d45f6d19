"""How close a predicted answer is to the right one, by the rules that the field's benchmarks use.

`relaxed`, `anls` and `vqa` are the benchmarks' own rules as lmms-eval and the benchmarks' code have them, so that their scores
can be compared with published ones.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal

from genrecal.errors import UsageError

LETTERS = "ABCDEFGHIJ"
PUNCTUATION = ".,;:!?()[]\"'"


# ------------------------------------------------------------------------------------------------------ text and numbers


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are equal but for case, white space at the ends or repeated, and a closing full stop, else 0."""
    return float(_plain(prediction) == _plain(answer))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").strip()


_CURRENCIES = (
    "$ us$ usd dollar dollars", "s$ sgd", "a$ aud", "c$ cad", "hk$ hkd", "€ eur euro euros", "£ gbp pound pounds", "¥ jpy yen",
    "cny rmb yuan 元", "₹ rs rs. inr rupee rupees", "₩ krw won", "rm myr ringgit", "rp idr rupiah", "chf francs", "฿ thb baht",
)  # fmt: skip
_OTHER_UNITS = (
    "% percent", "kg kilogram kilograms", "g gram grams", "km kilometer kilometers kilometre kilometres", "cm centimeters",
    "mm millimeters", "meter meters metre metres", "mile miles", "in inch inches", "ft foot feet", "lb lbs", "mg milligrams",
    "ml milliliters", "liter liters litre litres", "h hr hrs hour hours", "min mins minute minutes", "sec secs second seconds",
    "day days", "week weeks", "month months", "year years", "° degree degrees", "°c", "°f",
)  # fmt: skip
_UNIT = {word: words.split()[-1] for words in (*_CURRENCIES, *_OTHER_UNITS) for word in words.split()}
_SIGN = "|".join(sorted(map(re.escape, " ".join(_CURRENCIES).split()), key=len, reverse=True))
_WORDS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBER = re.compile(
    rf"(?P<first>{_SIGN})?\s*(?P<sign>[-+]?)\s*(?P<second>{_SIGN})?\s*"
    r"(?P<number>(?:0|[1-9][0-9]{0,2}(?:,[0-9]{2,3})*,[0-9]{3}|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)"
    r"\s*(?P<after>[^\s0-9.,:/-][^\s0-9]*)?"
)


def as_number(text: str) -> tuple[Decimal, str] | None:
    """A number with its unit ("" for none), such as "1,249.99", "$5", "RM 9.00", "45 %" and "seven"; None for other text.

    Digits that begin with a zero, dates, times and telephone numbers are no numbers.
    """
    plain = _plain(text).replace("−", "-").replace("per cent", "percent")
    match = _NUMBER.fullmatch(_WORDS.get(plain, plain))
    if match is None:
        return None
    units = {_UNIT.get(unit, unit) for unit in match.group("first", "second", "after") if unit}
    if len(units) > 1:
        return None
    return Decimal(match["sign"] + match["number"].replace(",", "")), units.pop() if units else ""


def number_match(prediction: str, answer: str) -> float:
    """1 for the same number, else 0: 9 is right for 9.00 and "1,200" for 1200, but 2020 is not for 2019.

    A currency, a per cent sign or a common unit may be missing on one side; two different ones are wrong. 0.45 is 45 %. If
    either is no number: `exact_match`.
    """
    got, wanted = as_number(prediction), as_number(answer)
    if got is None or wanted is None:
        return exact_match(prediction, answer)
    (value, unit), (right, right_unit) = got, wanted
    if unit == right_unit or "" in (unit, right_unit) and {unit, right_unit} - {""} <= set(_UNIT.values()):
        as_share = {unit, right_unit} == {"", "percent"} and abs(right if unit else value) < 1
        return float(value == right or as_share and value * (100 if right_unit else 1) == right * (100 if unit else 1))
    return 0.0


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """ChartQA's rule: a number may be off by 5 % of the right one; anything else must match but for case (Masry et al. 2022).

    "12%" is 0.12. As in the benchmark, commas and currency signs make a text of a number.
    """
    got, wanted = _float(prediction), _float(answer)
    if got is not None and wanted:
        return float(abs(got - wanted) / abs(wanted) <= 0.05)
    return float(prediction.lower() == answer.lower())


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answer: str) -> float:
    """DocVQA's average normalised Levenshtein similarity of one answer: 1 - distance / longer length, 0 below a half.

    Case and repeated white space do not count (Biten et al. 2019).
    """
    a, b = (" ".join(text.lower().split()) for text in (prediction, answer))
    longer = max(len(prediction.upper()), len(answer.upper()))
    similarity = 1 - levenshtein(a, b) / longer if longer else 1.0
    return similarity if similarity >= 0.5 else 0.0


def prose_match(prediction: str, answer: str) -> float:
    """`anls` of a sentence whose numbers must be the same ones in the same order; 0 where they are not."""
    found, wanted = (re.findall(r"\d+(?:[.,:/-]\d+)*", text) for text in (prediction, answer))
    return anls(prediction, answer) if found == wanted else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edits (insert, delete, replace one character) that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (char != other))
    return row[-1]


# ------------------------------------------------------------------------------------------------------------------- VQA


_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't shan't she'd've should've shouldn't somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll "
    "they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd "
    "who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
).split()
_FULL = {
    spelling: word for word in _CONTRACTIONS for spelling in (word.replace("'", "", 1), "".join(word.rsplit("'", 1)))
}


def vqa_match(prediction: str, answer: str) -> float:
    """1 if the two are equal after the normalisation of VQAv2's and TextVQA's evaluation, else 0.

    It takes away case, articles and punctuation, writes the numbers up to ten in digits and puts apostrophes into contractions.
    With one annotator's answer this is the benchmarks' soft accuracy without its vote of ten.
    """
    return float(vqa_normalised(prediction) == vqa_normalised(answer))


def vqa_normalised(text: str) -> str:
    """A text as the evaluation servers of VQAv2 and TextVQA compare it."""
    text = (
        text.lower()
        .replace(",", "")
        .replace("?", "")
        .replace("'s", " 's")
        .strip()
        .replace("\n", " ")
        .replace("\t", " ")
        .strip()
    )
    found = text
    for sign in ';/[]"{}()=+\\_-><@`!':
        found = found.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = (_WORDS.get(word, "0" if word == "none" else word) for word in found.split())
    return " ".join(_FULL.get(word, word) for word in words if word not in ("a", "an", "the"))


# -------------------------------------------------------------------------------------------------------- multiple choice


def multiple_choice(prediction: str, answer: str, question: str = "") -> float:
    """1 if the prediction chooses the option that the answer names, by its letter or by its text, else 0."""
    options = options_of(question)
    right = chosen_option(answer, options)
    return float(right is not None and chosen_option(prediction, options) == right)


def options_of(question: str) -> dict[str, str]:
    """The lettered options of a question, as "A. red", "B) red" or "(C) red", from A on; empty if there are not two."""
    found: list[tuple[str, int, int]] = []
    question = unicodedata.normalize("NFKC", question)
    for match in re.finditer(r"(?:^|(?<=\s))\(?([A-J])(?:[.):]\s|、)", question):
        if match[1] == "A":
            found = []
        if match[1] == LETTERS[len(found) : len(found) + 1]:
            found.append((match[1], match.start(), match.end()))
    ends = [start for _, start, _ in found[1:]] + [len(question)]
    options = {letter: question[start:end].strip() for (letter, _, start), end in zip(found, ends, strict=False)}
    options = {letter: text.split("\n")[0].strip() for letter, text in options.items()}
    return options if len(options) >= 2 else {}


def chosen_option(text: str, options: dict[str, str]) -> str | None:
    """The letter that a text chooses, or None.

    In this order: the letter alone ("B", "(b)", "**B.**"), before its text ("B. red"), as the answer ("the answer is B", the
    last such), in brackets (the last such). With options also: the letter as the first word, as the last, and the only option
    whose text is the answer or is part of it.
    """
    letters = "".join(options) or LETTERS
    text = unicodedata.normalize("NFKC", text).strip()
    alone = rf"[\s(\[\"'*]*([{letters}{letters.lower()}])[\s)\]\"'*.,:]*$"
    before = rf"\**([{letters}{letters.lower()}])\**(?:\)|[.:]\**(?=\s|$))"
    for pattern in (alone, before, rf"([{letters}])(?:,|\s*\n)"):
        if match := re.match(pattern, text):
            return match[1].upper()
    patterns = [
        rf"\b(?:[Aa]nswer|[Cc]hoice|[Oo]ption)(?:\s+is)?:?\s*\**\(?([{letters}])\b(?![-+#'’])",
        rf"(?:答案|选)[是为择]?\s*:?\s*\(?([{letters}])",
        rf"\(([{letters}{letters.lower()}])\)",
    ]
    if options:  # "A" and "I" also begin sentences
        patterns += [rf"^([{letters.replace('A', '').replace('I', '') or '-'}])\s", rf"\s([{letters}])[.*]*$"]
    for pattern in patterns:
        if named := re.findall(pattern, text):
            return str(named[-1]).upper()
    same = [letter for letter, option in options.items() if exact_match(text, option)]
    held = same or [
        letter
        for letter, option in options.items()
        if option and re.search(rf"(?<!\w){re.escape(_plain(option))}(?!\w)", _plain(text))
    ]
    return held[0] if len(held) == 1 else None


# ----------------------------------------------------------------------------------------------------------- which rule


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact_match,
    "number": number_match,
    "relaxed": relaxed_accuracy,
    "anls": anls,
    "prose": prose_match,
    "vqa": vqa_match,
    "choice": multiple_choice,
}


def check_metric(metric: str, option: str) -> None:
    """Raises UsageError for what is no rule."""
    if metric != "auto" and metric not in METRICS:
        raise UsageError(f"{option} {metric!r}: expected auto or one of {', '.join(METRICS)}")


# Benchmarks with a rule of their own, by the letters and digits of a sample's category or source.
_BENCHMARKS = {
    "chartqapro": None, "chartqa": "relaxed", "plotqa": "relaxed", "docvqa": "anls", "infovqa": "anls",
    "infographicvqa": "anls", "infographicsvqa": "anls", "stvqa": "anls", "textvqa": "vqa", "vqav2": "vqa",
    "okvqa": "vqa", "vizwiz": "vqa",
}  # fmt: skip


def metric_for(question: str, answer: str, *names: str) -> str:
    """The rule that `--metric auto` takes.

    Args:
        names: the sample's category and source; if one of them names a benchmark with a rule of its own, that rule.

    Else by the form of question and answer. An option's letter, or the text of an option that the question lists: choice. A
    number: number. Six words of letters or more, or 40 characters or more without a digit: prose. Anything else, such as long
    ids, addresses and lists of numbers: exact.
    """
    for name in names:
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        rule = next((rule for benchmark, rule in _BENCHMARKS.items() if benchmark in plain), None)
        if rule is not None:
            return rule
    options = options_of(question).values()
    if re.fullmatch(r"\(?[A-J]\)?\.?", answer.strip()) or any(exact_match(answer, option) for option in options):
        return "choice"
    if as_number(answer) is not None:
        return "number"
    words = [word for word in answer.split() if word.strip(PUNCTUATION).isalpha()]
    if len(words) >= 6 or (len(answer) >= 40 and not re.search(r"\d", answer)):
        return "prose"
    return "exact"


def score(rule: str, prediction: str, answer: str, question: str = "") -> float:
    """The score of one answer, 0 to 1, by the rule of that name in `METRICS`."""
    return multiple_choice(prediction, answer, question) if rule == "choice" else METRICS[rule](prediction, answer)
