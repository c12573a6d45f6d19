"""What runs inside vLLM's worker processes, and every use of vLLM's private API (tests/cache/test_vllm.py names each).

Answer rows are cut out and sent through the head on the worker, so the states of a whole prompt stay there. Only the rows
that a record holds cross to the engine, packed as the bytes of one tensor. vLLM is imported inside functions. It finds
`TeacherWorker` by name (`worker_extension_cls`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from genrecal.cache.extract import HeadTargets, head_targets
from genrecal.errors import ModelError, SampleError
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.shards.record import SampledTargets
from genrecal.vlm.checkpoint import Checkpoint

TASK = "token_embed"  # vLLM's pooling task that keeps every position
REQUEST_KEY = "genrecal"  # of a request's `extra_kwargs`
KEPT, SAMPLED = ("topk_ids", "topk_logits", "logsumexp", "target_logit"), ("ids", "counts", "entropy")  # that cross


@dataclass(frozen=True, kw_only=True)
class RowsRequest:
    """What a request asks of the worker, beside the forward pass.

    Args:
        key: the sample's, for the draws.
        answer_positions, target_id: of the answer rows, `[R]` each.
        question_spans: (start, end) of the question segments to send, none if questions are not cached.
        top_k, draws: logits and draws kept a row.
    """

    key: str
    answer_positions: list[int]
    target_id: list[int]
    question_spans: list[tuple[int, int]]
    top_k: int
    draws: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What comes back: `answer` `[R, D]` and `question` `[Q, D]` in the teacher's dtype, and the head's work on the first.

    num_states: positions that the worker saw a state of.
    """

    answer: torch.Tensor
    question: torch.Tensor
    found: HeadTargets
    num_states: int


def compute_rows(hidden: torch.Tensor, request: RowsRequest, head: FrozenHead) -> torch.Tensor:
    """Run on the worker: `hidden` `[L, D]` of a whole conversation -> packed rows, uint8 `[n]`; or the packed reason."""
    import safetensors.torch

    answer = hidden[torch.tensor(request.answer_positions, device=hidden.device)]
    question = torch.cat([hidden[:0], *(hidden[start:end] for start, end in request.question_spans)])
    item = request.key, answer, np.array(request.target_id, np.int32)
    (found,) = head_targets([item], head, top_k=request.top_k, draws=request.draws)
    if isinstance(found, SampleError):
        return _bytes_tensor(safetensors.torch.save({"error": _bytes_tensor(str(found).encode())}))
    tensors = {"answer": answer, "question": question, "num_states": torch.tensor(len(hidden))}
    tensors |= {name: torch.from_numpy(found[name]) for name in KEPT}
    if found["sampled"] is not None:
        tensors |= {name: torch.from_numpy(getattr(found["sampled"], name)) for name in SAMPLED}
    return _bytes_tensor(safetensors.torch.save({name: t.cpu().contiguous() for name, t in tensors.items()}))


def unpack_rows(packed: torch.Tensor) -> Rows:
    """The engine's side of `compute_rows`. Raises the worker's SampleError."""
    import safetensors.torch

    tensors = safetensors.torch.load(packed.numpy().tobytes())
    if "error" in tensors:
        raise SampleError(tensors["error"].numpy().tobytes().decode())
    sampled = None
    if "entropy" in tensors:
        sampled = SampledTargets(**{name: tensors[name].numpy() for name in SAMPLED})
    return Rows(
        answer=tensors["answer"],
        question=tensors["question"],
        num_states=int(tensors["num_states"]),
        found={name: tensors[name].numpy() for name in KEPT} | {"sampled": sampled},
    )


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class RowsHead(nn.Module):
    """Stands in the place of vLLM's token embedding head, which would send every position (and L2-normalise it)."""

    def __init__(self, head: FrozenHead | None):
        super().__init__()
        self.head = head  # None on the ranks whose output vLLM does not read

    def forward(self, pooled_data: Sequence[torch.Tensor | None], metadata: Any) -> list[torch.Tensor | None]:
        """Per request of a step: its states `[L, D]` when they are all there (None before) -> packed rows."""
        results: list[torch.Tensor | None] = []
        for hidden, params in zip(pooled_data, metadata.pooling_params, strict=True):
            if hidden is None:
                results.append(None)
            elif self.head is None:
                results.append(torch.empty(0, dtype=torch.uint8))
            else:
                results.append(compute_rows(hidden, RowsRequest(**params.extra_kwargs[REQUEST_KEY]), self.head))
        return results


HEAD_NAMES = ("lm_head", "output")  # the second is InternLM2's


