"""What the documents say: their scripts run, and their options, settings, defaults, names and links exist."""

import ast
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pair_runs
import pytest
import torch
import typer
from conftest import mixed_samples, write_llava
from PIL import Image

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import app
from genrecal.objectives import OBJECTIVES
from genrecal.samples import open_samples
from genrecal.shards.layout import read_cache_json
from genrecal.shards.manifest import SCHEMA
from genrecal.shards.reader import open_cache
from genrecal.shards.storage import open_store
from genrecal.train.config import TrainConfig, _all_keys, _converted, _parse_value, load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def blocks(page, language):
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shell_lines(page, language="sh"):
    """The commands of its shell blocks, continuation lines joined, comments left out."""
    text = "".join(blocks(page, language)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def table(page, header):
    """The rows of the table whose first line begins so, as lists of cells."""
    lines = without_blocks(page).partition(header)[2].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:end]]


# ------------------------------------------------------------------------------------------------------- scripts that run

# The dtype of the head, the codec of all states, and how far that codec may move a logit of the tiny teacher.
CACHES = [("float32", "bf16", 0.02), ("bfloat16", "int8", 0.15), ("float32", "int4", 3.0)]
one_cache = pytest.mark.parametrize("cache", CACHES[1:2], indirect=True, ids=["int8"])


@pytest.fixture(scope="module", params=CACHES, ids=lambda param: f"{param[0]}-{param[1]}")
def cache(request, tiny, tmp_path_factory):
    """A cache of eight conversations, and one record that was skipped."""
    folder = tmp_path_factory.mktemp("docs")
    data = write_llava(folder / "data", mixed_samples(8))
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, {"id": "bad", "conversations": [{"from": "human", "value": "q"}]}]))
    dtype, codec, _ = request.param
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=getattr(torch, dtype))
    options = CacheOptions(top_k=5, draws=6, max_skip=0.2, answer_codec=codec, question_codec=codec)
    run_cache_job(teacher, open_samples([data]), folder / "cache", options)
    return folder / "cache"


def run_alone(name, cache, folder, *, blocked=("genrecal", "torch", "transformers", "safetensors")):
    """Run a script of the format's page where genrecal (and the model libraries) cannot be imported; its lines."""
    code = next(block for block in blocks(DOCS / "shard-format.md", "python") if block.startswith(f"# {name}\n"))
    (folder / name).write_text(code)
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", start, str(folder / name), str(cache)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_format_script_reads_what_genrecal_reads(cache, tmp_path):
    lines = run_alone("read_cache.py", cache, tmp_path)
    opened = open_cache(cache)
    record, rows = opened[0], opened[0].answer_rows()
    assert lines[0].split() == [record.key, *map(str, record.hidden().shape)]
    predicts = np.flatnonzero(rows.predicts)
    logits, ids = opened.head().logits(torch.from_numpy(record.hidden()[predicts])).max(-1)
    printed = np.array([line.split() for line in lines[2:]], float)
    expected = [
        rows.position[predicts], ids.numpy(), logits.numpy(),
        rows.topk_ids[predicts, 0], rows.topk_logits[predicts, 0], rows.target_id[predicts],
    ]  # fmt: skip
    assert printed.shape == (record.row["answer_tokens"], len(expected))
    np.testing.assert_allclose(printed, np.stack(expected, axis=1), atol=6e-4, rtol=0)
    moved = {codec: limit for _, codec, limit in CACHES}[opened.description["answer_codec"]]
    np.testing.assert_allclose(printed[:, 2], printed[:, 4], atol=moved)  # what the codec took away


def expected_lines(cache):
    """What the scripts print of each sample."""
    return [
        f"{r.key} {len(r.sample.messages)} {r.answer.num_rows} {[Image.open(io.BytesIO(i)).size for i in r.images]}"
        for r in open_cache(cache)
    ]


def test_other_tools_read_a_cache(cache, tmp_path):
    """webdataset, pyarrow and DuckDB, by the scripts of the page."""
    opened = open_cache(cache)
    assert run_alone("read_webdataset.py", cache, tmp_path) == expected_lines(cache)
    records = sorted(opened, key=lambda r: (r.row["log_prob"], r.key))[:3]
    assert run_alone("read_pyarrow.py", cache, tmp_path) == [f"{r.key} {r.row['log_prob']}" for r in records]
    categories, skipped, members = run_alone("read_duckdb.py", cache, tmp_path)
    assert categories.startswith(f"[('test', 8, {sum(r.row['answer_tokens'] for r in opened)}, ")
    assert "no answer" in skipped or "no assistant turn" in skipped
    sizes = {}
    for member in (member for record in opened for member in record.row["members"]):
        sizes.setdefault((member["tier"], member["name"].endswith(".arrow")), []).append(member["size"])
    assert members == str([(*group, len(found), sum(found)) for group, found in sorted(sizes.items())])


