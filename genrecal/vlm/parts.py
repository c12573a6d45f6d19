"""Which parameters of a vision-language model are its vision encoder, its projector and its language model.

Told by the structure, not by a family's names: the language model is what transformers returns for `get_decoder`, with its
embeddings and head; a vision encoder is a submodule that transformers builds from a vision config; what else an image goes
through on its way into the language model is the projector, inside the encoder's module (Qwen's merger) or beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from genrecal.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of a model's parameters, each in one part.

    Args:
        language: of the decoder, the embeddings and the head. other: of encoders of audio, which no sample here has.
        routers, experts: those in `language` that choose a token's experts, and the experts that are chosen.
        encoders: names of the modules that are vision encoders, projector inside included.
    """

    encoder: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    other: tuple[str, ...]
    routers: frozenset[str]
    experts: frozenset[str]
    encoders: tuple[str, ...]


def find_parts(model: Any, *, path: str) -> Parts:
    """The parts of a model, with weights or on the device "meta".

    Raises ModelError where the config describes a vision encoder and no submodule is one, or there is no decoder.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or head is None:
        raise ModelError(f"{path}: {type(model).__name__} has no decoder and head of its own")
    language = {id(p) for module in (decoder, head, model.get_input_embeddings()) for p in module.parameters()}
    config = model.config
    vision = tuple({type(getattr(config, name)) for name in _sub_configs(config) if "vision" in name})
    encoders = dict(_outermost(model, vision))
    if vision and not encoders:
        raise ModelError(
            f"{path}: no module of {type(model).__name__} is built from its vision config alone, so which parameters are "
            "its vision encoder is not known; take another student"
        )
    width = head.weight.shape[1]
    frozen: set[int] = set()
    for encoder in encoders.values():
        frozen |= {id(p) for p in encoder.parameters()} - {id(p) for p in _projector_inside(encoder, width)}
    parts: dict[str, list[str]] = {"encoder": [], "projector": [], "language": [], "other": []}
    for name, parameter in model.named_parameters():
        of = "encoder" if id(parameter) in frozen else "projector"
        if id(parameter) in language:
            of = "language"
        elif any("audio" in part for part in name.split(".")):
            of = "other"
        parts[of].append(name)
    routers, experts = _mixtures(model)
    found = {name: tuple(names) for name, names in parts.items()}
    return Parts(encoders=tuple(encoders), routers=routers, experts=experts, **found)


def _mixtures(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the parameters of routers, which have a row for each expert beside them, and of experts."""
    routers: set[str] = set()
    experts: set[str] = set()
    for name, module in model.named_modules():
        chosen = getattr(module, "experts", None)
        if not isinstance(chosen, nn.Module) or not any(True for _ in chosen.parameters()):
            continue
        count = len(chosen) if isinstance(chosen, nn.ModuleList) else next(chosen.parameters()).shape[0]
        experts |= {f"{name}.experts.{key}" for key, _ in chosen.named_parameters()}
        for child, part in module.named_children():
            rows = [p.shape[0] for p in part.parameters() if p.dim() == 2]
            if ("router" in child or child == "gate") and count in rows:
                routers |= {f"{name}.{child}.{key}" for key, _ in part.named_parameters()}
    return frozenset(routers), frozenset(experts)


def _sub_configs(config: Any) -> list[str]:
    return [name for name, value in vars(config).items() if hasattr(value, "to_dict")]


def _outermost(model: nn.Module, kinds: tuple[type, ...], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules that transformers builds from a config of one of these kinds."""
    from transformers import PreTrainedModel

    for name, module in model.named_children():
        if kinds and isinstance(module, PreTrainedModel) and isinstance(module.config, kinds):
            yield prefix + name, module
        else:
            yield from _outermost(module, kinds, f"{prefix}{name}.")


def _projector_inside(encoder: nn.Module, width: int) -> Iterator[nn.Parameter]:
    """Parameters of an encoder's module that come after its blocks and lead to the language model's width."""
    stacks = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(stacks, key=len, default=None)  # the first of equally long ones
    passed = False
    for child in encoder.children():
        if blocks is not None and any(module is blocks for module in child.modules()):
            passed = True
        elif passed and any(p.dim() > 1 and p.shape[0] == width for p in child.parameters()):
            yield from child.parameters()
