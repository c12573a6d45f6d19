"""Commands around a cache: plan, cache, inspect, verify."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from genrecal.cli import options as shared
from genrecal.cli.options import CachePath, Json, grouped, plain
from genrecal.cli.output import console, printable, show
from genrecal.errors import UsageError
from genrecal.progress import counted

assumed, vllm = shared.panel("Assumptions"), shared.panel("Teacher, --backend vllm")
machines, checks = shared.panel("Many machines"), shared.panel("Checks")


def note(text: str, style: str = "") -> None:
    """Print a line that may hold a user's text."""
    console.print(printable(text), markup=False, highlight=False, style=style)


@dataclass(frozen=True, kw_only=True)
class AssumptionGroup:
    """As `genrecal.cache.plan.PlanOptions`."""

    probe: Annotated[int, assumed("Records to measure, drawn from all.")] = 512
    num_samples: Annotated[int, assumed("Forecast for N samples; 0 for as many as the data have.")] = 0
    gpu: Annotated[str, assumed("Card: a100, a100-40gb, b200, h100, h200, l4, l40s, mi300x or rtx4090.")] = "h100"
    gpus: Annotated[int, assumed("Cards that run side by side; 0 for as many as hold the teacher.")] = 0
    price: Annotated[float, assumed("Price of one card per hour, in any currency.")] = 0.0
    train_rate: Annotated[float, assumed("Samples per second that the trainer takes.")] = 64.0