@one_cache
@pytest.mark.slow
def test_energon_and_datasets_read_a_cache(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (line,) = [line for line in shell_lines(DOCS / "shard-format.md") if line.startswith("energon ")]
    _, *words = shlex.split(line.replace("demo-out/cache", str(copy)))
    done = subprocess.run([Path(sys.executable).with_name("energon"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = run_alone("read_energon.py", copy, tmp_path, blocked=("genrecal",))
    assert sorted(line for line in lines if line.startswith("0000")) == expected_lines(cache)
    assert run_alone("read_datasets.py", cache, tmp_path, blocked=("genrecal",)) == [*expected_lines(cache), "8 cached"]


def test_format_page_names_every_field(cache):
    """Every column, key and metadata field that is written stands on the page, as code."""
    text = (DOCS / "shard-format.md").read_text()
    opened = open_cache(cache)
    description = read_cache_json(open_store(cache))
    head = (cache / "head.safetensors").read_bytes()
    facts = json.loads(json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"]["genrecal"])
    names = {
        *description, *(f"teacher.{name}" for name in description["teacher"]), *description["totals"],
        *opened[0].answer.column_names, *opened[0].question.column_names, *SCHEMA.names, *opened.shard_facts[0], *facts,
        *json.loads(opened[0].answer.schema.metadata[b"genrecal"]), *opened[0].sample.to_json(),
    } - {"teacher"}  # fmt: skip
    assert sorted(name for name in names if f"`{name}`" not in text) == []


@one_cache
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/api/index.md"])
def test_python_examples_run(cache, page):
    (code,) = blocks(ROOT / page, "python")
    names = {}
    exec(code.replace("demo-out/cache", str(cache)), names)
    assert len(names["cache"]) == 8


def test_python_of_reading_the_loss_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks(DOCS / "howto/loss.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    terms = {"kl_first": 0.5, "kl_later": 0.25, "ce_first": 1.5, "sft": 2.0}
    lines = [{"stage": stage, "step": step, **terms} for stage in (1, 2) for step in range(8)]
    (tmp_path / "runs/mine/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exec(code, {})
    assert capsys.readouterr().out.split() == " ".join(f"{name} {value:.3f}" for name, value in terms.items()).split()


def test_slurm_script_counts_what_status_files_say(teacher, tmp_path):
    data = write_llava(tmp_path / "data", mixed_samples(8))
    (tmp_path / "status").mkdir()
    for worker in (0, 1):
        work = WorkOptions(workers=2, worker=worker, status_file=tmp_path / "status" / f"{worker}.json")
        run_cache_job(teacher, open_samples([data]), tmp_path / "cache", CacheOptions(samples_per_shard=2), work)
    (script,) = [block for block in blocks(DOCS / "howto/slurm.md", "bash") if "records_total" in block]
    script = script.replace("python -", f"{sys.executable} -")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["8 of 8 records, 0 skipped", "{'finished': 1, 'waiting': 1}"], done.stderr


# ----------------------------------------------------------------------------------------- commands, settings, names, links


def test_commands_of_shell_blocks_parse(tmp_path, monkeypatch):
    """Every whole command of a shell block or a job script is one that the parser takes, and its settings exist."""
    monkeypatch.chdir(tmp_path)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        for block in blocks(page, "toml"):
            (tmp_path / block.split()[1]).write_text(block)
        scripts = [line.removeprefix("srun ") for line in shell_lines(page, "bash")]
        for line in shell_lines(page) + [line for line in scripts if line.startswith("genrecal ")]:
            program, *words = shlex.split(re.sub(r"\$\w+", "1", line))  # a variable may stand for a number
            if program == "make":
                assert words[0] in targets, (page, line)
            if program != "genrecal":
                continue
            given = COMMANDS[words[0]].make_context(words[0], words[1:]).params
            if words[0] == "train":
                load_config(given["config"], given["set_"] or [])


def unknown_names(span):
    """What a span of code names and the program does not have: commands, options, settings, files, modules."""
    options = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    if match := re.match(r"genrecal (?!--)(\S+)(.*)", span):
        if match[1] not in COMMANDS:
            return {match[1]}
        options = {option for p in COMMANDS[match[1]].params for option in p.opts}
    named = set(re.findall(r"(?<!\S)--[a-z-]+", span)) if span.startswith(("genrecal ", "--")) else set()
    if re.fullmatch(r"(stage[123N]|recalibrator|lora|loss|data|prompt|evaluate|measure)\.(?!py$|md$|json)\w+", span):
        return {span.replace("stageN", "stage1")} - set(_all_keys(TrainConfig()))
    if re.fullmatch(r"(genrecal|tests|docs|scripts)/[\w/.-]*", span):
        return set() if (ROOT / span).exists() else {span}
    if re.fullmatch(r"genrecal(\.\w+)+", span):
        try:
            pkgutil.resolve_name(span)
        except (ImportError, AttributeError):
            return {span}
    return named - options - {"--debug", "--help", "--version", "--install-completion", "--show-completion"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_exist(page):
    text = without_blocks(page)
    spans = re.findall(r"`([^`\n]+)`", text)
    for node in (node for code in blocks(page, "python") for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("genrecal"):
            spans += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set().union(*map(unknown_names, spans)) if spans else set()
    found |= set(re.findall(r"--set ['\"]?([\w.]+)=", page.read_text())) - set(_all_keys(TrainConfig()))
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)", text):
        path = page.parent / target if target else page
        if "://" in target or target.endswith(("contributing.md", "changelog.md")):
            continue
        headings = (
            re.findall(r"^#+ (.*)$", without_blocks(path), re.M) if path.suffix == ".md" and path.exists() else []
        )
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
        if not path.exists() or (anchor and anchor not in slugs):
            found.add(f"{target}#{anchor}")
    assert found == set()


def test_settings_table_is_whole_and_true():
    shown = {}
    for name, cell, *_ in table(DOCS / "settings.md", "| setting |"):
        key, values = name.strip("`"), [_parse_value(part.strip()) for part in cell.split(" / ")]
        if key.startswith("stageN."):
            for number in (1, 2, 3):
                shown[key.replace("N", str(number), 1)] = values[number - 1] if len(values) == 3 else values[0]
        else:
            (shown[key],) = values
    assert set(shown) == set(_all_keys(TrainConfig()))
    for key, value in shown.items():
        default = TrainConfig()
        for part in key.split("."):
            default = getattr(default, part)
        assert _converted(default, value, key) == default, key


def test_every_objective_is_listed_and_option_defaults_are_true():
    rows = {cells[0].strip("`") for cells in table(DOCS / "train.md", "| `objective` |")}
    (setting,) = [cells[3] for cells in table(DOCS / "settings.md", "| setting |") if cells[0] == "`objective`"]
    (option,) = [p.help for p in COMMANDS["train"].params if p.name == "objective"]
    assert rows == set(OBJECTIVES)
    for name in OBJECTIVES:
        assert f"`{name}`" in setting and re.search(rf"(?<![\w-]){name}(?![\w-])", option), name
    defaults = {option: str(p.default) for p in COMMANDS["cache"].params for option in p.opts}
    shown = {name.strip("`"): default for name, default, _ in table(DOCS / "cache.md", "| option | default |")}
    assert shown == {name: defaults[name] for name in shown} and len(shown) > 10


# ------------------------------------------------------------------------------------------------------- tables of pairs


def test_the_tables_of_pairs_are_those_of_the_tests_and_of_the_results(tmp_path):
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts/support_matrix.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.pairs_of((DOCS / "models.md").read_text())
    assert set(found) == pair_runs.PAIRS and all(found.values())
    case = '<testcase name="t"><properties><property name="pair" value="{} {} {}"/></properties>{}</testcase>'
    ends = {"passed": "", "failed": "<failure/>", "skipped": "<skipped/>"}
    outcomes = {pair: list(ends)[number % 3] for number, pair in enumerate(sorted(pair_runs.PAIRS))}
    path = tmp_path / "results.xml"
    cases = "".join(case.format(*pair, ends[outcome]) for pair, outcome in outcomes.items())
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = script.results([path])
    assert found == {pair: outcome == "passed" for pair, outcome in outcomes.items() if outcome != "skipped"}
    text = script.tables(found)
    assert text.count("**failed**") == list(outcomes.values()).count("failed") and "not run" in text
