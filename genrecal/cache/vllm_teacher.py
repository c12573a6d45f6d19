"""A teacher run by vLLM: tensor and pipeline parallel, for models that one GPU does not hold.

vLLM's pooling runner gives every position's state after the final norm. `genrecal.cache.vllm_worker` cuts out the rows on
the worker. Images go to vLLM as images; that its prompt is ours, token for token, is checked for every sample.
That runner does not generate, so answers are written by another engine, which takes the first one's place.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from genrecal.cache.extract import States, answer_positions, answer_targets, states_of
from genrecal.cache.generate import answer_text
from genrecal.cache.proof import logits_agree
from genrecal.cache.teacher import Evidence
from genrecal.cache.vllm_worker import (
    REQUEST_KEY,
    TASK,
    Rows,
    RowsRequest,
    TeacherWorker,
    engine_max_tokens,
    pack_states,
    stop_engine,
    unpack_rows,
    unpack_states,
)
from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.samples import ImageRef, Sample, decode_image
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.vlm.checkpoint import Checkpoint
from genrecal.vlm.generation import stop_tokens
from genrecal.vlm.loading import first_line, load_renderer
from genrecal.vlm.rendering import Encoded, PromptOptions, named_values

MIN_VERSION = (0, 32)  # the vLLM that this was written for and is tested with
MAX_IMAGES = 64  # a conversation, unless --engine-arg limit_mm_per_prompt says otherwise
# What this backend itself must set: another value gives other states, or none.
OURS = (
    "model", "runner", "convert", "task", "pooler_config", "worker_extension_cls", "dtype", "trust_remote_code",
    "tensor_parallel_size", "pipeline_parallel_size", "tokenizer",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EnginePrompt(Encoded):
    """A conversation as vLLM takes it. `inputs` holds the text's tensors alone, since vLLM prepares the images itself.

    Args:
        raw_ids: token ids with placeholders not yet expanded.
        images: the images in reading order.
    """

    raw_ids: list[int]
    images: tuple[Image.Image, ...]

    @property
    def num_bytes(self) -> int:
        """With the decoded images, three bytes a pixel."""
        return super().num_bytes + sum(3 * image.width * image.height for image in self.images)


class VLLMTeacher:
    """A teacher run by vLLM, one engine over all its GPUs at a time: one that gives states, or one that writes answers."""

    backend = "vllm"

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        engine_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        head_device: torch.device | str = "cpu",
        prompt: PromptOptions | None = None,
    ):
        """Start the engine.

        Args:
            path: a model folder or hub name.
            dtype: "auto" is the checkpoint's (vLLM's own "auto" would run a float32 checkpoint in 16 bits).
            tensor_parallel, pipeline_parallel: GPUs a layer is spread over, and stages of layers.
            engine_args: more of vLLM's engine arguments, by their names there.
            trust_remote_code: run Python that comes with the checkpoint; never done without being asked for.
            head_device: where this process keeps its own copy of the head, with which codecs are measured.
            prompt: how conversations are rendered.

        Raises:
            UsageError: vLLM is not installed, or an argument that is this backend's own.
            ModelError: vLLM cannot run this model so; the message is its reason.
        """
        self.path = str(path)
        if taken := sorted(set(engine_args or {}) & set(OURS)):
            raise UsageError(
                f"--engine-arg {taken[0]}: is set by genrecal; expected another of vLLM's engine arguments"
            )
        self._vllm = vllm = _import_vllm()
        self.versions = {"vllm": str(vllm.__version__)}
        self.checkpoint = Checkpoint(path)
        self.dtype = self.checkpoint.dtype() if isinstance(dtype, str) else dtype
        self.renderer = load_renderer(path, prompt, trust_remote_code=trust_remote_code)
        self.renderer.refuse_unsaid_thinking(self.path)
        self._arguments: dict[str, Any] = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "trust_remote_code": trust_remote_code,
            "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
            "mm_processor_cache_gb": 0,  # every image is used once
            "enable_prefix_caching": False,  # so is every prompt
            **(engine_args or {}),
        }
        self.max_images = _max_images(self._arguments["limit_mm_per_prompt"])
        self._numbers = itertools.count()
        self._start(writes=False)
        self.max_tokens = engine_max_tokens(self.llm)
        self._check_layers()
        self.head = self._read_head(len(self.renderer.tokenizer)).to(head_device)
        self._image_token = self._find_image_token()

    def close(self) -> None:
        """Stop the engine and its workers."""
        stop_engine(self.llm)
        del self.llm

    def _start(self, *, writes: bool) -> None:
        """Start the engine that gives states, or the one that writes answers."""
        worker = f"{TeacherWorker.__module__}.{TeacherWorker.__qualname__}"
        pooler = self._vllm.config.PoolerConfig(task=TASK, use_activation=False)
        purpose: dict[str, Any] = {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
        purpose |= {"worker_extension_cls": worker}
        if writes:
            purpose = {"runner": "generate", "generation_config": "vllm"}  # none of the checkpoint's own settings
        try:
            self.llm = self._vllm.LLM(model=self.path, **purpose, **self._arguments)
        except Exception as error:  # vLLM and its parts raise every kind
            raise ModelError(f"{self.path}: vLLM cannot run it so: {engine_reason(error)}") from error
        self._writes = writes
        if not writes:
            self.workers = self._on_workers("genrecal_install", self.path, len(self.renderer.tokenizer))

    def _use(self, *, writes: bool) -> None:
        """Have the right engine run; the other one leaves the GPUs first."""
        if self._writes != writes:
            self.close()
            self._start(writes=writes)

    def _check_layers(self) -> None:
        found = sum(facts["num_layers"] for facts in self.workers if facts["tp_rank"] == 0)
        wanted = self.checkpoint.text_config.get("num_hidden_layers")
        if found != wanted:
            raise ModelError(
                f"{self.path}: vLLM runs {found} decoder layers of it, config.json says {wanted}; its states would be another "
                "layer's. Leave out what changes the model (--engine-arg hf_overrides)"
            )

    def _find_image_token(self) -> int | None:
        config = self.checkpoint.config
        if (token := config.get("image_token_id", config.get("image_token_index"))) is not None:
            return int(token)
        token = getattr(self.renderer.processor, "image_token_id", None)
        return None if token is None else int(token)

    def _read_head(self, vocab_size: int) -> FrozenHead:
        transform = next(facts["transform"] for facts in self.workers if facts["last"])
        if transform is None:
            raise ModelError(
                f"{self.path}: it cannot be told what vLLM does after this model's head; use --backend hf, which tries it"
            )
        scale, softcap = transform
        return self.checkpoint.head(
            dtype=self.dtype, vocab_size=vocab_size, transform=LogitTransform(scale=scale, softcap=softcap)
        )

    def encode(self, sample: Sample, *, max_tokens: int | None = None) -> EnginePrompt:
        """Render a sample. Raises SampleError if it cannot be, or the engine does not take so many tokens or images."""
        images = [decode_image(image.read()) for image in sample.images]
        if len(images) > self.max_images:
            raise SampleError(
                f"{len(images)} images, over the engine's limit of {self.max_images} (limit_mm_per_prompt)"
            )
        limit = min(max_tokens or self.max_tokens, self.max_tokens)
        encoded = self.renderer.encode_messages(sample.messages, images, key=sample.key, max_tokens=limit)
        order = [part.index for message in sample.messages for part in message.parts if isinstance(part, ImageRef)]
        fields = {field.name: getattr(encoded, field.name) for field in dataclasses.fields(encoded)}
        fields["inputs"] = {name: encoded.inputs[name] for name in self.renderer.text_keys}
        return EnginePrompt(
            **fields, raw_ids=self.renderer.raw_ids(sample.messages), images=tuple(images[i] for i in order)
        )

    def states(
        self, batch: Sequence[Encoded], *, questions: Sequence[bool], top_k: int, draws: int = 0
    ) -> list[States | SampleError]:
        """See `Teacher.states`. vLLM makes its own batches of what it is given."""
        spans = [
            [(start, end) for start, end, is_answer in encoded.segments() if wanted and not is_answer]
            for encoded, wanted in zip(batch, questions, strict=True)
        ]
        requests = [_request(*pair, top_k=top_k, draws=draws) for pair in zip(batch, spans, strict=True)]
        return [
            rows
            if isinstance(rows, SampleError)
            else states_of(encoded, rows.answer, rows.found, rows.question if wanted else None)
            for encoded, wanted, rows in zip(batch, questions, self.run(batch, requests), strict=True)
        ]

    def run(self, batch: Sequence[Encoded], requests: Sequence[RowsRequest]) -> list[Rows | SampleError]:
        """Run conversations and give back the rows asked for.

        Raises:
            ModelError: vLLM's prompt is not ours, or a position has no state: every record would be wrong. Or vLLM stopped.
        """
        self._use(writes=False)
        params = [
            self._vllm.PoolingParams(
                task=TASK, use_activation=False, extra_kwargs={REQUEST_KEY: dataclasses.asdict(request)}
            )
            for request in requests
        ]
        prompts = [self._prompt(encoded, answer=True) for encoded in batch]
        with self._stopping(batch):
            outputs = self.llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
        return [self._checked(encoded, output) for encoded, output in zip(batch, outputs, strict=True)]

    def write(
        self,
        batch: Sequence[Encoded],
        *,
        turn: int,
        how: AnswerSource,
        batch_tokens: int,
        wrote: Callable[[int], None] | None = None,
    ) -> list[str | SampleError]:
        """See `Teacher.write`. vLLM makes its own batches, and draws with a generator for each request.

        Raises ModelError as `run` does.
        """
        if not batch:
            return []
        self._use(writes=True)
        stops = self._stops()
        params = [
            self._vllm.SamplingParams(
                temperature=how.temperature,
                top_p=how.top_p,
                seed=xxhash.xxh3_64_intdigest(f"answer:{how.seed}:{turn}:{encoded.key}".encode()) >> 1,
                max_tokens=how.max_tokens,
                stop_token_ids=stops,
                detokenize=False,
            )
            for encoded in batch
        ]
        prompts = [self._prompt(encoded, answer=False) for encoded in batch]
        with self._stopping(batch):
            outputs = self.llm.generate(prompts, params, use_tqdm=False if wrote is None else _told(wrote))
        written = []
        for encoded, output in zip(batch, outputs, strict=True):
            self._check_prompt(encoded, encoded.input_ids[: len(encoded) - encoded.answer_lengths[-1]], output)
            written.append(answer_text(self.renderer, output.outputs[0].token_ids, stops, turn, how))
        return written

    def _stops(self) -> list[int]:
        """The ids that end an answer, as with transformers; and the tokenizer's end, at which vLLM stops by itself."""
        from transformers import GenerationConfig

        try:
            settings = GenerationConfig.from_pretrained(self.path)
        except OSError:  # no such file
            settings = GenerationConfig(eos_token_id=self.checkpoint.text_config.get("eos_token_id"))
        own = self.renderer.tokenizer.eos_token_id
        return sorted({*stop_tokens(settings, self.renderer), *([] if own is None else [own])})

    def _prompt(self, encoded: Encoded, *, answer: bool) -> dict[str, Any]:
        """A conversation as vLLM takes it, with its last answer or ready for it."""
        assert isinstance(encoded, EnginePrompt)
        end = len(encoded.raw_ids) - (0 if answer else encoded.answer_lengths[-1])
        prompt: dict[str, Any] = {"prompt_token_ids": encoded.raw_ids[:end]}
        if encoded.images:
            prompt["multi_modal_data"] = {"image": list(encoded.images)}
            # An id of its own for each image saves hashing it, and vLLM takes none for one that it had before.
            prompt["multi_modal_uuids"] = {"image": [f"genrecal-{next(self._numbers)}" for _ in encoded.images]}
        return prompt

    @contextlib.contextmanager
    def _stopping(self, batch: Sequence[Encoded]) -> Iterator[None]:
        """Out of memory, a worker that died, a prompt that vLLM does not take after all: one line."""
        try:
            yield
        except Exception as error:
            keys = f"{batch[0].key} to {batch[-1].key}"
            raise ModelError(
                f"{self.path}: vLLM stopped on samples {keys}: {engine_reason(error)}. Finished shards are kept"
            ) from error

    def evidence(self, encoded: Encoded) -> Evidence:
        """See `Teacher.evidence`: every position's state, and the logits that vLLM's own `compute_logits` makes of them."""
        positions = answer_positions(encoded)[0]
        request = _request(encoded, [(0, len(encoded))], top_k=1, draws=0)
        counted: list[int] = []
        self._use(writes=False)
        if self.renderer.takes_pictures:
            self._on_workers("genrecal_count_images", True)
        (rows,) = self.run([encoded], [request])
        if self.renderer.takes_pictures:
            counted = [n for n in self._on_workers("genrecal_count_images", False) if n is not None]
        if isinstance(rows, SampleError):
            raise rows
        hidden = rows.question
        own = self._on_workers("genrecal_own_logits", pack_states(hidden[positions]), self.path)
        logits = unpack_states(next(data for data in own if data is not None))
        ours = self.head.logits(hidden[positions]).cpu()
        if ours.shape != logits.shape or not logits_agree(ours, logits, self.dtype):
            raise ModelError(
                f"{self.path}: on sample {encoded.key} its head's output {tuple(ours.shape)} is not what vLLM's own logits "
                f"{tuple(logits.shape)} are; its hidden states would not reproduce this teacher. Use --backend hf"
            )
        return Evidence(
            hidden=hidden,
            logits=logits,
            image_tokens=None if self._image_token is None else int((encoded.input_ids == self._image_token).sum()),
            # Of several ranks that hold the vision encoder each makes them all.
            visual_embeddings=max(counted, default=None),
            norm=self.checkpoint.final_norm(),
        )

    def _on_workers(self, method: str, *args: Any) -> list[Any]:
        """What a method of TeacherWorker gives on every worker. Raises ModelError if it fails there."""
        try:
            return list(self.llm.collective_rpc(method, args=args))
        except Exception as error:  # another process's errors come as a kind of vLLM's
            raise ModelError(f"{self.path}: {method} failed on vLLM's workers: {engine_reason(error)}") from error

    def _check_prompt(self, encoded: Encoded, ours: np.ndarray, output: Any) -> None:
        theirs = np.array(output.prompt_token_ids)
        if not np.array_equal(ours, theirs):
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ModelError(
                f"{self.path}: sample {encoded.key}: vLLM's prompt has {len(theirs)} tokens, genrecal's {len(ours)}; they "
                f"differ from token {place} on, so no state would belong to its token. Use --backend hf for this model"
            )

    def _checked(self, encoded: Encoded, output: Any) -> Rows | SampleError:
        self._check_prompt(encoded, encoded.input_ids, output)
        try:
            rows = unpack_rows(output.outputs.data)
        except SampleError as error:
            return error
        if rows.num_states != len(encoded):
            raise ModelError(
                f"{self.path}: sample {encoded.key}: vLLM gave {rows.num_states} states for {len(encoded)} tokens; "
                "turn off what reuses states of other prompts (--engine-arg enable_prefix_caching=false)"
            )
        return rows


