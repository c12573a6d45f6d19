"""The command line: parse, call one run function, print errors. Heavy libraries are imported by the command that needs them."""

import dataclasses
import functools
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import genrecal
from genrecal.errors import GenrecalError, OtherRankError, StoppedError, StorageError, UsageError
from genrecal.files import check_writable
from genrecal.train.config import number_format

app = typer.Typer(
    help="Cache a large vision-language model's states once, then distil it into small models from the shards.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(soft_wrap=True)
UNLIMITED = 1_000_000  # columns of what is not printed to a terminal
INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a checkpoint.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's), float32, bfloat16 or float16; fp32, bf16 and fp16 too.",
        callback=lambda name: number_format(name, "--dtype"),
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        help="Files of JSON, JSON lines, CSV, Parquet, Arrow or WebDataset tars, folders of Parquet or tars, patterns "
        "such as 'data-{000..015}.tar', URLs such as s3://..., or a data set of the hub as REPO:SPLIT; may be repeated."
    ),
]
FieldNames = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="NAME=FIELD",
        help="What a field of the records is: question=q, image=img_path, ignore=notes; may be repeated.",
    ),
]
RoleNames = Annotated[
    list[str] | None,
    typer.Option("--role", metavar="ROLE=NAME", help="What a role in the records is: Human=user; may be repeated."),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(help="Variable of the chat template, such as enable_thinking=false (JSON or text); may be repeated."),
]
AllowToken = Annotated[
    list[str] | None,
    typer.Option(
        help="Added token that texts may hold, such as <|box_start|>; else special ones are refused; may be repeated."
    ),
]
IncludeCategory = Annotated[
    list[str] | None,
    typer.Option(help='Take records of this category alone; may be repeated. "" is those that name none.'),
]
ExcludeCategory = Annotated[list[str] | None, typer.Option(help="Leave out this category; may be repeated.")]
Split = Annotated[
    str, typer.Option(help="Take records whose hashed id falls between these shares; 0.95:1.0 is the rest of 0.0:0.95.")
]
SplitSeed = Annotated[int, typer.Option(help="Seed of the hash that --split takes ids by.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or split: the layers spread over all GPUs.")]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 0 done, 1 failed or found damage, 2 wrong usage; no traceback without --debug.

    Args:
        args: the words after `genrecal`; None takes those of this process.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rendering may run in forked workers
    words = list(sys.argv[1:] if args is None else args)
    words = [
        word for word in words if not re.fullmatch(r"--local[-_]rank=\d+", word)
    ]  # launchers add it; so says LOCAL_RANK
    debug = "--debug" in words
    other_rank = os.environ.get("RANK", "0") != "0"  # each rank finds the same fault in its command; the first says so
    try:
        given = [word for word in words if word != "--debug"] or ["--help"]
        # The name as a shell knows it, for completion too; else `python -m genrecal` would be completed.
        status = app(args=given, prog_name="genrecal", standalone_mode=False)
    except OtherRankError as error:
        status = error.exit_status
    except StoppedError as error:
        status = error.exit_status
        sys.stderr.write(f"genrecal: {error}\n")
    except GenrecalError as error:
        status = error.exit_status
        if not (isinstance(error, UsageError) and other_rank):
            _print_error(str(error), debug=debug)
    except OSError as error:  # of a file or disk, which no check can rule out beforehand
        status = 1
        _print_error(_of_file(error), debug=debug)
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's own kinds have it
            raise
        status = 2
        if not other_rank:
            _print_error(f"{error.format_message()} (--help lists the options)", debug=debug)
    if status == INTERRUPTED and not other_rank:
        sys.stderr.write("genrecal: interrupted; run the same command again to go on from what is finished\n")
    sys.exit(status or 0)


def _of_file(error: OSError) -> str:
    """An error of the operating system's, with the file and what to do."""
    files = " and ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
    what = f"{files}: {error.strerror}" if files and error.strerror else str(error) or type(error).__name__
    return f"{what}; look at this path, its permissions and the room on its disk, and run the same command again"


def _print_error(message: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"genrecal: error: {_printable(' '.join(message.split()))}\n")


