"""HTML pages that stand alone: one file, no script, nothing from the network, every text from data escaped.

The page itself forbids the rest: its Content-Security-Policy allows styles and pictures that are in the file, and nothing
else. What is folded or switched on it works without a script (`details`, radio buttons), so by keyboard too.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import genrecal
from genrecal.files import write_whole
from genrecal.inspect.text import JOINERS, visible
from genrecal.report import chart

MOST_TEXT = 20_000  # characters of one text of the data
TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template of `genrecal/report/templates` to a file that is whole or not there."""
    text = _environment().get_template(template).render(version=genrecal.__version__, **values)
    write_whole(path, text.encode("utf-8", "backslashreplace"))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        name: getattr(chart, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
    }
    environment.globals["legend"] = legend
    return environment


def _shown(value: Any) -> Any:
    """What a template prints of a value: of a text at most `MOST_TEXT` characters; those that control something, and those
    that turn the reading direction, as escapes."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    rest = len(value) - MOST_TEXT
    return visible(value[:MOST_TEXT], keep="\n" + JOINERS) + (f" … and {rest} more characters" if rest > 0 else "")


def legend(panels: Sequence[chart.Panel | None]) -> list[tuple[str, int, int]]:
    """(label, colour, dash) of the lines of panels that stand together, each once."""
    return list(dict.fromkeys((p.label, p.colour, p.dash) for panel in panels if panel for p in panel.paths))