@grouped
def plan(
    teacher: Annotated[
        str, shared.teacher("A folder, a hub name, or qwen2-vl-72b, internvl2-76b, internvl2.5-78b, nvlm-d-72b.")
    ],
    source: shared.DataGroup,
    storage: shared.StorageGroup,
    prices: AssumptionGroup,
    prompt: shared.PromptGroup,
    out: Annotated[str | None, plain("Planned place of the cache: check its free space.")] = None,
    json_: Json = False,
    trust_remote_code: shared.TrustRemoteCode = False,
) -> None:
    """Forecast a cache's size and the teacher's cost from a part of the data and the teacher's config."""
    from genrecal.cache.job import check_place
    from genrecal.cache.plan import PlanOptions, make_plan, plan_text
    from genrecal.cache.teacher_shape import KNOWN, teacher_shape
    from genrecal.samples.survey import survey
    from genrecal.train.config import objectives_by_store

    if out is not None:
        check_place(out)
    settings, assumptions = storage.options(), PlanOptions(**vars(prices))
    samples = source.loader()()
    surveyed = survey(samples)
    if not json_:
        for line in surveyed.lines(storage.max_skip):
            note(line)
    if teacher.lower() in KNOWN and not Path(teacher).exists():
        forecast = make_plan(KNOWN[teacher.lower()], None, samples, settings, assumptions, out=out)
    else:
        from genrecal.vlm.loading import load_renderer, model_folder, processor_files

        folder = model_folder(teacher)
        renderer = load_renderer(folder, prompt.parsed(), trust_remote_code=trust_remote_code)
        renderer.refuse_unsaid_thinking(teacher)
        files = [folder / "config.json", *processor_files(folder)]
        shape = teacher_shape(folder, trust_remote_code=trust_remote_code)
        file_bytes = sum(file.stat().st_size for file in files)
        forecast = make_plan(shape, renderer, samples, settings, assumptions, out=out, teacher_file_bytes=file_bytes)
    show(
        forecast.to_json() | {"survey": surveyed.to_json()} if json_ else plan_text(forecast, objectives_by_store()),
        json_,
    )
    too_many = forecast.skipped > storage.max_skip * forecast.num_samples
    if forecast.fits is False or surveyed.over(storage.max_skip) or too_many:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class BackendGroup:
    """What runs the teacher."""

    backend: Annotated[str, shared.teacher("What runs the teacher: hf (transformers) or vllm.")] = "hf"
    tensor_parallel: Annotated[int, vllm("GPUs that share each layer.", min=1)] = 1
    pipeline_parallel: Annotated[int, vllm("Stages that share the layers.", min=1)] = 1
    engine_arg: Annotated[
        shared.Texts, vllm("Engine argument, such as gpu_memory_utilization=0.85. May be repeated.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class WorkGroup:
    """As `genrecal.cache.options.WorkOptions`."""

    workers: Annotated[int, machines("Processes that share this job, such as one per node.")] = 1
    worker: Annotated[int, machines("Number of this process, from 0.")] = 0
    threads: Annotated[int, shared.teacher("Threads that decode and preprocess; 0 for all cores.")] = 0
    status_file: Annotated[Path | None, machines("Write progress here as JSON, outside the cache.")] = None


@dataclass(frozen=True, kw_only=True)
class RayGroup:
    """A Ray cluster to run on."""

    ray: Annotated[str | None, machines("Run on Ray: host:port, auto (this machine's) or local (a new one).")] = None
    ray_actors: Annotated[int, machines("With --ray: teachers; 0 for what the GPUs allow.")] = 0
    ray_gpus: Annotated[float | None, machines("With --ray: GPUs per teacher; default: 1, or 0 on the CPU.")] = None


@grouped
def cache(
    teacher: Annotated[str, shared.teacher("Teacher model: a folder or a hub name.")],
    source: shared.DataGroup,
    out: Annotated[str, plain("Cache directory or URL such as s3://...; an unfinished cache is resumed.")],
    storage: shared.StorageGroup,
    runner: BackendGroup,
    work: WorkGroup,
    cluster: RayGroup,
    model: shared.ModelGroup,
    prompt: shared.PromptGroup,
    blank_check: Annotated[int, checks("Run N samples with grey images too; print how much answers lose.", min=0)] = 0,
    compare_hf: Annotated[int, checks("Run N samples through hf on the CPU too; refuse other rows.", min=0)] = 0,
) -> None:
    """Run the teacher once over the data and write what training needs as shards."""
    from genrecal.cache.job import check_place, run_cache_job
    from genrecal.cache.load import TeacherSettings
    from genrecal.cache.options import RayOptions, WorkOptions
    from genrecal.samples.survey import survey

    settings, workers = storage.options(), WorkOptions(**vars(work))
    chosen = TeacherSettings(path=teacher, **vars(model), **vars(runner), prompt=prompt.parsed())
    if compare_hf and runner.backend == "hf":
        raise UsageError("--compare-hf: expected --backend vllm with it")
    if cluster.ray is None and (cluster.ray_actors or cluster.ray_gpus is not None):
        raise UsageError("--ray-actors and --ray-gpus: expected --ray ADDRESS with them")
    if cluster.ray is not None and (blank_check or compare_hf):
        raise UsageError(
            "--blank-check and --compare-hf: expected no --ray with them; run these checks on one machine first, "
            "with --limit"
        )
    load_samples = source.loader()
    check_place(out)
    samples = load_samples()
    surveyed = survey(samples)
    for line in surveyed.lines(storage.max_skip):
        note(line)
    surveyed.check(storage.max_skip)
    if cluster.ray is not None:
        from genrecal.cache.ray_job import run_ray_job

        gpus = chosen.gpus if cluster.ray_gpus is None else cluster.ray_gpus
        on = RayOptions(address=cluster.ray, actors=cluster.ray_actors, gpus=gpus)
        report = run_ray_job(chosen.load, load_samples, out, settings, workers, on)
    else:
        loaded = chosen.load()
        if compare_hf:
            from genrecal.cache.proof import compare_backends

            reference = chosen.reference(loaded)
            note(f"hf against vllm: {compare_backends(loaded, reference, samples, compare_hf)}")
        if blank_check:
            _print_blank_check(loaded, samples, blank_check)
        report = run_cache_job(loaded, samples, out, settings, workers)
    _print_report(out, report, work, surveyed.reasons)


def _print_blank_check(model: Any, samples: Any, count: int) -> None:
    from genrecal.cache.proof import blank_check

    found = blank_check(model, (samples[i] for i in range(len(samples))), count)
    if found is None:
        note("--blank-check: no sample has an image", "yellow")
        return
    note(f"blank check: {found}")
    if found.fall <= 0:
        note(
            "warning: the answers do not depend on the images as they should: check the images and the chat template, "
            "or try more samples",
            "yellow",
        )


def _print_report(out: str, report: Any, work: WorkGroup, printed: Any) -> None:
    """What the job did; reasons for skipped records of kinds that the survey has not `printed` before it."""
    from genrecal.samples.survey import Reasons
    from genrecal.shards.reader import open_cache

    done = f"{report.cached} samples cached, {report.skipped} skipped; " + (
        f"{counted(report.shards_done, 'shard')} written, {report.shards_found} found"
    )
    if report.shards_missing:
        note(
            f"{out}: worker {work.worker} of {work.workers} is done: {done}. Other workers still have "
            f"{counted(report.shards_missing, 'shard')} to finish; the last worker completes the cache"
        )
        return
    reasons = Reasons.of(open_cache(out).skipped())
    for kind in reasons.counts.keys() & printed.counts.keys():
        del reasons.counts[kind]
    for line in reasons.lines():
        note(f"skipped {line}", "yellow")
    if count := report.counts["context_answers"]:
        note(
            f"{counted(count, 'earlier answer')} used as context, not as targets: this chat template writes the last answer "
            "of a conversation in another way than earlier ones; use one record per answer to train on all",
            "yellow",
        )
    if count := report.counts["unread_reasoning"]:
        note(
            f"{counted(count, 'record')} with reasoning_content, which this model's chat template does not write",
            "yellow",
        )
    note(f"{out}: {done}")


@grouped
def inspect(
    cache: CachePath,
    key: Annotated[str | None, plain("Show one record, by its key or its sample id.")] = None,
    sql: Annotated[str | None, plain("Query the manifest with DuckDB, as the table `manifest`.")] = None,
    save_images: Annotated[Path | None, plain("With --key: write the record's images into this folder.")] = None,
    least_likely: Annotated[
        int | None, plain("List this many samples whose answers the teacher finds least likely.", min=1)
    ] = None,
    save_keys: Annotated[Path | None, plain("With --least-likely: write the samples' keys to this file.")] = None,
    html: Annotated[Path | None, plain("Write an HTML page of the summary, or of --key's record.")] = None,
    json_: Json = False,
) -> None:
    """Show what a cache holds: a summary, one record, the least likely answers, or a query over the manifest."""
    from genrecal import inspect as inspection
    from genrecal.inspect import text
    from genrecal.shards.reader import open_cache

    if sum(option is not None for option in (key, sql, least_likely)) > 1:
        raise UsageError("--key, --sql and --least-likely: expected one of them; each shows something else")
    if save_keys is not None and least_likely is None:
        raise UsageError("--save-keys: expected --least-likely N with it, the samples whose keys to write")
    if save_images is not None and key is None:
        raise UsageError("--save-images: expected --key KEY with it, the record whose images to write")
    if html is not None and (sql is not None or json_ or save_images is not None or least_likely is not None):
        raise UsageError(
            "--html: expected no --sql, --least-likely, --json or --save-images with it; it writes a page of its own"
        )
    opened = open_cache(cache)
    if html is not None:
        from genrecal.report.cache_page import write_cache_page

        write_cache_page(opened, html, [inspection.find_record(opened, key)] if key is not None else None)
        note(f"{html}: {cache}")
    elif sql is not None:
        result = inspection.run_sql(opened, sql)
        show(result.to_dicts() if json_ else text.sql_text(result), json_)
    elif least_likely is not None:
        result = inspection.least_likely(opened, least_likely)
        if save_keys is not None:
            from genrecal.files import write_whole

            keys = [row["key"] for row in result.to_dicts()]
            write_whole(save_keys, "".join(f"{key}\n" for key in keys).encode())
        show(result.to_dicts() if json_ else text.sql_text(result), json_)
    elif key is not None:
        record = inspection.find_record(opened, key)
        described = inspection.describe_record(record)
        saved = inspection.save_images(record, save_images) if save_images is not None else ()
        if json_:
            show(dataclasses.asdict(described) | {"saved_images": saved}, json_)
            return
        show(text.record_text(described))
        for path in saved:
            typer.echo(str(path))
    else:
        summary = inspection.summarize(opened)
        show(dataclasses.asdict(summary) if json_ else text.summary_text(summary), json_)


@grouped
def verify(
    cache: CachePath,
    deep: Annotated[bool, plain("Also recompute logits from states, and answers from tokens.", "--deep")] = False,
    repair: Annotated[bool, plain("Set corrupt shards aside; `cache` then writes them again.", "--repair")] = False,
    max_kl: Annotated[float, plain("With --deep: largest mean KL of a shard, in nats.")] = 0.1,
    device: Annotated[str, plain("With --deep: auto, cpu, cuda or cuda:N.")] = "auto",
    json_: Json = False,
) -> None:
    """Check every byte, count and key of a cache; exit status 1 if anything is corrupt."""
    from genrecal.shards.verify import quarantine, verify_cache
    from genrecal.vlm.loading import resolve_device

    if not max_kl >= 0:
        raise UsageError(f"--max-kl {max_kl}: expected nats, 0 or more")
    found = verify_cache(cache, deep=deep, max_kl=max_kl, device=str(resolve_device(device)) if deep else "cpu")
    moved = [str(folder) for folder in quarantine(found)] if repair else []
    if json_:
        show(dataclasses.asdict(found) | {"whole": found.whole, "quarantined": moved}, True)
        raise typer.Exit(0 if found.whole else 1)
    for finding in found.findings:
        typer.echo(printable(str(finding)))
    if found.deep:
        typer.echo("shard  target rows  mean KL, nats  max KL, nats  top-1 agreement")
    for row in found.deep:
        figures = f"{row.kl_mean:>13.3g}  {row.kl_max:>12.3g}  {row.top1_agreement:>15.2%}"
        typer.echo(f"{row.shard:05d}  {row.rows:>11}  {figures}")
    for text in found.notes:
        typer.echo(f"note: {printable(text)}")
    for folder in moved:
        typer.echo(f"set aside: {folder}")
    typer.echo(f"{cache}: {found.summary}")
    if moved:
        typer.echo("run `genrecal cache` again with the same options to write these shards again")
    elif found.damaged_shards and not repair:
        typer.echo(
            f"`genrecal verify {cache} --repair` sets these shards aside; `genrecal cache` then writes them again"
        )
    raise typer.Exit(0 if found.whole else 1)
