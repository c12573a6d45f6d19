"""An exported student served by vLLM from its folder answers as transformers does, with the real engine on a CPU.

`make test-vllm` runs these in an environment of their own (scripts/make_vllm_env).
"""

import base64
import os
import sys

import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm` runs these in an environment of their own")

import torch
import transformers
from conftest import picture, png
from exported import exported_student

from genrecal.vlm.loading import auto_class

pytestmark = pytest.mark.vllm

QUESTIONS = [
    "What color is the shape?",
    "What digit is shown?",
    "How many shapes are there? Say where each of them is.",
]
TOKENS = 24


def greedy(folder, number, question):
    """transformers' greedy answer: token ids, with the end of turn if it comes."""
    model = auto_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[picture(number, 56, 56)]], return_tensors="pt")
    ids = model.eval().generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_vllm_answers_as_transformers_does(name, tmp_path):
    """By the chat interface, which is what `vllm serve` calls: template, picture and tokens come from the folder alone."""
    from vllm import LLM, SamplingParams

    folder = exported_student(name, tmp_path)
    hidden = {module: sys.modules.pop(module) for module in list(sys.modules) if module == "llvmlite.binding.ffi"}
    llm = LLM(str(folder), dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True)
    sys.modules.update(hidden)  # vLLM for CPUs searches every module's objects for kernels and fails at that one's
    asked = []
    for number, question in enumerate(QUESTIONS):
        url = f"data:image/png;base64,{base64.b64encode(png(number, 56, 56)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        asked.append([{"role": "user", "content": content}])
    answers = llm.chat(asked, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    expected = [greedy(folder, number, question) for number, question in enumerate(QUESTIONS)]
    assert [list(answer.outputs[0].token_ids) for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) > 1
