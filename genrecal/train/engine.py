"""What runs a stage's Distiller on this rank: plain torch, DistributedDataParallel, or DeepSpeed's ZeRO.

All engines take the same micro-steps and give the same numbers. A micro-step's loss is its part of the global batch's,
whose denominator is known beforehand, so gradients are summed over ranks and micro-steps, never averaged: DDP and
DeepSpeed average over ranks, so losses are multiplied by the number of ranks. A parameter that no rank used has a gradient
of zero, not none: AdamW's moments decay in every step, whatever the step's samples were.
"""

import contextlib
import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from genrecal.errors import TrainingError, UsageError
from genrecal.objectives.base import Batch
from genrecal.train import deepspeed_private
from genrecal.train.checkpoint import MOMENTS, TrainedState, fitting, trained_parameters
from genrecal.train.config import StageConfig, TrainConfig
from genrecal.train.profiling import Clock
from genrecal.train.ranks import Ranks, peers_may_end, world_size
from genrecal.train.stages import Distiller, StepOutput


class Engine:
    """Runs the micro-steps of optimizer steps. All ranks call every method together.

    Attributes:
        same_modules: whether all ranks must run the same modules in a micro-step, images or not.
        updates: optimizer steps so far.
    """

    same_modules = False

    def __init__(
        self,
        distiller: Distiller,
        settings: StageConfig,
        ranks: Ranks,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        clock: Clock | None = None,
    ):
        self.settings, self.ranks, self.device, self.compute_dtype = settings, ranks, device, compute_dtype
        self.clock = clock or Clock()
        self.parameters = trained_parameters(distiller)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.updates = 0

    def micro_step(self, batch: Batch, tokens: int, *, last: bool) -> StepOutput:
        """Forward and backward; `tokens` divides the loss; `last` says that the optimizer step follows."""
        raise NotImplementedError

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear the gradient; its norm before clipping. If that is not finite, nothing was updated."""
        raise NotImplementedError

    def state(self, *, moments: bool = True) -> TrainedState | None:
        """What was learnt so far, on rank 0; None on the others. `moments` False leaves out AdamW's."""
        keys = MOMENTS if moments and self.updates else ()
        weights: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        with peers_may_end():
            for name, parameter in self.parameters.items():
                values = [self._whole(parameter, None), *(self._whole(parameter, key) for key in keys)]
                if self.ranks.first:
                    weights[name], *own = (value.detach().to("cpu", copy=True) for value in values)
                    found |= {f"{name}|{key}": value for key, value in zip(keys, own, strict=True)}
        return TrainedState(weights=weights, moments=found, updates=self.updates) if self.ranks.first else None

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        """A float32 weight or one of its moments, whole."""
        raise NotImplementedError

    def load_moments(self, state: TrainedState, *, where: str) -> None:
        """Resume from a state, given on every rank, whose weights the Distiller had when the engine started.

        Raises TrainingError, naming `where`, if its moments are of other parameters.
        """
        self.updates = state.updates
        if self.updates:
            self._start_moments()
            for name, parameter in self.parameters.items():
                for key in MOMENTS:
                    value = fitting(state.moments, f"{name}|{key}", self.shapes[name], where=where)
                    self._set_moment(parameter, key, value)

    def _start_moments(self) -> None:
        """Prepare AdamW's state after `updates` steps."""
        raise NotImplementedError

    def _set_moment(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Free what is kept outside of the engine, so that the next stage has its memory."""


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
    """The engine that the run asks for; `micro_steps` are those of a full optimizer step.

    Raises:
        UsageError: DeepSpeed is not installed. TrainingError: other processes are connected than were launched.
    """
    name = resolve_engine(config.engine, world_size())
    if name != "none":
        check_processes(name, ranks)
    named: dict[str, Any] = dict(device=device, compute_dtype=compute_dtype, clock=clock)
    if not name.startswith("zero"):
        return TorchEngine(distiller, settings, ranks, parallel=name == "ddp", **named)
    stage = int(name.removeprefix("zero"))
    return ZeroEngine(stage, distiller, settings, ranks, micro_steps=micro_steps, offload=config.offload, **named)


def fuses(device: torch.device) -> bool:
    """Whether torch's AdamW updates all tensors in one kernel there."""
    return device.type == "cuda"


class TorchEngine(Engine):
    """torch alone, in one process or in DistributedDataParallel."""

    def __init__(self, distiller: Distiller, settings: StageConfig, ranks: Ranks, *, parallel: bool, **named: Any):
        super().__init__(distiller, settings, ranks, **named)
        # One kernel for all tensors on CUDA, and no third array of a moment's size, which torch's default there takes.
        self.fused = fuses(self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=self.fused or None
        )
        self.module: nn.Module = distiller
        if parallel:
            # Stage 3 trains the projector, which a micro-batch without images does not use.
            self.module = nn.parallel.DistributedDataParallel(
                distiller,
                find_unused_parameters=distiller.stage == 3,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # rotary tables, the same everywhere
            )

    def micro_step(self, batch: Batch, tokens: int, *, last: bool) -> StepOutput:
        parallel = isinstance(self.module, nn.parallel.DistributedDataParallel)
        alone = self.module.no_sync() if parallel and not last else contextlib.nullcontext()  # type: ignore[operator]
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

    def step(self, learning_rate: float) -> float:
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        limit = self.settings.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit).item()
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, learning_rate)
            with self.clock.part("optimizer"):
                self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        return parameter if moment is None else self.optimizer.state[parameter][moment]

    def _start_moments(self) -> None:
        for parameter in self.parameters.values():
            step = torch.tensor(float(self.updates), device=parameter.device if self.fused else "cpu")
            self.optimizer.state[parameter] = {"step": step}

    def _set_moment(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        self.optimizer.state[parameter][key] = value.to(parameter.device)


class ZeroEngine(Engine):
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
        micro_steps: int,
        offload: bool,
        **named: Any,
    ):
        super().__init__(distiller, settings, ranks, **named)
        deepspeed = import_deepspeed(self.device)
        self.stage = stage
        # Ranks get out of step only where a parameter has no gradient at all: with partitioned weights, when a module runs
        # on some ranks; with others, when a projector that is trained does.
        self.same_modules = stage == 3 or distiller.stage == 3
        on_cpu = self.device.type == "cpu" or offload
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=on_cpu or None
        )
        config = zero_config(
            stage,
            settings,
            device=self.device,
            compute_dtype=self.compute_dtype,
            micro_steps=micro_steps,
            offload=offload,
            num_trained=sum(shape.numel() for shape in self.shapes.values()),
            num_parameters=sum(parameter.numel() for parameter in distiller.parameters()),
        )
        with peers_may_end():
            self.engine, self.optimizer, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=config)
            if stage == 3 and distiller.stage > 1:
                # The head is used once for every chunk of rows, and ranks have different numbers of rows: it cannot be
                # gathered at each use.
                deepspeed_private.keep_whole(self.optimizer, distiller.student.head.parameters())

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

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def _start_moments(self) -> None:
        deepspeed_private.start_moments(self.optimizer, self.stage, self.updates, MOMENTS)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:  # the call for whole tensors takes none that the number of ranks does not divide
            own = deepspeed_private.own_part(parameter, value, self.ranks.rank, self.ranks.size)
            safe_set_local_optimizer_state(parameter, own, key)

    def close(self) -> None:
        self.engine.destroy()
        deepspeed_private.forget_modules()


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
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
    if device.type == "cpu":
        deepspeed_private.use_no_own_operators(deepspeed)
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
