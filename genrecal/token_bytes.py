"""Vocabulary entry -> the bytes of text that it stands for."""

import functools
import re

SPACE = "▁"  # how sentencepiece writes a space


def token_bytes(token: str, decoder: str) -> bytes:
    """The bytes of a vocabulary entry, as the tokenizer's own decoder writes them.

    A decoder does not know which entries are added tokens: Gemma's added `▁▁` is two spaces.

    Args:
        token: a model's entry or an added token, special or not.
        decoder: the "decoder" of a tokenizer.json as JSON, not escaped to ASCII.
    """
    if "ByteLevel" in decoder:  # Qwen2, Llama 3
        return alphabet_bytes(token) or token.encode(errors="backslashreplace")
    if "ByteFallback" in decoder and (byte := fallback_byte(token)):
        return byte
    return (token.replace(SPACE, " ") if SPACE in decoder else token).encode(errors="backslashreplace")


def fallback_byte(token: str) -> bytes | None:
    """The byte of a sentencepiece byte token such as `<0x0A>`; None for any other entry."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(match[1], 16)]) if match else None


def alphabet_bytes(token: str) -> bytes | None:
    """The bytes of a byte-level entry; None for an entry that byte-level BPE cannot write and that stands for itself."""
    alphabet = _byte_alphabet()
    return bytes(alphabet[char] for char in token) if all(char in alphabet for char in token) else None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + number): value for number, value in enumerate(others)}
