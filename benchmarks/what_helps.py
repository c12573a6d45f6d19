"""What helps a student: objectives and settings at equal steps, on data that are clean, wrong, few, many or unclear.

    python benchmarks/what_helps.py --out what-helps [--regimes wrong,clean] [--variants 'SFT,SFT own'] [--seeds 0,1,2]

The demo's teacher and student, and its data with the flaws of a regime (`genrecal.demo.data`). Each regime has one cache
of the given answers and one of the teacher's own; every variant is trained from one of them for the same steps
(`genrecal.compare`), and asked the same held-out questions, whose answers are right. Regime `pruned` has another student, the
teacher without half of its decoder layers, for the objectives that need one tokenizer. Give the command again to go on, or to
train what was added. It prints and keeps a table for each regime, with what the teacher scores above it.
"""

import argparse
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.compare import Asking, compare, comparison_text, variants_of
from genrecal.demo.data import Flaws, write_dataset
from genrecal.demo.pipeline import ASSETS
from genrecal.evaluate.evaluate import evaluate, evaluation_of, read_predictions, save_evaluation
from genrecal.report.summary import plus_minus
from genrecal.samples import open_samples
from genrecal.shards.answer_source import GREEDY, AnswerSource
from genrecal.shards.layout import CACHE_FILE
from genrecal.shards.reader import open_cache
from genrecal.vlm.loading import load_vlm

