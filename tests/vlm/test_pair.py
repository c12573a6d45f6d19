"""`genrecal pair`: token types of tiny models of the real classes, and what follows from them."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation, picture
from rich.console import Console

from genrecal.cli import main
from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.objectives import OBJECTIVES
from genrecal.objectives.pairs import Coverage, coverage, findings
from genrecal.vlm.loading import image_token_id, load_renderer, load_vlm
from genrecal.vlm.pair import TEXT, Pair, _ids_between, _pieces, compare_pair, pair_report

Tiny = Callable[[str], Path]
ANY = Coverage(positions=1, compared=1, mass=1.0)
FEW = {"p": picture(0, 300, 120)}


def held(pair: Pair) -> dict[str, bool]:
    return {finding.name: finding.holds for finding in (*pair.conditions, *findings(pair, ANY))}


def printed(pair: Pair) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(pair_report(pair, findings(pair, ANY)))
    return console.export_text()


def without_weights(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


def reordered(folder: Path, to: Path) -> Path:
    """The same tokenizer, with the ids of two ordinary entries exchanged: " the" and "the", say."""
    without_weights(folder, to)
    content = json.loads((to / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (to / "tokenizer.json").write_text(json.dumps(content))
    return to


def test_one_family_can_be_distilled_in_every_way_without_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Qwen2-VL-72B and 2B of the paper: one tokenizer, heads padded unlike."""
    teacher = without_weights(tiny("qwen2_vl_padded_head"), tmp_path / "teacher")
    pair = compare_pair(teacher, tiny("qwen2_vl"), pictures=FEW)
    assert pair.traditional and all(held(pair).values())
    assert (pair.teacher.head_rows, pair.student.head_rows) == (pair.student.vocabulary + 24, pair.student.vocabulary)
    shared = f"over the {pair.student.vocabulary} ids in common of the heads' {pair.teacher.head_rows} and"
    assert [shared in finding.why for finding in findings(pair, ANY)] == [o.one_tokenizer for o in OBJECTIVES.values()]
    assert pair.same_ids == pair.same_splits == len(pair.teacher.ids) == len(pair.aligned)
    assert pair.common_ids == pair.common_entries <= pair.teacher.vocabulary
    assert pair.teacher.name == "teacher"


def test_another_index_order_alone_prevents_it(tiny: Tiny, tmp_path: Path) -> None:
    pair = compare_pair(tiny("qwen2_vl"), reordered(tiny("qwen2_vl"), tmp_path / "student"), pictures=FEW)
    assert not pair.traditional
    assert held(pair) == {
        "vocabulary size": True, "token splits": True, "index order": False, "image tokens": True,
        **{name: not objective.one_tokenizer for name, objective in OBJECTIVES.items()},
    }  # fmt: skip
    assert pair.common_entries - pair.common_ids == 2 and 0 < pair.same_ids < pair.same_splits


def test_another_number_of_image_tokens_alone_prevents_it_but_answers_still_pair(tiny: Tiny, tmp_path: Path) -> None:
    student = without_weights(tiny("qwen2_vl"), tmp_path / "student")
    for file in student.glob("*processor_config.json"):
        content = json.loads(file.read_text())
        settings = content.get("image_processor", content)
        settings["size"]["longest_edge"] //= 4
        file.write_text(json.dumps(content))
    pair = compare_pair(tiny("qwen2_vl"), student, pictures=FEW)
    found = held(pair)
    assert not pair.traditional and found["kl"]
    assert [name for name, holds in found.items() if not holds] == ["image tokens"]
    counts = pair.teacher.image_tokens, pair.student.image_tokens
    assert pair.conditions[-1].why == f"p: {counts[0]['p']} and {counts[1]['p']}" and counts[0]["p"] > counts[1]["p"]


def test_other_tokenizers_share_byte_positions(tiny: Tiny) -> None:
    """Byte-level BPE and sentencepiece with another vocabulary: nothing traditional, and what is shared adds up."""
    pair = compare_pair(tiny("qwen2_vl"), tiny("internvl_llama"), pictures=FEW)
    assert [name for name, holds in held(pair).items() if holds] == [
        name for name, objective in OBJECTIVES.items() if not objective.one_tokenizer
    ]
    data = TEXT.encode()
    assert pair.num_bytes == len(data) == pair.teacher.ends[-1] == pair.student.ends[-1] == pair.aligned[-1]
    spans = [set(zip([0, *side.ends], side.ends, strict=False)) for side in (pair.teacher, pair.student)]
    assert pair.same_splits == len(spans[0] & spans[1]) < min(map(len, spans))
    assert pair.aligned == [end for end in pair.teacher.ends if end in pair.student.ends]
    pieces = _pieces(pair)
    assert "".join(data[a:b].decode("utf-8", "surrogateescape") for a, b, _ in pieces).encode(
        "utf-8", "surrogateescape"
    ) == data  # fmt: skip
    for side in (pair.teacher, pair.student):
        assert [token for a, b, _ in pieces for token in _ids_between(side, a, b)] == side.ids
    split = [(a, b) for a, b, alike in pieces if not alike]
    assert split and all(
        len(_ids_between(pair.teacher, a, b)) + len(_ids_between(pair.student, a, b)) > 2 for a, b in split
    )


def test_what_byte_kl_compares_of_a_text(tiny: Tiny) -> None:
    """Everything with one tokenizer; characters that the student writes byte by byte are in no cell."""
    qwen, llama = (load_renderer(tiny(family)) for family in ("qwen2_vl", "internvl_llama"))
    for teacher, student, share in ((qwen, qwen, 1.0), (llama, qwen, 1.0), (qwen, llama, 0.622)):
        positions = len(student.byte_tokenizer(TEXT).ids) + 1
        found = coverage(teacher, student, TEXT)
        assert (found.positions, found.compared, round(found.mass, 3)) == (positions, positions, share)
        assert coverage(teacher, student, "What is the total of 7?").mass == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl_llama", "idefics3", "gemma3", "llava_onevision"])
