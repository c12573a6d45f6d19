"""The model folders that the tests marked `real` use are what they are called."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.real


def test_gemma_has_its_weights(real: Path) -> None:
    """It knows what a random model cannot."""
    folder = real / "gemma3-270m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits[0, -1].float()
    assert tokenizer.decode(logits.argmax().item()) == " Paris"
    assert model.lm_head.weight.shape == (262144, 640)


@pytest.mark.parametrize(
    ("name", "tokens", "end_of_turn"),
    [
        ("gemma3-asis", 262145, "<end_of_turn>"),
        ("qwen3-tiny", 151669, "<|im_end|>"),
        ("qwen2-tiny", 151665, "<|im_end|>"),
        ("llama3-tiny", 128256, "<|eot_id|>"),
        ("llama3_1-tiny", 128256, "<|eot_id|>"),
        ("deepseek-tiny", 128815, "<｜end▁of▁sentence｜>"),
        ("gpt4o-tiny", 200000, "<|endoftext|>"),
    ],
)
def test_tokenizers_are_whole(real: Path, name: str, tokens: int, end_of_turn: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real / name)
    assert len(tokenizer) == tokens
    assert tokenizer.decode(tokenizer("deux  été 中文 🙂", add_special_tokens=False).input_ids) == "deux  été 中文 🙂"
    assert len(tokenizer(end_of_turn, add_special_tokens=False).input_ids) == 1
