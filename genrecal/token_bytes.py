"""A vocabulary's entry -> the bytes of text that it stands for."""

import functools
import re

SPACE = "▁"  # how sentencepiece writes a space


def token_bytes(token: str, *, byte_level: bool) -> bytes:
    """The bytes of a vocabulary's entry, as byte-level BPE (Qwen2, Llama 3) or sentencepiece-like BPE writes it.

    An entry that byte-level BPE cannot have written stands for itself.
    """
    if byte_level:
        alphabet = _byte_alphabet()
        if all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace(SPACE, " ").encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes the 256 bytes with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + number): value for number, value in enumerate(others)}
