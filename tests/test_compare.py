"""`genrecal compare`: variants at equal steps, found again when they are finished, and a table that is arithmetic."""

import json
import shutil

import numpy as np
import pytest
from conftest import mixed_samples, write_llava

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.compare import Asking, _begin, rows_of, variants_of
from genrecal.errors import UsageError
from genrecal.evaluate.evaluate import evaluate, read_predictions
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.loop import train
from genrecal.train.run import Run

SMALL = "batch_size=3 accumulation=1 max_steps=2 epochs=9 lr=1e-2 lr_end=1e-3 checkpoint_every=0".split()
SETTINGS = ["data.workers=0", *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in SMALL)]
TRIES = ["--try", "sft", "--try", "no reg=loss.reg_weight=0"]


# --------------------------------------------------------------------------------------------------- what is asked for


def test_variants_take_common_settings_and_their_own(tmp_path):
    file = tmp_path / "tries.toml"
    file.write_text('["kl 3"]\ncache = "caches/other"\n[sft]\nobjective = "sft"\nstage2.lr = 3e-4\n')
    tries = ["genrecal", 'strong = loss.kl_weight=3 stage2.lr=2e-4 \'cache=["e", "f"]\'']
    found = variants_of(tries, file, caches=["c", "d"], settings=["stage2.lr=1e-3", "stage2.epochs=2"])
    assert [(v.name, v.folder, v.caches) for v in found] == [
        ("genrecal", "genrecal", ("c", "d")), ("strong", "strong", ("e", "f")), ("kl 3", "kl-3", ("caches/other",)),
        ("sft", "sft", ("c", "d")),
    ]  # fmt: skip
    assert [v.config.objective for v in found] == ["genrecal", "genrecal", "genrecal", "sft"]
    assert [v.config.stage2.lr for v in found] == [1e-3, 2e-4, 1e-3, 3e-4]
    assert {v.config.stage2.epochs for v in found} == {2} and found[1].config.loss.kl_weight == 3


@pytest.mark.parametrize(
    "tries, content, message",
    [
        ([], "", "nothing to compare"),
        (["bst"], "", "bst: objective 'bst': expected one of"),
        (["a=loss.kl_wait=3"], "", "a: unknown setting loss.kl_wait; the nearest one is loss.kl_weight"),
        (["a=objective"], "", "--try a 'objective': expected a.b=value"),
        (["a=seed=3"], "", "a: seed is set by --seeds"),
        (["a=cache=3"], "", "a: cache: expected a directory or URL, or a list of them, got 3"),
        ([], "lr = 1", "lr is in no table"),
        ([], "[a", "tries.toml: "),
    ],
)
def test_wrong_variants(tmp_path, tries, content, message):
    (tmp_path / "tries.toml").write_text(content)
    with pytest.raises(UsageError) as raised:
        variants_of(tries, tmp_path / "tries.toml", caches=["c"])
    assert message in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    """A cache of twelve samples, and questions to ask."""
    folder = tmp_path_factory.mktemp("compare")
    data = write_llava(folder / "data", mixed_samples(12))
    run_cache_job(teacher, open_samples([data]), folder / "cache", CacheOptions(samples_per_shard=8))
    write_llava(folder / "asked", mixed_samples(3))
    return folder


@pytest.fixture
def command(made, tiny, capsys):
    """`genrecal compare` over the cache; its exit status and what it printed."""

    def call(out, *words, data=None):
        student, data = tiny("internvl_qwen2"), data or made / "asked" / "data.json"
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(
                ["compare", "--cache", str(made / "cache"), "--student", str(student), "--data", str(data),
                 "--out", str(out), "--max-new-tokens", "3", "--dtype", "float32", *settings, *map(str, words)]
            )  # fmt: skip
        return (stop.value.code or 0, *capsys.readouterr())

    return call


