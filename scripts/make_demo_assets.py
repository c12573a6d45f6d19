"""Train the weights of the demo's teacher and student, which are in genrecal/demo/assets.

    python scripts/make_demo_assets.py

Configs, tokenizers, processors and templates are the files in those folders. The two models are as different as the
method has to cope with: Qwen2-VL with a byte-level vocabulary and images of variable size, InternVL with a
sentencepiece-like vocabulary and images of one fixed size. The student only sees the ``pretrain`` split (captions and
reading) and stays a weak model, the teacher learns every question type of ``train``. The weights depend on the machine's
arithmetic, so a new run gives equally good, not equal, ones.

The shipped folders were made with these defaults on one thread per model of a shared 2-core Xeon (2.5 GHz), torch
2.13.0+cpu, transformers 5.23.0: 11.5 minutes for the student (417,248 parameters), 39 for the teacher (1,592,512).
What it printed for 1500 held-out samples (exact match of every answer; "blank" has white images):

            all  Knowledge  Science & Math  Chart & Document  blank, all  folder loaded again
    student 46.3      50.4            27.3              64.1         5.4                 46.3
    teacher 94.9      92.5            98.0              93.9        21.7                 94.9

Blank is not zero: yes or no, even or odd and questions without an image can be guessed or known. The checks printed
during training use the first held-out samples, only to watch: the last step's weights are shipped, none is selected.
"""

import argparse
import copy
import functools
import math
import pathlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional

from genrecal.demo import data
from genrecal.vlm.loading import without_video_processors

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "genrecal" / "demo" / "assets"
IGNORE = -100


@dataclass(frozen=True)
class Vlm:
    """A model with the processor that feeds it."""

    model: transformers.PreTrainedModel
    processor: transformers.ProcessorMixin


def untrained(folder: pathlib.Path) -> Vlm:
    """The model of a shipped folder with new weights (from torch's global generator)."""
    with without_video_processors():
        processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    initialise(model)
    return Vlm(model, processor)


def initialise(model: Any) -> None:
    """Scale every weight by its fan-in; norms and biases keep the library's values.

    The defaults of transformers (standard deviation 0.02, layer scale 0.1) do not learn at a width of 100 within a few
    thousand steps.
    """
    residual = 1 / math.sqrt(2 * model.config.get_text_config().num_hidden_layers)
    for name, parameter in model.named_parameters():
        if "lambda_" in name:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "position_embeddings" in name or "cls_token" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() >= 2:
            outputs = ("o_proj", "down_proj", "attn.proj", "projection_layer", "fc2")
            gain = 0.5 if "lm_head" in name else residual if any(part in name for part in outputs) else 1.0
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))


