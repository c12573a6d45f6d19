"""What is said to lmms-eval, and what is read of it; the program itself runs in tests/end_to_end/test_lmms_eval.py."""

import json

import pytest

from genrecal.errors import GenrecalError, UsageError
from genrecal.evaluate import harness
from genrecal.evaluate.harness import TaskScore, lmms_eval_command, run_lmms_eval, scores_of


@pytest.fixture
def folder(tmp_path):
    """A model as far as the command needs it: `folder("internvl")`."""

    def make(model_type, name="model"):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return path

    return make


@pytest.mark.parametrize("family, name", [("internvl", "internvl_hf"), ("qwen2_vl", "qwen2_vl")])
def test_the_class_is_that_of_the_family(folder, tmp_path, family, name):
    path = folder(family)
    words = lmms_eval_command(path, ["ai2d", "mmstar"], out=tmp_path / "out", device="cuda:1", limit=5)
    given = {words[i]: words[i + 1] for i in range(3, len(words) - 1)}
    assert given["--model"] == name and given["--tasks"] == "ai2d,mmstar" and given["--limit"] == "5"
    assert given["--model_args"] == f"pretrained={path},device=cuda:1,device_map=cuda:1"


def test_what_is_given_comes_last_and_split_is_auto(folder, tmp_path):
    words = lmms_eval_command(
        folder("internvl"), ["ai2d"], out=tmp_path, device="split", harness_model="vllm", harness_args=["tp=2"],
        trust_remote_code=True,
    )  # fmt: skip
    assert words[words.index("--model") + 1] == "vllm"
    assert words[words.index("--model_args") + 1].endswith("device=cuda,device_map=auto,trust_remote_code=True,tp=2")


def test_what_its_arguments_cannot_say_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="a,b: lmms-eval takes no folder with a comma"):
        lmms_eval_command(folder("internvl", "a,b"), ["ai2d"], out=tmp_path)
    with pytest.raises(UsageError, match="model_type new, only for internvl.*name one with --harness-model"):
        lmms_eval_command(folder("new", "new"), ["ai2d"], out=tmp_path)
    with pytest.raises(UsageError, match="--harness-arg 'tp': expected name=value"):
        lmms_eval_command(folder("internvl"), ["ai2d"], out=tmp_path, harness_args=["tp"])


RESULTS = {
    "results": {
        "ai2d": {
            "alias": "ai2d",
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": 0.25,
            "exact_match_stderr_clt,flexible-extract": 0.3,
        },
        "mmmu_val": {
            "alias": " - mmmu_val",
            "mmmu_acc,none": 0.375,
            "mmmu_acc_stderr,none": "N/A",
            "submission,none": [],
        },
    },
    "n-samples": {"ai2d": {"original": 9, "effective": 4}, "mmmu_val": {"original": 8, "effective": 8}},
}


def test_scores_are_read_with_their_filters_and_errors():
    assert scores_of(RESULTS) == [
        TaskScore("ai2d", "exact_match (flexible-extract)", 0.5, 0.25, 4),
        TaskScore("mmmu_val", "mmmu_acc", 0.375, None, 8),
        TaskScore("mmmu_val", "submission", [], None, 8),
    ]


def as_lmms_eval(monkeypatch, said):
    """Lets a small program stand in for lmms-eval: it says something and writes results."""
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    program = (
        "import pathlib, sys; sys.stdout.write(sys.argv[1]); p = pathlib.Path(sys.argv[2]) / 'm'; p.mkdir(parents=True)"
    )
    program += "; (p / '1_results.json').write_text(sys.argv[3])"
    real = lmms_eval_command

    def command(*args, out, **options):
        words = real(*args, out=out, **options)
        return [words[0], "-c", program, said, str(out), json.dumps(RESULTS)]

    monkeypatch.setattr(harness, "lmms_eval_command", command)


def test_questions_that_failed_are_no_wrong_answers(folder, tmp_path, monkeypatch, capfd):
    path = folder("internvl")
    as_lmms_eval(monkeypatch, "all well\n")
    assert run_lmms_eval(path, ["ai2d"], out=tmp_path / "out") == scores_of(RESULTS)
    assert "all well" in capfd.readouterr().err
    as_lmms_eval(monkeypatch, "ERROR - Error out of memory in generating\nERROR - Error x in generating\n")
    with pytest.raises(GenrecalError, match="could not ask 2 questions .* the first: out of memory"):
        run_lmms_eval(path, ["ai2d"], out=tmp_path / "other")


def test_without_lmms_eval_one_line_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "genrecal\[eval\]"'):
        run_lmms_eval(folder("internvl"), ["ai2d"])
