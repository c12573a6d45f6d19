"""Printing of results: fitted to a terminal, unwrapped in a pipe, or as JSON."""

import io
import json
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
        from genrecal.shards.inspect import plain_json

        typer.echo(json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False))
    elif isinstance(content, str):
        typer.echo(content)
    elif console.is_terminal:
        console.print(content)
    else:
        text = io.StringIO()
        Console(file=text, width=UNLIMITED, soft_wrap=True).print(content)
        typer.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
