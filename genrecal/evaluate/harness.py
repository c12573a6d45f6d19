"""Evaluation by lmms-eval: it has the benchmarks' tasks, asks the model and scores. Here it is started, and its results read.

An exported student is a stock checkpoint, so lmms-eval's own model classes load it from its folder.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal.errors import GenrecalError, UsageError
from genrecal.vlm.config_file import read_json
from genrecal.vlm.loading import SPLIT, load_processor, model_folder, processor_files

# lmms-eval's name for the class of a family, by `model_type` of config.json. Its general class, `huggingface`, hands processors
# an argument that transformers 5 refuses.
CLASSES = {
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
}
# Bounds on an image's tiles. Its class for InternVL cuts every image into up to 12, whatever the student's processor says,
# so a student that was trained on fewer would be asked about images unlike those it was trained on.
TILES = ("min_patches", "max_patches")
# What some of its classes log when a question fails; they continue with an empty answer, which is scored as a wrong one.
FAILED = re.compile(r"Error (.*) in generating")


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or a group of tasks. `value` is lmms-eval's, and its `error` a standard error, if it gives one."""

    task: str
    metric: str
    value: Any
    error: float | None
    n: int | None


def lmms_eval_command(
    model: str | Path,
    tasks: Sequence[str],
    *,
    out: Path,
    device: str = "cpu",
    harness_model: str | None = None,
    harness_args: Sequence[str] = (),
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    trust_remote_code: bool = False,
) -> list[str]:
    """The words of lmms-eval's own command for a model.

    Args:
        device: "cpu", "cuda", "cuda:N", or "split" for `device_map="auto"`.
        harness_model: lmms-eval's name of a model class; None takes it from `model_type` in the folder's config.json.
        harness_args: `name=value` each, for that class; they come after ours and win. An InternVL's images
            are cut into as many tiles as its own processor says.
        out: where lmms-eval writes its results and, a file a task, every question with its answer.
        task_folder: tasks of one's own, in lmms-eval's format.

    Raises UsageError for what its way of writing arguments cannot say.
    """
    folder = model_folder(model)
    if harness_model is None:
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in CLASSES:
            raise UsageError(
                f"--model {model}: no class of lmms-eval is known here for model_type {kind}, only for {', '.join(CLASSES)}; "
                "name one with --harness-model, such as vllm"
            )
        harness_model = CLASSES[kind]
    given = [
        f"pretrained={folder}",
        f"device={'cuda' if device == SPLIT else device}",
        f"device_map={'auto' if device == SPLIT else device}",
    ]
    given += ["trust_remote_code=True"] if trust_remote_code else []
    if harness_model == "internvl_hf" and processor_files(folder):
        own = load_processor(folder).image_processor
        given += [f"{name}={getattr(own, name)}" for name in TILES if hasattr(own, name)]
    for text in harness_args:
        if "=" not in text:
            raise UsageError(f"--harness-arg {text!r}: expected name=value")
    if any(mark in str(folder) for mark in ",\"'{}[]"):
        raise UsageError(
            f"--model {folder}: lmms-eval takes no folder with a comma, quotes or brackets in its path; rename it"
        )
    words = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        harness_model,
        "--model_args",
        ",".join([*given, *harness_args]),
    ]
    words += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(out), "--log_samples"]
    words += ["--include_path", str(task_folder)] if task_folder else []
    words += ["--limit", str(limit)] if limit else []
    return words


def run_lmms_eval(
    model: str | Path, tasks: Sequence[str], *, out: Path | None = None, **options: Any
) -> list[TaskScore]:
    """Run lmms-eval in a process of its own; what it says goes to standard error.

    Args:
        out: as for `lmms_eval_command`; None keeps nothing but the scores.
        options: as for `lmms_eval_command`.

    Raises:
        UsageError: lmms-eval is not installed. GenrecalError: it ended without results, or could not ask a question.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise UsageError(
            '--harness lmms-eval: it is not installed in this environment; pip install "genrecal[eval]", best in an '
            "environment of its own"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: a file; expected a folder for lmms-eval's results")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) if out is None else out
        before = set(target.rglob("*_results.json"))
        words = lmms_eval_command(model, tasks, out=target, **options)
        sys.stderr.write(f"genrecal: {shlex.join(['python', *words[1:]])}\n")
        said = _run(words)
        found = sorted(set(target.rglob("*_results.json")) - before)
        if not found:  # its own exit status is 0 even then
            raise GenrecalError(f"lmms-eval ended without results ({_last_error(said)}); its output is above")
        scores = scores_of(json.loads(found[-1].read_text()))
    if failed := FAILED.findall(said):
        raise GenrecalError(
            f"lmms-eval could not ask {len(failed)} questions and would count them as wrong; the first: {failed[0]}"
        )
    return scores


def _run(words: list[str]) -> str:
    """Run a command, pass on what it says as it says it, and return that."""
    said = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdout is not None
        while piece := child.stdout.read1():  # type: ignore[attr-defined]
            text = piece.decode(errors="replace")
            sys.stderr.write(text)
            said.append(text)
    return "".join(said)


def _last_error(said: str) -> str:
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*$", said, flags=re.MULTILINE)
    return errors[-1].strip()[:300] if errors else "it named no error"


def scores_of(results: dict[str, Any]) -> list[TaskScore]:
    """The scores in lmms-eval's results file, in its order. Its keys of a metric are `NAME,FILTER`, filter `none` for none."""
    scores = []
    for task, metrics in results["results"].items():
        counted = results["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            name, comma, applied = key.partition(",")
            if not comma or "_stderr" in name:
                continue
            error = metrics.get(f"{name}_stderr,{applied}")
            shown = name if applied == "none" else f"{name} ({applied})"
            scores.append(TaskScore(task, shown, value, error if isinstance(error, float) else None, counted))
    return scores
