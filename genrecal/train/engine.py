"""What runs a stage's Distiller on this rank: plain torch, DistributedDataParallel, or DeepSpeed's ZeRO.

All engines take the same micro-steps and give the same numbers. A micro-step's loss is its part of the global batch's,
whose denominator is known beforehand, so gradients are summed over ranks and micro-steps, never averaged: DDP and
DeepSpeed average over ranks, which a factor of the world size takes back. A parameter that no rank used has a gradient of
zero, not none: AdamW's moments fade in every step, whatever the step's samples were.
"""

import contextlib
import functools
import gc
import logging
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from genrecal.errors import TrainingError, UsageError
from genrecal.objectives.base import Batch
from genrecal.train.checkpoint import MOMENTS, TrainedState, fitting, trained_parameters
from genrecal.train.config import StageConfig, TrainConfig
from genrecal.train.profiling import Clock
from genrecal.train.ranks import Ranks, peers_may_end, world_size
from genrecal.train.stages import Distiller, StepOutput


class Engine(Protocol):
    """Runs the micro-steps of optimizer steps. Every method is called by all ranks together.

    same_modules: whether all ranks must run the same modules in a micro-step, pictures or not.
    """

    same_modules: bool
    compute_dtype: torch.dtype

    def micro_step(self, batch: Batch, tokens: int, *, last: bool) -> StepOutput:
        """Forward and backward; `tokens` divides the loss; `last` says that the optimizer step follows."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, and forget the gradient; the gradient's norm before clipping.

        Where that is not finite, nothing is updated.
        """

    def state(self, *, moments: bool = True) -> TrainedState | None:
        """What was learnt so far, on rank 0; None on the others. `moments` False leaves out AdamW's."""

    def load_moments(self, state: TrainedState, *, where: str) -> None:
        """Go on from a state, given on every rank, whose weights the Distiller had when the engine started.

        Raises TrainingError, naming `where`, if its moments are of other parameters.
        """

    def close(self) -> None:
        """Let go of what is kept outside of the engine, so that its memory is free for the next stage's."""


def resolve_engine(name: str, processes: int) -> str:
    """The engine that "auto" stands for: ddp where a launcher started several processes, else none.

    Args:
        processes: as `world_size` counts them.

    Raises:
        UsageError: engine none, and several processes: each would train the whole run; ddp, and no launcher.
    """
    if name == "auto":
        return "ddp" if processes > 1 else "none"
    if name == "ddp" and not processes:
        raise UsageError(
            "engine ddp trains in several processes, and none were launched; start it with torchrun --nproc-per-node N -m "
            "genrecal train ..., or set engine=none"
        )
    if name == "none" and processes > 1:
        raise UsageError(
            f"engine none trains in one process, and the launcher started {processes}; set engine to ddp, zero1, zero2 or "
            "zero3, or start one process"
        )
    return name


def start_engine(
    config: TrainConfig,
    settings: StageConfig,
    distiller: Distiller,
    ranks: Ranks,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    micro_steps: int,
    clock: Clock | None = None,
) -> Engine:
    """The engine that the run asks for, checked to be it.

    Args:
        micro_steps: of a full optimizer step.

    Raises:
        UsageError: DeepSpeed is not installed. TrainingError: something else than what was asked for is running.
    """
    name = resolve_engine(config.engine, world_size())
    if name in ("none", "ddp"):
        return TorchEngine(
            distiller,
            settings,
            ranks,
            device=device,
            compute_dtype=compute_dtype,
            parallel=name == "ddp",
            clock=clock,
        )
    return ZeroEngine(
        int(name.removeprefix("zero")),
        distiller,
        settings,
        ranks,
        device=device,
        compute_dtype=compute_dtype,
        micro_steps=micro_steps,
        offload=config.offload,
        clock=clock,
    )


def fuses(device: torch.device) -> bool:
    """Whether torch's AdamW updates all tensors in one kernel there."""
    return device.type == "cuda"


