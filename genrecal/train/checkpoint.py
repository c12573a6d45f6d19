"""Checkpoints of a stage: what is trained and the optimizer's moments, in safetensors. Nothing is unpickled.

A checkpoint is a folder written under a temporary name and renamed when it is whole. It holds whole tensors, whatever
engine and number of processes wrote it, so that any other resumes from it, and it says what it is a checkpoint of. It holds
no random state: that of a step is a function of the seed, the stage, the step and the rank.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from genrecal.errors import TrainingError
from genrecal.files import flush, temporary_path
from genrecal.train.advice import cannot_write

WEIGHTS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True, kw_only=True)
class TrainedState:
    """What a stage has learnt so far, whole and in float32.

    Args:
        weights: every trained parameter, by name.
        moments: "NAME|exp_avg" and "NAME|exp_avg_sq"; empty before the first update.
        updates: optimizer steps that were taken.
    """

    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    updates: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's content; its tensors are read when they are asked for.

    Args:
        step: optimizer steps of the stage that were done, those without a sample included.
        run: what it is a checkpoint of, as run.json has it.
    """

    path: Path
    stage: int
    step: int
    run: dict[str, Any]
    state: TrainedState

    def put_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy its weights into place. Raises TrainingError if it is of other parameters, its moments included."""
        copy_weights(self.state.weights, parameters, where=str(self.path))
        moments = {f"{name}|{key}": None for name in parameters for key in MOMENTS if self.state.updates}
        check_names(self.state.moments, moments, where=str(self.path))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters that get a gradient, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path, stage: int, step: int, state: TrainedState, *, run: dict[str, Any], keep: int
) -> Path:
    """Write `stageN-stepS` under `folder` and remove all but the newest `keep` of that stage.

    Raises TrainingError if it cannot be written; the older ones then stand.
    """
    path = folder / f"stage{stage}-step{step:08d}"
    temporary = temporary_path(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(dict(state.weights), temporary / WEIGHTS)
        save_file(dict(state.moments), temporary / OPTIMIZER)
        content = {"stage": stage, "step": step, "updates": state.updates, "run": run}
        (temporary / STATE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for file in [*temporary.iterdir(), temporary]:
            flush(file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(path, "checkpoint", error) from None
    for old in find_checkpoints(folder, stage)[:-keep]:
        shutil.rmtree(old)
    return path


def find_checkpoints(folder: Path, stage: int) -> list[Path]:
    """A stage's checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"stage{stage}-step*") if re.fullmatch(r"stage\d-step\d+", path.name))


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint. Raises TrainingError if it cannot be read."""
    try:
        content = json.loads((path / STATE).read_text())
        state = TrainedState(
            weights=TensorFile(path / WEIGHTS), moments=TensorFile(path / OPTIMIZER), updates=int(content["updates"])
        )
        return Checkpoint(
            path=path, stage=content["stage"], step=content["step"], run=dict(content["run"]), state=state
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path / STATE, error) from None


def _unreadable(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path}: cannot be read: {error}; delete {path.parent} and train again, it goes on from what stands before it"
    )


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors. Raises TrainingError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def remove_checkpoints(folder: Path, stage: int) -> None:
    """Delete the checkpoints of a finished stage: its result is kept."""
    for path in find_checkpoints(folder, stage):
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete checkpoints that a killed process was still writing; one process of a run writes."""
    for leftover in folder.glob(".stage*.tmp"):
        shutil.rmtree(leftover)


@torch.no_grad()
def copy_weights(weights: Mapping[str, torch.Tensor], parameters: Mapping[str, Any], *, where: str) -> None:
    """Copy named tensors into parameters. Raises TrainingError naming the first that does not fit."""
    check_names(weights, parameters, where=where)
    for name, parameter in parameters.items():
        parameter.copy_(fitting(weights, name, parameter.shape, where=where))


def check_names(tensors: Mapping[str, Any], expected: Mapping[str, Any], *, where: str) -> None:
    """Raises TrainingError naming the first tensor that is missing or that nothing here has."""
    for name in sorted(tensors.keys() ^ expected.keys()):
        side = "the checkpoint lacks" if name not in tensors else "this run has no"
        raise TrainingError(f"{where}: {side} {name}; it is of another student, teacher or LoRA setting")


def fitting(tensors: Mapping[str, torch.Tensor], name: str, shape: torch.Size, *, where: str) -> torch.Tensor:
    """A tensor of the shape that its place has. Raises TrainingError if it has another."""
    tensor = tensors[name]
    if tensor.shape != shape:
        raise TrainingError(f"{where}: {name} is {list(tensor.shape)}, expected {list(shape)}")
    return tensor
