"""Tokens and the bytes they cover, for byte-level, sentencepiece-like, normalising and other tokenizers."""

import functools
import json
import unicodedata

import pytest
import tiny_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genrecal.errors import SampleError
from genrecal.token_bytes import token_bytes
from genrecal.vlm.tokens import ByteTokenizer, TokenizedText

MARKS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


def tokenizer_of(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return tiny_models.fast(backend, tiny_models.INTERNVL, specials=MARKS[2:])


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


@given(any_text | from_the_corpus)
def test_ranges_tile_any_text_byte_level(text: str) -> None:
    assert_tiles(BYTE_LEVEL, text)


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


def test_a_tokenizer_whose_normaliser_changes_the_text_itself_is_refused() -> None:
    """NFC leaves the text the same to Unicode; NFKC makes 102 of 10²."""
    with pytest.raises(SampleError, match=r"does not give the answer back: '10² m' comes out as '102 m'"):
        normalising(normalizers.NFKC())("10² m")
    with pytest.raises(SampleError, match="'A red' comes out as 'a red'"):
        normalising(normalizers.Lowercase())("A red")


def test_the_sentencepiece_space_mark_itself_is_refused() -> None:
    with pytest.raises(SampleError, match="'a▁b' comes out as 'a b'"):
        SENTENCEPIECE("a▁b")
    assert_tiles(BYTE_LEVEL, "a▁b")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(SampleError, match="half a surrogate pair"):
        BYTE_LEVEL("\ud83d")


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused() -> None:
    backend = tiny_models.byte_bpe(MARKS)
    backend.decoder = None  # nothing says any more that its tokens are byte-level
    with pytest.raises(SampleError, match="does not give the answer back: 'Grüße'"):
        ByteTokenizer(tokenizer_of(backend))("Grüße")


# ------------------------------------------------------------------------------------------------------ added tokens


ADDED = [
    "▁▁",
    "  ",
    "\t\t",
    "<table>",
    "été",
    "a b",
    "<0x41>",
    "<0xE4>",
    "Ġ",
    "\ufffd",
    "中文",
    "red",
    "▁red",
    "e\u0301",
]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def gemma_like() -> Tokenizer:
    """Gemma's: no space before the text."""
    backend = tiny_models.sentencepiece_bpe(MARKS)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def metaspace() -> Tokenizer:
    backend = tiny_models.sentencepiece_bpe(MARKS)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return backend


def nfc() -> Tokenizer:
    backend = tiny_models.byte_bpe(MARKS)
    backend.normalizer = normalizers.NFC()
    return backend


def word_level() -> Tokenizer:
    """Not a generative model's: tokens are joined by spaces."""
    words = ["<unk>", *MARKS, "a", "\n", ":", "red", "square", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


BACKENDS = {
    "byte-level": lambda: tiny_models.byte_bpe(MARKS),
    "nfc": nfc,
    "sentencepiece": lambda: tiny_models.sentencepiece_bpe(MARKS),
    "gemma": gemma_like,
    "metaspace": metaspace,
    "word-level": word_level,
}


@functools.cache
def with_added(kind: str, flags: frozenset[str]) -> ByteTokenizer:
    backend = BACKENDS[kind]()
    backend.add_tokens([AddedToken(text, **{flag: flag in flags for flag in FLAGS}) for text in ADDED])
    return ByteTokenizer(tokenizer_of(backend))


def assert_right_or_refused(tokenizer: ByteTokenizer, text: str) -> bool:
    """Whether the text was read. It is then what the tokenizer decodes, and each token covers its own bytes."""
    try:
        tokens = tokenizer(text)
    except SampleError:
        return False
    if unicodedata.normalize("NFC", text) == text:
        assert_tiles(tokenizer, text)
    else:
        assert unicodedata.normalize("NFC", decoded(tokenizer, tokens)) == unicodedata.normalize("NFC", text)
        assert not text or (tokens.starts[0], tokens.ends[-1]) == (0, len(text.encode()))
    assert tokenizer.text(tokens.ids.tolist()) == decoded(tokenizer, tokens)
    return True


HARD = [
    *("  ", "   ", "\t", "\r\n", "\n\n", "\x00", "\x7f", "▁", "▁▁", " ", "a", "b", ".", "1", "²", "é", "e\u0301", "中"),
    *("\u200d", "👩‍🔬", "🇪🇺", "مرحبا", "\u202e", "\u1100\u1161", "\ufffd", "Ġ", "<0x0A>", "\u00a0", "\u3000"),
    *("def f(x):\n    return x", "red square", *ADDED, *MARKS),
]
hard_text = st.lists(st.sampled_from(HARD) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


@pytest.mark.parametrize("kind", BACKENDS)
@settings(max_examples=150)
@given(text=hard_text, flags=st.frozensets(st.sampled_from(FLAGS)))
@example(text="a  b", flags=frozenset())
@example(text="x <table> y", flags=frozenset({"lstrip", "rstrip"}))
def test_text_with_added_tokens_is_right_or_refused(kind: str, text: str, flags: frozenset[str]) -> None:
    assert_right_or_refused(with_added(kind, flags), text)


def test_a_space_that_the_tokenizer_puts_behind_an_added_token_is_refused() -> None:
    """Llama 2's normaliser, which begins anew behind each."""
    with pytest.raises(SampleError, match=r"'x\\t\\ty' comes out as 'x\\t\\t y'"):
        with_added("sentencepiece", frozenset())("x\t\ty")


@pytest.mark.parametrize("kind", ["byte-level", "nfc", "gemma", "metaspace"])
@pytest.mark.parametrize("text", ["a  b", "if x:\n    y  # z", "A.  B", "x\t\ty", "<table>", "a b", "中文", " red  "])
def test_added_tokens_are_bytes_of_the_text(kind: str, text: str) -> None:
    """Whatever the vocabulary spells them like: two spaces are `▁▁` in Gemma's."""
    tokenizer = with_added(kind, frozenset())
    assert_tiles(tokenizer, text)
    added = tokenizer.tokenizer.added_tokens_decoder
    if text not in ("A.  B", "if x:\n    y  # z"):
        assert any(token_id in added for token_id in tokenizer(text).ids.tolist())


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_an_added_token_that_swallows_spaces_is_refused_beside_them(flag: str) -> None:
    tokenizer = with_added("byte-level", frozenset({flag}))
    with pytest.raises(SampleError, match="'x <table> y' comes out as 'x ?<table> ?y'"):
        tokenizer("x <table> y")
    assert_tiles(tokenizer, "x<table>y")


def test_an_added_token_that_the_decoder_garbles_is_refused() -> None:
    """A byte-level decoder takes letters of its alphabet for bytes."""
    with pytest.raises(SampleError, match="is no text"):
        with_added("byte-level", frozenset())("été")


@pytest.mark.parametrize("kind", ["byte-level", "nfc", "sentencepiece", "gemma", "metaspace"])
def test_bytes_of_all_entries_are_the_decoders(kind: str) -> None:
    """The rule that reads a tokenizer.json without a tokenizer gives what decoding gives."""
    tokenizer = with_added(kind, frozenset())
    decoder = json.dumps(json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
    for token, token_id in tokenizer.tokenizer.get_vocab().items():
        assert token_bytes(token, decoder) == tokenizer.token_bytes(token_id), token
