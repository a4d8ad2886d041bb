"""The attention function that replaces a layer's own, and its attachment to that layer.

transformers looks the function up under the name in the attention module's config at every call. A swapped layer gets a
copy of its config with the name "eah"; masks are made from the model's config, which stays as it is, as do the other
layers. Where EAH does not apply, the layer's own implementation runs on exactly what arrived.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eah.image_tokens import CACHED, PREFILL, Prefill
from eah.models import PLAIN_CAUSAL_DECODERS, attention_namespace
from eah.parallel import head_block, lend_across, of_all_heads, of_own_heads
from eah.report import Record
from eah_kernels import eah_attention, receiving_heads, select_head, sink_statistics

NAME = "eah"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
HANDLED = ("sdpa", "eager", *FLASH, "flex_attention")  # base implementations whose masks are understood here

NO_IMAGE_MASK = "no image mask reached the layer: the forward did not go through the enabled model's base model"
DROPOUT = "attention dropout is active"
SOME_HEADS = "the layer computes only some of its heads here, and its weights do not say which (tensor parallel)"
MASK_PER_HEAD = "each head has a mask of its own, and the heads are spread over processes (tensor parallel)"
UNALIGNED = "the layer has other keys than the tokens of this forward"
MASK_FORM = "the attention mask is of a form that is not known for this attention implementation"
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "the layer adds a position bias",
    "s_aux": "the layer has attention sinks of its own (s_aux)",
    "sinks": "the layer has attention sinks of its own (sinks)",
    "indices": "the layer attends to selected keys only (indices)",
    "block_indices": "the layer attends to selected keys only (block_indices)",
    "cache": "continuous batching packs several sequences",
    "block_table": "continuous batching packs several sequences",
    "cu_seq_lens_q": "several sequences are packed (cu_seq_lens_q)",
    "cu_seq_lens_k": "several sequences are packed (cu_seq_lens_k)",
}


class Settings(NamedTuple):
    """The knobs of `eah.enable`, the same for every swapped layer."""

    threshold: float
    min_density: float
    backend: str
    broadcast_to: int | str
    tested: bool  # the model is of a known family


class SwappedLayer:
    """One attention module while EAH acts in it. `record` and `history` are the only things that a forward changes."""

    def __init__(self, module: nn.Module, settings: Settings, history: int):
        self.module = module
        self.index = module.layer_idx
        self.settings = settings
        self.config = module.config
        self.record: Record | None = None
        self.history: deque[Record] | None = deque(maxlen=history) if history else None

    def __setstate__(self, state):
        self.__dict__.update(state)
        register()  # an unpickled model may be the first enabled one of its process

    @property
    def attached(self) -> bool:
        return getattr(self.module, "eah_layer", None) is self

    def remember(self, record: Record, instead_of_last: bool = False) -> None:
        self.record = record
        if self.history is not None:
            # Not traced: a compiled forward would be compiled anew whenever the history grows.
            torch.compiler.disable(_append)(self.history, record, instead_of_last)

    def attach(self) -> None:
        config = copy.copy(self.config)
        config._attn_implementation_internal = NAME  # the public setter would also change the config's sub-configs
        self.module.config = config
        self.module.eah_layer = self

    def detach(self) -> None:
        self.module.config = self.config
        del self.module.eah_layer


def _append(history: deque[Record], record: Record, instead_of_last: bool) -> None:
    if instead_of_last and history:
        history.pop()
    history.append(record)


class ModuleView:
    """An attention module seen with its original config: what a base implementation is given as the module."""

    def __init__(self, layer: SwappedLayer):
        self.module = layer.module
        self.config = layer.config

    def __getattr__(self, name):
        return getattr(self.module, name)


class Call(NamedTuple):
    """The arguments of `eah_kernels.eah_attention` for one forward of one layer."""

    key: Tensor
    value: Tensor
    image_mask: Tensor
    attention_mask: Tensor | None
    causal: bool
    sliding_window: int | None = None


def register() -> None:
    """Makes the name known to transformers; without effect the second time."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_forward(module, query, key, value, attention_mask, **kwargs):
    """What transformers calls. query (B, Hq, S, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv).

    Returns:
        Output (B, S, Hq, Dv) and the attention maps, or None in their place as the base implementation does.
    """
    layer = getattr(module, "eah_layer", None)
    if layer is None:
        raise RuntimeError('the attention implementation "eah" is set by eah.enable(model), not by name')
    prefill = kwargs.pop(PREFILL, None) or Prefill(stand_aside=NO_IMAGE_MASK)
    implementation = layer.config._attn_implementation
    namespace = attention_namespace(type(module))
    functions = namespace["ALL_ATTENTION_FUNCTIONS"]
    base = functions.get_interface(implementation, namespace["eager_attention_forward"])
    if base is functions["flash_attention_2"]:  # flash kernels from the hub go by their repository's name
        implementation = "flash_attention_2"
    view = ModuleView(layer)
    if query.shape[2] <= 1:  # a decoding step
        return base(view, query, key, value, attention_mask, **kwargs)

    reason = why_not(layer, implementation, query, key, attention_mask, prefill, kwargs)
    if reason is not None:
        _stand_aside(layer, reason)
        return base(view, query, key, value, attention_mask, **kwargs)

    call = what_arrived(layer, implementation, query, key, value, attention_mask, prefill, kwargs)
    knobs = {
        "threshold": layer.settings.threshold,
        "attention_mask": call.attention_mask,
        "causal": call.causal,
        "sliding_window": call.sliding_window,
        "scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "backend": layer.settings.backend,
    }
    min_density = layer.settings.min_density
    q, k, v = _as_under_autocast(query, call.key, call.value)
    block = head_block(module) if _spread(layer, query) else None
    wants_base = _requires_grad(query, key, value, attention_mask) or _wants_maps(layer.config, implementation, kwargs)
    if block is None and not wants_base:
        choice = dict(min_density=min_density, broadcast_to=layer.settings.broadcast_to)
        result = eah_attention(q, k, v, call.image_mask, **choice, **knobs)
        layer.remember(Record(result.head, result.sink_counts, call.image_mask, by_embedding=prefill.by_embedding))
        return result.output.transpose(1, 2), None

    # For gradients, for the maps, and with the chosen head in another process, the base implementation runs on its
    # query and key.
    with torch.no_grad():
        counts = sink_statistics(q, k, call.image_mask, **knobs).sink_counts
        counts = counts if block is None else of_all_heads(block, counts)
        head = select_head(counts, call.image_mask, min_density)
    layer.remember(Record(head, counts, call.image_mask, by_embedding=prefill.by_embedding))
    if block is None:
        lent = lend(head, query, key, value, attention_mask)
    else:
        lent = *lend_across(block, head, query, key), value, attention_mask
    output, maps = base(view, *lent, **kwargs)
    if layer.settings.broadcast_to == "all":
        return output, maps
    receives = receiving_heads(counts, head, layer.settings.broadcast_to)
    receives = (receives if block is None else of_own_heads(block, receives))[:, :, None, None]
    own_output, own_maps = base(view, query, key, value, attention_mask, **kwargs)
    output = torch.where(receives.transpose(1, 2), output, own_output)
    return output, maps if maps is None else torch.where(receives, maps, own_maps)


