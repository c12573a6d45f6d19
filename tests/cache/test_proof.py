"""A teacher proves itself before the job: whole ones of every family do, deliberately broken ones are refused with why."""

import functools
import shutil

import numpy as np
import pytest
import torch
from conftest import conversation, mixed_samples, write_llava
from safetensors.torch import load_file, save_file

from genrecal.cache import extract
from genrecal.cache.job import CacheOptions, run_cache_job
from genrecal.cache.proof import Proof, blank_check, compare_backends, prove
from genrecal.cache.teacher import HFTeacher
from genrecal.cli import main
from genrecal.errors import ModelError
from genrecal.samples import open_samples
from genrecal.vlm.checkpoint import Checkpoint
from genrecal.vlm.loading import VLM, load_processor, load_vlm, split_vlm
from genrecal.vlm.rendering import Renderer

FAMILIES = ["qwen2_vl", "qwen2_vl_wide", "qwen3_vl", "internvl_llama", "llava_onevision", "idefics3", "gemma3"]


@pytest.fixture(scope="module")
def load(tiny):
    return functools.cache(lambda family, dtype=torch.float32: HFTeacher.load(tiny(family), dtype=dtype))


@pytest.fixture
def teacher(tiny):
    """One to break."""
    return HFTeacher.load(tiny("qwen2_vl_wide"), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_teachers_pass(load, family, dtype):
    teacher = load(family, dtype)
    for sample in mixed_samples(4):
        encoded = teacher.encode(sample)
        prove(teacher, sample, encoded)
        evidence = teacher.evidence(encoded)
        assert evidence.image_tokens == evidence.visual_embeddings
        assert bool(evidence.image_tokens) == bool(sample.images)


def test_proved_once_and_again_with_the_first_picture(load, monkeypatch):
    teacher, proof, proved = load("qwen2_vl"), Proof(), []
    monkeypatch.setattr(
        "genrecal.cache.proof.prove", lambda teacher, sample, encoded: proved.append(sample.key) is None
    )
    text, short, long = (
        conversation(("q", "a"), key="text"),
        conversation(("q", "a"), images={0: 1}, key="short"),
        conversation(("q", "a long answer"), images={0: 2}, key="long"),
    )
    for batch in ([text], [text], [long, short, text], [long]):
        proof.check(teacher, [(sample, teacher.encode(sample)) for sample in batch])
    assert proved == ["text", "short"]


def states_at(teacher, layer, *, norm):
    """A `hidden` that gives what `layer` leaves (-1 is the last), with or without the final norm."""

    def hidden(inputs):
        outputs, caught = [], {}
        text = teacher.vlm.model.model.language_model
        hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in text.layers]
        hooks.append(text.norm.register_forward_hook(lambda *_: caught.update(done=True)))
        teacher.vlm.body(**teacher.vlm.on_device(inputs), use_cache=False)
        for hook in hooks:
            hook.remove()
        assert caught["done"] and len(outputs) == len(text.layers)
        state = outputs[layer][0] if isinstance(outputs[layer], tuple) else outputs[layer]
        return text.norm(state) if norm else state

    return hidden


@pytest.mark.parametrize(
    ("layer", "norm", "reason"),
    [(-2, True, "differs from its logits"), (-1, False, "differs from its logits")],
    ids=["off by one layer", "norm left out"],
)
def test_other_states_are_refused(teacher, monkeypatch, layer, norm, reason):
    broken = states_at(teacher, layer, norm=norm)
    monkeypatch.setattr(VLM, "hidden", lambda self, inputs: broken(inputs))
    sample = mixed_samples(1)[0]
    with torch.inference_mode(), pytest.raises(ModelError, match=reason):
        prove(teacher, sample, teacher.encode(sample))