class TorchEngine:
    """torch alone, in one process or in DistributedDataParallel."""

    same_modules = False

    def __init__(
        self,
        distiller: Distiller,
        settings: StageConfig,
        ranks: Ranks,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        parallel: bool,
        clock: Clock | None = None,
    ):
        self.clock = clock or Clock()
        self.parameters = trained_parameters(distiller)
        self.settings, self.ranks, self.device, self.compute_dtype = settings, ranks, device, compute_dtype
        # One kernel for all tensors on CUDA, and no third array of a moment's size, which torch's default there takes.
        self.fused = fuses(device)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=self.fused or None
        )
        self.updates = 0
        self.module: nn.Module = distiller
        if parallel:
            check_processes("ddp", ranks)
            # Stage 3 trains the projector, which a micro-batch without pictures does not use.
            self.module = nn.parallel.DistributedDataParallel(
                distiller,
                find_unused_parameters=distiller.stage == 3,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # rotary tables, the same everywhere
            )

    def micro_step(self, batch: Batch, tokens: int, *, last: bool) -> StepOutput:
        alone = self.module.no_sync() if self._parallel and not last else contextlib.nullcontext()  # type: ignore[operator]
        batch = batch.to(self.device, self.compute_dtype)
        with alone, peers_may_end():
            with (
                self.clock.part("forward"),
                torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            ):
                output: StepOutput = self.module(batch, tokens)
            with self.clock.part("backward"):
                (output.loss * self.ranks.size).backward()
        return output

    @property
    def _parallel(self) -> bool:
        return isinstance(self.module, nn.parallel.DistributedDataParallel)

    def step(self, learning_rate: float) -> float:
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.settings.max_grad_norm or float("inf")
        ).item()
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, learning_rate)
            with self.clock.part("optimizer"):
                self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, *, moments: bool = True) -> TrainedState | None:
        if not self.ranks.first:
            return None
        found = {
            f"{name}|{key}": self.optimizer.state[parameter][key].detach().cpu()
            for name, parameter in self.parameters.items()
            for key in MOMENTS
            if moments and self.updates
        }
        weights = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
        return TrainedState(weights=weights, moments=found, updates=self.updates)

    def close(self) -> None:
        pass

    def load_moments(self, state: TrainedState, *, where: str) -> None:
        self.updates = state.updates
        for name, parameter in self.parameters.items() if state.updates else ():
            moments = {key: fitting(state.moments, f"{name}|{key}", parameter.shape, where=where) for key in MOMENTS}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.updates), device=parameter.device if self.fused else "cpu"),
                **{key: value.to(parameter.device) for key, value in moments.items()},
            }


