"""Commands around training runs: train, export, compare, report."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from genrecal.cli import options as shared
from genrecal.cli.options import Json, Settings, Stages, StudentModel, Texts, grouped, parse_stages, plain
from genrecal.cli.output import console, show
from genrecal.errors import UsageError

forecast = shared.panel("Forecast")


@grouped
def train(
    cache: Annotated[
        list[str], plain("Cache directory or URL. May be repeated to mix caches (--set data.weights=[1,0.5]).")
    ],
    student: StudentModel,
    out: Annotated[Path, plain("Run directory; an unfinished run with the same settings is resumed.")],
    stages: Stages = "1,2,3",
    objective: Annotated[
        str | None,
        plain("genrecal, genrecal-aligned, sft, seqkd, kl, reverse-kl, skewed-kl, byte-kl, uld or dskd."),
    ] = None,
    config: shared.Config = None,
    set_: Settings = None,
    on_damage: Annotated[str | None, plain("At a corrupt sample: fail or skip (data.on_damage).")] = None,
    teacher: Annotated[str | None, plain("live:MODEL runs that teacher instead of reading shards.")] = None,
    dry_run: Annotated[bool, forecast("Forecast memory, steps, time and disk; train nothing.", "--dry-run")] = False,
    gpus: Annotated[int, forecast("With --dry-run: training processes, one per GPU.")] = 1,
    gpu_gigabytes: Annotated[float, forecast("With --dry-run: memory of one GPU in GB.")] = 80.0,
    profile: Annotated[int, forecast("Run N steps per stage; print time and memory by part.", min=0)] = 0,
    json_: Annotated[bool, forecast("With --dry-run: print JSON.", "--json")] = False,
    trust_remote_code: shared.TrustRemoteCode = False,
) -> None:
    """Train a student from a cache, in three stages."""
    from genrecal.train.config import load_config

    numbers = parse_stages(stages)
    short = {"objective": objective, "data.on_damage": on_damage}
    settings = load_config(config, [*(set_ or []), *(f"{name}={value}" for name, value in short.items() if value)])
    if teacher is not None and not teacher.startswith("live:"):
        raise UsageError(f"--teacher {teacher!r}: expected live:MODEL")
    if dry_run:
        from genrecal.objectives import objective_named
        from genrecal.shards.mixture import open_caches
        from genrecal.train.export import check_layout
        from genrecal.train.forecast import forecast_text, make_forecast
        from genrecal.vlm.loading import is_weight_file, model_folder

        several = objective_named(settings.objective).several_teachers(settings.loss)
        opened = open_caches(cache, settings.data.weights, several_teachers=several)
        options: dict[str, Any] = {"stages": numbers, "out": out, "trust_remote_code": trust_remote_code}
        found = make_forecast(settings, student, opened, gpus=gpus, gpu_gigabytes=gpu_gigabytes, **options)
        show(found.to_json() if json_ else forecast_text(found), json_)
        if any(is_weight_file(file) for file in model_folder(student).iterdir()):  # a folder may hold configs alone
            for text in check_layout(student, trust_remote_code=trust_remote_code).notes:
                sys.stderr.write(f"genrecal: export: {text}\n")
        raise typer.Exit(0 if found.fits else 1)

    # These imports take seconds: check the settings first.
    from genrecal.train import loop
    from genrecal.train.ranks import own_device, world_size
    from genrecal.train.run import Run

    run = Run(
        path=out,
        config=settings,
        student=student,
        caches=tuple(cache),
        teacher=teacher or "cache",
        trust_remote_code=trust_remote_code,
    )
    live = None
    if teacher:
        from genrecal.cache.load import load_live_teacher

        live = load_live_teacher(
            teacher.removeprefix("live:"),
            cache[0],
            device=str(own_device(settings.device)),
            trust_remote_code=trust_remote_code,
        )
    if profile:
        if text := loop.profile(run, profile, stages=numbers, live_teacher=live):
            typer.echo(text)
        return
    loop.train(run, stages=numbers, live_teacher=live)
    if world_size() and os.environ["RANK"] != "0":
        return
    done = run.last_finished_stage()
    following = f"`genrecal export {out} --out DIR` writes the student" if done > 1 else "stage 2 trains the student"
    text = f"stage {done} finished; {following}" if done else f"{settings.objective} trains nothing in stage 1"
    console.print(f"{out}: {text}", markup=False)


@grouped
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, plain("Folder of the checkpoint; must not exist.")],
    cache: Annotated[str | None, plain("Cache to check outputs on, if it has moved.")] = None,
    student: Annotated[str | None, plain("The student as it was before the run, if it has moved.")] = None,
    stage: Annotated[int | None, plain("Stage to export; default: the last finished stage.", min=2, max=3)] = None,
) -> None:
    """Write the trained student as a stock Hugging Face checkpoint."""
    from genrecal.train.export import export
    from genrecal.train.run import Run

    done = export(Run.open(run, student=student), out, cache=cache, stage=stage)
    for text in done.notes:
        console.print(f"note: {text}", markup=False)
    console.print(
        f"{out}: the student after stage {done.stage}; reloaded, it gives the same logits and greedy answers",
        markup=False,
    )


@grouped
def compare(
    cache: Annotated[list[str], plain("Cache of every variant that names no other. May be repeated to mix caches.")],
    student: StudentModel,
    source: shared.DataGroup,
    out: Annotated[Path, plain("Folder of the runs and the table; finished runs are reused.")],
    try_: Annotated[
        Texts,
        plain(
            "A variant: an objective, or NAME=SETTINGS such as 'kl 3=loss.kl_weight=3 cache=caches/other'. May be "
            "repeated; the first is the baseline.",
            "--try",
        ),
    ] = None,
    tries: Annotated[Path | None, plain("TOML file with a table of settings for each variant.")] = None,
    seeds: Annotated[str, plain("Seeds of every variant.")] = "0,1,2",
    stages: Stages = "1,2,3",
    config: shared.Config = None,
    set_: Settings = None,
    jobs: Annotated[int, plain("Runs side by side; each takes the next GPU.", min=1)] = 1,
    metric: shared.Metric = "auto",
    batch_size: Annotated[int, plain("Prompts per batch.", min=1)] = 8,
    max_new_tokens: shared.MaxNewTokens = None,
    dtype: shared.Dtype = "auto",
    json_: Json = False,
    trust_remote_code: shared.TrustRemoteCode = False,
) -> None:
    """Train several variants at equal steps with several seeds, evaluate each on held-out data, print one table."""
    from genrecal.compare import Asking, compare, comparison_text, variants_of

    variants = variants_of(try_ or [], tries, caches=cache, config=config, settings=set_ or [])
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {seeds!r}: expected numbers with commas, such as 0,1,2") from None
    found = compare(
        variants,
        student,
        source.loader(),
        out,
        seeds=numbers,
        stages=parse_stages(stages),
        asking=Asking(metric=metric, batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype),
        jobs=jobs,
        trust_remote_code=trust_remote_code,
        say=lambda line: sys.stderr.write(f"{line}\n"),
    )
    show(dataclasses.asdict(found) if json_ else comparison_text(found), json_)


@grouped
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs (also unfinished), folders of compare, answers of evaluate --out.")
    ],
    out: Annotated[Path, plain("HTML file; an existing one is replaced.")],
) -> None:
    """Write an HTML page of runs: the result first, then cost and losses. It opens offline."""
    from genrecal.report.run_page import write_run_report

    write_run_report(runs, out)
    console.print(f"{out}: {', '.join(map(str, runs))}", markup=False)
