"""The teacher's tokenizer and chat template, from the files that a cache keeps of it."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from genrecal.errors import DamageError
from genrecal.shards.layout import CACHE_FILE, TEACHER_FOLDER
from genrecal.shards.reader import Cache
from genrecal.vlm.loading import load_renderer
from genrecal.vlm.rendering import PromptOptions, Renderer

MOST_FILE_BYTES = 2**28  # of one file; a tokenizer of 262,144 entries takes 35 MB


def prompt_options(*caches: Cache) -> PromptOptions:
    """How conversations were rendered for caches of one teacher."""
    allowed = {token for cache in caches for token in cache.description["allowed_tokens"]}
    return PromptOptions(template_args=caches[0].description["template_args"], allowed_tokens=tuple(sorted(allowed)))


def teacher_renderer(cache: Cache) -> Renderer:
    """The cached teacher's renderer. Code that comes with the files is never run: the cache may be a stranger's.

    Raises:
        DamageError: a file is missing, or is not the one that the cache was made with.
        ModelError: the files make no processor, or only with code of their own.
    """
    with TemporaryDirectory() as folder:  # the cache may be far away
        for name, digest in cache.description["teacher"]["files_sha256"].items():
            inside = f"{TEACHER_FOLDER}/{Path(name).name}"
            where = cache.store.where(inside)
            try:
                if (size := cache.store.size(inside)) > MOST_FILE_BYTES:
                    raise DamageError(f"{where}: expected at most {MOST_FILE_BYTES} bytes, got {size}")
                content = bytes(cache.store.read(inside))
            except OSError as error:
                raise DamageError(f"{where}: {error.strerror or error}; {CACHE_FILE} lists it") from None
            if (got := hashlib.sha256(content).hexdigest()) != digest:
                raise DamageError(f"{where}: expected sha256 {digest}, got {got}; `genrecal verify` checks the others")
            (Path(folder) / Path(name).name).write_bytes(content)
        return load_renderer(folder, prompt_options(cache))
