"""Commands around models: pair, convert, evaluate."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from genrecal.cli import options as shared
from genrecal.cli.options import Json, MaxNewTokens, Metric, Texts, changed, grouped, plain
from genrecal.cli.output import console, printable, show
from genrecal.errors import SampleError, StorageError, UsageError

benchmark = shared.panel("Benchmarks")


@grouped
def pair(
    teacher: Annotated[str, typer.Argument(help="Teacher: a folder or a hub name; no weights are read.")],
    student: Annotated[str, typer.Argument(help="Student: a folder or a hub name.")],
    text: Annotated[str | None, plain("Text to tokenize; default: code, numbers and scripts.")] = None,
    image: Annotated[
        list[Path] | None, plain("Image to count tokens of; default: five sizes. May be repeated.")
    ] = None,
    json_: Json = False,
    trust_remote_code: shared.TrustRemoteCode = False,
) -> None:
    """Compare the tokens of two models and list the objectives that can distil between them."""
    from genrecal.objectives.pairs import coverage, findings
    from genrecal.samples import ImageSource, decode_image
    from genrecal.vlm.loading import load_renderer
    from genrecal.vlm.pair import TEXT, compare_pair, pair_report

    images = {}
    for path in image or []:
        try:
            decoded = decode_image(ImageSource(path=path).read())
        except SampleError as error:
            raise UsageError(f"--image {path}: {error}") from None
        images[f"{path.name} {decoded.width}x{decoded.height}"] = decoded
    options: dict[str, Any] = {"pictures": images or None, "trust_remote_code": trust_remote_code}
    found = compare_pair(teacher, student, text=TEXT if text is None else text, **options)
    of_teacher, of_student = (load_renderer(path, trust_remote_code=trust_remote_code) for path in (teacher, student))
    covered = coverage(of_teacher, of_student, found.text)
    objectives = findings(found, covered)
    facts = dataclasses.asdict(found) | {"traditional": found.traditional, "byte_kl": dataclasses.asdict(covered)}
    facts |= {"objectives": [dataclasses.asdict(finding) for finding in objectives]}
    show(facts if json_ else pair_report(found, objectives), json_)


@grouped
def convert(
    model: Annotated[str, typer.Argument(help="A folder or hub name of an InternVL in its original layout.")],
    processor: Annotated[
        str,
        plain("An InternVL in transformers' layout with the same vocabulary; its tokenizer is copied."),
    ],
    out: Annotated[Path, plain("Folder of the new checkpoint.")],
) -> None:
    """Convert an InternVL from its original layout to transformers' layout, which a student must have."""
    from genrecal.vlm.convert import convert_internvl

    convert_internvl(model, out, processor=processor)
    console.print(f"{out}: {model} in transformers' layout", markup=False)


@dataclass(frozen=True, kw_only=True)
class OptionalDataGroup(shared.DataGroup):
    """The same, without data for --harness."""

    data: Annotated[Texts, shared.data("Data in any form that `genrecal cache` reads.")] = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class HarnessGroup:
    """Benchmarks of a harness, in place of data."""

    harness: Annotated[str | None, benchmark("lmms-eval: run its tasks instead of --data (extra eval).")] = None
    tasks: Annotated[str | None, benchmark("Names of its tasks, with commas.")] = None
    task_folder: Annotated[Path | None, benchmark("Folder of your own tasks in its format.")] = None
    harness_model: Annotated[str | None, benchmark("Its model class; default: the family's.")] = None
    harness_arg: Annotated[Texts, benchmark("name=value for its model class. May be repeated.")] = None


