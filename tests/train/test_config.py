"""Settings: the paper's defaults, TOML and --set, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecal.errors import UsageError
from genrecal.train.config import RECIPES, LoraConfig, TrainConfig, config_from, load_config


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Every setting by its dotted name."""
    result: dict[str, object] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        result |= (
            flat(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else {prefix + item.name: value}
        )
    return result


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("stage", "batch_size"), [(1, 4), (2, 2), (3, 4)])
def test_a_stages_defaults_are_the_papers(stage: int, batch_size: int) -> None:
    config = TrainConfig().stage(stage)
    assert (config.lr, config.lr_end, config.accumulation, config.batch_size) == (1e-4, 1e-5, 16, batch_size)
    assert (config.epochs, config.max_steps, config.exclude_categories) == (1.0, 0, ())


def test_the_other_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert config.lora == LoraConfig(rank=64, alpha=64.0, dropout=0.05)
    assert config.gradient_checkpointing is True
    assert (config.objective, config.seed) == ("genrecal", 0)
    assert (config.loss.ce_weight, config.loss.kl_weight, config.loss.reg_weight, config.loss.sft_weight) == (
        1,
        1,
        1,
        1,
    )
    assert load_config() == config


def test_set_comes_over_toml_and_toml_over_the_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, "seed = 3\n[stage1]\nlr = 1e-3\nmax_steps = 5\n[stage2]\nlr = 2e-3\n[lora]\nrank = 8\n")
    config = load_config(file, ["stage1.lr=5e-4", "lora.dropout=0.5", "stage1.lr = 6e-4", "loss.target = exact"])
    changed = {name: value for name, value in flat(config).items() if value != flat(TrainConfig())[name]}
    assert changed == {
        "seed": 3,
        "stage1.lr": 6e-4,
        "stage1.max_steps": 5,
        "stage2.lr": 2e-3,
        "lora.rank": 8,
        "lora.dropout": 0.5,
        "loss.target": "exact",
    }


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("seed=7", "seed", 7), ("stage1.lr=1", "stage1.lr", 1.0), ("stage1.epochs=0.25", "stage1.epochs", 0.25),
        ("stage3.max_steps=1_000", "stage3.max_steps", 1000),
        ("gradient_checkpointing=false", "gradient_checkpointing", False), ("objective=sft", "objective", "sft"),
        ('objective="sft"', "objective", "sft"),
        ('stage2.exclude_categories=["Math", "A = b"]', "stage2.exclude_categories", ("Math", "A = b")),
        ("stage2.exclude_categories=[]", "stage2.exclude_categories", ()),
        ('stage3.include_categories=["Math"]', "stage3.include_categories", ("Math",)),
        ("stage1.exclude_categories=Math", "stage1.exclude_categories", ("Math",)),
        ("evaluate.data=test.jsonl", "evaluate.data", ("test.jsonl",)), ("data.weights=0.5", "data.weights", (0.5,)),
        ("data.workers=0", "data.workers", 0), ("precision=bf16", "precision", "bfloat16"),
        ("precision=bfloat16", "precision", "bfloat16"), ("precision=fp32", "precision", "float32"),
    ],
)  # fmt: skip
def test_a_value_is_read_as_toml_and_takes_the_settings_type(setting: str, name: str, value: object) -> None:
    found = flat(load_config(settings=[setting]))[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("stage1.lrr=1", r"unknown setting stage1\.lrr; the nearest one is stage1\.lr$"),
        ("stage2.acumulation=1", r"unknown setting stage2\.acumulation; the nearest one is stage2\.accumulation"),
        ("lora.rnk=1", r"nearest one is lora\.rank"), ("sead=1", "unknown setting sead; the nearest one is seed"),
        ("stage4.lr=1", r"unknown setting stage4; the nearest one is stage\d"),
        ("learning_rate=1", r"learning_rate; the nearest ones are stage1\.lr, stage2\.lr, stage3\.lr$"),
        ("stage2.learning_rate=1", r"stage2\.learning_rate; the nearest one is stage2\.lr$"),
        ("gradient_accumulation_steps=1", r"nearest ones are stage1\.accumulation, "),
        ("lora_r=1", r"nearest one is lora\.rank"), ("chunk_row=1", r"nearest one is loss\.chunk_rows"),
        ("xyzzy=1", r"unknown setting xyzzy; docs/settings\.md lists all settings"), ("=1", "unknown setting"),
        ("stage1", r"--set 'stage1': expected a\.b=value"), ("stage1=5", r"setting stage1: expected a table, got 5"),
        ("seed.x=5", "setting seed: expected int"), ("seed=1.5", "setting seed: expected int, got 1.5"),
        ("seed=many", "setting seed: expected int, got 'many'"),
        ("seed=true", "setting seed: expected int, got True"),
        ("stage1.lr=fast", r"setting stage1\.lr: expected float, got 'fast'"),
        ("stage1.lr=true", "expected float, got True"),
        ("gradient_checkpointing=1", "setting gradient_checkpointing: expected bool, got 1"),
        ("stage1.exclude_categories=[1]", r"expected a list of strings, got \[1\]"),
        ("stage1.lr=-1e-4", r"setting stage1\.lr: .* not negative, got -0\.0001"),
        ("stage1.lr=-1", r"setting stage1\.lr: .* not negative, got -1"),
        ("stage1.lr=nan", "expected a finite number"), ("lora.alpha=inf", "expected a finite number"),
        ("seed=-1", "not negative, got -1"),
        ("stage1.batch_size=0", r"setting stage1\.batch_size: expected at least 1, got 0"),
        ("stage3.accumulation=0", "at least 1"), ("data.window=0", "at least 1"), ("log_every=0", "at least 1"),
        ("keep_checkpoints=0", "at least 1"),
        ("objective=kd", r"objective 'kd': expected one of genrecal, genrecal-aligned, sft, seqkd"),
        ("loss.splice_weight=0", r"loss\.splice_weight 0 leaves objective genrecal nothing .* genrecal-aligned or sft"),
        ("precision=fp16", "precision 'fp16': expected one of auto, float32, fp32, bfloat16, bf16"),
        ("loss.target=bottomk", r"loss\.target 'bottomk': expected topk, exact or sample"),
        ("loss.target=", r"loss\.target '': expected"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_a_usage_error_that_names_it(setting: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_config(settings=[setting])


def test_the_aligned_objective_may_leave_out_the_splice_but_not_its_own_pass() -> None:
    aligned = ["objective=genrecal-aligned"]
    assert load_config(settings=[*aligned, "loss.splice_weight=0"]).loss.splice_weight == 0
    with pytest.raises(UsageError, match=r"with loss\.aligned_weight 0 is objective genrecal; set that"):
        load_config(settings=[*aligned, "loss.aligned_weight=0"])


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("seed = ", [], r"--config .*run\.toml: expected TOML, .*: Invalid value"),
        ("seed = 1\nseed = 2", [], r"--config .*run\.toml: expected TOML, .*: Cannot overwrite"),
        ("[stage1]\nlrr = 1", [], r"unknown setting stage1\.lrr; the nearest one is stage1\.lr$"),
        ("stage1 = 5", ["stage1.lr=1"], "--set 'stage1.lr=1': stage1 is no table"),
        ("[lora.deeper]\nx = 1", [], r"unknown setting lora\.deeper"),
        ("seed = 1979-05-27", [], "setting seed: expected int"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, text: str, settings: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_config(toml(tmp_path, text), settings)


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*gone\.toml: .*No such file"):
        load_config(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"--config .*binary\.toml"):
        load_config(tmp_path / "binary.toml")


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(0, 1),
    steps=st.integers(0, 10**6),
    categories=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    target=st.sampled_from(["topk", "exact", "sample"]),
)
def test_a_configuration_comes_back_from_a_runs_json(
    seed: int, lr: float, steps: int, categories: list[str], target: str
) -> None:
    values = {
        "seed": seed,
        "stage2": {"lr": lr, "max_steps": steps, "exclude_categories": categories},
        "loss": {"target": target},
    }
    config = config_from(values)
    assert (config.seed, config.stage2.lr, config.stage2.exclude_categories) == (seed, lr, tuple(categories))
    assert config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_papers_recipe_is_the_defaults_written_out() -> None:
    assert load_config(Path("paper")) == load_config(RECIPES / "paper.toml") == TrainConfig()


def test_a_recipe_has_a_name_but_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("single-24gb")) == load_config(RECIPES / "single-24gb.toml") != TrainConfig()
    (tmp_path / "single-24gb").write_text("seed = 5")
    assert load_config(Path("single-24gb")) == TrainConfig(seed=5)
    with pytest.raises(UsageError, match="--config papre: No such file, nor a recipe: internvl2-76b-to.*, paper, q"):
        load_config(Path("papre"))
