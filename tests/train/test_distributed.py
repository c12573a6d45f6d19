"""Several processes train as one: the same losses with every engine, after kills and on other numbers of processes.

The slow tests fork their ranks (tests/train/rank_runner.py); the launchers themselves are started too.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples, write_llava
from made_run import train_until
from safetensors.torch import load_file

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import HFTeacher
from genrecal.errors import GenrecalError, OtherRankError, TrainingError, UsageError
from genrecal.objectives import OBJECTIVES
from genrecal.samples import open_samples
from genrecal.shards.mixture import open_caches
from genrecal.shards.order import SampleOrder, micro_batches
from genrecal.shards.reader import open_cache
from genrecal.train.advice import LoaderError
from genrecal.train.batches import BatchBuilder, ShardSource, image_beside
from genrecal.train.checkpoint import trained_parameters
from genrecal.train.config import load_config
from genrecal.train.engine import check_processes, import_deepspeed, resolve_engine
from genrecal.train.logs import MACHINE, read_evaluations, read_metrics
from genrecal.train.loop import build_distiller, train
from genrecal.train.ranks import Ranks, check_devices, joined, own_device, world_size
from genrecal.train.run import Run
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

RUNNER = Path(__file__).with_name("rank_runner.py")
# Sums are taken in another order: float32's rounding, which AdamW's division by small moments enlarges from step to step.
# The gradient of stage 3, over all weights, is the largest sum.
CLOSE = {1: 2e-6, 2: 2e-6, 3: 2e-5}
GRADIENT_CLOSE = 1e-3


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    """24 conversations, a quarter without a picture; the questions of about half of them."""
    folder = tmp_path_factory.mktemp("distributed")
    samples = [*mixed_samples(23), conversation(("How many?", "7 system users"), images={0: 1}, key="00000023")]
    data = write_llava(folder / "d", samples)
    teacher = HFTeacher.load(tiny("qwen2_vl"), dtype=torch.float32)
    options = CacheOptions(samples_per_shard=8, question_fraction=0.5)
    run_cache_job(teacher, open_samples([data]), folder / "c", options)
    return folder / "c"


def words(cache, student, out, *settings, steps, batch_size=2, accumulation=2, stages="1,2,3"):
    """Of `genrecal train`; the defaults are those of two processes with a global batch of 8."""
    stage = f"batch_size={batch_size} accumulation={accumulation} max_steps={steps} epochs=9 lr=1e-3 lr_end=1e-4"
    every = [f"stage{n}.{setting}" for n in (1, 2, 3) for setting in [*stage.split(), "checkpoint_every=3"]]
    chosen = ["data.workers=0", "measure.samples=0", "lora.dropout=0", "loss.chunk_rows=16", *every, *settings]
    start = ["--cache", str(cache), "--student", str(student), "--out", str(out), "--stages", stages]
    return start + [word for setting in chosen for word in ("--set", setting)]


def untimed(out):
    lines = [{k: v for k, v in line.items() if k not in MACHINE} for line in read_metrics(Path(out))]
    return [line | {"skipped": sorted(line["skipped"])} if "skipped" in line else line for line in lines]


def assert_close(lines, others):
    """The same steps over the same samples; every term within CLOSE."""
    assert [(line["stage"], line["step"]) for line in lines] == [(line["stage"], line["step"]) for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if isinstance(value, float):
                within = GRADIENT_CLOSE if name == "grad_norm" else CLOSE[line["stage"]]
                assert other[name] == pytest.approx(value, rel=within, abs=within), (line["stage"], line["step"], name)
            else:
                assert other[name] == value, (line["stage"], line["step"], name)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]


def one_process(cache, student, out, *settings, steps):
    arguments = words(cache, student, out, *settings, steps=steps, accumulation=4)
    config = load_config(None, arguments[arguments.index("--set") + 1 :: 2])
    run = Run(path=out, config=config, student=str(student), caches=(str(cache),))
    train(run)
    return run


@pytest.mark.slow
def test_two_processes_under_torchrun_train_as_one(tiny, cache, tmp_path):
    """ddp by default; rank 0 alone prints and writes, and both ask the student."""
    student = tiny("internvl_qwen2")
    asked = [f'evaluate.data=["{cache.parent}/d/data.json"]', "evaluate.limit=5", "evaluate.max_new_tokens=2"]
    alone = one_process(cache, student, tmp_path / "one", *asked, steps=2)
    command = ["-m", "genrecal", "train", *words(cache, student, tmp_path / "two", *asked, steps=2)]
    ended = subprocess.run(
        [*TORCHRUN, free_port(), *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert_close(untimed(alone.path), untimed(tmp_path / "two"))
    one, two = (read_evaluations(path) for path in (alone.path, tmp_path / "two"))
    assert [(line["stage"], line["step"]) for line in two] == [(1, 0), (2, 1), (2, 2), (3, 1), (3, 2)]
    for line, other in zip(one, two, strict=True):
        assert line["evaluation"]["overall"]["n"] == other["evaluation"]["overall"]["n"] == 8
        assert line["evaluation"]["overall"] == pytest.approx(other["evaluation"]["overall"], rel=1e-4)
    assert "stage 1: 2 processes, engine ddp; a global batch of 8 samples is 2 micro-steps of 2 on each" in ended.stderr
    assert ended.stdout.count("finished") == 1 and ended.stderr.count("stage 3: 2/2 steps") == 1
    for stage in (1, 2, 3):
        one, two = (
            load_file(path / f"stage{stage}" / "trained.safetensors") for path in (alone.path, tmp_path / "two")
        )
        assert one.keys() == two.keys()
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


# --------------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 7, 24])
def test_ranks_share_each_global_batch_out(size, samples):
    """Every sample once, whatever the number of ranks; all ranks take as many micro-steps."""
    order = SampleOrder(np.arange(24) // 8, seed=3)
    lengths = np.random.default_rng(0).integers(5, 90, 24)
    batch = order.slice(5, 5 + samples)
    shares = [micro_batches(batch, lengths, batch_size=2, rank=rank, world_size=size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    taken = [index for share in shares for piece in share for index in piece]
    assert sorted(taken) == sorted(batch) and all(len(piece) <= 2 for share in shares for piece in share)


@pytest.mark.parametrize(
    ("stage", "target", "settings"),
    [
        (1, "topk", []), (1, "sample", ["objective=genrecal-aligned", "loss.splice_weight=0"]), (3, "topk", []),
        (2, "topk", ["objective=uld"]), (3, "sample", ["objective=dskd"]), (3, "sample", ["objective=kl"]),
    ],
)  # fmt: skip
def test_a_stand_in_changes_no_number(tiny, tmp_path, teacher, stage, target, settings):
    """Beside samples without pictures it adds nothing to the loss or a gradient, and alone it gives every parameter zeros."""
    samples = [conversation(("What?", "a red one"), key="00000000"), conversation(("Why?", "so"), key="00000001")]
    data = write_llava(tmp_path / "d", samples)
    run_cache_job(teacher, open_samples([data]), tmp_path / "c", CacheOptions(draws=5))
    cache = open_caches([tmp_path / "c"])
    config = load_config(None, ["lora.dropout=0", f"loss.target={target}", *settings])
    student = tiny("qwen2_vl" if config.objective == "kl" else "internvl_qwen2")
    run = Run(path=tmp_path / "run", config=config, student=str(student), caches=(str(cache.path),))
    torch.manual_seed(0)
    if stage > 1 and OBJECTIVES[config.objective].chained:  # what it starts from
        before = build_distiller(run, cache, 1, torch.device("cpu"), torch.float32)
        run.save_result(1, {name: p.detach() for name, p in trained_parameters(before).items()})
    if stage > 2:
        before = build_distiller(run, cache, 2, torch.device("cpu"), torch.float32)
        run.save_result(2, {name: p.detach() for name, p in trained_parameters(before).items()})
    distiller = build_distiller(run, cache, stage, torch.device("cpu"), torch.float32)
    renderer = distiller.student.renderer
    found = []
    for beside in (None, image_beside(renderer)):
        builder = BatchBuilder(ShardSource(cache), renderer, distiller.objective, beside=beside, fillers=[0, 1])
        batch = builder[[0, 1]].batch
        distiller.zero_grad(set_to_none=True)
        loss = distiller(batch, 7).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in trained_parameters(distiller).items()}))
    (loss, gradients), (loss_beside, gradients_beside) = found
    torch.testing.assert_close(loss_beside, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert gradients_beside[name] is not None, name
        expected = torch.zeros_like(gradients_beside[name]) if gradient is None else gradient
        torch.testing.assert_close(gradients_beside[name], expected, rtol=1e-4, atol=1e-5)
    distiller.zero_grad(set_to_none=True)
    output = distiller(builder[[]].batch, 7)
    output.loss.backward()
    assert output.loss.item() == 0 and not any(output.counts.values())
    for name, parameter in trained_parameters(distiller).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.fixture
def launched(monkeypatch):
    """The environment of rank 0 of so many processes."""

    def set_to(size, **others):
        values = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        for name, value in (values | others).items():
            monkeypatch.setenv(name, str(value))

    return set_to


def test_engines_that_cannot_be_are_refused(launched, monkeypatch, tiny, cache, tmp_path):
    assert [resolve_engine("auto", processes) for processes in (0, 1, 2)] == ["none", "none", "ddp"]
    with pytest.raises(UsageError, match="engine none trains in one process, and the launcher started 4"):
        resolve_engine("none", 4)
    with pytest.raises(UsageError, match="engine ddp trains in several processes, and none were launched; .*torchrun"):
        resolve_engine("ddp", 0)
    with pytest.raises(UsageError, match="engine 'zero4': expected one of auto, none, ddp, zero1, zero2, zero3"):
        load_config(None, ["engine=zero4"])
    with pytest.raises(UsageError, match="offload is for engine zero1, zero2 and zero3; engine is auto"):
        load_config(None, ["offload=true"])
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r'need DeepSpeed: pip install "genrecal\[deepspeed\]"'):
        import_deepspeed(torch.device("cpu"))
    run = Run(
        path=tmp_path / "run",
        config=load_config(None, ["engine=zero2"]),
        student=str(tiny("qwen2_vl")),
        caches=(str(cache),),
    )
    with pytest.raises(UsageError, match="need DeepSpeed"):
        train(run)
    assert not run.path.exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="the environment has no WORLD_SIZE and no MASTER_ADDR and no MASTER_PORT"):
        world_size()


def test_processes_other_than_those_launched_are_refused(monkeypatch):
    with joined("cpu", launched=False) as ranks:
        check_processes("ddp", ranks)
        monkeypatch.setattr("genrecal.train.engine.world_size", lambda: 2)
        with pytest.raises(
            TrainingError, match="engine ddp: 1 processes are connected, expected the 2 that were launched"
        ):
            check_processes("ddp", ranks)


def test_each_process_takes_its_own_device(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto") == torch.device("cuda")
    launched(4, LOCAL_RANK=1)
    assert own_device("auto") == own_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="4 processes cannot share it"):
        own_device("cuda:1")
    launched(4, LOCAL_RANK=2)
    with pytest.raises(UsageError, match="local rank 2: this machine has 2 CUDA devices; start at most 2"):
        own_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each is shown one
    assert own_device("auto") == torch.device("cuda", 0)


@pytest.mark.parametrize("uuids", [["a", "b", "c"], ["a", "b", "a"]])
def test_two_ranks_with_the_same_gpu_are_refused(monkeypatch, uuids):
    """Before NCCL's first collective, which would only say that a peer is lost."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[1]))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [("host", uuid) for uuid in uuids])
    ranks, device = Ranks(rank=1, size=3), torch.device("cuda", 0)
    if len(set(uuids)) == 3:
        check_devices(ranks, device)
        return
    with pytest.raises(OtherRankError, match=r"ranks 0 and 2 have the same GPU \(a of host\).*CUDA_VISIBLE_DEVICES"):
        check_devices(ranks, device)
    with pytest.raises(UsageError, match="ranks 0 and 2 have the same GPU"):
        check_devices(Ranks(rank=0, size=3), device)


