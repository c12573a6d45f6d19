"""A run's folder, and what a stage starts from.

RUN/run.json                    the whole configuration, the student, the cache and its digest, versions
RUN/cache-facts.json            what the cache held when the run began, for its report
RUN/metrics.jsonl, tensorboard/ every term of every step
RUN/snapshots/                  how well student and teacher are aligned, at the start and the end of stages, for its report
RUN/checkpoints/stageN-stepS/   to resume from
RUN/stageN/trained.safetensors  a finished stage's result: every parameter it trained
"""

import hashlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import genrecal
from genrecal.errors import TrainingError, UsageError
from genrecal.files import write_whole
from genrecal.folders import refuse_other_content
from genrecal.run_folder import LOCK_FILE, OUTPUT_FILE, RUN_FILE, read_run_file
from genrecal.shards.layout import CACHE_FILE
from genrecal.shards.mixture import Mixture
from genrecal.shards.reader import Cache
from genrecal.train.advice import explain_disk
from genrecal.train.checkpoint import Checkpoint, TensorFile, copy_weights, find_checkpoints, write_tensors
from genrecal.train.config import TrainConfig, config_from
from genrecal.train.stages import add_lora, merge_lora, select_trainable
from genrecal.vlm.cached_teacher import prompt_options
from genrecal.vlm.checkpoint import model_digests
from genrecal.vlm.loading import VLM, load_vlm
from genrecal.vlm.rendering import PromptOptions

