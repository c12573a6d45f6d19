"""The documentation site: it builds strictly and loads nothing from the network; what its pages promise is true."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser

import pytest
from test_docs import COMMANDS, ROOT, blocks
from torchvision_site import torchvision_path
from transformers.utils import is_torchvision_available

DOCS = ROOT / "docs"


# ----------------------------------------------------------------------------------------------------------- the build


class Loaded(HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src"))
        elif tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, from a process whose only way out is a proxy that is not there."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_site_builds_strictly_needs_no_network_and_has_its_generated_parts(site):
    """Strict: every link and anchor leads somewhere, every page is in the navigation."""
    pages = sorted(site.rglob("*.html"))
    sources = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert sources <= {page.relative_to(site) for page in pages}
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.found
        assert [address for address in parser.found if re.match(r"(\w+:)?//", address or "")] == [], page
    for style in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", style.read_text()) == []

    commands = (site / "cli.html").read_text()
    for name, command in COMMANDS.items():
        assert f'id="genrecal-{name}"' in commands
        for parameter in command.params:
            assert parameter.opts[0] in commands
    for page in (DOCS / "api").glob("*.md"):
        built = (site / "api" / page.with_suffix(".html").name).read_text()
        for module in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            assert f'id="{module}"' in built
    assert "qwen2-vl-72b" in (site / "costs.html").read_text()
    assert "Changelog" in (site / "changelog.html").read_text()
    assert (site / "contributing.html").exists()


def test_public_modules_stand_once_and_extras_are_those_of_the_package():
    listed = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed)) > 30
    for name in listed:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
    shown = set(re.findall(r"^\| `(\w+)` \| ", (DOCS / "index.md").read_text(), flags=re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert shown == set(extras) - {"docs", "dev"}


# -------------------------------------------------------------------------------------------------- what can go wrong


@functools.cache
def templates():
    """Every text of the package but its docstrings as one string each, with an ellipsis where a value is put in."""

    def text(node):
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "…"

    found = set()
    for path in (ROOT / "genrecal").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in docstrings:
                found.add(" ".join(text(node).split()))
    return found


def _says(template, message):
    """Whether the message's fixed parts stand in the template, in order."""
    place = 0
    for part in filter(None, (part.strip() for part in message.split("…"))):
        place = template.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def quoted_messages(page):
    """What the program prints by a page: the lines of its `text` blocks, and its table of messages. `…` for what differs."""
    lines = [line for block in blocks(page, "text") for line in block.splitlines()]
    _, _, table = page.read_text().partition("| message | what to do |\n")  # with numbers as N and M there
    lines += [
        re.sub(r"\b[NM]\b|\.\.\.", "…", message)
        for message in re.findall(r"^\| `([^`]+)`", table.partition("\n\n")[0], re.MULTILINE)
    ]
    return [re.sub(r"^genrecal: (error: )?|^warning: ", "", line) for line in lines]


def test_quoted_messages_are_the_programs():
    quoted = [message for page in DOCS.rglob("*.md") for message in quoted_messages(page)]
    assert [message for message in quoted if len(message.replace("…", "")) <= 10] == []  # too little to tell it by
    assert [message for message in quoted if not any(_says(template, message) for template in templates())] == []
    page = DOCS / "troubleshooting.md"
    assert len(quoted_messages(page)) >= 40
    for entry in re.split(r"^```text$", page.read_text(), flags=re.MULTILINE)[1:]:
        assert len(entry.split("```\n", 1)[1].split("\n## ")[0].split()) > 8, entry  # each says cause and remedy


# ------------------------------------------------------------------------------------------------------- the tutorial


@pytest.mark.slow
def test_tutorial(tmp_path):
    """All its files and commands, in its order, as they stand there but for fewer pictures and epochs."""
    page = DOCS / "tutorial.md"
    for language, fewer in (
        ("python", {"range(100)": "range(40)", "pictures[:20]": "pictures[:8]", "pictures[20:]": "pictures[8:]"}),
        ("toml", {"epochs = 3": "epochs = 1"}),
    ):
        text = "\0".join(blocks(page, language))
        for shown, taken in fewer.items():
            assert shown in text
            text = text.replace(shown, taken)
        for block in text.split("\0"):
            (tmp_path / block.split()[1]).write_text(block)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, words in (("python", ""), ("genrecal", "-m genrecal ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
        (programs / name).chmod(0o755)
    script = "set -eu -o pipefail\n" + "\n".join(blocks(page, "sh"))
    path = str(ROOT)
    if not is_torchvision_available():  # the page asks for it
        path = f"{torchvision_path(tmp_path / 'site')}:{ROOT}"
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    losses = re.findall(r"^stage (\d) (\w+) +([\d.]+) -> ([\d.]+)$", done.stdout, flags=re.MULTILINE)
    assert [(stage, name) for stage, name, *_ in losses] == [
        ("1", "kl_first"), ("1", "kl_later"), ("2", "kl_first"), ("2", "kl_later"), ("2", "sft"), ("3", "sft"),
    ]  # fmt: skip
    assert float(losses[1][3]) < float(losses[1][2]), losses  # at these rates the first token hardly moves
    assert "blank check" in done.stdout and "whole: " in done.stdout
    scores = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "scores").glob("*.jsonl")}
    assert scores.keys() == {"teacher", "before", "genrecal", "sft"} and len(set(scores.values())) == 1
    for name in ("mine", "mine-sft"):
        assert (tmp_path / "models" / name / "model.safetensors").exists()
    assert len(list((tmp_path / "looked-at").iterdir())) == 1
    said = done.stdout.split("the exported student says:")[1].splitlines()[0].strip()
    first = json.loads((tmp_path / "scores" / "genrecal.jsonl").read_text().splitlines()[0])
    assert said == first["prediction"]  # stock transformers and genrecal, of the same question