def test_every_error_comes_back_from_another_process():
    kinds = [GenrecalError, *GenrecalError.__subclasses__(), LoaderError]
    assert OtherRankError in kinds and len(kinds) > 10
    for kind in kinds:
        error = OtherRankError("m", 143) if kind is OtherRankError else kind("m")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind and str(back) == "m" and back.exit_status == error.exit_status


def test_the_global_batch_of_a_run_stays(tiny, cache, tmp_path):
    """Another number of processes changes accumulation alone; other settings must give the same product."""

    def begin(processes, *settings):
        config = load_config(None, [*(f"stage{n}.batch_size=2" for n in (1, 2, 3)), *settings])
        run = Run(path=tmp_path / "run", config=config, student=str(tiny("internvl_qwen2")), caches=(str(cache),))
        return run.begin(open_caches([cache]), processes)["global_batch"]

    everywhere = {f"stage{n}": 128 for n in (1, 2, 3)}
    assert begin(4) == everywhere
    assert begin(3) == begin(1, "engine=zero3", "offload=true", "device=cpu") == everywhere
    for stage in (1, 2):
        (tmp_path / f"run/checkpoints/stage{stage}-step00000001").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/stage{stage}-step00000001/state.json").touch()
    assert begin(2, "stage2.batch_size=4") == begin(8, "stage2.batch_size=1") == everywhere
    with pytest.raises(
        UsageError,
        match=r"global batch in stage 2 is 128 samples; stage2\.batch_size 4 x stage2\.accumulation 16 x 4 processes is 256;"
        " make it 128, or use another --out",
    ):
        begin(4, "stage2.batch_size=4")
    with pytest.raises(UsageError, match=r"seed was 0, now 3"):
        begin(4, "seed=3")
    with pytest.raises(UsageError, match=r"stage1\.lr was 0\.0001, now 0\.1"):
        begin(4, "stage1.lr=0.1", "stage3.lr=0.1")
    assert begin(4, "stage3.lr=0.1", "stage3.batch_size=4") == everywhere | {"stage3": 256}  # it has not begun


