"""A run -> a stock Hugging Face checkpoint: LoRA merged, no Recalibrator, the base model's own files beside the weights.

It is loaded again in its stock class and compared with what was trained before it is put in place.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from genrecal.errors import ModelError, SampleError, TrainingError, UsageError
from genrecal.evaluate.evaluate import generate, prompts_of
from genrecal.files import temporary_path
from genrecal.folders import refuse_other_content
from genrecal.samples import Sample, decode_image
from genrecal.shards.reader import Cache
from genrecal.train.run import Run
from genrecal.vlm.batch_proof import off_share
from genrecal.vlm.checkpoint import WEIGHTS_INDEX, Checkpoint, checkpoint_names
from genrecal.vlm.loading import VLM, empty_model, first_line, is_weight_file, load_vlm, model_folder

CHECK_SAMPLES = 4
CHECK_TOKENS = 24


def export(run: Run, out: Path, *, cache: str | None = None, stage: int | None = None) -> "Exported":
    """Write the student of the last finished stage (or of `stage`) to the folder `out`.

    Weights go through the stock class, in the base checkpoint's dtype; what the class does not have is copied. Every other
    file of the base folder and its sub-folders (config, tokenizer, chat templates, processor, generation config) is copied
    byte for byte: a processor saved from here might not load elsewhere.

    Raises:
        UsageError: nothing to export, or `out` exists.
        ModelError: what was written differs from what was trained. TrainingError: it cannot be written.
    """
    stage = run.last_finished_stage() if stage is None else stage
    if stage < 2 or not run.stage_result(stage).exists():
        raise UsageError(f"{run.path}: stage {max(stage, 2)} has not finished, so no student has been trained yet")
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another folder or delete it")
    refuse_other_content(out, "nothing")
    base = model_folder(run.student)
    layout = check_layout(run.student, trust_remote_code=run.trust_remote_code)
    student = run.student_after(stage, "auto")
    samples = _check_samples(cache or run.caches[0], student)
    temporary = temporary_path(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(student, base, temporary)
        _carry_over(student, layout, temporary)
        attention = None if run.config.attention == "auto" else run.config.attention
        exported = load_vlm(temporary, prompt=run.prompt, trust_remote_code=run.trust_remote_code, attention=attention)
        _check_outputs(student, exported, samples)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"--out {out}: cannot be written: {first_line(error)}; make room (or let it be written) and run the same "
            "command again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(stage=stage, notes=layout.notes)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported: the student after `stage`; `notes` say how its tensors differ from the base's."""

    stage: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a student's checkpoint and what its class writes differ, by tensor name.

    Args:
        carried: tensors of the checkpoint that the class does not have, such as a head for multi-token prediction.
        tied: tensors of the checkpoint that the class does not write, since they are another of its own (a tied head): that
            other's name in the class.
        renamed: tensors of the checkpoint that the class writes under other names.
    """

    checkpoint: Checkpoint | None = None
    carried: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    renamed: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """The same in words, for a user."""
        notes = []
        if self.carried:
            notes.append(
                f"{len(self.carried)} tensors that the student's class does not have ({self.carried[0]}, ...) are copied as "
                "they are: they were not trained, and fit the student as it was before"
            )
        if self.renamed:
            notes.append(
                f"{len(self.renamed)} tensors are written under the names that transformers gives them now (before: "
                f"{self.renamed[0]}, ...)"
            )
        return notes


def check_layout(student: str, *, trust_remote_code: bool = False) -> Layout:
    """Compare a student's tensor names with those that its class reads and writes, from the headers of its files.

    Called before a run's first stage, so that no export fails after its last. No weights are read.

    Raises ModelError for a class that needs tensors the checkpoint lacks, or that cannot be written in its own layout.
    """
    try:
        checkpoint = Checkpoint(student)
    except ModelError:
        return Layout()  # another file format, whose tensors cannot be listed
    model = empty_model(student, trust_remote_code=trust_remote_code)
    try:
        reads, writes = checkpoint_names(model, checkpoint.names)
    except Exception as error:
        raise ModelError(f"{student}: {type(model).__name__} cannot be written: {first_line(error)}") from None
    tied = {name: own for name, own in reads.items() if name not in writes and own in model.all_tied_weights_keys}
    return Layout(
        checkpoint=checkpoint,
        carried=tuple(sorted(name for name in checkpoint.names if name not in reads)),
        tied=tied,
        renamed=tuple(sorted(name for name in reads if name not in writes and name not in tied)),
    )


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
    for path in sorted(base.rglob("*")):
        place = path.relative_to(base)
        if path.is_file() and not is_weight_file(path) and not any(part.startswith(".") for part in place.parts):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def _carry_over(student: VLM, layout: Layout, folder: Path) -> None:
    """Put the tensors that the class did not write beside those that it wrote, in a file of their own."""
    if layout.checkpoint is None or not (layout.carried or layout.tied):
        return
    tensors = {name: layout.checkpoint.tensor(name) for name in layout.carried}
    state = student.model.state_dict()
    tensors |= {name: state[own].clone() for name, own in layout.tied.items()}
    written = Checkpoint(folder)
    files = [*written.files(), ""]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if file:
            (folder / file).rename(folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(written.files()[file] if file else tensors, name)
    size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def _check_outputs(student: VLM, exported: VLM, samples: Sequence[Sample]) -> None:
    """The reloaded checkpoint has the same weights, bit for bit; the same logits, up to what another place in memory rounds
    otherwise; and, where they are equal, the same greedy answers."""
    if type(exported.model) is not type(student.model):
        raise ModelError(
            f"export: {exported.path} loads as {type(exported.model).__name__}, not {type(student.model).__name__}"
        )
    own, written = student.model.state_dict(), exported.model.state_dict()
    different = [name for name, value in own.items() if name not in written or not torch.equal(value, written[name])]
    if different or own.keys() != written.keys():
        count = len(different) + len(written.keys() - own.keys())
        first = (different or sorted(written.keys() - own.keys()))[0]
        raise ModelError(f"export: {count} tensors differ after reloading, the first {first}")
    for sample in samples:
        encoded = student.renderer.encode(sample)
        inputs = student.renderer.collate([encoded])
        expected, got = (vlm.model(**vlm.on_device(inputs)).logits for vlm in (student, exported))
        if share := off_share(got[0], expected[0]):
            worst = (expected.float() - got.float()).abs().max().item()
            raise ModelError(
                f"export: logits on sample {sample.key} differ by up to {worst:.3g} after reloading ({share:.0%} of the rows)"
            )
        if not torch.equal(expected, got):
            continue  # rounding may turn a greedy answer
        first_prompt = prompts_of(student, sample, [decode_image(image.read()) for image in sample.images])[0]
        texts = [generate(vlm, [first_prompt], max_new_tokens=CHECK_TOKENS)[0] for vlm in (student, exported)]
        if texts[0] != texts[1]:
            raise ModelError(
                f"export: the greedy answer on sample {sample.key} was {texts[0]!r}, reloaded {texts[1]!r}"
            )
