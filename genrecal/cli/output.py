"""Printing of results: fitted to a terminal, unwrapped in a pipe, or as JSON."""

import io
import json
import math
from typing import Any

import typer
from rich.console import Console

console = Console(soft_wrap=True)
UNLIMITED = 1_000_000  # columns of output that does not go to a terminal


def printable(text: str) -> str:
    """Text with control and invisible characters escaped, on one line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def show(content: Any, as_json: bool = False) -> None:
    """Print JSON, or text or a rich renderable."""
    if as_json:
        typer.echo(json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False))
    elif isinstance(content, str):
        typer.echo(content)
    elif console.is_terminal:
        console.print(content)
    else:
        text = io.StringIO()
        Console(file=text, width=UNLIMITED, soft_wrap=True).print(content)
        typer.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def plain_json(value: Any) -> Any:
    """What JSON can hold: NaN and infinities become null, and other types become text."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, str | int | bool) else str(value)