@pytest.mark.slow
def test_a_comparison(made, tiny, command, tmp_path):
    """Its students are those of `genrecal train`, and a second call only adds what is new."""
    out = tmp_path / "out"
    status, printed, told = command(out, *TRIES, "--seeds", "0,1")
    assert status == 0, told
    assert "no reg, seed 1: accuracy" in told and "4 of 4 runs" in told

    config = load_config(None, [*SETTINGS, "loss.reg_weight=0", "seed=1"])
    run = Run(path=tmp_path / "run", config=config, student=str(tiny("internvl_qwen2")), caches=(str(made / "cache"),))
    train(run)
    asked = open_samples([made / "asked" / "data.json"])
    expected = evaluate(run.student_after(3, "float32"), asked, max_new_tokens=3).predictions
    found = {
        name: [read_predictions(out / "predictions" / name / f"seed{seed}.jsonl") for seed in (0, 1)]
        for name in ("sft", "no-reg")
    }
    assert found["no-reg"][1] == expected
    assert [[p.log_loss for p in p_s] for p_s in found["sft"]] != [[p.log_loss for p in p_s] for p_s in found["no-reg"]]
    first, second = rows_of(found)
    assert f"| no reg  | {second.accuracy.value:.1%} ± {second.accuracy.error:.1%}" in printed
    assert f"{second.log_loss_gain.value:+.3f} ± {second.log_loss_gain.error:.3f} " in printed
    assert f"n = {len(expected)} held-out questions; seeds 0, 1; ± one standard error over seeds" in printed
    assert "2 in stage 2 and 2 in stage 3" in printed and printed == (out / "table.md").read_text()
    facts = json.loads((out / "report.json").read_text())
    assert (facts["variants"], facts["seeds"]) == ({"sft": "sft", "no reg": "no-reg"}, [0, 1])
    assert facts["data"] == [str(made / "asked" / "data.json")]

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    (out / "predictions/no-reg/seed0.jsonl").unlink()  # its run is there still, so it is only asked again
    status, printed, told = command(out, *TRIES, "--seeds", "0", "--json")
    assert status == 0 and "1 of 2 runs are finished already" in told
    assert json.loads(printed)["rows"][1]["log_loss"][0] == pytest.approx(
        np.mean([p.log_loss for p in found["no-reg"][0]])
    )
    changed = [path for path, time in written.items() if path.stat().st_mtime_ns != time]
    assert [path.parent.name for path in changed] == ["no-reg"]

    status, _, told = command(out, "--try", "sft=objective=sft stage2.lr=1e-3")
    assert status == 2 and "sft: --out" in told and "holds another run: stage2.lr was 0.01, now 0.001" in told
    status, _, told = command(out, *TRIES, "--limit", "2")
    assert status == 2 and "holds another comparison: records was 3, now 2. Use another --out" in told


@pytest.mark.parametrize(
    "words, message",
    [
        (["--try", "a b", "--try", "a-b=seed=1"], "a b: objective 'a b'"),
        (["--try", "a b=objective=sft", "--try", "a-b=objective=sft"], "no other variant's"),
        ([*TRIES, "--seeds", "0,0"], "--seeds 0,0: expected different numbers"),
        (
            [*TRIES, "--try", "more=stage3.max_steps=3"],
            "stage 3 takes 3 steps over 9 samples in more, and 2 over 6 in sft",
        ),
        ([*TRIES, "--try", "large=stage1.batch_size=200"], "large: fewer samples than one global batch"),
        ([*TRIES, "--try", "drawn=loss.target=sample"], "drawn: --cache"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(command, tmp_path, words, message):
    status, printed, told = command(tmp_path / "out", *words)
    assert status == 2 and message in told and told.count("\n") == 1 and not printed
    assert not (tmp_path / "out").exists()


def test_a_missing_cache_and_data_without_a_question(command, tmp_path):
    status, _, told = command(tmp_path / "out", *TRIES, "--try", f"other=cache={tmp_path / 'nowhere'}")
    assert status == 1 and "error: other: " in told and "nowhere" in told
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "x", "conversations": [{"from": "human", "value": "q"}]}]))
    status, _, told = command(tmp_path / "out", *TRIES, data=data)
    assert status == 1 and "the student can be asked none of the first 1 records: " in told
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("chapter 1")
    status, _, told = command(tmp_path / "out", *TRIES)
    assert status == 2 and "expected a comparison or an empty folder, found other files (thesis.txt)" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_runs_side_by_side_are_the_same_runs(command, tmp_path):
    words = [*TRIES, "--seeds", "0,1"]
    results = [command(tmp_path / f"jobs{jobs}", *words, "--jobs", jobs) for jobs in (1, 2)]
    assert [status for status, *_ in results] == [0, 0]
    assert results[0][1] == results[1][1]
    assert "\nstage 2: " in (tmp_path / "jobs2/runs/sft/seed1/output.txt").read_text()


def test_a_student_that_moved_is_recognised(made, tiny, tmp_path):
    asked = open_samples([made / "asked" / "data.json"])
    _begin(tmp_path / "out", str(tiny("internvl_qwen2")), asked, Asking())
    shutil.copytree(tiny("internvl_qwen2"), tmp_path / "moved")
    _begin(tmp_path / "out", str(tmp_path / "moved"), asked, Asking())
    with pytest.raises(UsageError, match="holds another comparison: student.config.json was"):
        _begin(tmp_path / "out", str(tiny("internvl_llama")), asked, Asking())
