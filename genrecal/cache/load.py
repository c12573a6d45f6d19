"""Load the teacher of a job or of a training run, by its settings."""

from dataclasses import dataclass, field
from typing import Any

import torch

from genrecal.cache.teacher import HFTeacher, LiveTeacher, Teacher
from genrecal.errors import UsageError
from genrecal.shards.reader import open_cache
from genrecal.vlm.cached_teacher import prompt_options
from genrecal.vlm.loading import file_digest, model_folder, placement, processor_files
from genrecal.vlm.rendering import PromptOptions


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Which teacher to load, and how. Can be pickled, so that each Ray task loads its own.

    Args:
        path: a model folder or hub name.
        backend: "hf" (transformers) or "vllm".
        dtype: "auto" for the checkpoint's, or torch's name.
        device: "auto", a torch device, or "split" over all GPUs of the machine (hf only).
        tensor_parallel, pipeline_parallel, engine_arg: vllm only.

    Raises UsageError for settings that do not go together.
    """

    path: str
    backend: str = "hf"
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    engine_arg: list[str] | None = None
    trust_remote_code: bool = False
    prompt: PromptOptions = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        if self.backend not in ("hf", "vllm"):
            raise UsageError(f"--backend {self.backend!r}: expected hf or vllm")
        if self.backend == "hf" and (self.tensor_parallel > 1 or self.pipeline_parallel > 1 or self.engine_arg):
            raise UsageError(
                "--tensor-parallel, --pipeline-parallel and --engine-arg: expected --backend vllm with them; "
                "--device split spreads a teacher of the hf backend over the GPUs of a machine"
            )
        if self.backend == "vllm" and self.device == "split":
            raise UsageError("--device split: expected --tensor-parallel or --pipeline-parallel with --backend vllm")

    @property
    def gpus(self) -> float | None:
        """GPUs that one teacher takes; None for one if there is any."""
        if self.device == "cpu":
            return 0.0
        return float(self.tensor_parallel * self.pipeline_parallel) if self.backend == "vllm" else None

    def load(self) -> Teacher:
        """Load it. Raises ModelError or UsageError."""
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "prompt": self.prompt, "dtype": dtype}
        if self.backend == "hf":
            return HFTeacher.load(self.path, device=placement(self.device), **common)
        from genrecal.cache.vllm_teacher import VLLMTeacher, engine_arguments

        return VLLMTeacher(
            self.path,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            engine_args=engine_arguments(self.engine_arg or []),
            # The engine takes the GPUs; this process needs a device for the head alone.
            head_device="cpu" if self.device == "auto" else placement(self.device),
            **common,
        )

    def reference(self, teacher: Teacher) -> Teacher:
        """The same model in transformers on the CPU, with the dtype that `teacher` has."""
        return HFTeacher.load(
            self.path,
            dtype=teacher.head.weight.dtype,
            device="cpu",
            trust_remote_code=self.trust_remote_code,
            prompt=self.prompt,
        )


def load_live_teacher(path: str, cache: str, *, device: str, trust_remote_code: bool = False) -> LiveTeacher:
    """The teacher that made a cache, to run beside the student. Raises UsageError if it is another one."""
    opened = open_cache(cache)
    teacher = HFTeacher.load(
        path,
        dtype=getattr(torch, opened.description["teacher"]["dtype"]),
        device=placement(device),
        trust_remote_code=trust_remote_code,
        prompt=prompt_options(opened),
    )
    if not teacher.head.weight.cpu().equal(opened.head().weight):
        raise UsageError(f"--teacher live:{path}: its head is not the one that the cache {cache} was made with")
    made_with = opened.description["teacher"]["files_sha256"]
    for file in processor_files(model_folder(path)):
        if made_with.get(file.name) != file_digest(file):
            raise UsageError(
                f"--teacher live:{path}: its {file.name} is not the one that the cache {cache} was made with (sha256 "
                f"{made_with.get(file.name)}, got {file_digest(file)}), so its tokens may differ; make another cache with it"
            )
    return LiveTeacher(teacher, top_k=opened.description["top_k"], draws=opened.draws)