def why_not(layer, implementation, query, key, attention_mask, prefill: Prefill, kwargs) -> str | None:
    """The reason to leave this forward to the layer's own implementation, or None."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            return reason
    if implementation not in HANDLED:
        return f"the attention implementation {implementation!r} is not handled; handled are {', '.join(HANDLED)}"
    if prefill.stand_aside is not None:
        return prefill.stand_aside
    if kwargs.get("dropout"):
        return DROPOUT
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    if _spread(layer, query):
        block = head_block(layer.module)
        if block is None or block.size * heads != layer.config.num_attention_heads:
            return SOME_HEADS
        if attention_mask is not None and len(attention_mask.shape) == 4 and attention_mask.shape[1] > 1:
            return MASK_PER_HEAD
    aligned = kv_len == q_len or (kv_len > q_len and prefill.has_cache)
    if not aligned or tuple(prefill.image_mask.shape) != (batch, q_len):
        return UNALIGNED
    return None if _mask_is_known(implementation, attention_mask, batch, heads, q_len, kv_len) else MASK_FORM


def _spread(layer, query) -> bool:
    """The layer has more heads than this process computes."""
    return query.shape[1] != getattr(layer.config, "num_attention_heads", query.shape[1])


def _mask_is_known(implementation, mask, batch, heads, q_len, kv_len) -> bool:
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
    is_causal = kwargs.get("is_causal")
    is_causal = bool(getattr(layer.module, "is_causal", True) if is_causal is None else is_causal)
    if implementation in FLASH:
        padding = None if attention_mask is None else attention_mask[:, :q_len].bool()
        return Call(key, value, image_mask, padding, is_causal, kwargs.get("sliding_window"))
    if attention_mask is None:  # sdpa is then causal by its flag; eager and flex see everything
        return Call(key, value, image_mask, None, implementation == "sdpa" and is_causal)
    if layer.settings.tested and _plain_causal(layer.config, kwargs) and not prefill.own_mask:
        padding = prefill.padding_mask
        if padding is None or tuple(padding.shape) == tuple(image_mask.shape):
            return Call(key, value, image_mask, None if padding is None else padding.to(query.device), True)
    if not isinstance(attention_mask, Tensor):
        attention_mask = _dense(attention_mask, query.device)
    return Call(key, value, image_mask, attention_mask[..., :q_len], False)


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


def _dense(block_mask, device) -> Tensor:
    """(B, H, Sq, Skv) bool from a flex_attention BlockMask."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, q_len, kv_len = block_mask.shape
    return create_mask(block_mask.mask_mod, batch, heads, q_len, kv_len, device)


def _stand_aside(layer: SwappedLayer, reason: str) -> None:
    last = layer.record
    if reason == CACHED and last is not None:  # the prefill before stays on record
        layer.remember(last._replace(afterwards=reason), instead_of_last=True)
    else:
        layer.remember(Record(stood_aside=reason))


def _plain_causal(config, kwargs) -> bool:
    return (
        config.model_type in PLAIN_CAUSAL_DECODERS
        and kwargs.get("sliding_window") is None
        and getattr(config, "is_causal", True)
    )


def _requires_grad(*arguments) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _wants_maps(config, implementation, kwargs) -> bool:
    """transformers skips a layer that returns None for its maps: the maps of the next would be taken for this one's."""
    wanted = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    return implementation == "eager" and bool(wanted)


def _as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """RoPE leaves query and key wider than value under autocast; scaled_dot_product_attention casts them so too."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