def _request(encoded: Encoded, spans: list[tuple[int, int]], *, top_k: int, draws: int) -> RowsRequest:
    return RowsRequest(
        key=encoded.key,
        answer_positions=answer_positions(encoded)[0].tolist(),
        target_id=answer_targets(encoded)["target_id"].tolist(),
        question_spans=spans,
        top_k=top_k,
        draws=draws,
    )


def engine_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`--engine-arg` options -> vLLM's engine arguments. Raises UsageError as `named_values` does."""
    return named_values("--engine-arg", texts, "gpu_memory_utilization=0.85")


def engine_reason(error: BaseException) -> str:
    """What of vLLM's error says something: pydantic's wrappers and references to other processes' output left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "validation error" not in line and not line.startswith("For further information")]
    text = (told or lines or [type(error).__name__])[0].removeprefix("Value error, ").partition(" [type=")[0]
    if "Engine core initialization failed" in text or "See root cause above" in text:
        return "its engine process stopped while it started; the reason is in the messages above this line"
    return text


def _max_images(limits: Any) -> int:
    limit = limits.get("image", 999) if isinstance(limits, dict) else 999  # vLLM's own default
    return int(limit.get("count", 999) if isinstance(limit, dict) else limit)


def _told(wrote: Callable[[int], None]) -> Callable[..., Any]:
    """A progress bar for vLLM that shows nothing and says how many more are done."""
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            wrote(int(n or 0))
            return super().update(n)

    return functools.partial(Bar, file=io.StringIO())


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        import vllm.config
    except Exception as error:  # a torchvision built for another torch, say, is no ImportError
        raise UsageError(
            f"--backend vllm: vLLM cannot be imported ({first_line(error)}); pip install 'genrecal[vllm]' in an environment "
            "of its own, or use --backend hf"
        ) from None
    found = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if len(found) == 2 and found < MIN_VERSION:
        raise UsageError(
            f"--backend vllm: found vLLM {vllm.__version__}, expected {MIN_VERSION[0]}.{MIN_VERSION[1]} or newer; "
            "pip install -U vllm"
        )
    return vllm