class TeacherWorker:
    """Methods that vLLM adds to its workers; the engine calls them by name. Every name begins with `genrecal_`."""

    model_runner: Any  # the worker's own
    device: torch.device

    def genrecal_install(self, path: str, vocab_size: int) -> dict[str, Any]:
        """Put the teacher's head behind the body. Returns what this worker knows of its part of the model."""
        from vllm.distributed import get_pp_group, get_tp_group

        runner, model = self.model_runner, self.model_runner.model
        stage = get_pp_group()
        if not stage.is_first_rank and getattr(runner, "intermediate_tensors", 0) is None:
            # vLLM makes these buffers in its profile run, which the CPU worker leaves out.
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
        facts = {
            "num_layers": _count_layers(model),
            "tp_rank": get_tp_group().rank_in_group,
            "last": stage.is_last_rank,
        }
        if not stage.is_last_rank:
            return facts
        transform = _logit_transform(model)
        facts["transform"] = transform and (transform.scale, transform.softcap)
        pooler = model.pooler.poolers_by_task[TASK]
        head = None
        if facts["tp_rank"] == 0:
            whole = Checkpoint(path).head(
                dtype=runner.dtype, vocab_size=vocab_size, transform=transform or LogitTransform()
            )
            head = whole.to(self.device)
        pooler.head = RowsHead(head)
        return facts

    def genrecal_count_images(self, on: bool) -> int | None:
        """Begin (`on`) or end counting visual embeddings. At the end: how many were made, None if none were seen."""
        model = self.model_runner.model
        if on:
            self.genrecal_counted: int | None = None
            embed = model.embed_multimodal

            def counting(*args: Any, **kwargs: Any) -> Any:
                embeddings = embed(*args, **kwargs)
                tensors = embeddings if isinstance(embeddings, (list, tuple)) else list(embeddings)
                self.genrecal_counted = (self.genrecal_counted or 0) + sum(
                    tensor.numel() // tensor.shape[-1] for tensor in tensors
                )
                return embeddings

            model.embed_multimodal = counting  # hides the class's method until it is deleted
            return None
        del model.embed_multimodal
        return self.genrecal_counted

    def genrecal_own_logits(self, states: bytes, path: str) -> bytes | None:
        """What vLLM's own `compute_logits` makes of states (as `pack_states`); None on ranks that do not have the answer.

        The pooling runner leaves the head out, so it is built here, loaded by vLLM's own rule, and dropped again.
        """
        from vllm.distributed import get_pp_group, get_tp_group

        if not get_pp_group().is_last_rank:
            return None
        hidden = unpack_states(states).to(self.device)
        model = self.model_runner.model
        owner, name = _logits_owner(model)
        kept = dict(owner._modules)
        processor: Any = kept["logits_processor"]
        head: Any = kept[name].__dict__.get("module")  # behind a placeholder, unless the head is the embedding
        try:
            owner._modules["logits_processor"] = processor.__dict__.get("module", processor)
            if head is not None:
                owner._modules[name] = _load_head(head, path, hidden)
            with torch.inference_mode():
                logits = model.compute_logits(hidden)
        finally:
            owner._modules.update(kept)
            if head is not None:
                head.to("meta")  # gives its memory back
        if logits is None or get_tp_group().rank_in_group:
            return None
        return pack_states(logits.float())


def pack_states(states: torch.Tensor) -> bytes:
    """States `[R, D]` as bytes, which every way between engine and worker takes."""
    import safetensors.torch

    return safetensors.torch.save({"states": states.cpu().contiguous()})


def unpack_states(data: bytes) -> torch.Tensor:
    """The other side of `pack_states`."""
    import safetensors.torch

    return safetensors.torch.load(data)["states"]


def engine_max_tokens(llm: Any) -> int:
    """The longest prompt that an engine takes."""
    return int(llm.llm_engine.model_config.max_model_len)


def stop_engine(llm: Any) -> None:
    """Stop an engine and its workers, so that another one can take its place."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _logits_owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the head and what makes logits with it, and the head's name there. Raises ModelError if there is
    none."""
    for module in model.modules():
        for name in HEAD_NAMES:
            if {"logits_processor", name} <= module._modules.keys():
                return module, name
    raise ModelError(f"{type(model).__name__} of vLLM has no lm_head with a logits_processor; use --backend hf")


def _load_head(module: Any, path: str, like: torch.Tensor) -> nn.Module:
    """Give vLLM's own head, of which only the shapes exist (on the meta device), this rank's part of the weights."""
    head = Checkpoint(path).head(dtype=like.dtype, vocab_size=0, transform=LogitTransform())
    module.to_empty(device=like.device)
    for name, value in (("weight", head.weight), ("bias", head.bias)):
        parameter = module._parameters.get(name)
        if parameter is not None and value is not None:
            parameter.output_dim = 0  # lost on the meta device: the dimension that is spread over ranks
            module.weight_loader(parameter, value.to(like.device))
    module.quant_method.process_weights_after_loading(module)
    return module


def _count_layers(model: nn.Module) -> int:
    """Decoder layers of this pipeline stage that hold weights."""
    layers = getattr(_text_model(model), "layers", ())
    return sum(1 for layer in layers if type(layer).__name__ != "PPMissingLayer")


def _text_model(model: Any) -> Any:
    """The module that holds the decoder layers."""
    language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    for module in language_model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    return language_model


def _logit_transform(model: nn.Module) -> LogitTransform | None:
    """What vLLM does after this model's head, as its logits processor says; None for what we cannot repeat."""
    processor: Any = _logits_owner(model)[0]._modules["logits_processor"]
    scale, softcap = float(processor.scale), processor.soft_cap
    if softcap is not None and scale != 1.0:
        return None  # vLLM scales after the cap, LogitTransform before it
    return LogitTransform(scale=scale, softcap=None if softcap is None else float(softcap))