def test_ids_rows_and_image_tokens_are_the_models_own(tiny: Tiny, family: str) -> None:
    text, size = "What is shown? 3 of 7 中", (250, 90)
    types = compare_pair(tiny(family), tiny("qwen2_vl"), text=text, pictures={"p": picture(1, *size)}).teacher
    vlm = load_vlm(tiny(family), dtype=torch.float32)
    assert types.head_rows == vlm.head.weight.shape[0]
    assert types.vocabulary == len(vlm.renderer.tokenizer)
    encoded = vlm.renderer.encode(conversation(("Hi", text)))
    assert types.ids == encoded.answers[0].ids.tolist()[:-1]
    assert types.prompt == vlm.renderer.tokenizer.decode(encoded.input_ids[: encoded.question_lengths[0]])
    messages = conversation(("Hi", "a"), images={0: 1}).messages
    inputs = vlm.renderer.encode_messages(messages, [picture(1, *size)]).inputs
    placeholder = image_token_id(vlm.model.config)
    assert types.image_tokens == {"p": int((inputs["input_ids"] == placeholder).sum())}
    features = []
    vlm.model.get_input_embeddings().register_forward_hook(lambda _, __, out: features.append(out.detach().clone()))
    with torch.no_grad():
        vlm.model(**vlm.on_device(inputs), use_cache=False)  # refuses another number of visual embeddings
    assert types.image_positions["p"] >= types.image_tokens["p"] > 0 and features


def test_a_model_without_pictures(tiny: Tiny, tmp_path: Path) -> None:
    """The text half of a tiny model, as a folder of its own."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("qwen2_vl"))
    tokenizer.save_pretrained(tmp_path / "text")
    settings = json.loads((tmp_path / "text/tokenizer_config.json").read_text())
    del settings["processor_class"]
    (tmp_path / "text/tokenizer_config.json").write_text(json.dumps(settings))
    transformers.Qwen2Config(vocab_size=396, hidden_size=32).save_pretrained(tmp_path / "text")
    pair = compare_pair(tmp_path / "text", tiny("qwen2_vl"), pictures=FEW)
    assert pair.teacher.image_tokens is None and pair.conditions[-1].why == "the teacher takes no pictures"
    assert held(pair)["genrecal"] and not pair.traditional and "takes none" in printed(pair)
    both = compare_pair(tmp_path / "text", tmp_path / "text")
    assert both.traditional and both.conditions[-1].why == "neither takes pictures"


def test_what_cannot_be_compared_is_one_named_error(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("qwen2_vl")
    with pytest.raises(UsageError, match="--text: expected some text"):
        compare_pair(model, model, text="")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: expected a model folder, found no config.json"):
        compare_pair(tmp_path / "empty", model)
    bare = without_weights(model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="bare: its processor cannot be loaded"):
        compare_pair(model, bare)
    silent = without_weights(model, tmp_path / "silent")
    for file in silent.glob("*"):
        if file.suffix == ".json":
            content = json.loads(file.read_text())
            content.pop("chat_template", None)
            file.write_text(json.dumps(content))
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="silent: the model has no chat template"):
        compare_pair(silent, model)
    with pytest.raises(SampleError, match="qwen2_vl: picture strip: the processor refuses"):
        compare_pair(model, model, pictures={"strip": picture(0, 2000, 2)})


def test_the_command_prints_what_was_found(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["pair", str(tiny("qwen2_vl")), str(tiny("internvl_qwen2")), *map(str, args)])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    picture(0, 130, 70).save(tmp_path / "cat.png")
    status, out, err = run("--text", "What is\nthe total? 図", "--image", tmp_path / "cat.png", "--json")
    found = json.loads(out)
    assert (status, err, found["traditional"]) == (0, "", False)
    expected = compare_pair(
        tiny("qwen2_vl"), tiny("internvl_qwen2"), text=found["text"], pictures={"p": picture(0, 130, 70)}
    )
    assert found["byte_kl"]["compared"] <= found["byte_kl"]["positions"] == len(expected.student.ids) + 1
    assert found["teacher"]["ids"] == expected.teacher.ids and found["aligned"] == expected.aligned
    assert found["student"]["image_tokens"] == {"cat.png 130x70": expected.student.image_tokens["p"]}

    _, out, _ = run("--text", "What is\nthe total? 図", "--image", tmp_path / "cat.png")
    words = " ".join(out.split())
    assert "traditional distillation: not possible" in words and "kl no needs one tokenizer" in words
    assert f"image tokens, cat.png 130x70 {expected.teacher.image_tokens['p']} (prompt + " in words
    assert (
        f"compares {found['byte_kl']['compared']} of the student's {found['byte_kl']['positions']} positions" in words
    )
    assert "What is\\n" in out and "special tokens of the teacher alone: <|vision_start|>" in out

    (tmp_path / "broken.png").write_bytes(b"no picture")
    status, _, err = run("--image", tmp_path / "broken.png")
    assert status == 2 and err.count("\n") == 1 and "broken.png: image cannot be decoded" in err
    status, _, err = run("--image", tmp_path / "gone.png")
    assert status == 2 and "gone.png: No such file" in err


def test_the_report_shows_the_default_pictures_and_fits_a_terminal(tiny: Tiny) -> None:
    pair = compare_pair(tiny("qwen2_vl"), tiny("qwen2_vl"))
    text = printed(pair)
    for words in ("square 448x448", "strip 300x1200", "traditional distillation: possible", "applies", "👍"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100 and "≠" not in text
