"""What transformers passes to a layer's attention, as `eah_kernels` takes it: masks, keys and flags."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eah.image_tokens import Prefill
from eah.models import PLAIN_CAUSAL_DECODERS
from eah_kernels import Scoring

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
HANDLED = ("sdpa", "eager", *FLASH, "flex_attention")  # base implementations whose masks are understood here


class Call(NamedTuple):
    """The arguments of `eah_kernels.eah_attention` for one forward of one layer."""

    key: Tensor
    value: Tensor
    image_mask: Tensor | None
    attention_mask: Tensor | None
    causal: bool
    sliding_window: int | None = None


def mask_is_known(implementation, mask, batch, heads, q_len, kv_len) -> bool:
    if mask is None:
        return True
    shape = tuple(mask.shape)
    if implementation in FLASH:  # padding only
        return isinstance(mask, Tensor) and len(shape) == 2 and shape[0] == batch and q_len <= shape[1] <= kv_len
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (q_len, kv_len)
    if not isinstance(mask, Tensor):  # a BlockMask
        return implementation == "flex_attention" and fits
    return fits and (mask.dtype == torch.bool or mask.is_floating_point())


def what_arrived(layer, implementation, query, key, value, attention_mask, prefill: Prefill, kwargs) -> Call:
    """The layer's arguments as `eah_attention` takes them.

    Keys beyond S belong to a static cache that was empty: unwritten, and cut off. A mask that arrives holds everything
    that the model hides, causality and sliding window included. Where it can only be causality and padding, the
    (B, S) padding mask says the same. Only flash attention is told of padding, causality and window one by one.
    """
    q_len = query.shape[2]
    key, value = key[:, :, :q_len], value[:, :, :q_len]
    image_mask = prefill.image_mask.to(query.device)
    is_causal = _is_causal(layer, kwargs)
    if implementation in FLASH:
        padding = None if attention_mask is None else attention_mask[:, :q_len].bool()
        return Call(key, value, image_mask, padding, is_causal, kwargs.get("sliding_window"))
    if attention_mask is None:  # sdpa is then causal by its flag; eager and flex see everything
        return Call(key, value, image_mask, None, implementation == "sdpa" and is_causal)
    if layer.settings.tested and plain_causal(layer.config, kwargs) and not prefill.own_mask:
        padding = prefill.padding_mask
        if padding is None or tuple(padding.shape) == tuple(image_mask.shape):
            return Call(key, value, image_mask, None if padding is None else padding.to(query.device), True)
    if not isinstance(attention_mask, Tensor):
        attention_mask = _dense(attention_mask, query.device)
    return Call(key, value, image_mask, attention_mask[..., :q_len], False)


def what_arrived_later(layer, implementation, query, key, value, attention_mask, kwargs) -> Call:
    """The arguments of a forward on a cache. The mask says which keys are written; without one, all are.

    Flash attention's mask ends with the written keys.
    """
    if implementation in FLASH:
        if attention_mask is not None:
            written = attention_mask.shape[1]
            key, value, attention_mask = key[:, :, :written], value[:, :, :written], attention_mask.bool()
        return Call(key, value, None, attention_mask, _is_causal(layer, kwargs), kwargs.get("sliding_window"))
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        attention_mask = _dense(attention_mask, query.device)
    return Call(key, value, None, attention_mask, False)


def as_base_leaves_blind_rows(output: Tensor, value: Tensor, attention_mask, call: Call) -> Tensor:
    """A row that sees no key: the kernels give 0, as boolean masks do in the base implementations.

    The softmax of an additive mask, equal at all keys, gives the mean of all values, of unwritten ones too.
    output (B, Hq, Sq, Dv); value (B, Hkv, Skv, Dv) and the mask as they arrived.
    """
    if not isinstance(attention_mask, Tensor) or not attention_mask.is_floating_point():
        return output
    if call.causal:  # the (B, S) padding mask is read in place of the one that arrived
        if call.attention_mask is None:
            return output
        blind = (call.attention_mask.cumsum(-1) == 0)[:, None]
    else:
        highest = attention_mask.amax(-1)
        blind = (highest > -math.inf) & (highest <= torch.finfo(attention_mask.dtype).min / 2)
    mean = value.mean(2, dtype=torch.float32).to(output.dtype).repeat_interleave(output.shape[1] // value.shape[1], 1)
    return torch.where(blind[..., None], mean[:, :, None], output)


def lend(head: Tensor, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None):
    """Query, key, value and mask with which ordinary attention gives every head the chosen head's map.

    head (B,), -1 = the row keeps its own. Differentiable in query and key.
    """
    source = head.clamp(min=0).long()
    row = torch.arange(len(head), device=head.device)
    own = (head < 0)[:, None, None, None]
    group = query.shape[1] // key.shape[1]
    query = torch.where(own, query, query[row, source][:, None])
    key = torch.where(own, key, key[row, source // group][:, None])
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.shape[1] > 1:
        attention_mask = attention_mask.expand(len(head), -1, -1, -1)
        attention_mask = torch.where(own, attention_mask, attention_mask[row, source][:, None])
    return query, key, value, attention_mask


def rules_of(layer, call: Call, kwargs) -> dict:
    """What the functions of `eah_kernels` are told beside the tensors."""
    return {
        "attention_mask": call.attention_mask,
        "causal": call.causal,
        "sliding_window": call.sliding_window,
        "scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "backend": layer.settings.backend,
    }


def scoring_of(call: Call) -> Scoring:
    """Who sees whom."""
    return Scoring(call.attention_mask, call.causal, sliding_window=call.sliding_window)


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """RoPE leaves query and key wider than value under autocast; scaled_dot_product_attention casts them so too."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _dense(block_mask, device) -> Tensor:
    """(B, H, Sq, Skv) bool from a flex_attention BlockMask."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, q_len, kv_len = block_mask.shape
    return create_mask(block_mask.mask_mod, batch, heads, q_len, kv_len, device)


def _is_causal(layer, kwargs) -> bool:
    told = kwargs.get("is_causal")
    return bool(getattr(layer.module, "is_causal", True) if told is None else told)


def plain_causal(config, kwargs) -> bool:
    return (
        config.model_type in PLAIN_CAUSAL_DECODERS
        and kwargs.get("sliding_window") is None
        and getattr(config, "is_causal", True)
    )
