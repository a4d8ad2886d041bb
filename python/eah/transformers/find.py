"""Where a model keeps what EAH needs: its family, its image tokens, the attention modules of its decoder."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from eah.transformers.families import ENCODER, FAMILIES, INDICES, POSITION_BIAS, Differs, Refused, Works
from eah_kernels import MAX_HEAD_DIM

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")
NO_MAP = "it has no attention map, or more than one"


class UnsupportedModelError(ValueError):
    """EAH cannot act in this model, or not in this layer; the message says why and where it could."""


def family_of(model) -> Works | None:
    """The model's row, None for a family that is in none.

    Raises:
        UnsupportedModelError: the family is refused, or the model is an encoder-decoder.
    """
    family = FAMILIES.get(model.config.model_type)
    if isinstance(family, Refused):
        raise UnsupportedModelError(f"{named(model)} cannot be enabled: {family.why}")
    configs = (model.config, model.config.get_text_config(decoder=True))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModelError(f"{named(model)} cannot be enabled: {ENCODER}")
    return family


def image_token_ids(model, differs: Differs, video: bool) -> tuple[int, ...]:
    """The ids of the placeholder tokens that the image (and video) features replace; () where a mask marks them.

    Raises:
        UnsupportedModelError: the model has no image token.
    """
    if differs.position_mask:
        return ()
    ids = placeholder_ids(model.config, video)
    if not ids:
        raise UnsupportedModelError(f"{named(model)} has no image token: EAH needs a vision-language model")
    return ids


def placeholder_ids(config, video: bool) -> tuple[int, ...]:
    """As `image_token_ids`, by what the config names; () where it names none."""
    configs = [config, getattr(config, "vision_config", None)]
    video_token = _first(configs, VIDEO_TOKEN_NAMES)
    image_token = _first(configs, IMAGE_TOKEN_NAMES)
    known = [video_token if image_token is None else image_token, video_token if video else None]
    return tuple(dict.fromkeys(token for token in known if token is not None))


def attention_modules(model, layers: tuple[int, ...], may_move: bool = False) -> list[nn.Module]:
    """The self-attention module of each of these layers of the text decoder.

    `may_move`: take the first usable layer in place of one that has no map.

    Raises:
        ValueError: a layer that the decoder does not have.
        UnsupportedModelError: a layer without exactly one attention map that can be replaced.
    """
    usable, reasons = modules_with_maps(model)
    if not usable:
        why = "".join(f": {reason}" for reason in sorted(set(reasons.values()) - {NO_MAP}))
        raise UnsupportedModelError(f"no layer of {named(model)} has an attention map that can be replaced{why}")
    first = min((index for index in usable if index >= 1), default=min(usable))
    if may_move:
        layers = tuple(layer if layer in usable else first for layer in layers)
    count = _layer_count(model)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers must be within 0..{count - 1} for {named(model)}, got {layer}")
        if layer not in usable:
            why = "" if reasons[layer] == NO_MAP else f" ({reasons[layer]})"
            raise UnsupportedModelError(
                f"layer {layer} of {named(model)} has no attention map to replace{why}; "
                f"the first usable layer is {first}"
            )
    return [usable[layer] for layer in layers]


def modules_with_maps(model) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """By layer of the text decoder: the self-attention module whose map can be replaced, or why there is none."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "config") and _calls_attention_interface(type(module)):
            found.setdefault(index, []).append(module)
    single = {index: modules[0] for index, modules in found.items() if len(modules) == 1}
    reasons = {index: why for index, module in single.items() if (why := _why_not_usable(module))}
    usable = {index: module for index, module in single.items() if index not in reasons}
    without = {index: NO_MAP for index in range(_layer_count(model)) if index not in single}
    return dict(sorted(usable.items())), dict(sorted({**reasons, **without}.items()))


def query_heads(module: nn.Module) -> int:
    """The query heads of an attention module, those that other processes compute included."""
    return getattr(module, "num_heads", None) or _layer_config(module).num_attention_heads


def head_dims(module: nn.Module) -> tuple[int, int]:
    """The head dims of an attention module's keys and of its values."""
    config = _layer_config(module)
    key = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    key = key or config.hidden_size // config.num_attention_heads
    return key, getattr(module, "v_head_dim", None) or key


def attention_namespace(cls: Any) -> dict:
    """The globals of the file that an attention class is written in: its attention functions are looked up there."""
    forward = cls.forward
    while hasattr(forward, "__wrapped__"):  # as inspect.unwrap does, in a third of its time: this is once per forward
        forward = forward.__wrapped__
    return forward.__globals__


def named(model) -> str:
    """The model's class and family, for messages."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def _layer_count(model) -> int:
    return model.get_decoder().config.get_text_config(decoder=True).num_hidden_layers


def _first(configs, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for config in configs for name in names)
    return next((value for value in values if value is not None), None)


def _calls_attention_interface(cls: Any) -> bool:
    names = inspect.unwrap(cls.forward).__code__.co_names
    return "get_interface" in names and "eager_attention_forward" in attention_namespace(cls)


def _layer_config(module: nn.Module):
    """The config of the module's layer, in models whose layers differ."""
    per_layer = getattr(module.config, "per_layer_config", None)
    return module.config if per_layer is None else per_layer[module.layer_idx]


def _why_not_usable(module: nn.Module) -> str | None:
    if getattr(module, "indexer", None) is not None or getattr(module, "skip_topk", False):
        return INDICES
    if getattr(module, "is_kv_shared_layer", False):
        return "it has no keys of its own: it reuses those of an earlier layer"
    if getattr(module, "sinks", None) is not None:
        return "its attention has sinks of its own"
    if _names_argument(type(module), "position_bias"):
        return POSITION_BIAS
    if max(head_dims(module)) > MAX_HEAD_DIM:
        return f"its head dim is {max(head_dims(module))}, the largest possible is {MAX_HEAD_DIM}"
    return None


def _names_argument(cls: Any, name: str) -> bool:
    """Whether the forward passes a keyword argument of this name on: such names are among its constants."""
    constants = inspect.unwrap(cls.forward).__code__.co_consts
    return any(name == constant or (isinstance(constant, tuple) and name in constant) for constant in constants)
