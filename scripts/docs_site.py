"""What the documentation site is built with beside docs/: hooks of MkDocs, named in mkdocs.yml.

Pages that would be copies by hand are made here: the commands' reference, from the program itself; contributing and
changes, from the files at the top of the repository; the table of costs, from the page of benchmarks.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that stand outside docs/, by their names on the site.
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/, their links to it made relative."""
    for name, source in OUTSIDE.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text())
        for page, file in OUTSIDE.items():
            text = text.replace(f"]({file})", f"]({page})")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what is made in place of its mark, an HTML comment."""
    return re.sub(r"^<!-- (commands|forecasts)[^>]* -->$", lambda mark: MADE[mark[1]](), markdown, flags=re.MULTILINE)


def commands() -> str:
    """Every command with its options, as Typer writes them down; one heading a command."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "genrecal.cli", "utils", "docs", "--name", "genrecal"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise PluginError(f"the commands' reference cannot be made: {done.stderr}")
    _, options, rest = re.split(
        r"^# `genrecal`\n|^\*\*Commands\*\*:\n(?:\n\* .*)*", done.stdout, maxsplit=2, flags=re.M
    )
    return options + rest


def forecasts() -> str:
    """The table under Forecasts in the benchmarks."""
    section = (ROOT / "docs/benchmarks.md").read_text().split("\n## Forecasts\n")[1]
    return re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)[0]


MADE = {"commands": commands, "forecasts": forecasts}
