"""JSON from a file that may come from anywhere: of a bounded length and depth, and with no numbers that JSON has not."""

import json
import math
from typing import Any


def strict_json(data: bytes | memoryview | str, most_bytes: int) -> Any:
    """`json.loads` that raises ValueError, and nothing else, for what is no JSON or has more than `most_bytes`.

    Refused besides: NaN, infinities, `1e400`, half a surrogate pair, and more levels than Python's stack has.
    """
    content = data.encode() if isinstance(data, str) else bytes(data)
    if len(content) > most_bytes:
        raise ValueError(f"{len(content)} bytes of JSON; the limit is {most_bytes}")
    try:
        value = _DECODER.decode(content.decode(json.detect_encoding(content), "surrogatepass"))  # as json.loads does
        if b"\\ud" in content or b"\\uD" in content:  # half a pair stands as an escape; no UTF-8 has it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON of too many levels") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}, a number that JSON or a float64 has not")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)  # json.loads would make one at each call
