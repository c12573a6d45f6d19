"""A run's figures as Markdown: what the models score, and how each loss term went."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genrecal.files import write_whole


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


def terms_by_stage(metrics: Sequence[Mapping[str, Any]], *, share: float = 0.1) -> list[list[str]]:
    """Per stage and loss term: its mean over the first and the last tenth of the steps."""
    rows = []
    for stage in sorted({line["stage"] for line in metrics}):
        lines = [line for line in metrics if line["stage"] == stage]
        some = max(1, round(len(lines) * share))
        names = [name for name in lines[0] if name.endswith(("_first", "_later"))]
        for name in names:
            first, last = ([line[name] for line in part if name in line] for part in (lines[:some], lines[-some:]))
            rows.append([str(stage), name, *(f"{sum(p) / len(p):.3f}" if p else "-" for p in (first, last))])
    return rows


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write `sections` of (heading, Markdown) under a title."""
    parts = [f"# {title}", *(f"## {heading}\n\n{body}" for heading, body in sections)]
    write_whole(path, ("\n\n".join(parts) + "\n").encode())
