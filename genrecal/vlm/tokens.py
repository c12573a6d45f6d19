"""Text -> token ids with the byte range that each token covers, for any tokenizer.

An answer is tokenised by itself, as a model meets it: the prompt's tokens are fixed before the first answer token is
generated, so no token may straddle the border. Two tokenizers' tokens are then comparable by the bytes they cover.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrecal.errors import SampleError
from genrecal.token_bytes import SPACE, token_bytes


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
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else {}
        self._byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        self.token_bytes = functools.cache(self._token_bytes)

    def __call__(self, text: str) -> TokenizedText:
        """Tokenise `text` as the continuation of a prompt.

        Raises SampleError when no way of asking the tokenizer gives back the text.
        """
        wanted = text.encode()
        for anchor in ("", "\n", ":", "a"):
            # A sentencepiece tokenizer puts a space before a text that it takes for the first; an anchor prevents it.
            before = self._plain_ids(anchor) if anchor else []
            ids = self._plain_ids(anchor + text)
            if ids[: len(before)] != before:
                continue
            ids = ids[len(before) :]
            pieces = [self.token_bytes(token_id) for token_id in ids]
            if b"".join(pieces) == wanted:
                lengths = np.array([len(piece) for piece in pieces], np.int64)
                ends = np.cumsum(lengths)
                return TokenizedText(np.array(ids, np.int64), ends - lengths, ends)
        return self._normalised(text)

    def _normalised(self, text: str) -> TokenizedText:
        """A text that the tokenizer's normaliser changes (NFC, say): byte ranges from its own offsets instead."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        if b"".join(map(self.token_bytes, ids)) not in (normal.encode(), normal.replace(SPACE, " ").encode()):
            raise SampleError(f"the tokenizer does not give the answer back: {text[:60]!r} comes out otherwise")
        lengths = np.cumsum([0] + [len(char.encode()) for char in text])
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        starts, ends = lengths[offsets[:, 0]], lengths[offsets[:, 1]]
        if len(ids):  # offsets may leave out a combining mark that was merged; it belongs to the token before
            starts[0] = 0
            ends = np.maximum(ends, np.append(starts[1:], lengths[-1]))
        return TokenizedText(np.array(ids, np.int64), starts, ends)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            raise SampleError(f"has the token {token_id}, which the tokenizer does not know")
        return token_bytes(token, byte_level=self._byte_level)
