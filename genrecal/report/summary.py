"""Figures as Markdown."""

import math
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def plus_minus(value: float, error: float, *, percent: bool = False) -> str:
    """A mean and its standard error, which is "-" where one conversation gives none (NaN)."""
    form = ".1%" if percent else ".3f"
    return f"{value:{form}} ± {'-' if math.isnan(error) else format(error, form)}"
