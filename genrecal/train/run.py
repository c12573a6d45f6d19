"""A run's folder, and what a stage starts from.

RUN/run.json                    the whole configuration, the student, the cache and its digest, versions
RUN/metrics.jsonl, tensorboard/ every term of every step
RUN/checkpoints/stageN-stepS/   to go on from
RUN/stageN/trained.safetensors  a finished stage's result: every parameter it trained
"""

import dataclasses
import hashlib
import json
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

import genrecal
from genrecal.errors import TrainingError, UsageError
from genrecal.files import put_in_place, temporary_path, write_whole
from genrecal.shards.layout import CACHE_FILE
from genrecal.shards.reader import Cache
from genrecal.train.checkpoint import copy_weights, read_tensors
from genrecal.train.config import TrainConfig, config_from
from genrecal.train.stages import add_lora, merge_lora, select_trainable
from genrecal.vlm.loading import VLM, file_digest, load_vlm, model_folder

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder and what it is a run of.

    Args:
        teacher: "cache", or "live:MODEL" where a co-resident teacher makes the states.
    """

    path: Path
    config: TrainConfig
    student: str
    cache: str  # a directory or any fsspec URL
    teacher: str = "cache"
    trust_remote_code: bool = False

    def stage_result(self, stage: int) -> Path:
        return self.path / f"stage{stage}" / "trained.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def last_finished_stage(self) -> int:
        """The latest stage that has a result; 0 for none."""
        return max((stage for stage in (1, 2, 3) if self.stage_result(stage).exists()), default=0)

    def save_result(self, stage: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Write a finished stage's trained parameters."""
        path = self.stage_result(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary)
        put_in_place(temporary, path)

    def load_result(self, stage: int) -> dict[str, torch.Tensor]:
        """A finished stage's trained parameters. Raises TrainingError if the stage has not finished in this run."""
        path = self.stage_result(stage)
        if not path.exists():
            raise TrainingError(
                f"{path}: missing: stage {stage + 1} begins from stage {stage}'s result; train with --stages that "
                f"include {stage} first"
            )
        return read_tensors(path)

    # --------------------------------------------------------------------------------------------------------- identity

    def begin(self, cache: Cache) -> None:
        """Write run.json, or check that the one there is of the same run. Raises UsageError naming what differs."""
        description = self._description(cache)
        path = self.path / RUN_FILE
        if path.exists():
            found = _read_run_file(path)
            different = [
                f"{name} was {_at(found, name)!r}, now {_at(description, name)!r}"
                for name in sorted(_leaves(found) | _leaves(description))
                if _at(found, name) != _at(description, name) and not name.startswith(("software", "command"))
            ]
            if different:
                raise UsageError(f"--out {self.path} holds another run: {'; '.join(different)}. Use another --out")
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())

    def _description(self, cache: Cache) -> dict[str, Any]:
        student = model_folder(self.student)
        return json.loads(
            json.dumps(
                {
                    "config": dataclasses.asdict(self.config),
                    "student": str(Path(self.student).resolve()) if Path(self.student).is_dir() else self.student,
                    "student_config_sha256": file_digest(student / "config.json"),
                    "teacher": self.teacher,
                    "trust_remote_code": self.trust_remote_code,
                    "cache": cache.store.absolute,
                    "cache_sha256": hashlib.sha256(cache.store.read(CACHE_FILE)).hexdigest(),
                    "command": shlex.join(sys.argv),
                    "software": {
                        "genrecal": genrecal.__version__,
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                        "peft": peft.__version__,
                        "python": platform.python_version(),
                    },
                }
            )
        )

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run. Raises UsageError if the folder is none."""
        content = _read_run_file(path / RUN_FILE)
        return cls(
            path=path,
            config=config_from(content["config"]),
            student=content["student"],
            cache=content["cache"],
            teacher=content["teacher"],
            trust_remote_code=content["trust_remote_code"],
        )

    # ---------------------------------------------------------------------------------------------------------- student

    def load_student(self, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> VLM:
        """The student as it was before the run."""
        attention = None if self.config.attention == "auto" else self.config.attention
        return load_vlm(
            self.student, dtype=dtype, device=device, trust_remote_code=self.trust_remote_code, attention=attention
        )

    def student_after(self, stage: int, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> VLM:
        """The student with what stages up to `stage` taught it, LoRA merged. Stage 0 and 1 leave it as it was."""
        student = self.load_student(dtype, device)
        if stage >= 2:
            weights = {
                name.removeprefix("model."): value
                for name, value in self.load_result(stage).items()
                if name.startswith("model.")
            }
            if stage == 2 and self.config.lora.rank:
                add_lora(student, self.config.lora)
            names = select_trainable(stage, student, self.config.lora)
            parameters = dict(student.model.named_parameters())
            copy_weights(weights, {name: parameters[name] for name in names}, where=str(self.stage_result(stage)))
            if stage == 2 and self.config.lora.rank:
                merge_lora(student)
        student.model.requires_grad_(False)
        return student


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path.parent}: not a run: {RUN_FILE}: {error}; `genrecal train --out {path.parent}` makes one"
        ) from None


def _leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, value in tree.items():
        names |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return names


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
