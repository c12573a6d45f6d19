"""Text -> token ids with the byte range that each token covers, for any tokenizer.

An answer is tokenised by itself, as a model meets it: the prompt's tokens are fixed before the first answer token is
generated, so no token may straddle the border. Two tokenizers' tokens are then comparable by the bytes they cover.

What a token stands for is what the tokenizer's own `decode` writes for it behind other text. Nothing here looks at how a
vocabulary spells its entries, except for tokens that hold a part of a character, and every text is compared with the
`decode` of all of its tokens.
"""

import functools
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrecal.errors import SampleError
from genrecal.token_bytes import alphabet_bytes, fallback_byte

SHOWN = 30  # characters of a text that are shown on each side of where it differs


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text and the bytes of it that each covers.

    ids: int64 `[n]`; starts, ends: int64 `[n]`, offsets into the text's UTF-8 bytes.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class ByteTokenizer:
    """A Hugging Face tokenizer that says which bytes its tokens stand for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Decoders may drop a space at the beginning of a text, so tokens are always decoded behind these.
        self._before = self._plain_ids("a")
        self._before_text = self._decode(self._before)
        self.token_bytes = functools.cache(self._token_bytes)

    def __call__(self, text: str) -> TokenizedText:
        """Tokenise `text` as the continuation of a prompt.

        The ids decode to `text`, or to its NFC form where the tokenizer normalises (Qwen's).

        Raises SampleError when no way of asking the tokenizer gives back the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SampleError(f"holds half a surrogate pair, which is no text: {error}") from None
        problem = ""
        for anchor in ("", "\n", ":", "a"):
            # A sentencepiece tokenizer puts a space before a text that it takes for the first; an anchor prevents it.
            before = self._plain_ids(anchor) if anchor else []
            ids = self._plain_ids(anchor + text)
            if ids[: len(before)] != before:
                continue
            ids = ids[len(before) :]
            try:
                found = self.text(ids)
            except SampleError as error:
                problem = f"{_around(text, 0)} {error}"
                continue
            if found == text:
                lengths = np.array([len(self.token_bytes(token_id)) for token_id in ids], np.int64)
                ends = np.cumsum(lengths)
                return TokenizedText(np.array(ids, np.int64), ends - lengths, ends)
            alike = unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", text)
            if alike and self.tokenizer.is_fast:  # others know no offsets
                return self._normalised(anchor, text, len(before))
            place = len(os.path.commonprefix([text, found]))
            problem = f"{_around(text, place)} comes out as {_around(found, place)}"
        raise SampleError(f"the tokenizer does not give the answer back: {problem or _around(text, 0)}")

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for as the continuation of a prompt; special tokens are part of it.

        Raises SampleError for an id that the tokenizer does not know, for bytes that are no text, and where the tokens one by
        one are not what `tokenizer.decode` makes of them all.
        """
        data = b"".join(self.token_bytes(token_id) for token_id in ids)
        whole = self._decode([*self._before, *ids])
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"is no text: {error}") from None
        if whole != self._before_text + text:
            shown = whole.removeprefix(self._before_text)
            raise SampleError(f"is {_around(text, 0)} token by token, but the tokenizer decodes {_around(shown, 0)}")
        return text

    def _normalised(self, anchor: str, text: str, skipped: int) -> TokenizedText:
        """A text that the tokenizer's normaliser changes: byte ranges from its own offsets.

        Args:
            anchor: stands before the text, and is the first `skipped` tokens.
        """
        encoded = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"][skipped:]
        lengths = np.cumsum([0] + [len(char.encode()) for char in text])
        offsets = np.array(encoded["offset_mapping"][skipped:], np.int64).reshape(-1, 2) - len(anchor)
        starts, ends = lengths[offsets[:, 0]], lengths[offsets[:, 1]]
        if len(ids):  # offsets may leave out a combining mark that was merged; it belongs to the token before
            starts[0] = 0
            ends = np.maximum(ends, np.append(starts[1:], lengths[-1]))
        return TokenizedText(np.array(ids, np.int64), starts, ends)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            raise SampleError(f"has the token {token_id}, which the tokenizer does not know")
        text = self._decode([*self._before, token_id])
        whole = text.startswith(self._before_text) and "\ufffd" not in text
        if not whole and (part := fallback_byte(token) or alphabet_bytes(token)):
            return part  # of a character, which cannot be decoded alone
        return text.removeprefix(self._before_text).encode()


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - SHOWN) : place + SHOWN])