def with_norm(source, folder, kind):
    """A copy of a model whose last states and final norm are like those of released models, as far as `kind` says."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith(".norm.weight") and "visual" not in name]
    weight = tensors[name]
    if kind == "outliers":  # as in Gemma 3: a channel that the norm makes small holds nearly all of the energy
        weight.copy_((torch.randn(len(weight), generator=torch.Generator().manual_seed(0)) * 1.5).exp())
        weight[3] = 5e-4 * weight.max()
        last = max(name for name in tensors if name.endswith("mlp.down_proj.weight"))
        tensors[last][3] *= 1000
    elif kind == "pruned":
        weight[::5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("kind", ["as made", "outliers", "pruned"])
def test_states_that_skip_a_norm_are_found_without_logits(tiny, monkeypatch, tmp_path, kind, dtype):
    """As for a backend whose logits come from the same states."""
    teacher = HFTeacher.load(with_norm(tiny("qwen2_vl_wide"), tmp_path / "model", kind), dtype=dtype)
    sample = mixed_samples(1)[0]
    encoded = teacher.encode(sample)
    whole = teacher.evidence(encoded)
    norm = Checkpoint(teacher.path).final_norm()
    before = states_at(teacher, -1, norm=False)(teacher.renderer.collate([encoded]))[0].detach()
    for hidden, refused in ((whole.hidden, False), (before, True)):
        found = type(whole)(hidden=hidden, logits=whole.logits, image_tokens=6, visual_embeddings=6, norm=norm)
        monkeypatch.setattr(teacher, "evidence", lambda _, found=found: found)
        if refused:
            with pytest.raises(ModelError, match="not what its final norm leaves.*before the norm"):
                prove(teacher, sample, encoded)
        else:
            prove(teacher, sample, encoded)


def test_other_ids_than_the_models_own_are_refused(tiny, monkeypatch):
    """Llama 3's tokenizer adds a token that its template writes too."""
    teacher = HFTeacher.load(tiny("internvl2_76b"), dtype=torch.float32)
    sample = conversation(("What?", "a red square"), images={0: 1})
    prove(teacher, sample, teacher.encode(sample))
    monkeypatch.setattr(teacher.renderer, "_adds_special_tokens", lambda text: True)
    with pytest.raises(
        ModelError, match=r"token 1 of the prompt is '<\|begin_of_text\|>', expected '<\|start_header_id\|>'"
    ):
        prove(teacher, sample, teacher.encode(sample))


@pytest.mark.parametrize("closing", ["<|im_end|>", ""])
def test_ids_of_a_template_that_closes_nothing_pass(tiny, closing):
    """The last answer ends with the next turn's first token, which the template has not written yet."""
    processor = load_processor(tiny("qwen2_vl"))
    processor.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- for c in m.content %}"
        "{%- if c.type == 'image' %}<|image_pad|>{%- else %}{{ c.text }}{%- endif %}{%- endfor %}"
        f"{{{{ '{closing}' if m.role == 'assistant' else '' }}}}{{%- endfor %}}"
        "{%- if add_generation_prompt %}<|im_start|>{{ 'assistant\\n' }}{%- endif %}"
    )
    teacher = HFTeacher(split_vlm(load_vlm(tiny("qwen2_vl"), dtype=torch.float32).model, Renderer(processor)))
    assert teacher.renderer.marks.end_of_turn == (closing or "<|im_start|>")
    sample = conversation(("What?", "a red square"), ("And?", "7"), images={0: 1})
    encoded = teacher.encode(sample)
    assert encoded.input_ids[-1] == teacher.renderer.marks.end_of_turn_id
    prove(teacher, sample, encoded)


def test_dropped_pictures_are_refused(teacher, monkeypatch):
    collate = teacher.renderer.collate
    text = teacher.renderer.text_keys
    monkeypatch.setattr(
        teacher.renderer, "collate", lambda *args, **kw: {k: v for k, v in collate(*args, **kw).items() if k in text}
    )
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="placeholder tokens but 0 visual embeddings"):
        prove(teacher, sample, teacher.encode(sample))
    whole = teacher.evidence
    monkeypatch.setattr(  # were the embeddings made, but not used
        teacher,
        "evidence",
        lambda encoded: type(e := whole(encoded))(**vars(e) | {"visual_embeddings": e.image_tokens}),
    )
    with pytest.raises(ModelError, match="negatives of its pictures give the very same answer states"):
        prove(teacher, sample, teacher.encode(sample))
    with pytest.raises(ModelError, match="--blank-check: grey pictures .* change no state at all"):
        blank_check(teacher, mixed_samples(4), 2)


def test_a_template_without_pictures_is_refused(teacher, monkeypatch):
    whole = teacher.evidence
    monkeypatch.setattr(teacher, "evidence", lambda encoded: type(e := whole(encoded))(**vars(e) | {"image_tokens": 0}))
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="no image token is in the prompt of 1 pictures"):
        prove(teacher, sample, teacher.encode(sample))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_span_is_refused(teacher, monkeypatch, shift):
    right = extract.answer_positions
    sample = conversation(("What?", "a red square"), ("Else?", "no"), images={0: 1})
    encoded = teacher.encode(sample)
    monkeypatch.setattr(
        extract, "answer_positions", lambda e: (np.minimum(right(e)[0] + shift, len(e) - 1), right(e)[1])
    )
    with pytest.raises(ModelError, match="do not stand before the tokens that they predict"):
        prove(teacher, sample, encoded)


