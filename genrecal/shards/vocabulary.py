"""The teacher's vocabulary, from the `tokenizer.json` that a cache keeps: read as JSON, no tokenizer library is needed."""

import functools
import json
from dataclasses import dataclass

from genrecal.shards.layout import TEACHER_FOLDER
from genrecal.shards.storage import Store
from genrecal.shards.strict_json import strict_json
from genrecal.token_bytes import SPACE, token_bytes

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 2**26  # those of today's models have 2 to 35 MB


@dataclass(frozen=True)
class Vocabulary:
    """Token ids -> what they stand for.

    Args:
        tokens: of the model and added, special or not, as they are spelled there.
        decoder: JSON; see `genrecal.token_bytes.token_bytes`.
    """

    tokens: dict[int, str]
    decoder: str

    def text(self, token_id: int) -> str | None:
        """A token as text; a byte that is no whole character stands as `\\xNN`. None for an id past the vocabulary."""
        data = self.bytes(token_id)
        return None if data is None else data.decode("utf-8", "backslashreplace")

    def bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; None for an id past the vocabulary, as padded heads have them."""
        token = self.tokens.get(token_id)
        return None if token is None else token_bytes(token, self.decoder)

    @property
    def is_exact(self) -> bool:
        """Whether tokens stand for the same bytes behind any text: byte-level and sentencepiece-like decoders."""
        return "ByteLevel" in self.decoder or SPACE in self.decoder


def load_vocabulary(store: Store, folder: str = f"{TEACHER_FOLDER}/") -> tuple[Vocabulary | None, str]:
    """The teacher's vocabulary, or None and why ids are shown alone."""
    name = folder + TOKENIZER_FILE
    path = store.where(name)
    try:
        return _read_vocabulary(store.read(name, 0, MAX_TOKENIZER_BYTES + 1)), ""
    except OSError as error:
        return None, f"{path}: {error.strerror or error}: tokens are shown by their ids"
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return None, f"{path}: not a readable tokenizer ({error!r}): tokens are shown by their ids"


@functools.lru_cache(maxsize=4)
def _read_vocabulary(tokenizer: bytes) -> Vocabulary:
    content = strict_json(tokenizer, MAX_TOKENIZER_BYTES)
    vocab = content["model"]["vocab"]
    # BPE and WordLevel map tokens to ids; Unigram lists tokens with their scores.
    tokens = {int(i): str(token) for token, i in vocab.items()} if isinstance(vocab, dict) else {
        i: str(entry[0]) for i, entry in enumerate(vocab)
    }  # fmt: skip
    added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or []}
    return Vocabulary(tokens | added, json.dumps(content.get("decoder"), ensure_ascii=False))
