"""Any model class: the split is exact, what follows the head is found by test, what cannot be handled is refused."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import tiny_models
import torch
from conftest import mixed_samples

from genrecal.errors import ModelError
from genrecal.shards.head import FrozenHead, LogitTransform
from genrecal.vlm.loading import load_processor, load_vlm, split_vlm

FAMILIES = sorted(tiny_models.FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_body_is_the_models_logits(tiny, family, dtype):
    vlm = load_vlm(tiny(family), dtype=dtype)
    inputs = vlm.renderer.collate([vlm.renderer.encode(sample) for sample in mixed_samples(4)])
    with torch.no_grad():
        logits = vlm.model(**vlm.on_device(inputs)).logits
        assert torch.equal(vlm.transform(vlm.head(vlm.hidden(inputs))), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_changes_nothing(tiny, family):
    vlm = load_vlm(tiny(family), dtype=torch.float32)
    encoded = [vlm.renderer.encode(sample) for sample in mixed_samples(4)]
    with torch.no_grad():
        together = vlm.hidden(vlm.renderer.collate(encoded))
        for item, states in zip(encoded, together, strict=True):
            alone = vlm.hidden(vlm.renderer.collate([item]))[0]
            assert torch.allclose(states[: len(item)], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"final_logit_softcapping": 3.0}, LogitTransform(softcap=3.0)),
        ({"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ({"logits_scaling": 6.0}, LogitTransform(divisor=6.0)),
        ({"logits_scaling": 3.0, "final_logit_softcapping": 5.0}, LogitTransform(divisor=3.0, softcap=5.0)),
    ],
)
def test_what_follows_the_head_is_found(tiny, settings, expected):
    """The stock forward with one line after its head; the config carries the numbers, as in the families that do so."""
    vlm = load_vlm(tiny("internvl_qwen2"), dtype=torch.float32)
    for name, value in settings.items():
        setattr(vlm.model.config.get_text_config(), name, value)
    plain = type(vlm.model).forward

    class Model(type(vlm.model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = expected(output.logits)
            return output

    vlm.model.__class__ = Model
    found = split_vlm(vlm.model, vlm.renderer)
    assert found.transform == expected
    inputs = found.renderer.collate([found.renderer.encode(mixed_samples(1)[0])])
    with torch.no_grad():
        hidden = found.hidden(inputs)
        assert torch.allclose(found.frozen_head().logits(hidden[0]), vlm.model(**inputs).logits[0], atol=1e-5)


def test_a_setting_that_is_not_applied_is_not_believed(tiny):
    vlm = load_vlm(tiny("gemma3"), dtype=torch.float32)
    vlm.model.config.get_text_config().final_logit_softcapping = 30.0  # Gemma3ForConditionalGeneration ignores it
    assert split_vlm(vlm.model, vlm.renderer).transform == LogitTransform()


def test_logits_that_the_head_does_not_make_are_refused(tiny):
    vlm = load_vlm(tiny("internvl_qwen2"), dtype=torch.float32)
    plain = type(vlm.model).forward

    class Model(type(vlm.model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = output.logits**3
            return output

    vlm.model.__class__ = Model
    with pytest.raises(ModelError, match="not its head's output"):
        split_vlm(vlm.model, vlm.renderer)


def test_head_survives_its_file(tiny, tmp_path):
    vlm = load_vlm(tiny("qwen2_vl_padded_head"), dtype=torch.bfloat16)
    head = vlm.frozen_head()
    assert head.vocab_size < head.weight.shape[0]  # rows past the tokenizer's ids
    head.save(tmp_path / "head.safetensors")
    loaded = FrozenHead.load(tmp_path / "head.safetensors")
    assert torch.equal(loaded.weight, head.weight) and loaded.weight.dtype == torch.bfloat16
    assert (loaded.transform, loaded.vocab_size, loaded.bias) == (head.transform, head.vocab_size, None)


def test_a_split_model_is_the_same_model(tiny):
    """Without GPUs transformers' device map puts every layer on the CPU; the path through it is the same."""
    one, split = (load_vlm(tiny("qwen2_vl"), dtype=torch.float32, device=device) for device in ("cpu", "split"))
    inputs = one.renderer.collate([one.renderer.encode(mixed_samples(1)[0])])
    with torch.no_grad():
        assert torch.equal(one.hidden(inputs), split.hidden(inputs))


def test_folders_that_are_no_model_are_refused(tmp_path, tiny):
    with pytest.raises(ModelError, match=r"config\.json"):
        load_vlm(tmp_path)
    folder = tmp_path / "text"
    shutil.copytree(tiny("qwen2_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vlm(folder)


def test_a_model_with_another_models_processor_is_refused(tmp_path, tiny):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny("idefics3"), folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny("qwen2_vl") / name, folder / name)
    with pytest.raises(ModelError, match="files of this model, got those of a Idefics3Processor"):
        load_vlm(folder)


def test_remote_code_is_not_run_without_being_asked_for(tmp_path, tiny):
    folder = tmp_path / "remote"
    shutil.copytree(tiny("qwen2_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    )
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vlm(folder)
    assert not (tmp_path / "ran").exists()


def test_a_processor_without_its_video_half_is_never_saved(tiny, tmp_path):
    from transformers.utils import is_torchvision_available

    processor = load_processor(tiny("qwen2_vl"))
    if is_torchvision_available():
        processor.save_pretrained(tmp_path)  # it is whole here
        assert (tmp_path / "processor_config.json").exists()
    else:
        with pytest.raises(ModelError, match="must not be saved"):
            processor.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, allowed", [("/no/such/model", 0), ("./model", 0), ("a/b/model", 0), ("no/model", 1)])
@pytest.mark.parametrize("loads", ["load_vlm", "load_processor"])
def test_an_unknown_model_is_asked_for_once_at_most(tmp_path, name, allowed, loads):
    """Of a hub that refuses every connection; transformers would try each of its files several times, for half a minute."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as hub:

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = hub.accept()
                    asked.append(connection.recv(1000))
                    connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        code = f"from genrecal.vlm.loading import {loads}\n"
        code += f"try: {loads}({name!r})\nexcept Exception as error: print(repr(error))"
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.startswith(f"ModelError('{name}: "), done.stdout
    assert ("no such folder" in done.stdout) == (allowed == 0)
    of_model = [request for request in asked if b"model" in request.splitlines()[0]]
    assert len(of_model) <= allowed, of_model
