"""The demo's two models load like any others, with torchvision and without, and their token types differ."""

import torch
from conftest import conversation

from genrecal.demo.pipeline import ASSETS
from genrecal.vlm.loading import load_vlm


def test_teacher_and_student_load_and_differ_in_every_token_type():
    teacher, student = (load_vlm(ASSETS / name, dtype=torch.float32) for name in ("teacher", "student"))
    sample = conversation(("What is shown?", "There is a red square and 12 中文"), images={0: 1})
    a, b = (vlm.renderer.encode(sample) for vlm in (teacher, student))
    assert len(teacher.renderer.tokenizer) != len(student.renderer.tokenizer)  # vocabulary size
    assert len(a.answers[0].ids) != len(b.answers[0].ids)  # splits
    assert teacher.renderer.marks.end_of_turn_id != student.renderer.marks.end_of_turn_id  # ids
    assert a.question_lengths != b.question_lengths  # image tokens
    sizes = [sum(p.numel() for p in vlm.model.parameters()) for vlm in (teacher, student)]
    assert sizes[0] > 2 * sizes[1]
