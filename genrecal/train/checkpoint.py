"""State of a run on disk: a stage's checkpoints and its result, in safetensors. Nothing is unpickled.

Each file is written under a temporary name and renamed when it is whole. A checkpoint is a folder that counts from the moment
its last file, state.json, is there. It holds whole tensors, whatever engine and number of processes wrote it, so that any
other resumes from it, and it says which run it is of. It holds no random state: that of a step is a function of the seed,
the stage, the step and the rank.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from genrecal.errors import TrainingError
from genrecal.files import put_in_place, temporary_path, write_whole
from genrecal.train.advice import explain_disk

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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary)
        put_in_place(temporary, path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(
    folder: Path, stage: int, step: int, state: TrainedState, *, run: dict[str, Any], keep: int
) -> Path:
    """Write `stageN-stepS` under `folder` and remove all but the newest `keep` of that stage.

    Raises TrainingError if it cannot be written; the older ones are kept then.
    """
    path = folder / f"stage{stage}-step{step:08d}"
    content = {"stage": stage, "step": step, "updates": state.updates, "run": run}
    _remove(path)
    with explain_disk(path, "checkpoint"):
        try:
            write_tensors(path / WEIGHTS, state.weights)
            write_tensors(path / OPTIMIZER, state.moments)
            write_whole(path / STATE, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        except OSError:
            _remove(path)
            raise
    for old in find_checkpoints(folder, stage)[:-keep]:
        _remove(old)
    return path


def find_checkpoints(folder: Path, stage: int) -> list[Path]:
    """A stage's whole checkpoints, oldest first."""
    return sorted(state.parent for state in folder.glob(f"stage{stage}-step*/{STATE}"))


def remove_checkpoints(folder: Path, stage: int) -> None:
    """Delete the checkpoints of a finished stage: its result is kept."""
    for path in folder.glob(f"stage{stage}-step*"):
        _remove(path)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was still writing or removing; one process of a run writes."""
    for path in folder.glob("stage*-step*"):
        if not (path / STATE).exists():
            _remove(path)


def _remove(path: Path) -> None:
    (path / STATE).unlink(missing_ok=True)  # first: without it the rest does not count
    shutil.rmtree(path, ignore_errors=True)


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path / STATE, error) from None


def _unreadable(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path}: cannot be read: {error}; delete {path.parent} and run the same command again to resume from before it"
    )


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for. Raises TrainingError if it cannot be read."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