class ZeroEngine:
    """DeepSpeed's ZeRO, stage 1, 2 or 3, around torch's AdamW.

    Trained weights stay float32 and frozen ones what they are, under DeepSpeed's own autocast, so that bf16 means here what
    it means in the other engines. DeepSpeed's API for single parameters makes the whole tensors of a checkpoint.
    """

    def __init__(
        self,
        stage: int,
        distiller: Distiller,
        settings: StageConfig,
        ranks: Ranks,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        micro_steps: int,
        offload: bool,
        clock: Clock | None = None,
    ):
        self.clock = clock or Clock()
        deepspeed = import_deepspeed(device)
        self.stage, self.ranks, self.device, self.compute_dtype = stage, ranks, device, compute_dtype
        # Only where a parameter has no gradient at all do ranks get out of step: with partitioned weights, when a module
        # runs on some of them; with others, when a projector that is trained does.
        self.same_modules = stage == 3 or distiller.stage == 3
        self.parameters = trained_parameters(distiller)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.updates = 0
        on_cpu = device.type == "cpu" or offload
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=on_cpu or None
        )
        with peers_may_end():
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=distiller,
                optimizer=optimizer,
                config=zero_config(
                    stage,
                    settings,
                    device=device,
                    compute_dtype=compute_dtype,
                    micro_steps=micro_steps,
                    offload=offload,
                    num_trained=sum(shape.numel() for shape in self.shapes.values()),
                    num_parameters=sum(parameter.numel() for parameter in distiller.parameters()),
                ),
            )
            if stage == 3 and distiller.stage > 1:
                self._keep_whole(distiller.student.head.parameters())
        self._check(offload)

    def _keep_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """The head is used once for every chunk of rows, and ranks have different numbers of rows: it cannot be gathered
        at each use, as other weights of ZeRO-3 are."""
        for parameter in parameters:
            if not parameter.ds_persist:  # type: ignore[attr-defined]
                parameter.ds_persist = True  # type: ignore[attr-defined]
                self.optimizer.persistent_parameters.append(parameter)
                parameter.all_gather([parameter])  # type: ignore[attr-defined]

    def _check(self, offload: bool) -> None:
        """Raises TrainingError if DeepSpeed runs something else than what it was asked for."""
        name = f"zero{self.stage}"
        check_processes(name, self.ranks)
        engine, optimizer = self.engine, self.optimizer
        facts = {
            "ZeRO stage": (engine.zero_optimization_stage(), self.stage),
            "processes": (engine.dp_world_size, self.ranks.size),
            "gradients partitioned": (bool(engine.zero_optimization_partition_gradients()), self.stage >= 2),
            "weights partitioned": (bool(engine.zero_optimization_partition_weights()), self.stage == 3),
            "offload": (bool(getattr(optimizer, "offload_optimizer" if self.stage == 3 else "cpu_offload")), offload),
        }
        if self.stage == 3:
            whole = {id(parameter) for parameter in optimizer.persistent_parameters}
            held = sum(p.numel() for p in engine.module.parameters() if id(p) not in whole)
            facts["weights held whole"] = (held, 0)
            facts["weights partitioned at all"] = (len(whole) < len(list(engine.module.parameters())), True)
        else:
            held = sum(flat.numel() for flat in optimizer.single_partition_of_fp32_groups)
            total = sum(shape.numel() for shape in self.shapes.values())
            facts["optimizer state partitioned"] = (held < total // self.ranks.size + ALIGNMENT * self.ranks.size, True)
        for fact, (found, wanted) in facts.items():
            if found != wanted:
                raise TrainingError(
                    f"engine {name}: DeepSpeed says {fact} {found}, expected {wanted}; nothing was trained"
                )

    def micro_step(self, batch: Batch, tokens: int, *, last: bool) -> StepOutput:
        with peers_may_end():
            self.engine.set_gradient_accumulation_boundary(last)
            with self.clock.part("forward"):
                output: StepOutput = self.engine(batch.to(self.device, self.compute_dtype), tokens)
            with self.clock.part("backward"):
                self.engine.backward(output.loss * self.ranks.size, scale_wrt_gas=False)
        return output

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        with peers_may_end(), self.clock.part("optimizer"):
            self.engine.step()
        if self.optimizer.overflow:
            return math.nan
        self.updates += 1
        return float(self.engine.get_global_grad_norm())

    def state(self, *, moments: bool = True) -> TrainedState | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        with peers_may_end():
            for name, parameter in self.parameters.items():
                whole = {name: safe_get_full_fp32_param(parameter)}
                for key in MOMENTS if moments and self.updates else ():
                    whole[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key)
                if self.ranks.first:
                    whole = {key: value.detach().to("cpu", copy=True) for key, value in whole.items()}
                    weights[name] = whole.pop(name)
                    found |= whole
        return TrainedState(weights=weights, moments=found, updates=self.updates) if self.ranks.first else None

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.engine.destroy()
        # What would keep the whole Distiller: a list, and a cache of a method's answers.
        parameter_offload.FWD_MODULE_STACK.clear()
        for found in gc.get_objects():
            if isinstance(found, functools._lru_cache_wrapper) and str(found.__module__).startswith("deepspeed."):
                found.cache_clear()

    def load_moments(self, state: TrainedState, *, where: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.updates = state.updates
        if not state.updates:
            return
        optimizer = self.optimizer
        flats = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        for flat in flats:
            step = torch.tensor(float(state.updates), device=flat.device)
            optimizer.optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                value = fitting(state.moments, f"{name}|{key}", self.shapes[name], where=where)
                if self.stage == 3:
                    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
                    padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.size - value.numel()))
                    own = padded[self.ranks.rank * size :][:size]
                    safe_set_local_optimizer_state(parameter, own, key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)


ALIGNMENT = 1024  # more elements than ZeRO adds to a rank's partition to make partitions equal


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told to be quiet. Raises UsageError if it is not installed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(
            'engines zero1, zero2 and zero3 need DeepSpeed: pip install "genrecal[deepspeed]" ' + f"({error})"
        ) from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning
    )  # it calls older names
    if device.type == "cpu":
        # No operators of its own: that for processes of one machine would be compiled for a minute, and gloo does the same.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def zero_config(
    stage: int,
    settings: StageConfig,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    micro_steps: int,
    offload: bool,
    num_trained: int,
    num_parameters: int,
) -> dict[str, Any]:
    """DeepSpeed's own settings for a stage."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(num_trained, 500_000_000)}
    if stage == 3:  # norms and biases are not worth gathering; DeepSpeed's own 100,000 would keep all of a small model
        zero["stage3_param_persistence_threshold"] = min(100_000, num_parameters // 10_000)
    if device.type == "cpu":
        zero["overlap_comm"] = False  # it needs CUDA's streams
    if offload:
        cpu = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero |= {"offload_optimizer": cpu} | ({"offload_param": cpu} if stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs without a compiler
        "torch_autocast": {"enabled": compute_dtype != torch.float32, "dtype": "bfloat16"},
        "steps_per_print": None,
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def check_processes(name: str, ranks: Ranks) -> None:
    """Raises TrainingError if the processes that work together are not those that the launcher started."""
    connected = dist.get_world_size() if dist.is_initialized() else 0
    if connected != max(world_size(), 1) or connected != ranks.size:
        raise TrainingError(
            f"engine {name}: {connected} processes are connected, expected the {world_size()} that were launched; "
            "nothing was trained"
        )
