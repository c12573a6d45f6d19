"""Pictures' embeddings, kept in memory while vision encoder and projector are frozen (stages 1 and 2)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class VisionCache:
    """What the body's `get_image_features` makes of a sample's pictures, by the sample's key, in the CPU's memory.

    A sample's pictures are encoded by themselves, whatever else is in the batch, so that what is kept does not depend on
    the batch that it was met in. Nothing is thrown out when the room is used up: of samples that come once an epoch in an
    order drawn anew, those that came first are as likely to be asked for next as any others.

    Args:
        body: a VLM's body with transformers' usual `get_image_features`.
        max_bytes: kept at most.
    """

    def __init__(self, body: Any, max_bytes: int):
        self.body, self.max_bytes = body, max_bytes
        self.num_bytes = 0
        self._kept: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @contextlib.contextmanager
    def serving(
        self, keys: Sequence[str], tensors: dict[str, torch.Tensor], rows: Sequence[dict[str, slice]]
    ) -> Iterator[None]:
        """The body takes its pictures' embeddings from here while it runs on a batch.

        Args:
            keys: of the batch's samples. What stands after them in the batch is encoded and not kept.
            tensors: the batch as it is given to the body.
            rows: of each sample in it, see `Renderer.picture_rows`.
        """
        original = self.body.get_image_features
        names = {id(tensor): name for name, tensor in tensors.items()}
        device = next(iter(tensors.values())).device

        def features(*args: Any, **kwargs: Any) -> Any:
            outputs = []
            for place, own in enumerate(rows):
                if not own:
                    continue

                def cut(value: Any, own: dict[str, slice] = own) -> Any:
                    name = names.get(id(value))
                    return value[own[name]] if name in own else value

                key = keys[place] if place < len(keys) else None
                kept = self._kept.get(key) if key is not None else None
                if kept is None:
                    with torch.no_grad():
                        made = original(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
                    kept = {name: made[name] for name in ("pooler_output", "deepstack_features") if name in made}
                    if key is not None:
                        self._keep(key, kept)
                outputs.append(kept)
            return _Features({name: _joined([one[name] for one in outputs], device) for name in outputs[0]})

        self.body.get_image_features = features
        try:
            yield
        finally:
            del self.body.get_image_features  # the class's own is behind it

    def _keep(self, key: str, output: dict[str, Any]) -> None:
        size = sum(tensor.nbytes for tensor in _tensors(output))
        if self.num_bytes + size <= self.max_bytes:
            self.num_bytes += size
            self._kept[key] = {name: _moved(value, torch.device("cpu")) for name, value in output.items()}


class _Features(dict[str, Any]):
    """Stands for transformers' output object: entries are attributes too."""

    __getattr__ = dict.__getitem__


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _moved(value: Any, device: torch.device) -> Any:
    """The same on a device, in memory of its own: a row of a batch's output would keep all of it."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [_moved(part, device) for part in value]


def _joined(values: Sequence[Any], device: torch.device) -> Any:
    """Samples' embeddings one after another, in the family's own form.

    A tensor `[pictures or tiles, tokens, D]`; a sequence of pictures' `[tokens, D]`; or one of these for each layer that
    the decoder takes embeddings in at (Qwen3-VL's deepstack).
    """
    if isinstance(values[0], torch.Tensor):
        return torch.cat([value.to(device) for value in values])
    if values[0] and not isinstance(values[0][0], torch.Tensor):
        return [_joined(layer, device) for layer in zip(*values, strict=True)]
    return [tensor.to(device) for value in values for tensor in value]