@pytest.fixture
def checkpointed(tiny, cache, tmp_path):
    """A run of stage 1 stopped after its checkpoint of step 3."""
    run = one_stage(cache, tiny("internvl_qwen2"), tmp_path / "run")
    train_until(run, 3)
    return run


def one_stage(cache, student, out, *settings):
    arguments = words(cache, student, out, *settings, steps=4)
    config = load_config(None, arguments[arguments.index("--set") + 1 :: 2])
    return Run(path=out, config=config, student=str(student), caches=(str(cache),))


def test_a_checkpoint_says_what_it_is_of_and_another_is_refused(checkpointed):
    folder = checkpointed.checkpoints / "stage1-step00000003"
    content = json.loads((folder / "state.json").read_text())
    assert content["stage"] == 1 and content["step"] == content["updates"] == 3
    assert content["run"]["processes"] == 1 and content["run"]["software"]["torch"] == torch.__version__
    assert [len(digest) for digest in content["run"]["caches_sha256"]] == [64]
    assert content["run"]["config"]["stage1"]["lr"] == 1e-3

    def refused(pattern, **changes):
        (folder / "state.json").write_text(json.dumps(content | changes))
        with pytest.raises(TrainingError, match=pattern):
            train(checkpointed, stages=(1,))

    refused("a checkpoint of another run: stage was 2, now 1; delete it", stage=2)
    refused("cache was .*, now .* with another cache.json", run=content["run"] | {"caches_sha256": ["00"]})
    others = content["run"]["student_sha256"] | {"weights": "00"}
    refused("student was .*, now .* with other weights; delete it", run=content["run"] | {"student_sha256": others})
    config = content["run"]["config"] | {"seed": 7}
    refused(r"run: seed was 7, now 0", run=content["run"] | {"config": config})
    (folder / "state.json").write_text(json.dumps(content))
    weights = (folder / "trained.safetensors").read_bytes()
    (folder / "trained.safetensors").write_bytes((folder / "optimizer.safetensors").read_bytes())
    with pytest.raises(TrainingError, match=r"this run has no|the checkpoint lacks"):
        train(checkpointed, stages=(1,))
    (folder / "trained.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(
        TrainingError, match=r"trained\.safetensors: cannot be read: .*; delete .*stage1-step00000003 and"
    ):
        train(checkpointed, stages=(1,))
    (folder / "trained.safetensors").write_bytes(weights)
    train(checkpointed, stages=(1,))
    assert checkpointed.stage_result(1).exists()


