"""What runs a stage's Distiller on this rank: plain torch, DistributedDataParallel, or DeepSpeed's ZeRO.

All engines take the same micro-steps and give the same numbers. A micro-step's loss is its part of the global batch's,
whose denominators are known beforehand, so gradients are summed over ranks and micro-steps, never averaged: DDP and
DeepSpeed average over ranks, which a factor of the world size takes back. A parameter that no rank used has a gradient of
zero, not none: AdamW's moments fade in every step, whatever the step's samples were.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from genrecal.errors import TrainingError, UsageError
from genrecal.train.batches import MicroBatch
from genrecal.train.checkpoint import MOMENTS, TrainedState, check_names, copy_weights, fitting, trained_parameters
from genrecal.train.config import StageConfig, TrainConfig
from genrecal.train.ranks import Ranks, peers_may_end, world_size
from genrecal.train.stages import Denominators, Distiller, StepOutput


class Engine(Protocol):
    """Runs the micro-steps of optimizer steps. Every method is called by all ranks together.

    same_modules: whether all ranks must run the same modules in a micro-step, pictures or not.
    """

    same_modules: bool

    def micro_step(self, batch: MicroBatch, denominators: Denominators, *, last: bool) -> StepOutput:
        """Forward and backward; `last` says that the optimizer step follows."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, and forget the gradient; the gradient's norm before clipping.

        Where that is not finite, nothing is updated.
        """

    def state(self) -> TrainedState | None:
        """On rank 0; None on the others."""

    def load(self, state: TrainedState, *, where: str) -> None:
        """Go on from a state, given on every rank. Raises TrainingError, naming `where`, if it is of other parameters."""


def resolve_engine(name: str, processes: int) -> str:
    """The engine that "auto" stands for: ddp where a launcher started several processes, else none.

    Args:
        processes: as `world_size` counts them.

    Raises:
        UsageError: engine none, and several processes: each would train the whole run.
    """
    if name == "auto":
        return "ddp" if processes > 1 else "none"
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
            distiller, settings, ranks, device=device, compute_dtype=compute_dtype, parallel=name == "ddp"
        )
    raise UsageError(f"engine {name}: not there yet")


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
    ):
        self.parameters = trained_parameters(distiller)
        self.settings, self.ranks, self.device, self.compute_dtype = settings, ranks, device, compute_dtype
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.updates = 0
        self.module: nn.Module = distiller
        if parallel:
            check_processes("ddp", ranks)
            # Stage 3 trains the projector, which a micro-batch without pictures does not use.
            self.module = nn.parallel.DistributedDataParallel(
                distiller, find_unused_parameters=distiller.stage == 3, gradient_as_bucket_view=True
            )

    def micro_step(self, batch: MicroBatch, denominators: Denominators, *, last: bool) -> StepOutput:
        alone = self.module.no_sync() if self._parallel and not last else contextlib.nullcontext()  # type: ignore[operator]
        batch = batch.to(self.device, self.compute_dtype)
        with alone, peers_may_end():
            with torch.autocast(
                self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32
            ):
                output: StepOutput = self.module(batch, denominators)
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
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> TrainedState | None:
        if not self.ranks.first:
            return None
        moments = {
            f"{name}|{key}": self.optimizer.state[parameter][key].detach().cpu()
            for name, parameter in self.parameters.items()
            for key in MOMENTS
            if self.updates
        }
        weights = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
        return TrainedState(weights=weights, moments=moments, updates=self.updates)

    def load(self, state: TrainedState, *, where: str) -> None:
        copy_weights(state.weights, self.parameters, where=where)
        check_names(state.moments, moment_names(state, self.parameters), where=where)
        self.updates = state.updates
        for name, parameter in self.parameters.items() if state.updates else ():
            moments = {key: fitting(state.moments, f"{name}|{key}", parameter.shape, where=where) for key in MOMENTS}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.updates)),
                **{key: value.to(parameter.device) for key, value in moments.items()},
            }


def moment_names(state: TrainedState, parameters: Iterable[str]) -> dict[str, None]:
    """Names of the moments that a state of these parameters has."""
    return {f"{name}|{key}": None for name in parameters for key in MOMENTS if state.updates}


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
