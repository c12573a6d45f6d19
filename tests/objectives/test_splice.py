"""The splice against one built by hand, turn by turn, from the words of the method."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from genrecal.objectives.splice import splice_index

LENGTHS = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), min_size=1, max_size=5
)


def by_hand(samples):
    """Names of the states in each splice, and which of them predict, in words: "q<sample>.<turn>.<i>" and "a...".

    The last position of each question segment predicts, and all but the last of each answer segment. The very last state
    is left out: it predicts nothing, and none comes after it.
    """
    splices, predicts = [], []
    for s, turns in enumerate(samples):
        row, places = [], []
        for t, (q, n) in enumerate(turns):
            row += [f"q{s}.{t}.{i}" for i in range(q)]
            places.append(len(row) - 1)
            row += [f"a{s}.{t}.{i}" for i in range(n)]
            places += [len(row) - n + i for i in range(n - 1)]
        splices.append(row[:-1])
        predicts.append(places)
    return splices, predicts


@given(LENGTHS)
def test_equals_the_splice_built_by_hand(samples):
    """The student's states are padded to a rectangle, with its own answers between its questions."""
    longest = max(sum(q + n for q, n in turns) for turns in samples)
    source, questions = [], []
    for s, turns in enumerate(samples):
        names, segments = [], []
        for t, (q, n) in enumerate(turns):
            segments.append(np.arange(len(names), len(names) + q) + s * longest)
            names += [f"q{s}.{t}.{i}" for i in range(q)] + ["student's answer"] * n
        source += names + ["padding"] * (longest - len(names))
        questions.append(segments)
    num_question_rows = len(source)
    source += [f"a{s}.{t}.{i}" for s, turns in enumerate(samples) for t, (_, n) in enumerate(turns) for i in range(n)]
    index = splice_index(questions, [[n for _, n in turns] for turns in samples], num_question_rows)
    splices, predicts = by_hand(samples)
    got = [[source[i] for i in row[: len(splice)]] for row, splice in zip(index.rows, splices, strict=True)]
    assert got == splices
    width = index.rows.shape[1]
    assert width == max(map(len, splices))
    assert index.predicts.tolist() == [s * width + p for s, places in enumerate(predicts) for p in places]
    assert len(index.predicts) == sum(n for turns in samples for _, n in turns)
