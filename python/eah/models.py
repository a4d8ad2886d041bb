"""What differs from one model family to the next: one row each. Everything else is found by a general rule."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn


class UnsupportedModelError(ValueError):
    """EAH cannot act in this model, or not in this layer; the message says why and where it could."""


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`; a field is what some family does differently."""

    image_tokens: tuple[str, ...] = ("image_token_id",)  # attributes of the config, one placeholder token id each


FAMILIES = {
    "internvl": Family(),
    "llava": Family(),
    "qwen2_5_vl": Family(image_tokens=("image_token_id", "video_token_id")),
}

# Text decoders (model_type of the text config) in which a layer without a sliding window sees exactly the earlier real
# keys: their mask can be replaced by causality and the 2-D padding mask, which the kernels read S times faster.
PLAIN_CAUSAL_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3"})


def image_token_ids(model) -> tuple[int, ...]:
    """The ids of the placeholder tokens that the image features replace.

    Raises:
        UnsupportedModelError: the model has no image token, or is of no family in `FAMILIES`.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    ids = [getattr(config, name, None) for name in (family or Family()).image_tokens]
    if any(token is None for token in ids):
        raise UnsupportedModelError(f"{_named(model)} has no image token: EAH needs a vision-language model")
    if family is None:
        raise UnsupportedModelError(f"{_named(model)} is not a supported family; supported: {', '.join(FAMILIES)}")
    return tuple(ids)


def attention_modules(model, layers: tuple[int, ...]) -> list[nn.Module]:
    """The self-attention module of each of these layers of the text decoder.

    Raises:
        ValueError: a layer that the decoder does not have.
        UnsupportedModelError: a layer without exactly one attention map that can be replaced.
    """
    decoder = model.get_decoder()
    count = decoder.config.num_hidden_layers
    found: dict[int, list[nn.Module]] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "config") and _calls_attention_interface(type(module)):
            found.setdefault(index, []).append(module)
    usable = sorted(index for index, modules in found.items() if len(modules) == 1)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers must be within 0..{count - 1} for {_named(model)}, got {layer}")
        if layer not in usable:
            where = f"the first usable layer is {usable[0]}" if usable else "no layer of it has one"
            raise UnsupportedModelError(f"layer {layer} of {_named(model)} has no attention map to replace; {where}")
    return [found[layer][0] for layer in layers]


def attention_namespace(cls: type) -> dict:
    """The globals of the file that an attention class is written in: its attention functions are looked up there."""
    return inspect.unwrap(cls.forward).__globals__


def _calls_attention_interface(cls: type) -> bool:
    names = inspect.unwrap(cls.forward).__code__.co_names
    return "get_interface" in names and "eager_attention_forward" in attention_namespace(cls)


def _named(model) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"