def _printable(text: str) -> str:
    """Text of a cache's, in which nothing can move the cursor or hide, on one line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda value: _version(value), help="Print the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"genrecal {genrecal.__version__}")
        raise typer.Exit


# ------------------------------------------------------------------------------------------------------------------- plan


@app.command()
def plan(
    teacher: Annotated[
        str,
        typer.Option(
            help="Teacher model: a folder or a hub name, or qwen2-vl-72b, internvl2-76b, internvl2.5-78b, nvlm-d-72b."
        ),
    ],
    data: Data,
    out: Annotated[str | None, typer.Option(help="Where the cache would be: is there room?")] = None,
    image_root: Annotated[str | None, typer.Option(help="Folder or URL where relative image paths start.")] = None,
    field: FieldNames = None,
    role: RoleNames = None,
    include_category: IncludeCategory = None,
    exclude_category: ExcludeCategory = None,
    split: Split = "0.0:1.0",
    split_seed: SplitSeed = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first N records only, of those selected.", min=1)] = None,
    probe: Annotated[int, typer.Option(help="Records that are looked at, drawn from all.")] = 512,
    num_samples: Annotated[int, typer.Option(help="Forecast for this many; 0 for as many as the data have.")] = 0,
    top_k: Annotated[int, typer.Option(help="As for cache.")] = 64,
    targets: Annotated[str | None, typer.Option(help="As for cache.")] = None,
    answer_codec: Annotated[str, typer.Option(help="As for cache.")] = "int8",
    question_codec: Annotated[str, typer.Option(help="As for cache.")] = "int4",
    question_fraction: Annotated[float, typer.Option(help="As for cache.")] = 1.0,
    question_seed: Annotated[int, typer.Option(help="As for cache.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="As for cache.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="As for cache.")] = 16384,
    max_tokens: Annotated[int, typer.Option(help="As for cache.")] = 0,
    max_skip: Annotated[float, typer.Option(help="As for cache: exit status 1 if more of the records are bad.")] = 0.01,
    generate: Annotated[bool, typer.Option("--generate", help="As for cache.")] = False,
    max_answer_tokens: Annotated[int, typer.Option(help="As for cache.")] = 1024,
    peak_tflops: Annotated[float, typer.Option(help="Of a GPU, dense, in the teacher's dtype.")] = 989.0,
    utilisation: Annotated[float, typer.Option(help="Share of it that the teacher reaches.")] = 0.4,
    gpu_gigabytes: Annotated[float, typer.Option(help="Memory of a GPU.")] = 80.0,
    gpu_bandwidth: Annotated[
        float, typer.Option(help="GPU memory bandwidth in GB/s (used to estimate --generate).")
    ] = 3350.0,
    train_rate: Annotated[float, typer.Option(help="Samples a second that the trainer takes.")] = 64.0,
    template_arg: TemplateArg = None,
    allow_token: AllowToken = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Forecast a cache's bytes and the teacher's cost, from a sample of the data and the teacher's config alone."""
    from genrecal.cache.job import check_place
    from genrecal.cache.options import CacheOptions
    from genrecal.cache.plan import PlanOptions, make_plan, plan_text
    from genrecal.cache.teacher_shape import KNOWN, teacher_shape
    from genrecal.samples import FieldMap, open_samples
    from genrecal.samples.survey import survey

    if out is not None:
        check_place(out)
    top_k, draws = _targets(targets, top_k, top_k_given=False)
    settings = CacheOptions(
        top_k=top_k,
        draws=draws,
        answer_codec=answer_codec,
        question_codec=question_codec,
        question_fraction=question_fraction,
        question_seed=question_seed,
        answers=_answers(generate, 0.0, 1.0, 0, max_answer_tokens),
        samples_per_shard=samples_per_shard,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
    )
    assumed = PlanOptions(
        probe=probe,
        num_samples=num_samples,
        peak_tflops=peak_tflops,
        utilisation=utilisation,
        gpu_gigabytes=gpu_gigabytes,
        gpu_bandwidth=gpu_bandwidth,
        train_rate=train_rate,
    )
    selection = _selection(include_category, exclude_category, split, split_seed)
    fields = FieldMap.parse(field or (), role or ())
    samples = open_samples(data, image_root=image_root, limit=limit, selection=selection, fields=fields)
    surveyed = survey(samples)
    if not json_:
        _print_survey(surveyed, max_skip)
    if teacher.lower() in KNOWN and not Path(teacher).exists():
        forecast = make_plan(KNOWN[teacher.lower()], None, samples, settings, assumed, out=out)
    else:
        from genrecal.vlm.loading import load_renderer, model_folder, processor_files

        folder = model_folder(teacher)
        prompt = _prompt(template_arg, allow_token)
        renderer = load_renderer(folder, prompt, trust_remote_code=trust_remote_code)
        renderer.refuse_unsaid_thinking(teacher)
        forecast = make_plan(
            teacher_shape(folder, trust_remote_code=trust_remote_code),
            renderer,
            samples,
            settings,
            assumed,
            out=out,
            teacher_file_bytes=sum(file.stat().st_size for file in [folder / "config.json", *processor_files(folder)]),
        )
    if json_:
        content = forecast.to_json() | {"survey": surveyed.to_json()}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo(plan_text(forecast))
    if forecast.fits is False or surveyed.over(max_skip) or forecast.skipped > max_skip * forecast.num_samples:
        raise typer.Exit(1)


def _print_survey(found: Any, max_skip: float) -> None:
    for line in found.lines(max_skip):
        console.print(_printable(line), markup=False, highlight=False)


# ------------------------------------------------------------------------------------------------------------------ cache


