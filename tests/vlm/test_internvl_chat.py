"""The original InternVL layout: the same tokens as transformers' own layout of the same model."""

import numpy as np
import pytest
import tiny_models
from conftest import conversation, mixed_samples, picture

from genrecal.errors import ModelError, SampleError
from genrecal.vlm.internvl_chat import InternVLChatProcessor
from genrecal.vlm.loading import load_processor, load_vlm
from genrecal.vlm.rendering import Renderer


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny_models.make_original(tiny("internvl_wide"), tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(load_processor(folder, trust_remote_code=True))


@pytest.fixture(scope="module")
def native(tiny):
    return Renderer(load_processor(tiny("internvl_wide")))


def test_tokens_are_those_of_the_native_layout(renderer, native):
    for sample in mixed_samples(8):
        want, got = native.encode(sample), renderer.encode(sample)
        assert np.array_equal(want.input_ids, got.input_ids)
        assert want.segments() == got.segments() and set(got.inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "size", [(56, 56), (10, 300), (300, 10), (57, 56), (112, 56), (200, 190), (640, 480), (90, 170)]
)
def test_tiles_of_pictures_of_every_shape(renderer, native, size):
    from PIL import Image

    processor = native.processor
    inputs = processor(text=["<IMG_CONTEXT>"], images=[[Image.new("RGB", size)]])
    assert renderer.processor.num_tiles(*size) == len(inputs["pixel_values"])


def test_raw_ids_have_one_placeholder_a_picture_as_text_of_its_own(renderer):
    for sample in mixed_samples(4):
        raw, whole = renderer.raw_ids(sample.messages), renderer.encode(sample).input_ids.tolist()
        placeholder = renderer.tokenizer("<image>")["input_ids"]
        text = renderer.tokenizer.decode(raw)
        assert text.count("<image>") == len(sample.images)
        places = [i for i in range(len(raw)) if raw[i : i + len(placeholder)] == placeholder]
        assert len(places) == len(sample.images)
        context = renderer.processor.image_token_id
        assert [t for t in whole if t != context][-5:] == raw[-5:]  # the answer's own tokens


def test_raw_ids_of_other_families_are_their_unexpanded_prompts(tiny):
    for family in ("qwen2_vl", "internvl_wide"):
        renderer = Renderer(load_processor(tiny(family)))
        for sample in mixed_samples(4):
            raw, whole = renderer.raw_ids(sample.messages), renderer.encode(sample).input_ids.tolist()
            token = renderer.processor.image_token_id
            assert raw.count(token) == len(sample.images)
            if not sample.images:
                assert raw == whole


def test_a_text_that_speaks_of_images_is_refused(renderer):
    with pytest.raises(SampleError, match="holds 2 times <image>, expected 1"):
        renderer.encode(conversation(("what is <image>?", "a"), images={0: 1}))


def test_fixed_tiles_and_no_thumbnail(renderer, folder):
    import json

    config = json.loads((folder / "config.json").read_text())
    fixed = InternVLChatProcessor(renderer.tokenizer, config | {"dynamic_image_size": False})
    assert fixed.num_tiles(*picture(width=500, height=40).size) == 1
    bare = InternVLChatProcessor(renderer.tokenizer, config | {"use_thumbnail": False})
    assert bare.num_tiles(112, 56) == 2 and renderer.processor.num_tiles(112, 56) == 3


def test_transformers_cannot_run_it(folder):
    with pytest.raises(
        ModelError, match="no class for the original internvl_chat layout.*genrecal convert.*--backend vllm"
    ):
        load_vlm(folder)
