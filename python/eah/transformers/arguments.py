"""What transformers passes to a layer's attention, as `eah_kernels` takes it: masks, keys and flags."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eah.method import Call
from eah.transformers.families import PLAIN_CAUSAL_DECODERS
from eah.transformers.forward import FLASH, Forward
from eah.transformers.prompt import Prompt
from eah_kernels import Scoring, shows

if TYPE_CHECKING:
    from eah.transformers.layer import SwappedLayer


def mask_is_known(forward: Forward) -> bool:
    implementation, mask = forward.implementation, forward.mask
    if mask is None:
        return True
    (batch, heads, q_len, _), kv_len, shape = forward.query.shape, forward.key.shape[2], tuple(mask.shape)
    if implementation in FLASH:  # padding only
        return isinstance(mask, Tensor) and len(shape) == 2 and shape[0] == batch and q_len <= shape[1] <= kv_len
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (q_len, kv_len)
    if not isinstance(mask, Tensor):  # a BlockMask
        return implementation == "flex_attention" and fits
    return fits and (mask.dtype == torch.bool or mask.is_floating_point())


def call_of_prompt(layer: SwappedLayer, forward: Forward, prompt: Prompt) -> Call:
    """What arrived with a whole prompt, as `eah_attention` takes it.

    Keys beyond S belong to a static cache that was empty: unwritten, and cut off.
    """
    query, q_len = forward.query, forward.query.shape[2]
    key, value = forward.key[:, :, :q_len], forward.value[:, :, :q_len]
    return Call(*for_the_kernels(query, key, value), _scoring_of_prompt(layer, forward, prompt))


def _scoring_of_prompt(layer: SwappedLayer, forward: Forward, prompt: Prompt) -> Scoring:
    """A mask that arrives holds everything that the model hides, causality and sliding window included. Where it can
    only be causality and padding, the (B, S) padding mask says the same. Only flash attention is told of padding,
    causality and window one by one.
    """
    mask, q_len, device = forward.mask, forward.query.shape[2], forward.query.device
    if forward.implementation in FLASH:
        padding = None if mask is None else mask[:, :q_len].bool()
        return _scoring(forward, padding, _is_causal(layer, forward), forward.keywords.get("sliding_window"))
    if mask is None:  # sdpa is then causal by its flag; eager and flex see everything
        return _scoring(forward, None, forward.implementation == "sdpa" and _is_causal(layer, forward))
    if layer.settings.tested and plain_causal(layer.config, forward.keywords) and not prompt.own_mask:
        padding = prompt.padding_mask
        if padding is None or tuple(padding.shape) == tuple(prompt.image_mask.shape):
            return _scoring(forward, None if padding is None else padding.to(device), True)
    return _scoring(forward, _dense(mask, device)[..., :q_len], False)


def sequences_are_apart(layer: SwappedLayer, forward: Forward, prompt: Prompt) -> bool:
    """Whether each of a prompt's packed sequences sees itself alone, and causally."""
    sequences, mask = prompt.sequences, forward.mask
    if sequences is None or forward.has_cache:
        return False
    if forward.implementation in FLASH:  # it has another sign of a sequence's begin: the lowest position
        return mask is None and sequences.from_zero and _is_causal(layer, forward)
    made_for_it = layer.settings.tested and plain_causal(layer.config, forward.keywords) and mask is not None
    return made_for_it and sequences.are_apart(_dense(mask, forward.query.device))


def call_on_cache(layer: SwappedLayer, forward: Forward) -> Call:
    """What arrived with a forward on a cache. The mask says which keys are written; without one, all are.

    Flash attention's mask ends with the written keys.
    """
    key, value, mask = forward.key, forward.value, forward.mask
    if forward.implementation in FLASH:
        if mask is not None:
            written = mask.shape[1]
            key, value, mask = key[:, :, :written], value[:, :, :written], mask.bool()
        scoring = _scoring(forward, mask, _is_causal(layer, forward), forward.keywords.get("sliding_window"))
    else:
        scoring = _scoring(forward, None if mask is None else _dense(mask, forward.query.device), False)
    return Call(*for_the_kernels(forward.query, key, value), scoring)


def _scoring(forward: Forward, mask: Tensor | None, causal: bool, window: int | None = None) -> Scoring:
    scale = forward.keywords.get("scaling")
    scale = forward.query.shape[-1] ** -0.5 if scale is None else scale
    return Scoring(mask, causal, scale, window, forward.keywords.get("softcap"))


def as_base_leaves_blind_rows(output: Tensor, forward: Forward, scoring: Scoring) -> Tensor:
    """A row that sees no key: the kernels give 0, as boolean masks do in the base implementations.

    The softmax of an additive mask, equal at all keys, gives the mean of all values, of unwritten ones too.
    output (B, Hq, Sq, Dv).
    """
    value, mask = forward.value, forward.mask
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return output
    if scoring.causal:  # the (B, S) padding mask is read in place of the one that arrived
        if scoring.attention_mask is None:
            return output
        blind = (scoring.attention_mask.cumsum(-1) == 0)[:, None]
    else:
        highest = mask.amax(-1)
        blind = (highest > -math.inf) & ~shows(highest)
    mean = value.mean(2, dtype=torch.float32).to(output.dtype).repeat_interleave(output.shape[1] // value.shape[1], 1)
    return torch.where(blind[..., None], mean[:, :, None], output)


def for_the_kernels(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without derivatives, which come from the base implementation (`Forward.wants_the_base`).

    RoPE leaves query and key wider than value under autocast; scaled_dot_product_attention casts them so, too.
    """
    query, key, value = query.detach(), key.detach(), value.detach()
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _dense(mask, device: torch.device) -> Tensor:
    """A mask as it is, or (B, H, Sq, Skv) bool from a flex_attention BlockMask."""
    if isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, q_len, kv_len = mask.shape
    return create_mask(mask.mask_mod, batch, heads, q_len, kv_len, device)


def _is_causal(layer: SwappedLayer, forward: Forward) -> bool:
    told = forward.keywords.get("is_causal")
    return bool(getattr(layer.module, "is_causal", True) if told is None else told)


def plain_causal(config, kwargs) -> bool:
    return (
        config.model_type in PLAIN_CAUSAL_DECODERS
        and kwargs.get("sliding_window") is None
        and getattr(config, "is_causal", True)
    )