TEST_SAMPLES = 1100  # 1,504 questions
MAX_ANSWER_TOKENS = 48
STEPS = {"stage1": 144, "stage2": 144, "stage3": 48}
LR = {"stage1": 3e-3, "stage2": 2e-3, "stage3": 5e-4}  # the demo's
SETTINGS = [
    "gradient_checkpointing=false", "data.workers=0", "data.window=4",
    *(f"{stage}.{setting}" for stage, steps in STEPS.items() for setting in (
        "batch_size=16", "accumulation=1", "epochs=1000", f"max_steps={steps}", f"lr={LR[stage]}",
        f"lr_end={LR[stage] / 10}", "checkpoint_every=0")),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings, in one string as for `genrecal compare --try`; `own`: from the teacher's own answers, not the given ones.

    The demo's teacher and student split text differently, so `kl`, `reverse-kl` and `skewed-kl` are not for that pair.
    """

    name: str
    settings: str
    own: bool = False


MAIN = (
    Variant(name="SFT", settings="objective=sft"),
    Variant(name="GenRecal", settings="objective=genrecal"),
    Variant(name="SFT own", settings="objective=seqkd", own=True),
    Variant(name="bytes ce", settings="objective=byte-kl"),
    Variant(name="bytes", settings="objective=byte-kl loss.ce_weight=0"),
    Variant(name="bytes own", settings="objective=byte-kl", own=True),
)
OTHERS = (
    Variant(name="aligned own", settings="objective=genrecal-aligned", own=True),
    Variant(name="aligned", settings="objective=genrecal-aligned"),
    Variant(name="GenRecal own", settings="objective=genrecal", own=True),
    Variant(name="uld own", settings="objective=uld", own=True),
    Variant(name="dskd own", settings="objective=dskd", own=True),
    Variant(name="uld", settings="objective=uld"),
    Variant(name="dskd", settings="objective=dskd"),
    Variant(name="GenRecal no reg", settings="objective=genrecal loss.reg_weight=0"),
    Variant(name="GenRecal KL 3", settings="objective=genrecal loss.kl_weight=3"),
    Variant(name="GenRecal first 3", settings="objective=genrecal loss.first_token_weight=3"),
    Variant(name="aligned linear", settings="objective=genrecal-aligned recalibrator.layers=0"),
    Variant(name="aligned linear own", settings="objective=genrecal-aligned recalibrator.layers=0", own=True),
)

ONE_TOKENIZER = (
    *MAIN,
    Variant(name="kl", settings="objective=kl"),
    Variant(name="reverse-kl", settings="objective=reverse-kl"),
    Variant(name="skewed-kl", settings="objective=skewed-kl"),
    Variant(name="uld", settings="objective=uld"),
    Variant(name="dskd", settings="objective=dskd"),
    Variant(name="aligned", settings="objective=genrecal-aligned"),
    Variant(name="kl own", settings="objective=kl", own=True),
)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What the training data are like, and what is tried on them; held-out pictures are as unclear as these.

    layers: of the teacher's decoder, those that its pruned copy keeps as the student; none for the demo's student.
    """

    samples: int = 768
    flaws: Flaws = field(default_factory=Flaws)
    variants: tuple[Variant, ...] = MAIN
    layers: tuple[int, ...] = ()


REGIMES = {
    "wrong": Regime(flaws=Flaws(wrong_answers=0.3), variants=MAIN + OTHERS),
    "clean": Regime(),
    "unclear": Regime(flaws=Flaws(unclear_images=1.0)),
    "little": Regime(samples=192),
    "much": Regime(samples=3072),
    "pruned": Regime(flaws=Flaws(wrong_answers=0.3), variants=ONE_TOKENIZER, layers=(0, 3)),
}


def run_regime(regime: Regime, chosen: list[str], out: Path, seeds: list[int], jobs: int) -> str:
    """Data, two caches, the runs of the chosen variants (all, if none is named); the table."""
    test = write_dataset(
        out / "test",
        num_samples=TEST_SAMPLES,
        split="test",
        seed=0,
        flaws=Flaws(unclear_images=regime.flaws.unclear_images),
    )
    train = write_dataset(out / "train", num_samples=regime.samples, split="train", seed=0, flaws=regime.flaws)
    given, own = out / "cache-given", out / "cache-own"
    _write_caches(train, given, own)
    student = _pruned_teacher(out / "student", regime.layers) if regime.layers else ASSETS / "student"
    variants = variants_of(
        [
            f"{v.name}={v.settings} cache={own if v.own else given}"
            for v in regime.variants
            if not chosen or v.name in chosen
        ],
        None,
        caches=[str(given)],
        settings=SETTINGS,
    )
    asking = Asking(batch_size=60, dtype="float32")
    found = compare(
        variants,
        str(student),
        partial(open_samples, [test]),
        out / "compare",
        seeds=seeds,
        asking=asking,
        jobs=jobs,
    )
    table = f"{_teacher_and_student(out, test, student)}\n\n{comparison_text(found)}"
    (out / "table.md").write_text(table + "\n")
    return table


def _write_caches(data: Path, given: Path, own: Path) -> None:
    """The teacher's states over the given answers, and over its own; a cache that is complete is left as it is."""
    teacher = None
    for folder, answers in ((given, AnswerSource()), (own, AnswerSource(kind=GREEDY, max_tokens=MAX_ANSWER_TOKENS))):
        if not (folder / CACHE_FILE).exists() or not open_cache(folder).is_complete:
            teacher = teacher or HFTeacher.load(ASSETS / "teacher", dtype=torch.float32)
            run_cache_job(teacher, open_samples([data]), folder, CacheOptions(samples_per_shard=64, answers=answers))


def _pruned_teacher(folder: Path, layers: tuple[int, ...]) -> Path:
    """The teacher with these layers of its decoder alone: a weaker model with the same tokenizer."""
    if not (folder / "model.safetensors").exists():
        model = AutoModelForImageTextToText.from_pretrained(ASSETS / "teacher", dtype="auto")
        decoder, config = model.model.language_model, model.config.text_config
        decoder.layers = torch.nn.ModuleList(decoder.layers[number] for number in layers)
        config.num_hidden_layers, config.layer_types = len(layers), [config.layer_types[number] for number in layers]
        shutil.copytree(ASSETS / "teacher", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folder)
    return folder


def _teacher_and_student(out: Path, test: Path, student: Path) -> str:
    """What the teacher and the untrained student score on the held-out questions."""
    lines = []
    for name, folder in (("teacher", ASSETS / "teacher"), ("student before", student)):
        path = out / f"{name.replace(' ', '-')}.jsonl"
        if not path.exists():
            save_evaluation(evaluate(load_vlm(folder, dtype=torch.float32), open_samples([test]), batch_size=60), path)
        score = evaluation_of(read_predictions(path), []).overall
        accuracy = plus_minus(score.accuracy, score.accuracy_error, percent=True)
        lines.append(f"{name} {accuracy}, log-loss {plus_minus(score.log_loss, score.log_loss_error)}")
    return "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--variants", default="", help="names with commas; all of the regime, if none")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.regimes.split(","):
        seeds = [int(seed) for seed in options.seeds.split(",")]
        chosen = [variant for variant in options.variants.split(",") if variant]
        table = run_regime(REGIMES[name], chosen, options.out / name, seeds, options.jobs)
        print(f"\n{name}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
