"""A run's folder, and what a stage starts from.

RUN/run.json                    the whole configuration, the student, the cache and its digest, versions
RUN/cache-facts.json            what the cache held when the run began, for its report
RUN/metrics.jsonl, tensorboard/ every term of every step
RUN/snapshots/                  how student and teacher are aligned, at the start and the end of stages, for its report
RUN/checkpoints/stageN-stepS/   to go on from
RUN/stageN/trained.safetensors  a finished stage's result: every parameter it trained
"""

import dataclasses
import hashlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
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
from genrecal.run_folder import RUN_FILE, in_this_versions_names, read_run_file
from genrecal.shards.layout import CACHE_FILE
from genrecal.shards.mixture import Mixture, tokenizer_digest
from genrecal.train.checkpoint import Checkpoint, copy_weights, read_tensors
from genrecal.train.config import TrainConfig, config_from
from genrecal.train.stages import add_lora, merge_lora, select_trainable
from genrecal.vlm.loading import VLM, file_digest, load_vlm, model_folder

# Who computes it, how, and who looks on: the global batch and all that follows from it stay as they were.
MAY_CHANGE = re.compile(
    r"(software|command|processes|global_batch)\b"
    r"|config\.(engine|offload|device|wandb|evaluate\.\w+|measure\.\w+|stage\d\.(batch_size|accumulation))$"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder and what it is a run of.

    Args:
        caches: of one teacher; with several, `config.data.weights` says how often each one's samples are seen.
        teacher: "cache", or "live:MODEL" where a co-resident teacher makes the states.
    """

    path: Path
    config: TrainConfig
    student: str
    caches: tuple[str, ...]  # each a directory or any fsspec URL
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

    def save_result(self, stage: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Write a finished stage's trained parameters, on the CPU."""
        path = self.stage_result(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        save_file(dict(weights), temporary)
        put_in_place(temporary, path)

    def load_result(self, stage: int) -> dict[str, torch.Tensor]:
        """A finished stage's trained parameters. Raises TrainingError if the stage has not finished in this run."""
        self.need_result(stage)
        return read_tensors(self.stage_result(stage))

    def need_result(self, stage: int) -> None:
        """Raises TrainingError if the stage has not finished in this run."""
        path = self.stage_result(stage)
        if not path.exists():
            raise TrainingError(
                f"{path}: missing: stage {stage + 1} begins from stage {stage}'s result; train with --stages that "
                f"include {stage} first"
            )

    # --------------------------------------------------------------------------------------------------------- identity

    def begin(self, cache: Mixture, processes: int = 1) -> dict[str, Any]:
        """Write run.json, or check that the one there is of the same run; its content.

        The global batch of each stage is the run's: what it was begun with, on that many processes. On another number of
        processes it stays, and accumulation gives way.

        Raises UsageError naming what differs.
        """
        content, path = self.check(cache, processes), self.path / RUN_FILE
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        return content

    def check(self, cache: Mixture, processes: int = 1) -> dict[str, Any]:
        """The content that run.json has or will have; see `begin`. Nothing is written."""
        now = self.description(cache, processes)
        path = self.path / RUN_FILE
        if not path.exists():
            return now
        found = read_run_file(self.path)
        if different := differences(_with_all_settings(found), now):
            raise UsageError(f"--out {self.path} holds another run: {'; '.join(different)}. Use another --out")
        if "global_batch" not in found:
            raise UsageError(
                f"--out {self.path}: {RUN_FILE} names no global_batch, so it is of an earlier version; go on with that "
                "version, or use another --out"
            )
        self._check_global_batches(found, processes)
        return found

    def _check_global_batches(self, found: dict[str, Any], processes: int) -> None:
        for number in (1, 2, 3):
            name, settings = f"stage{number}", self.config.stage(number)
            before = _at(found, f"config.{name}")
            if (settings.batch_size, settings.accumulation) == (before["batch_size"], before["accumulation"]):
                continue
            product, global_batch = settings.batch_size * settings.accumulation * processes, found["global_batch"][name]
            if product != global_batch:
                raise UsageError(
                    f"--out {self.path}: the run's global batch in stage {number} is {global_batch} samples; {name}.batch_size "
                    f"{settings.batch_size} x {name}.accumulation {settings.accumulation} x {processes} processes is {product}"
                )

    def check_files(self, begun: dict[str, Any], cache: Mixture) -> None:
        """Raises UsageError if this machine has another student or cache than the one that the run was begun on."""
        here = self.description(cache)
        found = [("student", here["student"], here["student_config_sha256"], begun["student_config_sha256"])]
        if len(here["caches"]) != len(begun["caches"]):
            raise UsageError(
                f"{platform.node()}: --cache {', '.join(here['caches'])}: expected as many caches as rank 0 has, "
                f"{len(begun['caches'])}, got {len(here['caches'])}; start all processes with the same command"
            )
        found += [
            ("cache", *each) for each in zip(here["caches"], here["caches_sha256"], begun["caches_sha256"], strict=True)
        ]
        for what, path, digest, expected in found:
            if digest != expected:
                raise UsageError(
                    f"{platform.node()}: the {what} {path} is not what rank 0 has by that name: its sha256 is {digest}, "
                    f"expected {expected}"
                )

    def check_checkpoint(self, checkpoint: Checkpoint, stage: int, cache: Mixture) -> None:
        """Raises TrainingError, naming what differs, for a checkpoint of another run or stage."""
        before = _with_all_settings(in_this_versions_names(checkpoint.run))
        different = differences(before, self.description(cache))
        if checkpoint.stage != stage:
            different.insert(0, f"stage was {checkpoint.stage}, now {stage}")
        if different:
            raise TrainingError(f"{checkpoint.path}: a checkpoint of another run: {'; '.join(different)}; delete it")

    def description(self, cache: Mixture, processes: int = 1) -> dict[str, Any]:
        """What a run and its checkpoints are of, as run.json has it."""
        student = model_folder(self.student)
        return json.loads(
            json.dumps(
                {
                    "config": dataclasses.asdict(self.config),
                    "global_batch": {
                        f"stage{number}": settings.batch_size * settings.accumulation * processes
                        for number in (1, 2, 3)
                        for settings in (self.config.stage(number),)
                    },
                    "processes": processes,
                    "student": str(Path(self.student).resolve()) if Path(self.student).is_dir() else self.student,
                    "student_config_sha256": file_digest(student / "config.json"),
                    "teacher": self.teacher,
                    "trust_remote_code": self.trust_remote_code,
                    "caches": [each.store.absolute for each in cache.caches],
                    "cache_tokenizer_sha256": tokenizer_digest(cache.first),
                    "caches_sha256": [hashlib.sha256(each.store.read(CACHE_FILE)).hexdigest() for each in cache.caches],
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
        content = read_run_file(path)
        return cls(
            path=path,
            config=config_from(content["config"]),
            student=content["student"],
            caches=tuple(content["caches"]),
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


def _with_all_settings(before: dict[str, Any]) -> dict[str, Any]:
    """What a run was of, with the defaults of settings that came after it; what this version no longer has stays as it is."""
    try:
        return before | {"config": json.loads(json.dumps(dataclasses.asdict(config_from(before["config"]))))}
    except (UsageError, KeyError, TypeError, AttributeError):
        return before


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What sets two runs apart, in words; what may change while a run goes on is no difference."""
    return [
        f"{name} was {_at(before, name)!r}, now {_at(now, name)!r}"
        for name in sorted(_leaves(before) | _leaves(now))
        if _at(before, name) != _at(now, name) and not MAY_CHANGE.match(name)
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, value in tree.items():
        names |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return names


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