def test_answers_of_another_sample_are_refused(teacher):
    sample = conversation(("What?", "a red square"), images={0: 1})
    other = conversation(("What?", "a blue square"), images={0: 1})
    with pytest.raises(ModelError, match="decodes to 'a red square', expected 'a blue square'"):
        prove(teacher, other, teacher.encode(sample))


def test_rows_of_other_positions_are_refused(teacher, monkeypatch):
    whole = teacher.states

    def swapped(batch, **options):
        (states,) = whole(batch, **options)
        states.answer.hidden[[0, 1]] = states.answer.hidden[[1, 0]]
        return [states]

    monkeypatch.setattr(teacher, "states", swapped)
    sample = mixed_samples(1)[0]
    with pytest.raises(ModelError, match="the answer row of position .* is not that position's state"):
        prove(teacher, sample, teacher.encode(sample))


def test_a_broken_teacher_caches_nothing(teacher, monkeypatch, tmp_path):
    broken = states_at(teacher, -2, norm=True)
    monkeypatch.setattr(VLM, "hidden", lambda self, inputs: broken(inputs))
    data = write_llava(tmp_path / "data", mixed_samples(4))
    with pytest.raises(ModelError, match="differs from its logits"):
        run_cache_job(teacher, open_samples([data]), tmp_path / "cache", CacheOptions())
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_blank_check_measures_what_pictures_give(load):
    teacher = load("idefics3")
    found = blank_check(teacher, mixed_samples(8), 4)
    falls = []
    for sample in [sample for sample in mixed_samples(8) if sample.images][:4]:
        rows = teacher.states([teacher.encode(sample)], questions=[False], top_k=1)[0].answer
        falls.append(rows.target_log_prob[rows.predicts].mean())
    assert found.samples == 4 and found.log_prob == pytest.approx(np.mean(falls), abs=1e-4)
    assert found.fall > 2 * found.error > 0
    assert blank_check(teacher, [conversation(("q", "a"))], 4) is None


def test_blank_check_of_a_teacher_that_was_trained(tmp_path):
    pytest.importorskip("matplotlib")
    from genrecal.demo.data import write_dataset
    from genrecal.demo.pipeline import ASSETS

    samples = open_samples([write_dataset(tmp_path / "data", num_samples=24, split="test", seed=0)])
    found = blank_check(HFTeacher.load(ASSETS / "teacher"), [samples[i] for i in range(len(samples))], 24)
    assert found.samples >= 20 and found.log_prob > -0.3 and found.fall > 1.0  # 2.5 nats over 200 conversations


def test_blank_check_on_the_command_line(tiny, tmp_path, capsys):
    data = write_llava(tmp_path / "data", mixed_samples(4))
    command = ["cache", "--teacher", str(tiny("gemma3")), "--data", str(data), "--blank-check", "2"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--out", str(tmp_path / "cache")])
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "blank check: with grey pictures the log-probability of an answer token falls from" in output
    assert "warning: the answers do not depend on the images" in output  # this one's weights are random


def test_backends_are_compared_row_by_row(load, tiny, monkeypatch):
    teacher, same = load("qwen2_vl_wide"), load("qwen2_vl_wide", torch.bfloat16)
    assert compare_backends(teacher, teacher, mixed_samples(6), 4).hidden == 0
    assert 0 < compare_backends(same, teacher, mixed_samples(6), 4).hidden < 0.1
    broken = states_at(teacher, -2, norm=True)
    other = HFTeacher.load(tiny("qwen2_vl_wide"), dtype=torch.float32)
    monkeypatch.setattr(other.vlm.__class__, "hidden", lambda self, inputs: broken(inputs))
    reference = [teacher.states([teacher.encode(s)], questions=[False], top_k=1)[0] for s in mixed_samples(1)]
    monkeypatch.undo()
    monkeypatch.setattr(other, "states", lambda batch, **_: reference)
    with pytest.raises(ModelError, match="does not give the states of hf"):
        compare_backends(other, teacher, mixed_samples(1), 1)