def test_a_folder_that_is_not_shared_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("genrecal.train.ranks.SEEN_SECONDS", 0.3)
    with pytest.raises(
        TrainingError, match=r"run\.json: rank 0 on .* does not see what rank 0 wrote; --out must be a folder"
    ):
        Ranks().wait_for(tmp_path / "out" / "run.json")


def test_another_student_on_another_machine_is_refused(tiny, cache, tmp_path):
    run = one_stage(cache, tiny("internvl_qwen2"), tmp_path / "run")
    begun = run.begin(open_caches([cache]), 2)
    run.check_files(begun, open_caches([cache]))
    for changed, words in (
        ({"student_sha256": {"weights": "00"}}, "student was .* with other .*weights"),
        ({"caches_sha256": ["00"]}, "cache was .* with another cache.json"),
        ({"caches": ["/a", "/b"], "caches_sha256": ["00", "11"]}, "cache was /a, /b, now .*/c with"),
    ):
        with pytest.raises(UsageError, match=f"expected the student and the caches of rank 0: {words}"):
            run.check_files(begun | changed, open_caches([cache]))


# ------------------------------------------------------------------------------------------------------ forked ranks, slow


class Runner:
    """The process of tests/train/rank_runner.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def run(self, ranks, out, arguments, **request):
        """What became of ranks that ran side by side."""
        request |= {"ranks": ranks, "out": str(out), "args": arguments}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self, ranks, out, arguments):
        ended = self.run(ranks, out, arguments)
        assert ended["statuses"] == [0] * ranks, ended["output"]
        return untimed(out)


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


@pytest.fixture(scope="module")
def awkward(tiny, cache):
    """Settings under which a rank has only text while the other has pictures, loses all samples of a micro-batch, and has
    none left in the last step."""
    renderer = Renderer(load_processor(tiny("internvl_qwen2")))
    opened = open_caches([cache])
    lengths = sorted(len(renderer.encode(record.sample)) for record in opened)
    settings = [f"max_tokens={lengths[-1] - 1}", "data.max_skip=1"]
    return [*settings, *(f"stage{n}.epochs={LAST / 24}" for n in (1, 2, 3))]


STEPS = 11
LAST = 8 * (STEPS - 1) + 1  # a sample more than the other steps take


@pytest.fixture(scope="module")
def alone(runner, tiny, cache, awkward, tmp_path_factory):
    """The run of one process: its folder and its lines."""
    out = tmp_path_factory.mktemp("alone") / "run"
    arguments = words(cache, tiny("internvl_qwen2"), out, *awkward, steps=0, accumulation=4)
    return out, runner.finish(1, out, arguments)


def test_the_awkward_settings_are_awkward(cache, awkward, tiny):
    opened, renderer = open_caches([cache]), Renderer(load_processor(tiny("internvl_qwen2")))
    lengths, images = opened.column("question_tokens") + opened.column("answer_tokens"), opened.column("images")
    limit = int(awkward[0].partition("=")[2])
    fits = np.array([len(renderer.encode(record.sample)) <= limit for record in opened])
    for stage in (1, 2, 3):
        order, seen = SampleOrder(opened.column("shard"), seed=stage), set()
        for step in range(STEPS):
            batch = order.slice(step * 8, min(step * 8 + 8, LAST))
            shares = [micro_batches(batch, lengths, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
            for pieces in zip(*shares, strict=True):
                kept = [piece[fits[piece]] for piece in pieces]
                if all(map(len, kept)) and images[kept[0]].any() != images[kept[1]].any():
                    seen.add("only text")
                seen |= {"all lost" for piece, rest in zip(pieces, kept, strict=True) if len(piece) and not len(rest)}
                seen |= {"none left" for piece in pieces if not len(piece)}
        assert seen == {"only text", "all lost", "none left"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_every_engine_gives_the_losses_of_one_process(runner, tiny, cache, awkward, alone, tmp_path, engine):
    """Eleven steps of each stage, fp32, each stage from the weights that one process ended the last one with."""
    one, expected = alone
    assert [sum(line["stage"] == stage for line in expected) for stage in (1, 2, 3)] == [STEPS] * 3
    assert any("skipped" in line for line in expected)
    student, out = tiny("internvl_qwen2"), tmp_path / "run"
    for stage in (1, 2, 3):
        arguments = words(cache, student, out, f"engine={engine}", *awkward, steps=0, stages=str(stage))
        lines = runner.finish(2, out, arguments)
        shutil.copy(one / f"stage{stage}/trained.safetensors", out / f"stage{stage}/trained.safetensors")
    assert_close(expected, lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "stages", "settings"),
    [
        ("internvl_qwen2", 2, "2,3", ["engine=zero3", "objective=dskd"]),  # the head is trained, chunk by chunk
        ("internvl_llama", 2, "1,2", ["engine=ddp", "objective=genrecal-aligned", "loss.first_token_weight=3"]),
        ("qwen2_vl", 1, "1,2", ["engine=zero2", "offload=true"]),  # without a launcher
        ("qwen3_vl", 2, "1,2,3", ["engine=zero3", "offload=true"]),
        ("llava_onevision", 2, "1,2,3", ["engine=zero1"]),
    ],
)
def test_objectives_and_students_on_several_processes(runner, tiny, cache, tmp_path, family, ranks, stages, settings):
    student, alone, out = tiny(family), tmp_path / "alone", tmp_path / "run"
    plain = [setting for setting in settings if not setting.startswith(("engine", "offload"))]
    lines = runner.finish(1, alone, words(cache, student, alone, *plain, steps=3, accumulation=4, stages=stages))
    assert sorted({line["stage"] for line in lines}) == [int(stage) for stage in stages.split(",")]
    accumulation = 4 // ranks
    arguments = words(cache, student, out, *settings, steps=3, accumulation=accumulation, stages=stages)
    assert_close(lines, runner.finish(ranks, out, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_killed_ranks_go_on_bit_for_bit(runner, tiny, cache, tmp_path, engine):
    """kill -9 of all ranks, at seeded instants and while a checkpoint is written, LoRA dropout on: the same numbers."""
    instants = random.Random(f"kills of {engine}")
    student, whole, cut = tiny("internvl_qwen2"), tmp_path / "whole", tmp_path / "cut"
    settings = [f"engine={engine}", "lora.dropout=0.05"]
    lines = runner.finish(2, whole, words(cache, student, whole, *settings, steps=5))
    arguments = words(cache, student, cut, *settings, steps=5)
    places = [
        {"at_lines": 5 * stage + instants.randint(1, 4), "forwards": instants.randint(0, 2)} for stage in range(3)
    ]
    places.insert(instants.randint(0, 2), {"fsync": instants.randint(3, 7)})
    killed = 0
    for place in places:
        ended = runner.run(2, cut, arguments, **place)
        assert set(ended["statuses"]) <= {0, -signal.SIGKILL}, ended["output"]
        killed += -signal.SIGKILL in ended["statuses"]
    assert killed == len(places)
    assert runner.finish(2, cut, arguments) == lines
    for stage in (1, 2, 3):
        one, two = (load_file(path / f"stage{stage}" / "trained.safetensors") for path in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_killed_ranks_go_on_with_another_engine_and_number(runner, tiny, cache, tmp_path):
    """One run passes through every engine and one to three processes, and is the run that was never killed."""
    student, alone, out = tiny("internvl_qwen2"), tmp_path / "alone", tmp_path / "run"
    lines = runner.finish(1, alone, words(cache, student, alone, steps=8, accumulation=4))
    arguments = words(cache, student, out, steps=8)  # of two processes
    chain = [(2, "ddp", 4), (3, "zero3", 7), (1, "none", 12), (2, "zero2", 15), (3, "ddp", 20), (1, "zero3", 23)]
    for ranks, engine, at in chain:
        ended = runner.run(ranks, out, [*arguments, "--set", f"engine={engine}"], at_lines=at)
        assert ended["statuses"] == [-signal.SIGKILL] * ranks, ended["output"]
    assert_close(lines, runner.finish(2, out, [*arguments, "--set", "engine=zero1"]))


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_stops_all(runner, tiny, cache, tmp_path, name="SIGUSR1"):
    student, whole, cut = tiny("internvl_qwen2"), tmp_path / "whole", tmp_path / "cut"
    settings = ["stage1.checkpoint_every=0", "data.workers=1"]
    lines = runner.finish(2, whole, words(cache, student, whole, *settings, steps=6, stages="1"))
    arguments = words(cache, student, cut, *settings, steps=6, stages="1")
    ended = runner.run(2, cut, arguments, at_lines=2, signal=name, to_rank=1)
    assert ended["statuses"] == [143, 143], ended["output"]
    (step,) = re.findall(
        rf"genrecal: {name}: saved a checkpoint at stage 1, step (\d); run the same command to resume", ended["output"]
    )
    assert "error" not in ended["output"]
    assert [path.name for path in (cut / "checkpoints").iterdir()] == [f"stage1-step0000000{step}"]
    assert len(untimed(cut)) == int(step)
    assert runner.finish(2, cut, arguments) == lines


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_stops_all(runner, tiny, cache, tmp_path):
    """Before the update, in one line, with the samples of that rank's micro-batch."""
    out = tmp_path / "run"
    arguments = words(cache, tiny("internvl_qwen2"), out, "engine=zero3", steps=6, stages="1")
    ended = runner.run(2, out, arguments, spoilt_rank=1, spoilt_at=3)  # micro-step 1 of step 2
    assert ended["statuses"] == [1, 1]
    opened = open_caches([cache])
    lengths = opened.column("question_tokens") + opened.column("answer_tokens")
    batch = SampleOrder(opened.column("shard"), seed=1).slice(8, 16)
    keys = opened.column("key")[micro_batches(batch, lengths, batch_size=2, rank=1, world_size=2)[0]]
    (line,) = [line for line in ended["output"].splitlines() if "error" in line]
    assert line.startswith(f"genrecal: error: the loss is nan on samples {', '.join(keys)}; nothing was updated")
    assert len(untimed(out)) == 1


