"""Every use of DeepSpeed's internals, in one place: what ZeRO needs here and DeepSpeed's documented interface does not give.

tests/train/test_engine.py calls each function with the DeepSpeed that is installed, and names it when a release breaks it.
"""

import functools
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def use_no_own_operators(deepspeed: Any) -> None:
    """On CPUs: DeepSpeed would compile one for a minute that does what gloo does."""
    deepspeed.ops.__compatible_ops__ = {}


def keep_whole(optimizer: Any, parameters: Iterable[Any]) -> None:
    """ZeRO-3: gather these parameters once and keep them on every rank, as small ones are kept."""
    for parameter in parameters:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            optimizer.persistent_parameters.append(parameter)
            parameter.all_gather([parameter])


def start_moments(optimizer: Any, stage: int, step: int, names: Sequence[str]) -> None:
    """Give the wrapped optimizer the state it has after `step` updates, its moments zero, so that they can be set."""
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        state = {"step": torch.tensor(float(step), device=flat.device)}
        optimizer.optimizer.state[flat] = state | {name: torch.zeros_like(flat) for name in names}
    if stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def own_part(parameter: Any, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """ZeRO-3: this rank's part of a whole tensor, padded as DeepSpeed pads the parameter."""
    part = parameter.ds_tensor.ds_numel
    return nn.functional.pad(value.flatten(), (0, part * size - value.numel()))[rank * part :][:part]


def forget_modules() -> None:
    """Empty a list and caches of methods' results that would keep a stage's modules after `engine.destroy()`."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for found in gc.get_objects():
        if isinstance(found, functools._lru_cache_wrapper) and str(found.__module__).startswith("deepspeed."):
            found.cache_clear()
