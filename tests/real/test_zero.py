"""The tests that guard everything, on real weights: a teacher that writes its answers, and a student that is the teacher.

In bfloat16 it is in test_answers.py, with the vllm backend in tests/cache/test_vllm.py.
"""

import pytest
import torch
from real_runs import answering, check_answers, first_steps, generate_words

from genrecal.cache.teacher import HFTeacher, LiveTeacher
from genrecal.cli import main
from genrecal.train.logs import MACHINE

pytestmark = pytest.mark.real


def test_own_answers_and_teacher_equal_student_in_float32(real, tmp_path):
    model = answering(real, tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(generate_words(model, tmp_path))
    assert ended.value.code == 0
    check_answers(model, tmp_path / "cache")
    lines = {"cache": first_steps(tmp_path / "cache", model, tmp_path / "run", precision="float32")}
    first, second = (line["kl"] for line in lines["cache"])
    print("float32, KL of the steps", first, second)
    assert abs(first) < 1e-6 and second > 1e-3  # by then the student has moved
    live = LiveTeacher(HFTeacher.load(model, dtype=torch.float32), top_k=64)
    lines["live"] = first_steps(tmp_path / "cache", model, tmp_path / "live", precision="float32", live_teacher=live)
    for cached, other in zip(lines["cache"], lines["live"], strict=True):
        assert cached.keys() == other.keys()
        for name in cached.keys() - MACHINE:
            assert cached[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
