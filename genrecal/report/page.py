"""HTML pages that stand alone: one file, no script, nothing from the network, every text from data escaped.

The page itself forbids the rest: its Content-Security-Policy allows styles and images that are in the file, and nothing
else. Folding and switching work without a script (`details`, radio buttons), so by keyboard too.
"""

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import genrecal
from genrecal.errors import UsageError
from genrecal.files import write_whole
from genrecal.inspect.text import JOINERS, visible
from genrecal.report import chart
from genrecal.samples import decode_image

MAX_TEXT = 20_000  # characters of one text of the data
TEMPLATES = Path(__file__).parent / "templates"
# An image stands in the page as its original bytes; a larger one, or one that not every browser shows, is made small.
ORIGINAL_BYTES, ORIGINAL_PIXELS, SMALL_SIDE = 2**20, 2**24, 1024
BROWSER_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def write_page(path: Path, template: str, *, option: str, **values: Any) -> None:
    """Render a template of `genrecal/report/templates` to a file that is whole or not there.

    Raises UsageError, which names the `option`, for a file that cannot be written.
    """
    text = _environment().get_template(template).render(version=genrecal.__version__, **values)
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


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
    names = ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
    environment.globals |= {name: getattr(chart, name) for name in names} | {"legend": legend}
    return environment


def _shown(value: Any) -> Any:
    """What a template prints: control characters and changes of direction as escapes, long texts cut."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    rest = len(value) - MAX_TEXT
    return visible(value[:MAX_TEXT], keep="\n" + JOINERS) + (f" … and {rest} more characters" if rest > 0 else "")


def legend(panels: Sequence[chart.Panel | None]) -> list[tuple[str, int, int]]:
    """(label, colour, dash) of the lines of panels that stand together, each once."""
    return list(dict.fromkeys((p.label, p.colour, p.dash) for panel in panels if panel for p in panel.paths))


def image_uri(data: bytes, form: str | None, pixels: int, side: int = SMALL_SIDE) -> tuple[str, bool]:
    """An image as a data URI, and whether it was made small. Raises SampleError for one that cannot be decoded.

    Args:
        form: the image's format as PIL names it. pixels: what its header says. side: the longest side of one made small.
    """
    kind = BROWSER_FORMATS.get(form or "")
    small = kind is None or len(data) > ORIGINAL_BYTES or pixels > ORIGINAL_PIXELS
    if small:
        image = decode_image(data)
        image.thumbnail((side, side))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        data, kind = stream.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}", small
