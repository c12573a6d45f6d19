"""What the tests with real weights share: Gemma 3 that writes answers, conversations, and the zero test."""

import json
from pathlib import Path

import torch
from conftest import conversation, write_llava

from genrecal.shards.reader import open_cache
from genrecal.train.config import load_config
from genrecal.train.logs import read_metrics
from genrecal.train.loop import train
from genrecal.train.run import Run

# The base model says such questions again; two spaces and four are tokens of their own.
SAMPLES = [
    conversation(("Say: one  two    three", "one  two    three"), key="00000000"),
    conversation(("Hello!", "Good morning."), ("2+2=", "4."), key="00000001"),
    conversation(("What is the capital of France?", "Paris,  on the Seine."), key="00000002"),
]


def answering(real: Path, folder: Path) -> Path:
    """Gemma 3 270M with settings by which an answer ends with its line: the base model never ends a turn."""
    folder.mkdir()
    for file in (real / "gemma3-270m").iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    new_line = 107
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 106, new_line]}))
    return folder


def generate_words(model: Path, folder: Path, *more: str) -> list[str]:
    """`genrecal cache --generate` in float32, with states as they are."""
    data = write_llava(folder / "data", SAMPLES)
    return [
        "cache", "--teacher", str(model), "--data", str(data), "--out", str(folder / "cache"), "--dtype", "float32",
        "--answer-codec", "bf16", "--generate", "--max-answer-tokens", "24", *more,
    ]  # fmt: skip


def check_answers(model: Path, cache: Path) -> None:
    """They are those that transformers itself writes and decodes after the model's own prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    records = list(open_cache(cache))
    assert len(records) == len(SAMPLES)
    for record, sample in zip(records, SAMPLES, strict=True):
        assert record.sample.given_answers == sample.answers
        messages = []
        for question, answer in zip(sample.messages[::2], record.sample.answers, strict=True):
            messages.append({"role": "user", "content": question.parts[0]})
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                ids = own.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            assert ids[-1] in own.generation_config.eos_token_id
            assert answer == tokenizer.decode(ids[:-1])
            messages.append({"role": "assistant", "content": answer})
    assert "one  two    three" in records[0].sample.answers[0]


def first_steps(cache: Path, model: Path, out: Path, *, precision: str, live_teacher=None) -> list[dict]:
    """Metrics of two steps in which a model distils from the cache that it made."""
    stage = "batch_size=2 accumulation=1 max_steps=2 lr=1e-4 checkpoint_every=0".split()
    settings = ["objective=kl", f"precision={precision}", "data.workers=0", "lora.rank=4", "lora.dropout=0"]
    config = load_config(None, [*settings, *(f"stage2.{setting}" for setting in stage)])
    source = "cache" if live_teacher is None else "live"
    train(
        Run(path=out, config=config, student=str(model), caches=(str(cache),), teacher=source),
        stages=(2,),
        live_teacher=live_teacher,
    )
    return read_metrics(out)
