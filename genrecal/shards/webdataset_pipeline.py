"""A cache as a pipeline of the webdataset library, for training loops that are built on it."""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from genrecal.errors import DamageError
from genrecal.samples import decode_image
from genrecal.shards.index import read_shard_manifest
from genrecal.shards.layout import tar_name
from genrecal.shards.manifest import CACHED
from genrecal.shards.reader import MAX_CONVERSATION_BYTES, Cache
from genrecal.shards.record import answer_rows, read_table
from genrecal.shards.storage import Store
from genrecal.shards.strict_json import strict_json

if TYPE_CHECKING:
    import webdataset

READ_AHEAD = 2**22  # bytes of a remote tar that one request reads


def webdataset_pipeline(cache: Cache) -> "webdataset.DataPipeline":
    """Read a cache with the webdataset library: a `DataPipeline` that yields decoded samples.

    Finished shards are divided among ranks (`split_by_node`) and loader workers (`split_by_worker`); samples come in the
    order of the shards. The question tier is not read. Append stages with `compose`, such as
    `compose(webdataset.shuffle(1000))`.

    A sample is a dict of

    - `__key__`: its key; `__url__`: its tar;
    - `json`: the conversation, as `KEY.json` has it;
    - `images`: a list of `PIL.Image.Image`, mode RGB; an image part of the conversation gives the index;
    - `answer`: `genrecal.shards.record.AnswerRows`: `hidden` (float32 `[R, D]`), `topk_ids` (int32 `[R, k]`),
      `topk_logits` (float32 `[R, k]`), `logsumexp` (float32 `[R]`), `target_id` (int32 `[R]`) and others.

    Iterating raises DamageError for a tar that cannot be read or is not what its manifest says.
    """
    import webdataset

    shards = [{"url": cache.store.where(tar_name("samples", shard)), "shard": shard} for shard in cache.shards]
    stages = (webdataset.split_by_node, webdataset.split_by_worker, _ReadShards(cache.store))
    return webdataset.DataPipeline([shards], *stages)


@dataclass(frozen=True)
class _ReadShards:
    """A stage of the pipeline: shards -> decoded samples. It can be pickled, as loader workers need."""

    store: Store

    def __call__(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for source in shards:
            manifest, _ = read_shard_manifest(self.store, source["shard"])
            rows = {row["key"]: row for row in manifest.to_pylist() if row["status"] == CACHED}
            count = 0
            try:
                with self.store.open(tar_name("samples", source["shard"]), ahead=READ_AHEAD) as stream:
                    for sample in group_by_keys(tar_file_expander([source | {"stream": stream}]), lcase=False):
                        yield _decode(sample, rows.get(sample["__key__"]))
                        count += 1
            except (tarfile.TarError, OSError) as error:
                raise DamageError(f"{source['url']}: cannot be read: {error.args[0]}") from None
            if count != len(rows):
                raise DamageError(
                    f"{source['url']}: expected {len(rows)} samples, got {count}; `genrecal verify` says more"
                )


def _decode(sample: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    """A sample's members compared with its manifest row, and decoded."""
    key, where = sample["__key__"], sample["__url__"]
    members = [member for member in row["members"] if member["tier"] == "samples"] if row is not None else []
    parts: dict[str, Any] = {
        name: sample.get(name) for name in (member["name"].removeprefix(f"{key}.") for member in members)
    }
    for member, (name, data) in zip(members, parts.items(), strict=True):
        if data is None or xxhash.xxh3_64_intdigest(data) != member["xxh3"]:
            raise DamageError(f"{where}: member {key}.{name}: missing or corrupt; `genrecal verify` says more")
    if row is None or len(parts) != len(sample) - 2:
        raise DamageError(f"{where}: sample {key}: expected members {sorted(parts)}, got {sorted(sample)[2:]}")
    images = [data for name, data in parts.items() if name[0].isdigit()]
    arrow = f"{where}: member {key}.answer.arrow"
    return {
        "__key__": key,
        "__url__": where,
        "json": strict_json(parts["json"], MAX_CONVERSATION_BYTES),
        "images": [decode_image(data) for data in images],
        "answer": answer_rows(read_table(parts["answer.arrow"], where=arrow), where=arrow),
    }
