"""The alignment of two tokenizers' answers: against the prefixes themselves, over every pair of kinds of tokenizer."""

import itertools
import unicodedata

import numpy as np
import pytest
import tiny_models
from conftest import conversation
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_align import align_turn_naive

from genrecal.cache.extract import answer_targets
from genrecal.objectives.align import NOWHERE, align, align_turn, prefix_ends
from genrecal.shards.record import AnswerRows
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MARKS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
BACKENDS = {
    "byte-level": tiny_models.byte_bpe(MARKS),
    "qwen2": tiny_models.byte_bpe(MARKS, like="qwen2", vocab_size=380),
    "llama3": tiny_models.byte_bpe(["<|begin_of_text|>", *MARKS], like="llama3"),
    "sentencepiece": tiny_models.sentencepiece_bpe(MARKS),
}
KINDS = {
    name: ByteTokenizer(tiny_models.fast(backend, tiny_models.INTERNVL, specials=MARKS[2:]))
    for name, backend in BACKENDS.items()
}
PAIRS = list(itertools.permutations(KINDS, 2))

answers = st.lists(
    st.sampled_from([*" \n.0?中é🙂", "1987", "What is", " red", "square", "image", "  "])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=8,
).map("".join)


def with_end_of_turn(tokens: TokenizedText) -> TokenizedText:
    end = tokens.ends.max(initial=0)
    return TokenizedText(np.append(tokens.ids, 1), np.append(tokens.starts, end), np.append(tokens.ends, end))


def ends_of(tokens: TokenizedText) -> np.ndarray:
    return prefix_ends(tokens.starts, tokens.ends)


@settings(max_examples=25)
@given(answers)
def test_pairs_are_those_of_equal_prefixes(text):
    """Whatever each kind of tokenizer does to the text that it gives back byte by byte."""
    text = unicodedata.normalize("NFC", text)
    tokens = {name: with_end_of_turn(tokenizer(text)) for name, tokenizer in KINDS.items()}
    pieces = {name: [KINDS[name].token_bytes(i) for i in found.ids[:-1].tolist()] for name, found in tokens.items()}
    for teacher, student in PAIRS:
        pairs = align_turn(ends_of(tokens[teacher]), ends_of(tokens[student]))
        expected = align_turn_naive([*pieces[teacher], b""], [*pieces[student], b""])
        assert list(map(tuple, pairs.tolist())) == expected, (teacher, student)
        last = (len(pieces[teacher]), len(pieces[student]))
        assert expected[-1] == last and expected[0] == (0, 0)


@settings(max_examples=25)
@given(answers)
def test_what_a_normaliser_changes_lines_up_where_whole_characters_end(text):
    """Also of a text that Qwen2's tokenizer composes: rows rise on both sides, from the first to the end of turn."""
    text += "e\u0301 n\u0303o"
    tokens = {name: with_end_of_turn(tokenizer(text)) for name, tokenizer in KINDS.items()}
    boundaries = set(np.cumsum([0, *(len(char.encode()) for char in text)]).tolist())
    for teacher, student in PAIRS:
        ends = ends_of(tokens[teacher]), ends_of(tokens[student])
        pairs = align_turn(*ends)
        assert tuple(pairs[0]) == (0, 0) and tuple(pairs[-1]) == (len(ends[0]) - 1, len(ends[1]) - 1)
        assert (np.diff(pairs, axis=0) > 0).all()
        assert (ends[0][pairs[:, 0]] == ends[1][pairs[:, 1]]).all()
        if "qwen2" in (teacher, student):
            assert set(ends[0][pairs[:, 0]].tolist()) <= boundaries | set(ends_of(tokens["byte-level"]).tolist())


def test_one_tokenizer_lines_up_everywhere():
    for name, tokenizer in KINDS.items():
        tokens = with_end_of_turn(tokenizer("How many bars? 12 中"))
        pairs = align_turn(ends_of(tokens), ends_of(tokens))
        assert pairs.tolist() == [[i, i] for i in range(len(tokens.ids))], name


def test_no_prefix_ends_inside_of_a_character():
    """Three tokens of a character of three bytes, which a normalising tokenizer gives the whole of it, and then one byte."""
    starts, ends = np.array([0, 0, 0, 3, 4]), np.array([3, 3, 3, 4, 4])
    assert prefix_ends(starts, ends).tolist() == [0, NOWHERE, NOWHERE, 3, 4]
    whole = np.array([0, 3, 4])
    assert align_turn(prefix_ends(starts, ends), whole).tolist() == [[0, 0], [3, 1], [4, 2]]
    assert align_turn(np.array([0, NOWHERE, 4]), np.array([0, NOWHERE, 4])).tolist() == [[0, 0], [2, 2]]


def test_a_space_that_the_template_leaves_to_the_answer_is_passed_over():
    """ " 7" as " " and "7", whose prefixes in the answer "7" are both empty: the row that predicts "7" counts."""
    idefics = prefix_ends(np.array([0, 0, 1]), np.array([0, 1, 1]))
    other = prefix_ends(np.array([0, 1]), np.array([1, 1]))
    assert align_turn(idefics, other).tolist() == [[1, 0], [2, 1]]
    assert align_turn(other, idefics).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("student", ["internvl_llama", "idefics3", "qwen2_vl"])
def test_turns_are_lined_up_each_by_itself(tiny, student):
    """Rows that have a target are counted over turns, and so are the student's answer tokens."""
    sample = conversation(("How many?", "7 of 9"), ("And?", ""), ("What?", "a red square 中"))
    encoded = {name: Renderer(load_processor(tiny(name))).encode(sample) for name in ("qwen2_vl", student)}
    targets = answer_targets(encoded["qwen2_vl"])
    lengths = encoded["qwen2_vl"].answer_lengths
    nothing = np.empty((len(targets["target_id"]), 0), np.float32)
    rows = AnswerRows(
        turn=np.repeat(np.arange(3), [n + 1 for n in lengths]),
        position=targets["target_id"],
        token_id=targets["target_id"],
        states=nothing,
        **targets,
        target_logit=nothing,
        topk_ids=nothing,
        topk_logits=nothing,
        logsumexp=nothing,
    )
    found = align(rows, encoded[student].answers)
    assert found.first.sum() == 3 and found.first[0]
    texts = [answer.encode() for answer in ("7 of 9", "", "a red square 中")]
    for turn, text in enumerate(texts):
        first_t, first_s = sum(lengths[:turn]), sum(encoded[student].answer_lengths[:turn])
        in_turn = (found.teacher_rows >= first_t) & (found.teacher_rows < first_t + lengths[turn])
        inside = found.student_rows[in_turn] - first_s
        assert ((inside >= 0) & (inside < encoded[student].answer_lengths[turn])).all()
        begins = encoded["qwen2_vl"].answers[turn].starts[found.teacher_rows[in_turn] - first_t]
        assert (begins == encoded[student].answers[turn].starts[inside]).all()
        assert begins[0] == 0 and begins[-1] == len(text)
    if student == "qwen2_vl":
        assert (found.teacher_rows == np.arange(sum(lengths))).all()
        assert (found.student_rows == found.teacher_rows).all()
