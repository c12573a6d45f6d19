"""genrecal beside TRL's trainers: the same models, data, batch, steps and learning rate, in one run.

    scripts/make_peers_env .venv-peers
    .venv-peers/bin/python benchmarks/peers.py --out peers [--steps 192] [--seeds 0,1,2] [--methods 'TRL GOLD,byte-kl']

The demo's teacher (Qwen2-VL) and student (InternVL), whose tokenizers differ; conversations of one image and one question,
of which three in ten have a wrong answer. Every method trains the student's decoder layers and final norm. TRL's run the
teacher beside the student; ours read a cache, and the time to make it is printed on its own. Each run is a process of its own,
one after another: samples/s is over its training steps (ours count loading and the checks before the first step too),
memory is the process's peak (resident set).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from genrecal.demo.data import Flaws, write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.evaluate.evaluate import evaluate
from genrecal.samples import open_samples
from genrecal.vlm.loading import load_vlm

BATCH = 16
LR = 2e-3
OURS = {
    "sft": ["objective=sft"],
    "uld": ["objective=uld"],
    "byte-kl": ["objective=byte-kl", "loss.ce_weight=0"],
}
TRL = ("TRL SFT", "TRL GOLD", "TRL GOLD and CE", "TRL ULD", "TRL ULD and CE")


def one_question_each(folder: Path, number: int, split: str, flaws: Flaws) -> Path:
    """The demo's data, of which the conversations of one image and one turn are kept."""
    path = write_dataset(folder, num_samples=number, split=split, seed=0, flaws=flaws)  # type: ignore[arg-type]
    records = [
        r for r in json.loads(path.read_text()) if isinstance(r.get("image"), str) and len(r["conversations"]) == 2
    ]
    path.write_text(json.dumps(records))
    return path


def train_with_trl(method: str, data: Path, out: Path, steps: int, seed: int) -> float:
    """Train and save the student with one of TRL's trainers; seconds of the steps."""
    from datasets import Dataset, Image, Sequence
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    rows = [
        {
            "images": [str(data.parent / record["image"])],
            "prompt": [{"role": "user", "content": record["conversations"][0]["value"].removeprefix("<image>\n")}],
            "completion": [{"role": "assistant", "content": record["conversations"][1]["value"]}],
        }
        for record in json.loads(data.read_text())
    ]
    dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    student = AutoModelForImageTextToText.from_pretrained(ASSETS / "student", dtype=torch.float32)
    student.requires_grad_(False)
    student.model.language_model.layers.requires_grad_(True)
    student.model.language_model.norm.requires_grad_(True)
    off = {"gradient_checkpointing": False, "bf16": False, "disable_tqdm": True, "remove_unused_columns": False}
    shared = off | {
        "output_dir": str(out / "trl"), "per_device_train_batch_size": BATCH, "max_steps": steps, "learning_rate": LR,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "seed": seed, "max_length": None, "report_to": [],
        "save_strategy": "no", "logging_steps": 10, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    rest = {"train_dataset": dataset, "processing_class": AutoProcessor.from_pretrained(ASSETS / "student")}
    if method == "TRL SFT":
        trainer = SFTTrainer(model=student, args=SFTConfig(**shared, completion_only_loss=True), **rest)
    else:
        hybrid, ce = "GOLD" in method, float("CE" in method)
        gold = GOLDConfig(
            **shared, use_uld_loss=True, uld_use_hybrid_loss=hybrid, lmbda=0.0, beta=0.0, uld_crossentropy_weight=ce
        )
        teacher = AutoModelForImageTextToText.from_pretrained(ASSETS / "teacher", dtype=torch.float32)
        trainer = GOLDTrainer(model=student, teacher_model=teacher, args=gold, **rest)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    student.save_pretrained(out / "student")
    rest["processing_class"].save_pretrained(out / "student")
    return seconds


def train_with_ours(method: str, cache: Path, out: Path, steps: int, seed: int) -> float:
    from genrecal.train.config import load_config
    from genrecal.train.export import export
    from genrecal.train.loop import train
    from genrecal.train.run import Run

    settings = [
        *OURS[method], f"seed={seed}", "lora.rank=0", "gradient_checkpointing=false", "data.workers=0", "log_every=10",
        f"stage2.batch_size={BATCH}", "stage2.accumulation=1", "stage2.epochs=1000", f"stage2.max_steps={steps}",
        f"stage2.lr={LR}", "stage2.lr_end=0", "stage2.checkpoint_every=0",
    ]  # fmt: skip
    config = load_config(None, settings)
    run = Run(path=out / "run", config=config, student=str(ASSETS / "student"), caches=(str(cache),))
    started = time.monotonic()
    train(run, stages=[2])
    seconds = time.monotonic() - started
    export(run, out / "student")
    return seconds


def score(out: Path, test: Path) -> dict[str, float]:
    found = evaluate(load_vlm(out / "student", dtype=torch.float32), open_samples([test]), batch_size=60).overall
    return {"accuracy": 100 * found.accuracy, "log_loss": found.log_loss, "n": found.n}


def alone(words: argparse.Namespace) -> None:
    """One run, in this process."""
    out: Path = words.out
    out.mkdir(parents=True, exist_ok=True)
    if words.alone in TRL:
        seconds = train_with_trl(words.alone, words.data, out, words.steps, words.seed)
    else:
        seconds = train_with_ours(words.alone, words.cache, out, words.steps, words.seed)
    found = {
        "samples/s": words.steps * BATCH / seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    (out / "result.json").write_text(json.dumps(found | score(out, words.test)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join((*TRL, *OURS)))
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--samples", type=int, default=1100, help="conversations before those of one question are chosen"
    )
    parser.add_argument("--threads", type=int, default=2)
    for name in ("alone", "seed", "data", "test", "cache"):
        kind = {"alone": str, "seed": int}.get(name, Path)
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.alone:
        return alone(words)
    data = one_question_each(words.out / "train", words.samples, "train", Flaws(wrong_answers=0.3))
    test = one_question_each(words.out / "test", words.samples, "test", Flaws())
    cache, started = words.out / "cache", time.monotonic()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "genrecal",
            "cache",
            "--teacher",
            ASSETS / "teacher",
            "--data",
            data,
            "--out",
            cache,
            "--dtype",
            "float32",
        ],
        check=True,
    )
    print(f"cache: {time.monotonic() - started:.0f} s, once for all runs below", flush=True)
    print(
        "| method | samples/s | peak memory, GB | accuracy, % | log-loss, nats per answer |\n| --- | --- | --- | --- | --- |"
    )
    for method in words.methods.split(","):
        results = []
        for seed in map(int, words.seeds.split(",")):
            folder = words.out / f"{method.replace(' ', '-')}-{seed}"
            if not (folder / "result.json").exists():
                command = [sys.executable, __file__, "--alone", method, "--seed", seed, "--data", data, "--test", test]
                command += ["--cache", cache, "--out", folder, "--steps", words.steps, "--threads", words.threads]
                with open(words.out / f"{folder.name}.log", "w") as log:
                    subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log)
            results.append(json.loads((folder / "result.json").read_text()))

        def column(name: str, digits: int, found: list[dict[str, float]] = results) -> str:
            values = np.array([result[name] for result in found])
            error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
            return f"{values.mean():.{digits}f}{error}"

        cells = [column("samples/s", 1), column("memory", 2), column("accuracy", 1), column("log_loss", 2)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
