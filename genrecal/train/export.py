"""A run -> a stock Hugging Face checkpoint: LoRA merged, no Recalibrator, the base model's own files beside the weights.

It is loaded again in its stock class and compared with what was trained before it is put in place.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.files import temporary_path
from genrecal.samples import Sample, decode_image
from genrecal.shards.reader import Cache
from genrecal.train.evaluate import generate, prompts_of
from genrecal.train.run import Run
from genrecal.vlm.loading import VLM, is_weight_file, load_vlm, model_folder
from genrecal.vlm.rendering import PromptOptions

CHECK_SAMPLES = 4
CHECK_TOKENS = 24


def export(run: Run, out: Path, *, cache: str | None = None, stage: int | None = None) -> int:
    """Write the student of the last finished stage (or of `stage`) to the folder `out`; returns the stage.

    Weights go through the stock class, in the base checkpoint's dtype and key names. Every other file of the base
    folder (config, tokenizer, chat template, processor, generation config) is copied byte for byte: a processor saved
    from here might not load elsewhere.

    Raises:
        UsageError: nothing to export, or `out` exists.
        ModelError: what was written differs from what was trained.
    """
    stage = run.last_finished_stage() if stage is None else stage
    if stage < 2 or not run.stage_result(stage).exists():
        raise UsageError(f"{run.path}: stage {max(stage, 2)} has not finished, so no student has been trained yet")
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another folder or delete it")
    base = model_folder(run.student)
    student = run.student_after(stage, "auto")
    samples = _check_samples(cache or run.caches[0], student)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write(student, base, temporary)
        _check_keys(base, temporary)
        _check_outputs(student, temporary, samples, prompt=run.prompt, trust_remote_code=run.trust_remote_code)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return stage


def _check_samples(cache: str, student: VLM) -> list[Sample]:
    """The first cached samples that the student can take (of a language model: those without pictures)."""
    samples: list[Sample] = []
    try:
        opened = Cache(cache)
        for index in range(len(opened)):
            sample = opened[index].sample
            with contextlib.suppress(SampleError):
                student.renderer.encode(sample)
                samples.append(sample)
            if len(samples) == CHECK_SAMPLES:
                break
    except ValueError as error:
        raise UsageError(f"export compares outputs on a few cached samples, but {error}; give --cache") from None
    return samples


def _write(student: VLM, base: Path, folder: Path) -> None:
    """The weights by the stock class, then the base folder's other files over whatever it wrote beside them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # saving imports DeepSpeed where it is installed, which would warn
    student.model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
        if not is_weight_file(path):
            path.unlink()
    for path in base.iterdir():
        if path.is_file() and not is_weight_file(path):
            shutil.copyfile(path, folder / path.name)


def weight_keys(folder: Path) -> dict[str, list[int]]:
    """Tensor names and shapes of a checkpoint's safetensors files."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _check_keys(base: Path, folder: Path) -> None:
    wanted, got = weight_keys(base), weight_keys(folder)
    if not wanted:
        return  # a base in another file format: the stock class's own names stand
    if different := sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)):
        name = different[0]
        raise ModelError(
            f"export: {len(different)} tensors differ from the base model's, the first {name}: "
            f"expected {wanted.get(name, 'none')}, got {got.get(name, 'none')}"
        )


@torch.inference_mode()
def _check_outputs(
    student: VLM,
    folder: Path,
    samples: Sequence[Sample],
    *,
    prompt: PromptOptions | None = None,
    trust_remote_code: bool,
) -> None:
    """The reloaded checkpoint gives the same logits and the same greedy answers."""
    exported = load_vlm(folder, prompt=prompt, trust_remote_code=trust_remote_code)
    if type(exported.model) is not type(student.model):
        raise ModelError(
            f"export: {folder} loads as {type(exported.model).__name__}, not {type(student.model).__name__}"
        )
    for sample in samples:
        encoded = student.renderer.encode(sample)
        inputs = student.renderer.collate([encoded])
        expected, got = (vlm.model(**vlm.on_device(inputs)).logits.float() for vlm in (student, exported))
        if not torch.equal(expected, got):
            worst = (expected - got).abs().max().item()
            raise ModelError(f"export: logits on sample {sample.key} differ by up to {worst:.3g} after reloading")
        first = prompts_of(student, sample, [decode_image(image.read()) for image in sample.images])[0]
        texts = [generate(vlm, [first], max_new_tokens=CHECK_TOKENS)[0] for vlm in (student, exported)]
        if texts[0] != texts[1]:
            raise ModelError(
                f"export: the greedy answer on sample {sample.key} was {texts[0]!r}, reloaded {texts[1]!r}"
            )
