"""The original InternVL layout: the same tokens as transformers' own layout of the same model."""

import numpy as np
import pytest
import tiny_models
from conftest import conversation, mixed_samples, picture

from genrecal.errors import ModelError, SampleError
from genrecal.samples import decode_image
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


# ----------------------------------------------------------------------------------------------------------------- NVLM-D


@pytest.fixture(scope="module")
def nvlm(tiny, tmp_path_factory):
    native = tiny("nvlm_d_native_wide")
    folder = tiny_models.make_original(native, tmp_path_factory.mktemp("nvlm") / "model", nvlm=True)
    return Renderer(load_processor(folder, trust_remote_code=True))


def test_every_tile_of_nvlm_d_has_its_tag(nvlm):
    pad = "<|vision_pad|>" * nvlm.processor.tokens_a_tile
    for sample in mixed_samples(4):
        encoded = nvlm.encode(sample)
        text = nvlm.tokenizer.decode(encoded.input_ids)
        for image in sample.images:
            tiles = nvlm.processor.num_tiles(*decode_image(image.read()).size)
            tags = [*(f"<tile_{number}>" for number in range(1, tiles)), "<tile_global_thumbnail>"]
            run = f"<Image>{''.join(tag + pad for tag in tags)}</Image>\n"
            assert run in text
            text = text.replace(run, "<image>\n", 1)
        assert "Image>" not in text and "vision_pad" not in text
        assert encoded.answers[0].ids.tolist() == encoded.input_ids[slice(*encoded.segments()[1][:2])].tolist()


def test_what_stands_around_a_picture_of_nvlm_d_is_tokenised_by_itself(nvlm):
    """As vLLM does it, though the tokenizer would join ">" and the line break."""
    joined = nvlm.tokenizer("</Image>\n")["input_ids"]
    apart = [*nvlm.tokenizer("</Image>")["input_ids"], *nvlm.tokenizer("\n")["input_ids"]]
    assert joined != apart
    sample = mixed_samples(1)[0]
    ids, raw = nvlm.encode(sample).input_ids.tolist(), nvlm.raw_ids(sample.messages)
    assert any(ids[place : place + len(apart)] == apart for place in range(len(ids)))
    placeholder = nvlm.tokenizer("<image>\n")["input_ids"]
    places = [place for place in range(len(raw)) if raw[place : place + len(placeholder)] == placeholder]
    assert len(places) == len(sample.images) == 1
    rest = raw[places[0] + len(placeholder) :]
    assert raw[: places[0]] == ids[: places[0]] and rest == ids[-len(rest) :]


def test_nvlm_d_is_no_student(tiny, tmp_path):
    folder = tiny_models.make_original(tiny("nvlm_d_native_wide"), tmp_path / "model", nvlm=True)
    with pytest.raises(ModelError, match="no class for the original NVLM_D layout; take another student, or cache it"):
        load_vlm(folder)
