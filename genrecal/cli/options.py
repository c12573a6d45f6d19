"""Options that several commands share. A command takes a group as one argument; `grouped` expands it into its options."""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from genrecal.errors import UsageError
from genrecal.train.config import number_format


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a dataclass by that dataclass's fields, and build the dataclass for the call."""
    groups: dict[str, Any] = {}
    options: list[Parameter] = []
    for name, given in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(given.annotation):
            options.append(given.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        groups[name] = given.annotation
        hints = typing.get_type_hints(given.annotation, include_extras=True)
        for field in dataclasses.fields(given.annotation):
            default = Parameter.empty if field.default is dataclasses.MISSING else field.default
            options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def changed(group: Any) -> list[str]:
    """Options of a group that differ from their defaults, as they are written on the command line."""
    fields = dataclasses.fields(group)
    return [f"--{field.name.replace('_', '-')}" for field in fields if getattr(group, field.name) != field.default]


def parse_stages(text: str) -> list[int]:
    """`1,2,3` -> the stages to train. Raises UsageError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= {1, 2, 3}:
        raise UsageError(f"--stages {text!r}: expected numbers from 1 to 3 with commas, such as 1,2,3")
    return numbers


def panel(name: str | None) -> Callable[..., Any]:
    """`typer.Option` for one panel of --help: takes the help, then the option's name if it is not the parameter's."""

    def option(help: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=help, rich_help_panel=name, **more)

    return option


plain, data, storage, answers = panel(None), panel("Data"), panel("Storage"), panel("Answers")
model, teacher = panel("Model"), panel("Teacher")

Texts = list[str] | None
CachePath = Annotated[str, typer.Argument(help="Cache directory or URL.")]
Config = Annotated[Path | None, plain("TOML file of settings, or the name of a recipe (paper).")]
Json = Annotated[bool, plain("Print JSON.", "--json")]
MaxNewTokens = Annotated[int | None, plain("Maximum answer length; default: the generation config's.", min=1)]
Metric = Annotated[str, plain("auto, exact, number, relaxed, anls, prose, vqa or choice.")]
Settings = Annotated[Texts, plain("One setting, such as stage1.lr=2e-4. May be repeated.", "--set")]
Stages = Annotated[str, plain("Stages to train, such as 1,2,3 or 2.")]
StudentModel = Annotated[str, model("Student model: a folder or a hub name.")]
TrustRemoteCode = Annotated[bool, model("Run Python code that comes with a checkpoint.", "--trust-remote-code")]
DTYPES = "auto (the checkpoint's), float32, bfloat16 or float16; fp32, bf16 and fp16 work too."
Dtype = Annotated[str, model(DTYPES, callback=lambda name: number_format(name, "--dtype"))]


@dataclass(frozen=True, kw_only=True)
class DataGroup:
    """Which records a command reads."""

    data: Annotated[
        list[str],
        data(
            "JSON, JSON lines, CSV, Parquet, Arrow or WebDataset tar files, folders of Parquet or tars, patterns "
            "such as 'data-{000..015}.tar', URLs such as s3://..., or REPO:SPLIT of the hub. May be repeated."
        ),
    ]
    image_root: Annotated[str | None, data("Folder or URL of relative image paths; default: the data's folder.")] = None
    field: Annotated[
        Texts,
        data(
            "Name a field of the records: question=q, image=path, ignore=notes. May be repeated.", metavar="NAME=FIELD"
        ),
    ] = None
    role: Annotated[Texts, data("Name a role in the records: Human=user. May be repeated.", metavar="ROLE=NAME")] = None
    include_category: Annotated[Texts, data('Use only this category; "" is records without one. May be repeated.')] = (
        None
    )
    exclude_category: Annotated[Texts, data("Leave out this category. May be repeated.")] = None
    split: Annotated[str, data("Use records whose hashed id lies between two shares, such as 0.95:1.0.")] = "0.0:1.0"
    split_seed: Annotated[int, data("Seed of the hash that --split uses.")] = 0
    limit: Annotated[int | None, data("Use only the first N of the selected records.", min=1)] = None

    def loader(self) -> Callable[[], Any]:
        """A function that opens the records; it can be pickled."""
        from genrecal.samples import FieldMap, Selection, open_samples, parse_split

        selection = Selection(
            include_categories=tuple(self.include_category or ()),
            exclude_categories=tuple(self.exclude_category or ()),
            split=parse_split(self.split),
            split_seed=self.split_seed,
        )
        fields = FieldMap.parse(self.field or (), self.role or ())
        options: dict[str, Any] = {"limit": self.limit, "selection": selection, "fields": fields}
        return functools.partial(open_samples, self.data or (), image_root=self.image_root, **options)


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """How conversations are rendered."""

    template_arg: Annotated[
        Texts, model("Variable of the chat template, such as enable_thinking=false. May be repeated.")
    ] = None
    allow_token: Annotated[
        Texts, model("Special token that texts may contain, such as <|box_start|>. May be repeated.")
    ] = None

    def parsed(self) -> Any:
        """As `genrecal.vlm.rendering.PromptOptions`."""
        from genrecal.vlm.rendering import PromptOptions

        return PromptOptions.parse(self.template_arg, self.allow_token)


@dataclass(frozen=True, kw_only=True)
class ModelGroup:
    """How a model is loaded."""

    dtype: Dtype = "auto"
    device: Annotated[str, model("auto, cpu, cuda, cuda:N, or split (layers spread over all GPUs).")] = "auto"
    trust_remote_code: TrustRemoteCode = False


OF_STATES = ("--answer-codec", "--kl-budget")  # options that do nothing without these states
OF_QUESTIONS = ("--question-codec", "--question-fraction", "--question-seed")


class Store(StrEnum):
    """What `--store` keeps of the teacher; each holds what the one before holds."""

    targets = "targets"
    states = "states"
    questions = "questions"


@dataclass(frozen=True, kw_only=True)
class StorageGroup:
    """What a cache holds of each sample, and in which batches and shards it is made."""

    top_k: Annotated[int | None, storage("Logits to store per answer token; default: 64.")] = None
    targets: Annotated[
        str | None, storage("topk:K (same as --top-k K), sample:K (K draws per token), or both: topk:64,sample:50.")
    ] = None
    store: Annotated[
        Store,
        storage("Top-k targets alone, answer states too, or question states as well (genrecal's stage 1 reads them)."),
    ] = Store.questions
    answer_codec: Annotated[str, storage("Codec of answer states: bf16, int8 or int4.")] = "int8"
    question_codec: Annotated[str, storage("Codec of question states: bf16, int8 or int4.")] = "int4"
    question_fraction: Annotated[float, storage("Share of samples whose question states are stored.")] = 1.0
    question_seed: Annotated[int, storage("Seed that selects the samples of --question-fraction.")] = 0
    kl_budget: Annotated[float, storage("Refuse a shard whose codec costs a larger mean KL, in nats.")] = math.inf
    samples_per_shard: Annotated[int, storage("Input records per shard.")] = 256
    batch_tokens: Annotated[int, teacher("Tokens per teacher batch, padding included.")] = 16384
    max_tokens: Annotated[int, data("Skip longer conversations; 0 for no limit.")] = 0
    max_skip: Annotated[float, data("Fail if a larger share of the records is skipped.")] = 0.01
    generate: Annotated[bool, answers("Let the teacher write the answers; default: the data's.", "--generate")] = False
    generate_temperature: Annotated[float, answers("With --generate: temperature; 0 for greedy decoding.")] = 0.0
    generate_top_p: Annotated[float, answers("With --generate: top-p of sampling.")] = 1.0
    generate_seed: Annotated[int, answers("With --generate: seed of sampling.")] = 0
    max_answer_tokens: Annotated[
        int, answers("With --generate: skip a conversation if an answer does not end within N tokens.")
    ] = 1024

    def options(self) -> Any:
        """As `genrecal.cache.options.CacheOptions`."""
        from genrecal.cache.options import CacheOptions, parse_targets, written_answers

        top_k, draws = parse_targets(self.targets, self.top_k)
        names = {field.name for field in dataclasses.fields(CacheOptions)} & vars(self).keys()
        answers = written_answers(
            self.generate, self.generate_temperature, self.generate_top_p, self.generate_seed, self.max_answer_tokens
        )
        values = {name: getattr(self, name) for name in names} | {"top_k": top_k, "draws": draws, "answers": answers}
        unused = {Store.targets: (*OF_STATES, *OF_QUESTIONS), Store.states: OF_QUESTIONS, Store.questions: ()}[
            self.store
        ]
        for option in changed(self):
            if option in unused and getattr(self, option[2:].replace("-", "_")) != "none":
                needed = Store.questions if option in OF_QUESTIONS else "states or questions"
                raise UsageError(f"{option}: expected --store {needed} with it, got --store {self.store}")
        if self.store != Store.questions:
            values["question_codec"] = "none"
        if self.store == Store.targets:
            values["answer_codec"] = "none"
        return CacheOptions(**values)