def save(vlm: Vlm, folder: pathlib.Path, name: str) -> None:
    """Write a complete folder, the weights in bfloat16. Only parameters are cast: ``model.to`` would round the rotary
    frequencies too."""
    model = copy.deepcopy(vlm.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    files = {path.name: path.read_bytes() for path in (ASSETS / name).iterdir() if path.suffix != ".safetensors"}
    model.save_pretrained(folder)
    for file, content in files.items():
        (folder / file).write_bytes(content)


# ------------------------------------------------------------------------------------------- images and sequences


@dataclass(frozen=True)
class Pool:
    """Pictures of one split with what the model's own processor made of them (float16, to save memory)."""

    scenes: dict[str, list[data.Scene]]
    pixels: dict[str, torch.Tensor]


def process_images(processor: transformers.ProcessorMixin, images: list[Image.Image]) -> torch.Tensor:
    """Pixel tensors from the shipped image processor, one row per image (all images have the demo's size)."""
    rows = []
    for start in range(0, len(images), 500):
        chunk = images[start : start + 500]
        pixels = processor.image_processor(chunk, return_tensors="pt")["pixel_values"]
        rows.append(pixels.reshape(len(chunk), -1, *pixels.shape[1:]).to(torch.float16))
    return torch.cat(rows)


def make_pool(processor: transformers.ProcessorMixin, split: data.Split, size: int, seed: int) -> Pool:
    """Draw ``size`` images of each category."""
    scenes, pixels = {}, {}
    for category in data.CATEGORIES:
        rng = random.Random(f"{category}/{split}/{seed}")
        scenes[category] = [data.make_scene(category, rng, split) for _ in range(size)]
        pixels[category] = process_images(processor, [scene.image for scene in scenes[category]])
    return Pool(scenes, pixels)


@dataclass(frozen=True)
class Sequence:
    """A tokenized conversation: labels only on the assistant's turns, its images, and what each answer asked."""

    ids: list[int]
    labels: list[int]
    pixels: list[torch.Tensor]
    category: str
    spans: list[tuple[str, int, int]]


class Encoder:
    """Turns conversations into token ids exactly as the processor would, but message by message from a cache."""

    def __init__(self, processor: transformers.ProcessorMixin) -> None:
        self.processor = processor
        self.is_teacher = isinstance(processor, transformers.Qwen2VLProcessor)
        self.image_token = processor.image_token
        self.expanded = self._expanded_image()
        self.message = functools.lru_cache(maxsize=100_000)(self._message)
        self.header = len(self._ids("<|im_start|>assistant\n"))

    def _expanded_image(self) -> str:
        blank = Image.new("RGB", (data.SIZE, data.SIZE))
        ids = self.processor(images=[[blank]], text=[self.image_token], return_tensors="pt")["input_ids"][0]
        return self.processor.tokenizer.decode(ids)

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _message(self, role: str, text: str, with_image: bool) -> list[int]:
        content = [{"type": "image"}] if with_image else []
        message = {"role": role, "content": [*content, {"type": "text", "text": text}]}
        rendered = self.processor.apply_chat_template([message], tokenize=False)
        return self._ids(rendered.replace(self.image_token, self.expanded))

    def encode(self, category: str, turns: tuple[data.Turn, ...], pixels: list[torch.Tensor]) -> Sequence:
        """The whole conversation; each answer is learned together with the end-of-turn token that closes it."""
        ids: list[int] = []
        labels: list[int] = []
        spans = []
        for turn in turns:
            question = self.message("user", turn.question, turn.new_image)
            answer = self.message("assistant", turn.answer, False)
            start = len(ids) + len(question) + self.header
            stop = len(ids) + len(question) + answer.index(self.processor.tokenizer.eos_token_id) + 1
            ids += question + answer
            labels += [IGNORE] * (len(ids) - len(labels))
            labels[start:stop] = ids[start:stop]
            spans.append((turn.kind, start, stop))
        return Sequence(ids, labels, pixels, category, spans)

    def collate(self, batch: list[Sequence]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Right-padded model inputs and labels. Causal attention needs no mask for padding on the right."""
        length = max(len(item.ids) for item in batch)
        ids = torch.full((len(batch), length), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(batch), length), IGNORE)
        for row, item in enumerate(batch):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
            labels[row, : len(item.labels)] = torch.tensor(item.labels)
        inputs: dict[str, Any] = {"input_ids": ids}
        pixels = [image for item in batch for image in item.pixels]
        if self.is_teacher:
            inputs["mm_token_type_ids"] = (ids == self.processor.image_token_id).long()
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels).float()
        if pixels and self.is_teacher:
            side = data.SIZE // self.processor.image_processor.patch_size
            inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(pixels))
        return inputs, labels


def training_sequences(encoder: Encoder, pool: Pool, split: data.Split, seed: int) -> Iterator[Sequence]:
    """An endless stream of conversations about the pool's images, with new questions every time.

    Conversations are longer than in the demo's data (up to six turns about an image): the image costs the same,
    so every step learns from more answers.
    """
    rng = random.Random(f"training/{split}/{seed}")
    while True:
        if rng.random() < data.TEXT_ONLY_SHARE:
            yield encoder.encode(data.SCIENCE, (data.ask_text(rng, split),), [])
            continue
        category = rng.choice(data.CATEGORIES)
        chosen = [rng.randrange(len(pool.scenes[category])) for _ in range(2 if rng.random() < 0.1 else 1)]
        counts = [rng.randint(1, 6 // len(chosen)) for _ in chosen]
        turns = data.dialogue([pool.scenes[category][index] for index in chosen], counts, rng, split)
        yield encoder.encode(category, turns, [pool.pixels[category][index] for index in chosen])


def training_batches(sequences: Iterator[Sequence], size: int, seed: int) -> Iterator[list[Sequence]]:
    """Batches of conversations of similar length, in random order: half the padding of batches drawn blindly."""
    rng = random.Random(seed)
    while True:
        drawn = sorted((next(sequences) for _ in range(16 * size)), key=lambda item: len(item.ids))
        batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        rng.shuffle(batches)
        yield from batches


# ------------------------------------------------------------------------------------------- training and measuring


def answer_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the answers' tokens; the vocabulary is only computed where it counts."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    keep = wanted != IGNORE
    return functional.cross_entropy(model.get_output_embeddings()(hidden[keep]), wanted[keep])


def train(vlm: Vlm, pool: Pool, args: argparse.Namespace, *, split: data.Split, steps: int, name: str) -> None:
    """AdamW with a short warm-up and cosine decay; prints the loss and now and then the held-out accuracy."""
    model, encoder = vlm.model, Encoder(vlm.processor)
    batches = training_batches(training_sequences(encoder, pool, split, args.seed), args.batch, args.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), foreach=True)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10 + 1), steps)
    check = test_sequences(encoder, args.check_samples)
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        loss = answer_loss(model, *encoder.collate(next(batches)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % args.log_every == 0:
            rate = (time.perf_counter() - started) / step
            print(f"{name} step {step} loss {np.mean(losses[-args.log_every :]):.3f} ({rate:.2f} s/step)", flush=True)
        if step % args.check_every == 0 or step == steps:
            print_accuracy(f"{name} step {step}", measure(vlm, encoder, check))
            if args.checkpoints:
                save(vlm, args.checkpoints / name, name)
    model.eval()


def test_sequences(encoder: Encoder, num_samples: int, *, blank: bool = False) -> list[Sequence]:
    """Held-out samples; with ``blank`` every image is a white one."""
    sequences = []
    for sample in data.make_samples(num_samples, "test", seed=0):
        images = [Image.new("RGB", image.size, "white") if blank else image for image in sample.images]
        pixels = list(process_images(encoder.processor, images)) if images else []
        sequences.append(encoder.encode(sample.category, sample.turns, pixels))
    return sequences


Score = dict[str, list[bool]]


@torch.no_grad()
def measure(vlm: Vlm, encoder: Encoder, sequences: list[Sequence]) -> Score:
    """Exact match of every answer (teacher-forced argmax, which equals greedy decoding's exact match) by kind."""
    score: Score = defaultdict(list)
    vlm.model.eval()
    for start in range(0, len(sequences), 100):
        batch = sequences[start : start + 100]
        inputs, labels = encoder.collate(batch)
        predicted = vlm.model(**inputs).logits.argmax(-1)
        for row, item in enumerate(batch):
            for kind, begin, end in item.spans:
                right = torch.equal(predicted[row, begin - 1 : end - 1], labels[row, begin:end])
                for key in ("all", item.category, f"{item.category}: {kind}"):
                    score[key].append(right)
    vlm.model.train()
    return score


def print_accuracy(name: str, score: Score) -> None:
    """One line: overall, by category, by question type."""
    parts = [f"{key} {100 * np.mean(score[key]):.1f}" for key in ("all", *data.CATEGORIES)]
    kinds = [f"{key.split(': ')[1]} {100 * np.mean(score[key]):.0f}" for key in sorted(score) if ": " in key]
    print(f"{name}: {', '.join(parts)} | {', '.join(kinds)}", flush=True)


# --------------------------------------------------------------------------------------------------- shipped folders


@torch.no_grad()
def measure_folder(folder: pathlib.Path, num_samples: int) -> float:
    """Accuracy of a shipped folder as a user would load it: AutoProcessor on images and text, nothing cached."""
    with without_video_processors():
        processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = Encoder(processor)
    right: list[bool] = []
    for sample in data.make_samples(num_samples, "test", seed=0):
        messages = []
        for turn in sample.turns:
            image = [{"type": "image"}] if turn.new_image else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": turn.answer})
        text = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(images=[list(sample.images)] if sample.images else None, text=[text], return_tensors="pt")
        reference = encoder.encode(sample.category, sample.turns, [])
        if inputs["input_ids"][0].tolist() != reference.ids:
            raise AssertionError(f"{sample.id}: the processor's tokens differ from those that were trained")
        predicted = model(**inputs).logits[0].argmax(-1)
        for _, begin, end in reference.spans:
            right.append(predicted[begin - 1 : end - 1].tolist() == reference.ids[begin:end])
    return float(np.mean(right))


def make(name: str, vlm: Vlm, args: argparse.Namespace, *, split: data.Split, steps: int) -> None:
    """Train one model, write its folder and check the folder."""
    started = time.perf_counter()
    if steps:
        pool = make_pool(vlm.processor, split, args.pictures, args.seed)
        print(f"{name}: {3 * args.pictures} images in {time.perf_counter() - started:.0f} s", flush=True)
        train(vlm, pool, args, split=split, steps=steps, name=name)
    folder = args.out / name
    save(vlm, folder, name)
    encoder = Encoder(vlm.processor)
    print_accuracy(f"{name} test", measure(vlm, encoder, test_sequences(encoder, args.test_samples)))
    print_accuracy(f"{name} blank", measure(vlm, encoder, test_sequences(encoder, args.test_samples, blank=True)))
    print(f"{name} folder, loaded again: {100 * measure_folder(folder, args.test_samples):.1f}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    print(f"{name}: {parameters} parameters, {size} bytes, {time.perf_counter() - started:.0f} s", flush=True)


def parse_args() -> argparse.Namespace:
    """The defaults made the shipped folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS)
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--student-steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=8000, help="training images of each category")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-samples", type=int, default=1500)
    parser.add_argument("--check-samples", type=int, default=450)
    parser.add_argument("--check-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--checkpoints", type=pathlib.Path, help="save the model here at every check")
    return parser.parse_args()


def main() -> None:
    """Train the student a little and the teacher long."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    todo = {"student": ("pretrain", args.student_steps), "teacher": ("train", args.teacher_steps)}
    for name, (split, steps) in todo.items():
        if args.only in (None, name):
            torch.manual_seed(args.seed)
            make(name, untrained(ASSETS / name), args, split=split, steps=steps)


if __name__ == "__main__":
    main()
