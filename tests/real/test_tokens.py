"""Bytes of tokens, answers and pairs over the tokenizers of released models."""

import functools
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from genrecal.errors import SampleError
from genrecal.token_bytes import token_bytes
from genrecal.vlm.pair import compare_pair
from genrecal.vlm.tokens import ByteTokenizer

pytestmark = pytest.mark.real

NAMES = ["gemma3-270m", "qwen3-tiny", "qwen2-tiny", "llama3-tiny", "llama3_1-tiny", "deepseek-tiny", "gpt4o-tiny"]
CODE = "def f(x):\n    if x:\n        return [\n\t\t1,  # one\n        ]\n\n\n    return None  \r\n"
PIECES = [
    *(" ", "  ", "   ", " " * 17, "\t", "\t\t", "\n", "\n\n", "\r\n", "\x00", "\x1b", "\x7f", "\u00a0", "\u3000", "\u200d"),
    *("▁", "▁▁", "Ġ", "\ufffd", "é", "e\u0301", "\u0301", "n\u0323\u0307", "가", "\u1100\u1161", "ﬁ", "²", "Å", "\u212b"),
    *("中文。", "日本語", "مرحبا بالعالم", "שלום", "👩‍👩‍👧‍👦", "🇪🇺", "👍🏽", "\U000e0041", "𝔘", "ไทย"),
    *("a", "A", "1", "12345", ".", ",", "'s", "</", "<0x0A>", "<table>", "<think>", "<|x|>", "| a  | b |", CODE),
]  # fmt: skip


@functools.cache
def tokenizer_of(folder: Path) -> ByteTokenizer:
    return ByteTokenizer(AutoTokenizer.from_pretrained(folder))


@functools.cache
def added_of(folder: Path) -> list[str]:
    return [str(token) for token in tokenizer_of(folder).tokenizer.added_tokens_decoder.values()]


def assert_right(folder: Path, text: str) -> None:
    """Each token covers its own bytes, and all of them are what the tokenizer decodes; U+2581 is refused where it is lost."""
    tokenizer = tokenizer_of(folder)
    try:
        tokens = tokenizer(text)
    except SampleError as error:
        assert "gemma" in folder.name and "▁" in text and "comes out as" in str(error)
        return
    ids, data = tokens.ids.tolist(), text.encode()
    decoded = tokenizer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert tokenizer.text(ids) == decoded
    assert ids == tokenizer.tokenizer(text, add_special_tokens=False).input_ids
    if decoded == text:
        assert [data[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)] == [
            *map(tokenizer.token_bytes, ids)
        ]
        assert [0, *tokens.ends] == [*tokens.starts, len(data)]
    else:
        assert "qwen" in folder.name and decoded == unicodedata.normalize("NFC", text)
        assert (tokens.starts[0], tokens.ends[-1]) == (0, len(data))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_text_is_read_right(real: Path, name: str, data: st.DataObject) -> None:
    piece = st.sampled_from(PIECES) | st.sampled_from(added_of(real / name)) | st.characters(exclude_categories=["Cs"])
    assert_right(real / name, data.draw(st.lists(piece, max_size=10).map("".join)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["a  b", CODE, "One.  Two.", "  a ", "\t\tx", "e\u0301", "<table>  <td>"])
def test_runs_of_spaces_are_read(real: Path, name: str, text: str) -> None:
    tokenizer_of(real / name)(text)
    assert_right(real / name, text)


def test_a_typed_mark_is_no_space(real: Path) -> None:
    with pytest.raises(SampleError, match="'a▁▁b' comes out as 'a  b'"):
        tokenizer_of(real / "gemma3-270m")("a▁▁b")
    for name in NAMES[1:]:
        assert_right(real / name, "a▁▁b")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_every_entry(real: Path, name: str) -> None:
    """Two ways: what the tokenizer decodes, and what its tokenizer.json says without a tokenizer."""
    tokenizer = tokenizer_of(real / name)
    decoder = json.dumps(json.loads((real / name / "tokenizer.json").read_text())["decoder"], ensure_ascii=False)
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert len(vocabulary) > 120_000
    assert [t for t, i in vocabulary.items() if tokenizer.token_bytes(i) != token_bytes(t, decoder)] == []


@pytest.mark.parametrize("name", ["gemma3-270m", "llama3_1-tiny", "qwen3-tiny", "deepseek-tiny"])
def test_gemma_pairs_with_itself_and_others_on_the_default_text(real: Path, name: str) -> None:
    pair = compare_pair(real / "gemma3-270m", real / name)
    assert pair.teacher.ends[-1] == pair.student.ends[-1] == pair.num_bytes
    assert (pair.shared.differences == ()) == pair.traditional == (name == "gemma3-270m")