@app.command()
def cache(
    context: typer.Context,
    teacher: Annotated[str, typer.Option(help="Teacher model: a folder or a hub name.")],
    data: Data,
    out: Annotated[str, typer.Option(help="Cache directory, or a URL such as s3://...; an unfinished one is resumed.")],
    image_root: Annotated[
        str | None, typer.Option(help="Folder or URL where relative image paths start; else the data's folder.")
    ] = None,
    field: FieldNames = None,
    role: RoleNames = None,
    include_category: IncludeCategory = None,
    exclude_category: ExcludeCategory = None,
    split: Split = "0.0:1.0",
    split_seed: SplitSeed = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first N records only, of those selected.", min=1)] = None,
    top_k: Annotated[int, typer.Option(help="Logits kept for each answer token.")] = 64,
    targets: Annotated[
        str | None,
        typer.Option(
            help="topk:K (the same as --top-k K), sample:K (K draws for each answer token too), or both: topk:64,sample:50."
        ),
    ] = None,
    answer_codec: Annotated[str, typer.Option(help="How answer states are written: bf16, int8 or int4.")] = "int8",
    question_codec: Annotated[str, typer.Option(help="How question states are written, or none.")] = "int4",
    kl_budget: Annotated[
        float, typer.Option(help="Refuse a shard whose codec costs a larger mean KL, in nats.")
    ] = math.inf,
    question_fraction: Annotated[float, typer.Option(help="Share of samples whose question states are kept.")] = 1.0,
    question_seed: Annotated[int, typer.Option(help="Seed that selects the samples of --question-fraction.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Input records a shard.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a teacher batch, padding included.")] = 16384,
    max_tokens: Annotated[int, typer.Option(help="Skip conversations longer than this; 0 for no limit.")] = 0,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Have the teacher write the answers, and cache those; else the given ones."),
    ] = False,
    generate_temperature: Annotated[
        float, typer.Option(help="Of --generate: draw tokens at this temperature; 0 takes the most probable ones.")
    ] = 0.0,
    generate_top_p: Annotated[
        float, typer.Option(help="Of --generate: draw from the fewest tokens that hold this share of the mass.")
    ] = 1.0,
    generate_seed: Annotated[int, typer.Option(help="Of --generate: another seed draws other answers.")] = 0,
    max_answer_tokens: Annotated[
        int, typer.Option(help="Of --generate: skip a conversation with an answer that does not end within so many.")
    ] = 1024,
    template_arg: TemplateArg = None,
    allow_token: AllowToken = None,
    max_skip: Annotated[float, typer.Option(help="Fail when more than this share of the input is skipped.")] = 0.01,
    workers: Annotated[int, typer.Option(help="Runs of this command that share the work, one a node, say.")] = 1,
    worker: Annotated[int, typer.Option(help="The number of this worker, counted from 0.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads that decode and preprocess; 0 for the machine's cores.")] = 0,
    status_file: Annotated[
        Path | None, typer.Option(help="Write here, as JSON, how far the job is; outside the cache.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on the Ray cluster at host:port; auto for this machine's, local for a new one."),
    ] = None,
    ray_actors: Annotated[int, typer.Option(help="Teachers on the cluster; 0 for what its GPUs allow.")] = 0,
    ray_gpus: Annotated[
        float | None, typer.Option(help="GPUs that one teacher takes; else one, or none with --device cpu.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    backend: Annotated[str, typer.Option(help="What runs the teacher: hf (transformers) or vllm.")] = "hf",
    tensor_parallel: Annotated[int, typer.Option(help="vllm: GPUs that each layer is spread over.", min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="vllm: stages that the layers are spread over.", min=1)] = 1,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="vllm: one of its engine arguments, such as gpu_memory_utilization=0.85; may be repeated."),
    ] = None,
    blank_check: Annotated[
        int,
        typer.Option(
            help="Run N samples with grey images too; print how far the answers' log-probability falls.", min=0
        ),
    ] = 0,
    compare_hf: Annotated[
        int, typer.Option(help="vllm: run N samples through hf on the CPU too; refuse if their rows differ.", min=0)
    ] = 0,
) -> None:
    """Run the teacher once over the data and write its states as shards."""
    from genrecal.cache.job import check_place, run_cache_job
    from genrecal.cache.options import CacheOptions, RayOptions, WorkOptions
    from genrecal.samples import FieldMap, open_samples
    from genrecal.samples.survey import Reasons, survey
    from genrecal.shards.reader import open_cache

    source = context.get_parameter_source("top_k")
    top_k, draws = _targets(targets, top_k, top_k_given=source is not None and source.name == "COMMANDLINE")
    settings = CacheOptions(
        top_k=top_k,
        draws=draws,
        answers=_answers(generate, generate_temperature, generate_top_p, generate_seed, max_answer_tokens),
        answer_codec=answer_codec,
        question_codec=question_codec,
        kl_budget=kl_budget,
        question_fraction=question_fraction,
        question_seed=question_seed,
        samples_per_shard=samples_per_shard,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        max_skip=max_skip,
    )
    work = WorkOptions(workers=workers, worker=worker, threads=threads, status_file=status_file)
    prompt = _prompt(template_arg, allow_token)
    load_teacher: Callable[[], Any]
    if backend == "vllm":
        load_teacher = functools.partial(
            _vllm_teacher,
            teacher,
            dtype,
            device,
            trust_remote_code,
            tensor_parallel,
            pipeline_parallel,
            engine_arg,
            prompt,
        )
    elif backend != "hf":
        raise UsageError(f"--backend {backend!r}: expected hf or vllm")
    elif tensor_parallel > 1 or pipeline_parallel > 1 or engine_arg or compare_hf:
        raise UsageError(
            "--tensor-parallel, --pipeline-parallel, --engine-arg and --compare-hf: expected --backend vllm with them; "
            "--device split spreads a teacher of the hf backend over the GPUs of a machine"
        )
    else:
        load_teacher = functools.partial(_teacher, teacher, dtype, device, trust_remote_code, prompt)
    selection = _selection(include_category, exclude_category, split, split_seed)
    fields = FieldMap.parse(field or (), role or ())
    load_samples = functools.partial(
        open_samples, data, image_root=image_root, limit=limit, selection=selection, fields=fields
    )
    check_place(out)
    samples = load_samples()
    surveyed = survey(samples)
    _print_survey(surveyed, max_skip)
    surveyed.check(max_skip)
    if ray is not None:
        from genrecal.cache.ray_job import run_ray_job

        if blank_check or compare_hf:
            raise UsageError(
                "--blank-check and --compare-hf: expected no --ray with them; make these checks on one machine first, "
                "with --limit"
            )
        if ray_gpus is None and device != "cpu" and backend == "vllm":
            ray_gpus = float(tensor_parallel * pipeline_parallel)
        gpus = 0.0 if ray_gpus is None and device == "cpu" else ray_gpus
        cluster = RayOptions(address=ray, actors=ray_actors, gpus=gpus)
        report = run_ray_job(load_teacher, load_samples, out, settings, work, cluster)
    elif ray_actors or ray_gpus is not None:
        raise UsageError("--ray-actors and --ray-gpus: expected --ray ADDRESS with them")
    else:
        model = load_teacher()
        if compare_hf:
            from genrecal.cache.proof import compare_backends

            dtype = str(model.head.weight.dtype).removeprefix("torch.")
            reference = _teacher(teacher, dtype, "cpu", trust_remote_code, prompt)
            console.print(f"hf against vllm: {compare_backends(model, reference, samples, compare_hf)}")
        if blank_check:
            _blank_check(model, samples, blank_check)
        report = run_cache_job(model, samples, out, settings, work)
    done = f"{report.shards_done} shards written, {report.shards_found} were there"
    if report.shards_missing:
        console.print(
            f"{out}: worker {worker} of {workers} is done: {report.cached} samples cached, {report.skipped} skipped; {done}. "
            f"{report.shards_missing} shards of other workers are not finished yet; the last worker completes the cache"
        )
        return
    for line in Reasons.of(open_cache(out).skipped()).lines():
        console.print(f"skipped {_printable(line)}", style="yellow", markup=False)
    if count := report.counts["context_answers"]:
        console.print(
            f"{count} earlier answers are context and no targets: this chat template opens the last answer of a conversation "
            "otherwise than earlier ones; give a record for each answer to have them all",
            style="yellow",
        )
    if count := report.counts["unread_reasoning"]:
        console.print(
            f"{count} records have reasoning_content, which this model's chat template does not write", style="yellow"
        )
    console.print(f"{out}: {report.cached} samples cached, {report.skipped} skipped; {done}")