# The settings that identify a run. All others may change when it is resumed: they say how it is computed, not what.
IDENTITY = re.compile(
    r"seed|objective|prompt\.\w+(\.\w+)?|(recalibrator|lora)\.\w+|loss\.(?!chunk_rows$)\w+|data\.(weights|window)"
    r"|stage\d\.(epochs|max_steps|lr|lr_end|weight_decay|max_grad_norm|(include|exclude)_categories|drop_unlikely)"
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

    @property
    def prompt(self) -> PromptOptions:
        """How the student's conversations are rendered: as the run was begun with, or will be."""
        found = read_run_file(self.path) if (self.path / RUN_FILE).exists() else {}
        if "cache_prompt" in found:
            inherited = PromptOptions(**found["cache_prompt"])
        else:
            inherited = prompt_options(*map(Cache, self.caches))
        return student_prompt(self.config, inherited)

    def stage_result(self, stage: int) -> Path:
        return self.path / f"stage{stage}" / "trained.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def last_finished_stage(self) -> int:
        """The latest stage that has a result; 0 for none."""
        return max((stage for stage in (1, 2, 3) if self.stage_result(stage).exists()), default=0)

    def save_result(self, stage: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Write a finished stage's trained parameters, on the CPU. Raises TrainingError if they cannot be written."""
        path = self.stage_result(stage)
        with explain_disk(path, f"result of stage {stage}"):
            write_tensors(path, weights)

    def load_result(self, stage: int) -> Mapping[str, torch.Tensor]:
        """A finished stage's trained parameters. Raises TrainingError if the stage has not finished in this run."""
        self.need_result(stage)
        return TensorFile(self.stage_result(stage))

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
        processes it stays, and accumulation gives way. run.json keeps the settings that the run was begun with, and lists
        under "resumed" what a later call changed.

        Raises UsageError naming what differs.
        """
        found = self.read()
        content = self.check(cache, processes)
        if found is not None:
            before, now = flat(found["config"]), flat(json.loads(json.dumps(asdict(self.config))))
            changed = {name: value for name, value in now.items() if value != before.get(name)}
            for name, value in changed.items():
                sys.stderr.write(f"genrecal: {self.path}: resumed with {name}={value}, begun with {before.get(name)}\n")
            content["resumed"] = [
                *found.get("resumed", ()),
                {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv)} | changed,
            ]
        else:
            self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / RUN_FILE, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        return content

    def read(self) -> dict[str, Any] | None:
        """What run.json holds; None if there is none. Raises UsageError if it cannot be read."""
        return _whole(read_run_file(self.path), self.path / RUN_FILE) if (self.path / RUN_FILE).exists() else None

    def check(self, cache: Mixture, processes: int = 1) -> dict[str, Any]:
        """The content that run.json has or will have; see `begin`. Nothing is written."""
        now, found = self.description(cache, processes), self.read()
        if found is None:
            refuse_other_content(self.path, "a run", ours=(LOCK_FILE, OUTPUT_FILE))
            return now
        if different := self.differences(found, now):
            raise UsageError(f"--out {self.path} holds another run: {'; '.join(different)}. Use another --out")
        # Paths may change, and a stage of which nothing is kept may be another one.
        content = found | {name: now[name] for name in ("student", "caches", "teacher", "trust_remote_code")}
        for stage in [stage for stage in self._new_stages() if found["config"][stage] != now["config"][stage]]:
            content["config"] = content["config"] | {stage: now["config"][stage]}
            content["global_batch"] = content["global_batch"] | {stage: now["global_batch"][stage]}
        self._check_global_batches(content, processes)
        return content

    def _new_stages(self) -> list[str]:
        """Stages of which the folder holds neither a result nor a checkpoint."""
        return [
            f"stage{number}"
            for number in (1, 2, 3)
            if not self.stage_result(number).exists() and not find_checkpoints(self.checkpoints, number)
        ]

    def _check_global_batches(self, begun: dict[str, Any], processes: int) -> None:
        for number in (1, 2, 3):
            name, settings = f"stage{number}", self.config.stage(number)
            before = begun["config"][name]
            if (settings.batch_size, settings.accumulation) == (before["batch_size"], before["accumulation"]):
                continue
            product, global_batch = settings.batch_size * settings.accumulation * processes, begun["global_batch"][name]
            if product != global_batch:
                raise UsageError(
                    f"--out {self.path}: the run's global batch in stage {number} is {global_batch} samples; {name}.batch_size "
                    f"{settings.batch_size} x {name}.accumulation {settings.accumulation} x {processes} processes is {product};"
                    f" make it {global_batch}, or use another --out"
                )

    def differences(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """What makes two descriptions two runs, in words. A student or cache is recognised by its digests, wherever it is."""
        new = tuple(f"{stage}." for stage in self._new_stages())
        old_settings, settings = flat(before["config"]), flat(now["config"])
        different = [
            f"{name} was {old_settings.get(name)!r}, now {settings.get(name)!r}"
            for name in sorted(old_settings | settings)
            if IDENTITY.fullmatch(name) and not name.startswith(new) and old_settings.get(name) != settings.get(name)
        ]
        old_files, files = before["student_sha256"], now["student_sha256"]
        if others := [name for name in sorted(old_files | files) if old_files.get(name) != files.get(name)]:
            different.append(f"student was {before['student']}, now {now['student']} with other {', '.join(others)}")
        if before["caches_sha256"] != now["caches_sha256"]:
            different.append(
                f"cache was {', '.join(before['caches'])}, now {', '.join(now['caches'])} with another {CACHE_FILE}"
            )
        return different

    def check_files(self, begun: dict[str, Any], cache: Mixture) -> None:
        """Raises UsageError if this machine has another student or cache than rank 0's, which began the run."""
        here = self.description(cache)
        if different := self.differences(begun | {"config": here["config"]}, here):
            raise UsageError(
                f"{platform.node()}: expected the student and the caches of rank 0: {'; '.join(different)}; start all "
                "processes with the same command and the same files"
            )

    def check_checkpoint(self, checkpoint: Checkpoint, stage: int, begun: dict[str, Any]) -> None:
        """Raises TrainingError, naming what differs, for a checkpoint of another run or stage."""
        different = self.differences(_whole(checkpoint.run, checkpoint.path), begun)
        if checkpoint.stage != stage:
            different.insert(0, f"stage was {checkpoint.stage}, now {stage}")
        if different:
            raise TrainingError(f"{checkpoint.path}: a checkpoint of another run: {'; '.join(different)}; delete it")

    def description(self, cache: Mixture, processes: int = 1) -> dict[str, Any]:
        """What a run and its checkpoints are of, as run.json has it."""
        prompt = prompt_options(*cache.caches)
        description = {
            "config": asdict(self.config),
            "global_batch": {
                f"stage{number}": settings.batch_size * settings.accumulation * processes
                for number in (1, 2, 3)
                for settings in (self.config.stage(number),)
            },
            "processes": processes,
            "student": str(Path(self.student).resolve()) if Path(self.student).is_dir() else self.student,
            "student_sha256": model_digests(self.student),
            "teacher": self.teacher,
            "trust_remote_code": self.trust_remote_code,
            "caches": [each.store.absolute for each in cache.caches],
            "cache_prompt": {"template_args": prompt.template_args, "allowed_tokens": prompt.allowed_tokens},
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
        return json.loads(json.dumps(description))

    @classmethod
    def open(cls, path: Path, *, student: str | None = None) -> "Run":
        """An existing run.

        Args:
            student: where its student is now, if it has moved.

        Raises UsageError if the folder is none, or for another student.
        """
        content = _whole(read_run_file(path), path / RUN_FILE)
        if student is not None and (digests := model_digests(student)) != content["student_sha256"]:
            others = sorted({name for name, _ in digests.items() ^ content["student_sha256"].items()})
            raise UsageError(
                f"--student {student}: another than the run's, {content['student']}: other {', '.join(others)}"
            )
        return cls(
            path=path,
            config=config_from(content["config"]),
            student=student or content["student"],
            caches=tuple(content["caches"]),
            teacher=content["teacher"],
            trust_remote_code=content["trust_remote_code"],
        )

    # ---------------------------------------------------------------------------------------------------------- student

    def load_student(self, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> VLM:
        """The student as it was before the run."""
        attention = None if self.config.attention == "auto" else self.config.attention
        student = load_vlm(
            self.student,
            dtype=dtype,
            device=device,
            trust_remote_code=self.trust_remote_code,
            attention=attention,
            prompt=self.prompt,
        )
        student.renderer.refuse_unsaid_thinking(self.student)
        return student

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


def _whole(content: dict[str, Any], where: Path) -> dict[str, Any]:
    """A description with all that a run is recognised by. Raises UsageError if it lacks some."""
    names = (
        "config",
        "global_batch",
        "student",
        "student_sha256",
        "teacher",
        "trust_remote_code",
        "caches",
        "caches_sha256",
    )
    if missing := [name for name in names if name not in content]:
        raise UsageError(
            f"{where}: it does not say {', '.join(missing)}, so it is of another version; use another --out"
        )
    return content


def student_prompt(config: TrainConfig, inherited: PromptOptions) -> PromptOptions:
    """How a student's conversations are rendered, given how its teacher's were."""
    own = config.prompt
    return PromptOptions(template_args=own.template_args, allowed_tokens=own.allowed_tokens, inherited=inherited)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> values by dotted name."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