@grouped
def evaluate(
    name: Annotated[str, shared.model("Model folder or hub name.", "--model")],
    source: OptionalDataGroup,
    model: shared.ModelGroup,
    prompt: shared.PromptGroup,
    chosen: HarnessGroup,
    metric: Metric = "auto",
    out: Annotated[
        Path | None, plain("Write predictions here as jsonl; with --harness, a folder for its files.")
    ] = None,
    batch_size: Annotated[int | None, plain("Prompts per batch; default: 8, or 1 with --harness.", min=1)] = None,
    max_new_tokens: MaxNewTokens = None,
    json_: Json = False,
) -> None:
    """Generate answers and score them, on your own data or on benchmarks of lmms-eval."""
    if chosen.harness is not None:
        wrong = [*changed(source), *changed(prompt), *changed(model)]
        wrong += ["--metric"] * (metric != "auto") + ["--max-new-tokens"] * (max_new_tokens is not None)
        wrong = [option for option in wrong if option not in ("--limit", "--device", "--trust-remote-code")]
        if wrong:
            raise UsageError(f"{wrong[0]}: expected no --harness with it; its tasks and model class decide that")
        _run_harness(name, chosen, model, json_, out=out, limit=source.limit, batch_size=batch_size or 1)
        return
    if changed(chosen):
        raise UsageError(f"{changed(chosen)[0]}: expected --harness lmms-eval with it")
    if not source.data:
        raise UsageError("--data: expected data files, or --harness lmms-eval --tasks NAME,NAME")

    from genrecal.evaluate.evaluate import evaluate, save_evaluation
    from genrecal.evaluate.scores import check_metric
    from genrecal.files import check_writable
    from genrecal.report.summary import plus_minus
    from genrecal.samples.survey import Reasons, survey
    from genrecal.vlm.loading import load_vlm, placement

    check_metric(metric, "--metric")
    if out is not None:
        try:
            check_writable(out)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    samples = source.loader()()
    for line in survey(samples).lines():
        typer.echo(printable(line), err=True)
    device = placement(model.device)
    trusted = model.trust_remote_code
    vlm = load_vlm(name, dtype=model.dtype, device=device, trust_remote_code=trusted, prompt=prompt.parsed())
    result = evaluate(vlm, samples, metric=metric, batch_size=batch_size or 8, max_new_tokens=max_new_tokens)
    for line in Reasons.of(f"{where}: {why}" for where, why in result.skipped).lines():
        typer.echo(f"skipped {printable(line)}", err=True)
    scores = {"overall": result.overall, **result.by_category}
    rules = {key: result.rules(None if score is result.overall else key) for key, score in scores.items()}
    table = Table("category", "questions", "accuracy", "answer log-loss, nats", "scored by", box=None, pad_edge=False)
    for category, score in scores.items():
        table.add_row(
            category or "(no category)",
            str(score.n),
            plus_minus(score.accuracy, score.accuracy_error, percent=True),
            plus_minus(score.log_loss, score.log_loss_error),
            ", ".join(f"{rule} {count}" for rule, count in rules[category].items()),
        )
    facts = {category: dataclasses.asdict(score) | {"rules": rules[category]} for category, score in scores.items()}
    show(facts if json_ else table, json_)
    if out is not None:
        try:
            save_evaluation(result, out)
        except OSError as error:
            raise StorageError(
                f"--out {out}: cannot be written: {error.strerror or error}; the scores are printed above"
            ) from None


def _run_harness(path: str, chosen: HarnessGroup, model: shared.ModelGroup, as_json: bool, **options: Any) -> None:
    from genrecal.evaluate.harness import run_lmms_eval
    from genrecal.vlm.loading import placement

    if chosen.harness != "lmms-eval":
        raise UsageError(f"--harness {chosen.harness!r}: expected lmms-eval")
    tasks = (chosen.tasks or "").split(",")
    if not all(tasks):
        raise UsageError(f"--tasks {chosen.tasks or ''!r}: expected names of lmms-eval's tasks, such as ai2d,mmstar")
    scores = run_lmms_eval(
        path,
        tasks,
        device=str(placement(model.device)),
        harness_model=chosen.harness_model,
        harness_args=chosen.harness_arg or [],
        task_folder=chosen.task_folder,
        trust_remote_code=model.trust_remote_code,
        **options,
    )
    table = Table("task", "metric", "value", "standard error", "questions", box=None, pad_edge=False)
    for score in scores:
        value = f"{score.value:.4g}" if isinstance(score.value, int | float) else str(score.value)
        error = "" if score.error is None else f"{score.error:.2g}"
        table.add_row(score.task, score.metric, value, error, str(score.n or ""))
    show([dataclasses.asdict(score) for score in scores] if as_json else table, as_json)