def _targets(text: str | None, top_k: int, *, top_k_given: bool) -> tuple[int, int]:
    """`--targets` -> logits and draws kept a row. Raises UsageError for what it cannot be, or another k than `--top-k`."""
    widths: dict[str, int] = {}
    for part in text.split(",") if text is not None else []:
        kind, _, width = part.strip().partition(":")
        if kind not in ("topk", "sample") or kind in widths or not width.isdecimal() or not int(width):
            raise UsageError(f"--targets {text!r}: expected topk:K, sample:K or both, such as topk:64,sample:50")
        widths[kind] = int(width)
    if top_k_given and widths.get("topk", top_k) != top_k:
        raise UsageError(f"--targets topk:{widths['topk']} and --top-k {top_k}: expected the same k; leave one out")
    return widths.get("topk", top_k), widths.get("sample", 0)


def _answers(generate: bool, temperature: float, top_p: float, seed: int, max_tokens: int) -> Any:
    from genrecal.shards.answer_source import GREEDY, SAMPLED, AnswerSource

    if not generate:
        for name, value, plain in (("temperature", temperature, 0), ("top-p", top_p, 1), ("seed", seed, 0)):
            if value != plain:
                raise UsageError(f"--generate-{name} {value}: expected --generate with it")
        return AnswerSource()
    if temperature == 0:
        return AnswerSource(kind=GREEDY, max_tokens=max_tokens)
    return AnswerSource(kind=SAMPLED, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _selection(include: list[str] | None, exclude: list[str] | None, split: str, seed: int) -> Any:
    from genrecal.samples import Selection, parse_split

    return Selection(
        include_categories=tuple(include or ()),
        exclude_categories=tuple(exclude or ()),
        split=parse_split(split),
        split_seed=seed,
    )


def _prompt(template_arg: list[str] | None, allow_token: list[str] | None) -> Any:
    from genrecal.vlm.rendering import PromptOptions

    return PromptOptions.parse(template_arg, allow_token)


def _teacher(path: str, dtype: str, device: str, trust_remote_code: bool, prompt: Any) -> Any:
    from genrecal.cache.teacher import HFTeacher

    return HFTeacher.load(
        path, dtype=_dtype(dtype), device=_device(device), trust_remote_code=trust_remote_code, prompt=prompt
    )


def _vllm_teacher(
    path: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    tensor_parallel: int,
    pipeline_parallel: int,
    engine_arg: list[str] | None,
    prompt: Any,
) -> Any:
    from genrecal.cache.vllm_teacher import VLLMTeacher, engine_arguments

    if device == "split":
        raise UsageError("--device split: expected --tensor-parallel or --pipeline-parallel with --backend vllm")
    return VLLMTeacher(
        path,
        dtype=_dtype(dtype),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        engine_args=engine_arguments(engine_arg or []),
        trust_remote_code=trust_remote_code,
        # The engine takes the GPUs; this process needs a device for the head alone.
        head_device="cpu" if device == "auto" else _device(device),
        prompt=prompt,
    )


def _blank_check(teacher: Any, samples: Any, count: int) -> None:
    from genrecal.cache.proof import blank_check

    found = blank_check(teacher, (samples[i] for i in range(len(samples))), count)
    if found is None:
        console.print("--blank-check: no sample has a picture", style="yellow")
        return
    console.print(f"blank check: {found}")
    if found.fall <= 0:
        console.print(
            "warning: the answers do not depend on the pictures as they should: look at the pictures and the chat template, "
            "or try more samples",
            style="yellow",
        )


def _device(name: str) -> Any:
    from genrecal.vlm.loading import SPLIT, resolve_device

    return SPLIT if name == SPLIT else resolve_device(name)


def _dtype(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(
    cache: Annotated[str, typer.Argument(help="Cache directory or URL.")],
    key: Annotated[str | None, typer.Option(help="Show one record, by its key or its sample id.")] = None,
    sql: Annotated[str | None, typer.Option(help="Query the manifest with DuckDB, as the table `manifest`.")] = None,
    save_images: Annotated[
        Path | None, typer.Option(help="With --key: write the record's pictures into this folder.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of the summary and some records, or of the one of --key.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a cache holds: a summary, one record, or what a query finds in the manifest."""
    from genrecal.shards import inspect as shards_inspect
    from genrecal.shards import inspect_text
    from genrecal.shards.reader import open_cache

    if key is not None and sql is not None:
        raise UsageError("--key and --sql: expected one of the two; --key shows a record, --sql queries the manifest")
    if save_images is not None and key is None:
        raise UsageError("--save-images: expected --key KEY with it, the record whose pictures to write")
    if html is not None and (sql is not None or json_ or save_images is not None):
        raise UsageError("--html: expected no --sql, --json or --save-images with it; it writes a page of its own")
    opened = open_cache(cache)
    if html is not None:
        from genrecal.report.cache_page import write_cache_page

        write_cache_page(opened, html, [shards_inspect.find_record(opened, key)] if key is not None else None)
        console.print(f"{html}: {cache}", markup=False)
    elif sql is not None:
        result = shards_inspect.run_sql(opened, sql)
        _show(result.to_dicts() if json_ else inspect_text.sql_text(result), json_)
    elif key is not None:
        record = shards_inspect.find_record(opened, key)
        described = shards_inspect.describe_record(record)
        saved = shards_inspect.save_images(record, save_images) if save_images is not None else ()
        if json_:
            _show(dataclasses.asdict(described) | {"saved_images": saved}, json_)
            return
        _show(inspect_text.record_text(described), json_)
        for path in saved:
            typer.echo(str(path))
        protocol = inspect_text.inline_protocol(os.environ) if sys.stdout.isatty() else None
        for data in record.images if protocol else []:
            typer.echo(inspect_text.inline_image(data, str(protocol)), nl=False)
    else:
        summary = shards_inspect.summarize(opened)
        _show(dataclasses.asdict(summary) if json_ else inspect_text.summary_text(summary), json_)


def _show(content: Any, as_json: bool) -> None:
    """Print JSON, or a renderable: fitted to a terminal, and as wide as it is when piped."""
    if as_json:
        from genrecal.shards.inspect import plain_json

        typer.echo(json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False))
    elif console.is_terminal:
        console.print(content)
    else:
        text = io.StringIO()
        Console(file=text, width=UNLIMITED, soft_wrap=True).print(content)
        typer.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


# ------------------------------------------------------------------------------------------------------------------- pair


@app.command()
def pair(
    teacher: Annotated[str, typer.Argument(help="Teacher: a folder or a hub name; no weights are read.")],
    student: Annotated[str, typer.Argument(help="Student, likewise.")],
    text: Annotated[str | None, typer.Option(help="Text to compare; else one with code, numbers and scripts.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture to count tokens of, else five sizes; may be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Put two models' token types side by side: which distillation is possible between them."""
    from genrecal.errors import SampleError
    from genrecal.objectives.pairs import findings
    from genrecal.samples import ImageSource, decode_image
    from genrecal.vlm.pair import TEXT, compare_pair, pair_report

    pictures = {}
    for path in image or []:
        try:
            picture = decode_image(ImageSource(path=path).read())
        except SampleError as error:
            raise UsageError(f"--image {path}: {error}") from None
        pictures[f"{path.name} {picture.width}x{picture.height}"] = picture
    found = compare_pair(
        teacher,
        student,
        text=TEXT if text is None else text,
        pictures=pictures or None,
        trust_remote_code=trust_remote_code,
    )
    objectives = findings(found)
    if json_:
        facts = dataclasses.asdict(found) | {"traditional": found.traditional}
        _show(facts | {"objectives": [dataclasses.asdict(finding) for finding in objectives]}, json_)
    else:
        _show(pair_report(found, objectives), json_)


# ----------------------------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    cache: Annotated[str, typer.Argument(help="Cache directory or URL.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Recompute logits from states, and answers from tokens.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged shards aside, so that `cache` makes them again.")
    ] = False,
    max_kl: Annotated[float, typer.Option(help="With --deep: a shard's largest mean KL, in nats.")] = 0.1,
    device: Annotated[str, typer.Option(help="With --deep: auto, cpu, cuda or cuda:N.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every byte, count and key of a cache; exit status 1 if anything is damaged."""
    from genrecal.shards.verify import quarantine, verify_cache

    if not max_kl >= 0:
        raise UsageError(f"--max-kl {max_kl}: expected nats, 0 or more")
    found = verify_cache(cache, deep=deep, max_kl=max_kl, device=str(_device(device)) if deep else "cpu")
    moved = quarantine(found) if repair else []
    if json_:
        content = dataclasses.asdict(found) | {"whole": found.whole, "quarantined": [str(folder) for folder in moved]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        raise typer.Exit(0 if found.whole else 1)
    for finding in found.findings:
        typer.echo(_printable(str(finding)))
    if found.deep:
        typer.echo("shard  target rows  mean KL, nats  max KL, nats  top-1 agreement")
    for row in found.deep:
        figures = f"{row.kl_mean:>13.3g}  {row.kl_max:>12.3g}  {row.top1_agreement:>15.2%}"
        typer.echo(f"{row.shard:05d}  {row.rows:>11}  {figures}")
    for note in found.notes:
        typer.echo(f"note: {_printable(note)}")
    for folder in moved:
        typer.echo(f"set aside: {folder}")
    typer.echo(f"{cache}: {found.summary}")
    if moved:
        typer.echo("run `genrecal cache` again with the same options: it makes exactly these shards again")
    elif found.damaged_shards and not repair:
        typer.echo(f"`genrecal verify {cache} --repair` sets damaged shards aside for `genrecal cache` to make again")
    raise typer.Exit(0 if found.whole else 1)


# ------------------------------------------------------------------------------------------------------------------ train


@app.command()
def train(
    cache: Annotated[
        list[str],
        typer.Option(
            help="Cache directory or URL; may be repeated, to mix caches of one teacher (--set data.weights=[1,0.5])."
        ),
    ],
    student: Annotated[str, typer.Option(help="Student model: a folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="Run directory; an unfinished run of the same settings goes on.")],
    stages: Annotated[str, typer.Option(help="Stages to train, such as 1,2,3 or 2.")] = "1,2,3",
    objective: Annotated[
        str | None,
        typer.Option(
            help="genrecal, genrecal-aligned, sft, seqkd, kl, reverse-kl, skewed-kl, byte-kl, uld or dskd; the same as "
            "--set objective=..."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, or the name of a recipe.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as stage1.lr=2e-4.")] = None,
    on_damage: Annotated[
        str | None, typer.Option(help="At a damaged sample: fail or skip; the same as --set data.on_damage=...")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="live:MODEL runs that teacher beside the student in place of the shards.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast memory, steps, time and disk from configs alone; train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="Of --dry-run: processes that train together, one a GPU.")] = 1,
    gpu_gigabytes: Annotated[float, typer.Option(help="Of --dry-run: memory of a GPU.")] = 80.0,
    profile: Annotated[
        int,
        typer.Option(
            help="Run this many steps of each stage, print time and peak memory by part, keep nothing.", min=0
        ),
    ] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Of --dry-run: print JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a student from a cache, in three stages."""
    from genrecal.train.config import load_config

    numbers = _stages(stages)
    short = {"objective": objective, "data.on_damage": on_damage}
    settings = load_config(config, [*(set_ or []), *(f"{name}={value}" for name, value in short.items() if value)])
    if teacher is not None and not teacher.startswith("live:"):
        raise UsageError(f"--teacher {teacher!r}: expected live:MODEL")
    if dry_run:
        from genrecal.shards.mixture import open_caches
        from genrecal.train.export import check_layout
        from genrecal.train.forecast import forecast_text, make_forecast
        from genrecal.vlm.loading import is_weight_file, model_folder

        forecast = make_forecast(
            settings,
            student,
            open_caches(cache, settings.data.weights),
            gpus=gpus,
            gpu_gigabytes=gpu_gigabytes,
            stages=numbers,
            out=out,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(json.dumps(forecast.to_json(), indent=2) if json_ else forecast_text(forecast))
        if any(is_weight_file(file) for file in model_folder(student).iterdir()):  # else it is of configs alone
            for note in check_layout(student, trust_remote_code=trust_remote_code).notes:
                sys.stderr.write(f"genrecal: export: {note}\n")
        raise typer.Exit(0 if forecast.fits else 1)

    # These take seconds: only once the settings are known to be right.
    from genrecal.train.loop import profile as profile_steps
    from genrecal.train.loop import train
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
        device = str(own_device(settings.device))
        live = _live_teacher(teacher.removeprefix("live:"), cache[0], device, trust_remote_code)
    if profile:
        if text := profile_steps(run, profile, stages=numbers, live_teacher=live):
            typer.echo(text)
        return
    train(run, stages=numbers, live_teacher=live)
    if world_size() and os.environ["RANK"] != "0":
        return
    done = run.last_finished_stage()
    following = (
        f"`genrecal export {out} --out DIR` writes the student" if done > 1 else "the student is trained in stage 2"
    )
    console.print(
        f"{out}: stage {done} finished; {following}"
        if done
        else f"{out}: nothing to train in stage 1 of {settings.objective}"
    )


def _stages(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= {1, 2, 3}:
        raise UsageError(f"--stages {text!r}: expected numbers from 1 to 3 with commas, such as 1,2,3")
    return numbers


def _live_teacher(path: str, cache: str, device: str, trust_remote_code: bool) -> Any:
    """The co-resident teacher; with the cache's dtype and head, or else it is another teacher."""
    from genrecal.cache.teacher import LiveTeacher
    from genrecal.shards.reader import open_cache
    from genrecal.vlm.cached_teacher import prompt_options
    from genrecal.vlm.loading import file_digest, model_folder, processor_files

    opened = open_cache(cache)
    prompt = prompt_options(opened)
    teacher = _teacher(path, opened.description["teacher"]["dtype"], device, trust_remote_code, prompt)
    if not teacher.head.weight.cpu().equal(opened.head().weight):
        raise UsageError(f"--teacher live:{path}: its head is not the one that the cache {cache} was made with")
    made_with = opened.description["teacher"]["files_sha256"]
    for file in processor_files(model_folder(path)):
        if made_with.get(file.name) != file_digest(file):
            raise UsageError(
                f"--teacher live:{path}: its {file.name} is not the one that the cache {cache} was made with (sha256 "
                f"{made_with.get(file.name)}, got {file_digest(file)}): its tokens would be others; make another cache with it"
            )
    return LiveTeacher(teacher, top_k=opened.description["top_k"], draws=opened.draws)


# ------------------------------------------------------------------------------------------------------- export, evaluate


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; must not exist.")],
    cache: Annotated[str | None, typer.Option(help="Cache to check outputs on, if it has moved.")] = None,
    student: Annotated[str | None, typer.Option(help="The student as it was before the run, if it has moved.")] = None,
    stage: Annotated[int | None, typer.Option(help="Stage to export; else the last finished.", min=2, max=3)] = None,
) -> None:
    """Write the trained student as a stock Hugging Face checkpoint."""
    from genrecal.train.export import export
    from genrecal.train.run import Run

    done = export(Run.open(run, student=student), out, cache=cache, stage=stage)
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{out}: the student after stage {done.stage}; reloaded, its logits and greedy answers are the trained one's"
    )


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A folder or hub name of the original InternVL layout.")],
    processor: Annotated[
        str,
        typer.Option(help="An InternVL in transformers' layout, with the same vocabulary: its tokenizer is copied."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint in transformers' layout.")],
) -> None:
    """Write an InternVL of the original layout in transformers' own, which a student must have."""
    from genrecal.vlm.convert import convert_internvl

    convert_internvl(model, out, processor=processor)
    console.print(f"{out}: {model} in transformers' layout")


@app.command()
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder or hub name.")],
    data: Annotated[list[str] | None, typer.Option(help="Data, as for cache.")] = None,
    metric: Annotated[str, typer.Option(help="auto, exact, number, relaxed, anls, prose, vqa or choice.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Write the predictions here, as jsonl; with --harness, a folder for its files.")
    ] = None,
    image_root: Annotated[str | None, typer.Option(help="Folder or URL where relative image paths start.")] = None,
    field: FieldNames = None,
    role: RoleNames = None,
    include_category: IncludeCategory = None,
    exclude_category: ExcludeCategory = None,
    split: Split = "0.0:1.0",
    split_seed: SplitSeed = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first N records only, of those selected.", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts at a time; default 8, and 1 with --harness.", min=1, show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; else the generation config's.", min=1)
    ] = None,
    template_arg: TemplateArg = None,
    allow_token: AllowToken = None,
    harness: Annotated[
        str | None, typer.Option(help="lmms-eval: run its tasks in place of --data; it needs the extra eval.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of the harness: names of tasks, with commas.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Of the harness: tasks of your own, in its format.")] = None,
    harness_model: Annotated[
        str | None, typer.Option(help="Of the harness: its class for the model; else the family's.")
    ] = None,
    harness_arg: Annotated[
        list[str] | None, typer.Option(help="Of the harness: name=value for that class; may be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate answers and score them, on data of your own or on the benchmarks of a harness."""
    given = [name for name in context.params if (of := context.get_parameter_source(name)) and of.name == "COMMANDLINE"]
    _check_evaluate(harness, tasks, data, given)
    if harness is not None:
        options = {
            "out": out,
            "device": str(_device(device)),
            "harness_model": harness_model,
            "harness_args": harness_arg or [],
            "task_folder": task_folder,
            "limit": limit,
            "batch_size": batch_size or 1,
            "trust_remote_code": trust_remote_code,
        }
        _evaluate_by_harness(model, (tasks or "").split(","), options, json_)
        return

    from genrecal.evaluate.evaluate import evaluate, save_evaluation
    from genrecal.evaluate.scores import check_metric
    from genrecal.report.summary import plus_minus
    from genrecal.samples import FieldMap, open_samples
    from genrecal.samples.survey import Reasons, survey
    from genrecal.vlm.loading import load_vlm

    check_metric(metric, "--metric")
    if out is not None:
        try:
            check_writable(out)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None

    selection = _selection(include_category, exclude_category, split, split_seed)
    fields = FieldMap.parse(field or (), role or ())
    samples = open_samples(data or [], image_root=image_root, limit=limit, selection=selection, fields=fields)
    for line in survey(samples).lines():
        typer.echo(_printable(line), err=True)
    prompt = _prompt(template_arg, allow_token)
    vlm = load_vlm(
        model, dtype=_dtype(dtype), device=_device(device), trust_remote_code=trust_remote_code, prompt=prompt
    )
    result = evaluate(vlm, samples, metric=metric, batch_size=batch_size or 8, max_new_tokens=max_new_tokens)
    for line in Reasons.of(f"{where}: {why}" for where, why in result.skipped).lines():
        typer.echo(f"skipped {_printable(line)}", err=True)
    scores = {"overall": result.overall, **result.by_category}
    rules = {name: result.rules(None if score is result.overall else name) for name, score in scores.items()}
    table = Table("category", "questions", "accuracy", "answer log-loss, nats", "scored by", box=None, pad_edge=False)
    for name, score in scores.items():
        table.add_row(
            name or "(no category)",
            str(score.n),
            plus_minus(score.accuracy, score.accuracy_error, percent=True),
            plus_minus(score.log_loss, score.log_loss_error),
            ", ".join(f"{rule} {count}" for rule, count in rules[name].items()),
        )
    content = {name: dataclasses.asdict(score) | {"rules": rules[name]} for name, score in scores.items()}
    _show(content if json_ else table, json_)
    if out is not None:
        try:
            save_evaluation(result, out)
        except OSError as error:
            raise StorageError(
                f"--out {out}: cannot be written: {error.strerror or error}; the scores are printed above"
            ) from None


def _evaluate_by_harness(model: str, tasks: list[str], options: dict[str, Any], as_json: bool) -> None:
    from genrecal.evaluate.harness import run_lmms_eval

    scores = run_lmms_eval(model, tasks, **options)
    if as_json:
        _show([dataclasses.asdict(score) for score in scores], True)
        return
    table = Table("task", "metric", "value", "standard error", "questions", box=None, pad_edge=False)
    for score in scores:
        value = f"{score.value:.4g}" if isinstance(score.value, int | float) else str(score.value)
        error = "" if score.error is None else f"{score.error:.2g}"
        table.add_row(score.task, score.metric, value, error, str(score.n or ""))
    _show(table, False)


def _check_evaluate(harness: str | None, tasks: str | None, data: list[str] | None, given: list[str]) -> None:
    """That what is asked for is one of two: data of one's own, or tasks of a harness."""
    harness_only = ("tasks", "task_folder", "harness_model", "harness_arg")
    data_only = (
        "data",
        "metric",
        "image_root",
        "field",
        "role",
        "include_category",
        "exclude_category",
        "split",
        "split_seed",
        "max_new_tokens",
        "template_arg",
        "allow_token",
        "dtype",
    )
    if harness is None:
        wrong = [name for name in given if name in harness_only]
        if wrong:
            raise UsageError(f"{_option(wrong[0])}: expected --harness lmms-eval with it")
        if not data:
            raise UsageError("--data: expected data files, or --harness lmms-eval --tasks NAME,NAME")
        return
    if harness != "lmms-eval":
        raise UsageError(f"--harness {harness!r}: expected lmms-eval")
    wrong = [name for name in given if name in data_only]
    if wrong:
        raise UsageError(f"{_option(wrong[0])}: it is not for --harness, whose tasks and model class decide that")
    if not tasks or not all(tasks.split(",")):
        raise UsageError(
            f"--tasks {tasks or ''!r}: expected names of lmms-eval's tasks with commas, such as ai2d,mmstar"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------------------- compare


@app.command()
def compare(
    cache: Annotated[
        list[str],
        typer.Option(help="Cache directory or URL, of every variant that names no other; may be repeated to mix."),
    ],
    student: Annotated[str, typer.Option(help="Student model: a folder or a hub name.")],
    data: Annotated[list[str], typer.Option(help="Held-out data, as for cache.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and the table; finished runs there are found again.")],
    try_: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            help="A variant: an objective, or NAME=SETTINGS such as 'kl 3=loss.kl_weight=3 cache=caches/other'; may be "
            "repeated. The first is what the others are compared with.",
        ),
    ] = None,
    tries: Annotated[Path | None, typer.Option(help="TOML file with a table of settings for each variant.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every variant.")] = "0,1,2",
    stages: Annotated[str, typer.Option(help="Stages to train, such as 1,2,3 or 1,2.")] = "1,2,3",
    config: Annotated[Path | None, typer.Option(help="TOML file of settings of all variants.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting of all variants.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side; GPUs are dealt out to them in turn.", min=1)] = 1,
    image_root: Annotated[str | None, typer.Option(help="Folder or URL where relative image paths start.")] = None,
    field: FieldNames = None,
    role: RoleNames = None,
    limit: Annotated[int | None, typer.Option(help="Ask the first N records only.", min=1)] = None,
    metric: Annotated[str, typer.Option(help="auto, exact, number, relaxed, anls, prose, vqa or choice.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered at a time.", min=1)] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; else the generation config's.", min=1)
    ] = None,
    dtype: Dtype = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train several variants at equal steps with several seeds, ask each student the same questions, print one table."""
    from genrecal.compare import Asking, compare, comparison_text, variants_of
    from genrecal.samples import FieldMap, open_samples

    variants = variants_of(try_ or [], tries, caches=cache, config=config, settings=set_ or [])
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {seeds!r}: expected numbers with commas, such as 0,1,2") from None
    found = compare(
        variants,
        student,
        functools.partial(
            open_samples,
            data,
            image_root=image_root,
            limit=limit,
            fields=FieldMap.parse(field or (), role or ()),
        ),
        out,
        seeds=numbers,
        stages=_stages(stages),
        asking=Asking(metric=metric, batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype),
        jobs=jobs,
        trust_remote_code=trust_remote_code,
        say=lambda line: sys.stderr.write(f"{line}\n"),
    )
    if json_:
        _show(dataclasses.asdict(found), True)
    else:
        typer.echo(comparison_text(found))


# ----------------------------------------------------------------------------------------------------------------- report


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; unfinished ones show what they have.")],
    out: Annotated[Path, typer.Option(help="The HTML file; one that is there is replaced.")],
) -> None:
    """Write a page of one or several runs: losses, accuracy, cost. One file, which opens offline."""
    from genrecal.report.run_page import write_run_report

    write_run_report(runs, out)
    console.print(f"{out}: {', '.join(map(str, runs))}", markup=False)


# ----------------------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor(
    out: Annotated[Path, typer.Option(help="A folder of the disk that caches and runs are to lie on.")] = Path(),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine and environment have, and what each command lacks here; exit status 1 if all lack something."""
    from genrecal.doctor import examine, report_text

    if not out.is_dir():
        raise UsageError(f"--out {out}: expected a folder that exists")
    report = examine(out)
    typer.echo(json.dumps(report.to_json(), indent=2) if json_ else report_text(report))
    if not report.healthy:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the cache, the runs and the report.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of the data, the order and the Recalibrator.")] = 0,
) -> None:
    """Run the whole pipeline on bundled data and tiny models, on a CPU."""
    from genrecal.demo.pipeline import run_demo

    run_demo(out, seed=seed, say=console.print)


if __name__ == "__main__":
    main()
