"""One pair of teacher and student through all that follows the cache job, for the tests of both environments.

A test that calls `note_pair` has its outcome in the tables of docs/models.md (`make support-matrix`).
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from conftest import picture
from safetensors.torch import load_file
from tiny_models import is_vision_encoder

from genrecal.train.config import load_config
from genrecal.train.export import export
from genrecal.train.logs import read_metrics
from genrecal.train.loop import train
from genrecal.train.run import Run
from genrecal.vlm.checkpoint import Checkpoint
from genrecal.vlm.loading import auto_class, without_video_processors

SMALL = "batch_size=4 accumulation=2 max_steps=3 epochs=3 lr=1e-2 lr_end=1e-3 checkpoint_every=0".split()
SETTINGS = ["data.workers=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]
TERMS = {1: ("ce", "kl", "reg_ce", "reg_kl"), 2: ("ce", "kl", "sft"), 3: ("sft",)}

# The paper's models, by the names of their tiny ones (tests/tiny_models.py). NVLM-D runs in vLLM alone.
HF_TEACHERS = ("qwen2_vl_72b", "internvl2_76b", "internvl2_5_78b")
STUDENTS = ("qwen2_vl_2b", "qwen2_vl_7b", "internvl2_5_1b", "internvl2_5_2b", "internvl2_5_4b", "internvl2_5_8b")
# Families beyond the paper, each once as a teacher and once as a student.
RING = ("qwen2_5_vl", "gemma3", "qwen3_vl", "idefics3", "internvl_qwen2", "llava_onevision", "qwen2_5_vl")
NEED_TORCHVISION = [("internvl_qwen2", "smolvlm"), ("smolvlm", "llava_onevision")]
# Each of these has a test of its own.
LANGUAGE_MODELS = [("llama3", "qwen2_vl_2b"), ("internvl2_76b", "qwen2"), ("llama3", "qwen2")]
PAIRS = {
    *((teacher, student, "hf") for teacher, student in itertools.product(HF_TEACHERS, STUDENTS)),
    *(("nvlm_d_72b", student, "vllm") for student in STUDENTS),
    *((*pair, "hf") for pair in (*itertools.pairwise(RING), *NEED_TORCHVISION, *LANGUAGE_MODELS)),
}


def note_pair(property_of: Callable[[str, object], None], teacher: str, student: str, backend: str = "hf") -> None:
    """Note which pair a test is of, for scripts/support_matrix.py; `property_of` is pytest's `record_property`."""
    assert (teacher, student, backend) in PAIRS
    property_of("pair", f"{teacher} {student} {backend}")


def train_and_check(cache: Path, student: Path, folder: Path, *settings: str) -> Run:
    """Train a student from a cache, export it, and use it as a stranger would, with transformers alone."""
    config = load_config(None, [*SETTINGS, *settings])
    run = Run(path=folder / "run", config=config, student=str(student), caches=(str(cache),))
    train(run)
    lines = read_metrics(run.path)
    for stage, terms in TERMS.items():
        steps = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert len(steps) == 3 and all(math.isfinite(line[name]) for line in steps for name in (*terms, "loss"))
        assert steps[-1]["loss"] < steps[0]["loss"], f"stage {stage} learns nothing"
    out = folder / "student"
    export(run, out)
    assert Checkpoint(out).shapes() == Checkpoint(student).shapes()
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any(is_vision_encoder(name) for name in changed)
    _generate(out)
    return run


# What VLMEvalKit's class for a family loads a folder with (docs/evaluate.md).
VLMEVALKIT = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "AutoProcessor"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "AutoProcessor"),
    "idefics3": ("Idefics3ForConditionalGeneration", "AutoProcessor"),
}


def _generate(folder: Path) -> None:
    """A token from the stock class; nothing of genrecal's but what loads a processor without torchvision."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = auto_class(config).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert [type(model).__name__] == json.loads((folder / "config.json").read_text())["architectures"]
    with without_video_processors():
        processor = transformers.AutoProcessor.from_pretrained(folder)
        for name in VLMEVALKIT.get(config.model_type, ()):
            assert type(getattr(transformers, name).from_pretrained(folder)) in (type(model), type(processor))
    text, question = {"type": "text", "text": "What is shown?"}, {"role": "user", "content": "What is shown?"}
    takes_pictures = hasattr(processor, "image_processor")
    if takes_pictures:
        question["content"] = [{"type": "image"}, text]
    prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    pictures = {"images": [[picture()]]} if takes_pictures else {}
    inputs = processor(text=[prompt], **pictures, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 1