@pytest.mark.slow
def test_what_one_rank_meets_alone_ends_all(runner, tiny, cache, tmp_path):
    """A damaged sample, which only the rank that reads it sees, and a rank that is killed."""
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    path = copy / "samples" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[open_cache(copy).by_key("00000009-s9").row["members"][0]["offset"] + 3] ^= 1
    path.write_bytes(data)
    student = tiny("internvl_qwen2")
    ended = runner.run(2, tmp_path / "a", words(copy, student, tmp_path / "a", steps=6, stages="1"))
    assert ended["statuses"] == [1, 1]
    (line,) = [line for line in ended["output"].splitlines() if "error" in line]
    assert "samples/00001.tar: member 00000009-s9" in line and "Traceback" not in ended["output"]
    out = tmp_path / "b"
    arguments = words(cache, student, out, steps=9, stages="1")
    ended = runner.run(2, out, arguments, at_lines=2, signal="SIGKILL", to_rank=1)
    assert ended["statuses"] == [1, -signal.SIGKILL]
    assert "the connection to another process of this run broke" in ended["output"]
    assert "Traceback" not in ended["output"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module", "genrecal"],
        ["-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1", "--num_processes", "2",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT", "-m", "genrecal"],
    ],
    ids=["deepspeed", "accelerate"],
)  # fmt: skip
def test_other_launchers(tiny, cache, tmp_path, launcher):
    out = tmp_path / "run"
    launcher = [free_port() if word == "PORT" else word for word in launcher]
    arguments = words(cache, tiny("internvl_qwen2"), out, "engine=zero2", steps=2, stages="1")
    ended = subprocess.run(
        [sys.executable, *launcher, "train", *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert "stage 1: 2 processes, engine zero2" in ended.stderr and len(untimed(out)) == 2


@pytest.mark.slow
def test_sigterm_to_torchrun(tiny, cache, tmp_path):
    """As a scheduler sends it: the launcher hands it on, and the ranks save."""
    out = tmp_path / "run"
    arguments = words(cache, tiny("internvl_qwen2"), out, "stage1.checkpoint_every=0", steps=9999, stages="1")
    arguments += ["--set", "stage1.epochs=9999"]
    process = subprocess.Popen(
        [*TORCHRUN, free_port(), "-m", "genrecal", "train", *arguments],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 600
    while len(untimed(out)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0 and errors.count("genrecal: SIGTERM: saved a checkpoint at stage") == 1, errors
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert len(untimed(out)) == int(checkpoint.name[-8:]) < 9999
