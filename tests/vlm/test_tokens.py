"""Tokens and the bytes they cover, for byte-level, sentencepiece-like and normalising tokenizers."""

import pytest
import tiny_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from genrecal.errors import SampleError
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MARKS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


def tokenizer_of(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return tiny_models.fast(backend, tiny_models.CHATML, specials=MARKS[2:])


def normalising(normalizer: normalizers.Normalizer) -> ByteTokenizer:
    backend = tiny_models.byte_bpe(MARKS)
    backend.normalizer = normalizer
    return ByteTokenizer(tokenizer_of(backend))


BYTE_LEVEL = ByteTokenizer(tokenizer_of(tiny_models.byte_bpe(MARKS)))
SENTENCEPIECE = ByteTokenizer(tokenizer_of(tiny_models.sentencepiece_bpe(MARKS)))
NFC = normalising(normalizers.NFC())
KINDS = {"byte-level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE, "nfc": NFC}

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
from_the_corpus = st.lists(st.sampled_from([*" \n.0?中é🙂", "What is", " red", "square", "\u0301", "  "])).map("".join)

TEXTS = {
    "plain": "a red square",
    "leading space": " blue",
    "leading spaces": "   blue",
    "leading newline": "\n\nyes",
    "trailing space": "yes \n",
    "only space": " ",
    "digits": "1234567890",
    "leading digit": "7 of 9",
    "chinese": "收据总计：１２元",
    "emoji": "👩‍👩‍👧 and 🙂",
    "controls": "\x00\x07\t\r\n\x7f",
    "looks like a byte token": "<0x41>",
    "nothing": "",
}


def decoded(tokenizer: ByteTokenizer, tokens: TokenizedText) -> str:
    """What the tokenizer itself makes of the ids as the continuation of a prompt that ends in "a"."""
    prompt = tokenizer.tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer.tokenizer.decode([*prompt, *tokens.ids.tolist()], clean_up_tokenization_spaces=False)
    assert text.startswith("a")
    return text[1:]


def assert_tiles(tokenizer: ByteTokenizer, text: str) -> None:
    """The ranges stand one after another over the text's bytes, each as long as its token's bytes."""
    tokens = tokenizer(text)
    assert tokens.ids.dtype == tokens.starts.dtype == tokens.ends.dtype == "int64"
    assert len(tokens.ids) == len(tokens.starts) == len(tokens.ends)
    assert [0, *tokens.ends] == [*tokens.starts, len(text.encode())]
    pieces = [text.encode()[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    assert pieces == [tokenizer.token_bytes(token_id) for token_id in tokens.ids.tolist()]
    assert decoded(tokenizer, tokens) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_tile_the_text_and_ids_decode_to_it(kind: str, text: str) -> None:
    assert_tiles(KINDS[kind], text)


@settings(deadline=None)
@given(any_text | from_the_corpus)
def test_ranges_tile_any_text_byte_level(text: str) -> None:
    assert_tiles(BYTE_LEVEL, text)


@settings(deadline=None)
@given((any_text | from_the_corpus).filter(lambda text: "▁" not in text))
def test_ranges_tile_any_text_sentencepiece(text: str) -> None:
    assert_tiles(SENTENCEPIECE, text)


def test_a_token_may_cover_a_part_of_a_character() -> None:
    tokens = BYTE_LEVEL("中")
    assert (tokens.starts.tolist(), tokens.ends.tolist()) == ([0, 1, 2], [1, 2, 3])


def test_a_continuation_gets_no_space_that_it_does_not_have() -> None:
    """A sentencepiece tokenizer asked for "red" alone answers "▁red", a token that no prompt would be followed by."""
    alone = SENTENCEPIECE.tokenizer("red", add_special_tokens=False)["input_ids"]
    assert SENTENCEPIECE.token_bytes(alone[0]).startswith(b" ")
    assert not SENTENCEPIECE.token_bytes(int(SENTENCEPIECE("red").ids[0])).startswith(b" ")
    assert SENTENCEPIECE.token_bytes(int(SENTENCEPIECE(" red").ids[0])).startswith(b" ")


@settings(deadline=None)
@given(any_text | from_the_corpus)
def test_ids_are_the_tokenizers_own(text: str) -> None:
    assert BYTE_LEVEL(text).ids.tolist() == BYTE_LEVEL.tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------- normalising tokenizers


def test_a_decomposed_character_keeps_its_place_in_the_original_text() -> None:
    text = "cafe\u0301 au lait"  # é as two characters of three bytes; NFC makes it one of two
    tokens = NFC(text)
    composed = NFC("caf\u00e9 au lait")
    assert tokens.ids.tolist() == composed.ids.tolist()
    assert b"".join(map(NFC.token_bytes, tokens.ids.tolist())) == "caf\u00e9 au lait".encode()
    assert tokens.ends[-1] == len(text.encode()) == composed.ends[-1] + 1
    after = {int(start) for start in composed.starts if start >= len("caf\u00e9".encode())}
    assert {int(start) - 1 for start in tokens.starts if start >= len("cafe\u0301".encode())} == after


@settings(deadline=None)
@given(any_text | from_the_corpus)
@example("A\u0300")  # the tokenizer's own offsets leave the mark out
@example("e\u0301 \u1100\u1161\u11a8 x\u0323\u0307")
def test_ranges_of_a_normalised_text_are_ordered_and_reach_its_end(text: str) -> None:
    tokens = NFC(text)
    assert len(tokens.ids) == len(tokens.starts) == len(tokens.ends)
    assert b"".join(map(NFC.token_bytes, tokens.ids.tolist())) == normalizers.NFC().normalize_str(text).encode()
    bounds = [(int(start), int(end)) for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    assert bounds == sorted(bounds) and all(0 <= start <= end <= len(text.encode()) for start, end in bounds)
    assert not text or (bounds[0][0], bounds[-1][1]) == (0, len(text.encode()))


def test_the_sentencepiece_space_mark_itself_is_taken_as_a_space() -> None:
    tokens = SENTENCEPIECE("a▁b")
    assert b"".join(map(SENTENCEPIECE.token_bytes, tokens.ids.tolist())).strip() == b"a b"
    assert tokens.ends[-1] == len("a▁b".encode())


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused() -> None:
    backend = tiny_models.byte_bpe(MARKS)
    backend.decoder = None  # nothing says any more that its tokens are byte-level
    with pytest.raises(SampleError, match="does not give the answer back: 'Grüße'"):
        ByteTokenizer(tokenizer_of(backend))("Grüße")
