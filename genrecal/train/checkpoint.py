"""Checkpoints of a stage: what is trained, the optimizer and the random state, in safetensors. Nothing is unpickled.

A checkpoint is a folder written under a temporary name and renamed when it is whole.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from genrecal.errors import TrainingError
from genrecal.files import temporary_path

WEIGHTS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters that get a gradient, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    stage: int,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write `stageN-stepS` under `folder` and remove all but the newest `keep` of that stage."""
    path = folder / f"stage{stage}-step{step:08d}"
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / WEIGHTS)
    names = {id(parameter): name for name, parameter in parameters.items()}
    moments = {
        f"{names[id(parameter)]}|{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    moments["random|cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        moments["random|cuda"] = torch.cuda.get_rng_state()
    save_file(moments, temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps({"stage": stage, "step": step}))
    for file in temporary.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    for old in find_checkpoints(folder, stage)[:-keep]:
        shutil.rmtree(old)
    return path


def find_checkpoints(folder: Path, stage: int) -> list[Path]:
    """A stage's checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"stage{stage}-step*") if re.fullmatch(r"stage\d-step\d+", path.name))


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Restore a checkpoint in place and return its step. Raises TrainingError if it is of other parameters."""
    weights, moments = read_tensors(path / WEIGHTS), read_tensors(path / OPTIMIZER)
    copy_weights(weights, parameters, where=str(path))
    torch.set_rng_state(moments.pop("random|cpu"))
    cuda = moments.pop("random|cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for key, value in moments.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)
    return int(json.loads((path / STATE).read_text())["step"])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors. Raises TrainingError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: cannot be read: {error}; delete {path.parent} and train again, it goes on from what stands before it"
        ) from None


def remove_unfinished(folder: Path) -> None:
    """Delete checkpoints that a killed process was still writing; a run has one process at a time."""
    for leftover in folder.glob(".stage*.tmp"):
        shutil.rmtree(leftover)


@torch.no_grad()
def copy_weights(weights: dict[str, torch.Tensor], parameters: dict[str, Any], *, where: str) -> None:
    """Copy named tensors into parameters. Raises TrainingError naming the first that does not fit."""
    for name in sorted(weights.keys() | parameters.keys()):
        if name not in weights or name not in parameters:
            side = "the checkpoint lacks" if name not in weights else "this run has no"
            raise TrainingError(f"{where}: {side} {name}; it is of another student, teacher or LoRA setting")
        if weights[name].shape != parameters[name].shape:
            raise TrainingError(
                f"{where}: {name} is {list(weights[name].shape)}, expected {list(parameters[name].shape)}"
            )
        parameters[name].copy_(weights[name])
