"""Tiny models of the families of transformers 5.23, whose configs, processors and chat templates lie in families.json, and
what of genrecal works with each: what `scripts/family_table.py` writes into docs/models.md."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import _spread_weights, byte_bpe
from transformers import AddedToken, AutoConfig, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from genrecal.cli import main
from genrecal.shards.reader import Cache
from genrecal.vlm.cached_teacher import prompt_options
from genrecal.vlm.loading import auto_class, load_vlm, without_video_processors

SPECS: dict[str, Any] = json.loads((Path(__file__).parent / "families.json").read_text())
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by scripts/family_table.py -->", "<!-- end of families -->"
NEEDS_TORCHVISION = {
    "cohere2_vision", "gemma4", "gemma4_empty_thought", "gemma4_moe", "kimi_k25", "lfm2_vl", "llama4", "minicpmv4_6",
    "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral4", "molmo2", "perception_lm", "pixtral",
}  # fmt: skip
NEEDS_TIMM = {"perception_lm"}
WITHOUT_THINKING = {"qwen3_5": "enable_thinking", "glm46v": "enable_thinking", "kimi_k25": "thinking"}
STATES_AGREE = 0.01  # float32 states as a share of their length; they are stored as bfloat16, which rounds by 0.004
ONE_STEP = [
    f"--set={name}"
    for stage in (1, 2, 3)
    for name in (f"stage{stage}.accumulation=1", f"stage{stage}.batch_size=4", f"stage{stage}.max_steps=1")
] + ["--set=data.workers=0", "--set=measure.samples=0", "--set=data.max_skip=1", "--set=device=cpu"]


def can_run(family: str) -> bool:
    """Whether this environment has what the family's processor needs."""
    with contextlib.suppress(ImportError):
        if family in NEEDS_TIMM:
            import timm  # noqa: F401
        return is_torchvision_available() or family not in NEEDS_TORCHVISION
    return False


def write_files(family: str, folder: Path) -> Path:
    """Write what a family's folder holds besides weights, and return it."""
    spec = SPECS[family]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("config", "config"), ("processor_config", "processor"), ("tokenizer_config", "tokenizer")):
        if part in spec:
            (folder / f"{name}.json").write_text(json.dumps(spec[part]))
    if "template" in spec:
        (folder / "chat_template.jinja").write_text(spec["template"])
    leading = [token for place, (token, _, number) in enumerate(spec["tokens"]) if place == number]
    words = min((number for *_, number in spec["tokens"][len(leading) :]), default=400)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(leading, vocab_size=words, like="qwen2"))
    for token, special, _ in spec["tokens"][len(leading) :]:
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    assert [tokenizer.convert_tokens_to_ids(token) for token, *_ in spec["tokens"]] == [n for *_, n in spec["tokens"]]
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_family(family: str, folder: Path) -> Path:
    """Write a family's tiny model with random weights to `folder` once and return it."""
    if not (folder / "model.safetensors").exists():
        write_files(family, folder)
        torch.manual_seed(0)
        with without_video_processors():
            config = AutoConfig.from_pretrained(folder)
            model = auto_class(config).from_config(config)
        _spread_weights(model, norms=False)
        model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Row:
    """What works with a family: "works", or the reason why not; `notes` are what a user is told."""

    teacher: str
    student: str
    export: str
    notes: str


def run_family(family: str, folder: Path, data: Path, cache: Path) -> Row:
    """Cache a family as a teacher, and train and export it as a student of `cache`, by the command line.

    Raises AssertionError for a traceback, and where cached states are not the model's own.
    """
    model, run = make_family(family, folder / "model"), folder / "run"
    variable = WITHOUT_THINKING.get(family)
    options = [f"--template-arg={variable}=false"] if variable else []
    made = folder / "cache"
    teacher, notes = genrecal(
        "cache",
        f"--teacher={model}",
        f"--data={data}",
        f"--out={made}",
        "--device=cpu",
        "--max-skip=1",
        "--answer-codec=bf16",
        "--question-codec=bf16",
        *options,
    )
    if teacher == "works":
        _check_states(model, made)
    genrecal("plan", f"--teacher={model}", f"--data={data}", *options)  # no traceback
    settings = [f"--set=prompt.template_args.{variable}=false"] if variable else []
    student, more = genrecal("train", f"--cache={cache}", f"--student={model}", f"--out={run}", *ONE_STEP, *settings)
    genrecal("train", f"--cache={cache}", f"--student={model}", f"--out={run}", "--dry-run", *ONE_STEP, *settings)
    export = genrecal("export", str(run), f"--out={folder / 'out'}")[0] if student == "works" else "-"
    shutil.rmtree(run, ignore_errors=True)
    told = [note for note in ("runs alone", "is written alone", "routers") if note in notes + more]
    words = {"runs alone": "conversations run one by one", "is written alone": "answers are written one by one",
             "routers": "routers stay frozen; experts get no LoRA"}  # fmt: skip
    return Row(teacher=teacher, student=student, export=export, notes="; ".join(words[note] for note in told))


def genrecal(*args: str) -> tuple[str, str]:
    """Run a command in this process: "works" or "refused: ...", and all that it printed on standard error."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
        except SystemExit as end:
            status = int(end.code or 0)
    text = err.getvalue()
    errors = [line for line in text.splitlines() if line.startswith("genrecal: error: ")]
    assert not status or len(errors) == 1, f"genrecal {' '.join(args)}: exit status {status}\n{text}"
    if not status:
        return "works", text
    reason = errors[0].removeprefix("genrecal: error: ")
    for path in (arg.partition("=")[2] for arg in args):
        reason = reason.replace(f"{path}: ", "").replace(path, "...") if "/" in path else reason
    return f"refused: {reason}", text


def _check_states(model: Path, made: Path) -> None:
    """Every cached answer state is that of its conversation alone."""
    cache = Cache(str(made))
    vlm = load_vlm(model, prompt=prompt_options(cache))
    for record in cache:
        encoded = vlm.renderer.encode(record.sample)
        with torch.no_grad():
            states = vlm.hidden(vlm.renderer.collate([encoded]))[0].float().numpy()
        rows = record.answer_rows()
        expected = states[rows.position]
        off = np.linalg.norm(rows.hidden - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert off.max() < STATES_AGREE, f"{record.sample.key}: a cached state is off by {off.max():.0%} of its length"


# -------------------------------------------------------------------------------- the table in docs/models.md


def rows_of() -> dict[str, Row]:
    """What the page's table says of each family."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in cells[2:]}
    return {
        family: Row(**dict(zip(("teacher", "student", "export", "notes"), map(_plain, row), strict=True)))
        for family, row in rows.items()
    }


def write_rows(rows: dict[str, Row]) -> None:
    """Write the page's table."""
    lines = ["| family | teacher | student | export | notes |", "| --- | --- | --- | --- | --- |"]
    for family, row in sorted(rows.items()):
        cells = (row.teacher, row.student, row.export, row.notes)
        lines.append(f"| {family} | " + " | ".join(_escaped(cell) for cell in cells) + " |")
    page, written = PAGE.read_text(), "\n".join([BEGIN, *lines, END])
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: written, page, flags=re.DOTALL))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _plain(cell: str) -> str:
    return cell.replace("\\|", "|").replace("&lt;", "<")
