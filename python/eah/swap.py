"""The attention function that replaces a layer's own, and its attachment to that layer.

transformers looks the function up under the name in the attention module's config at every call. A swapped layer gets a
copy of its config with the name "eah"; masks are made from the model's config, which stays as it is, as do the other
layers. Where EAH does not apply, the layer's own implementation runs on exactly what arrived.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eah import decode
from eah.arguments import (
    FLASH,
    HANDLED,
    as_base_leaves_blind_rows,
    as_under_autocast,
    lend,
    mask_is_known,
    plain_causal,
    rules_of,
    scoring_of,
    what_arrived,
    what_arrived_later,
)
from eah.image_tokens import CACHED, CONTINUOUS, PREFILL, Prefill, cache_in
from eah.models import attention_namespace, query_heads
from eah.parallel import head_block, lend_across, of_all_heads, of_own_heads
from eah.report import Record
from eah.uniform import sight_of
from eah_kernels import (
    eah_attention,
    seeing_rows,
    select_head,
    shared_map_attention,
    sink_statistics,
)

NAME = "eah"
CACHE = "eah_cache"  # the keywords that carry what transformers does not hand on to the attention function
MAPS = "eah_output_attentions"

NO_IMAGE_MASK = "no image mask reached the layer: the forward did not go through the enabled model's base model"
DROPOUT = "attention dropout is active"
SOME_HEADS = "the layer computes only some of its heads here, and its weights do not say which (tensor parallel)"
MASK_PER_HEAD = "each head has a mask of its own, and the heads are spread over processes (tensor parallel)"
SPREAD = "the heads are spread over processes (tensor parallel), whose column sums are not gathered at every step"
UNALIGNED = "the layer has other keys than the tokens of this forward"
MASK_FORM = "the attention mask is of a form that is not known for this attention implementation"
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "the layer adds a position bias",
    "s_aux": "the layer has attention sinks of its own (s_aux)",
    "sinks": "the layer has attention sinks of its own (sinks)",
    "indices": "the layer attends to selected keys only (indices)",
    "block_indices": "the layer attends to selected keys only (block_indices)",
    "cache": CONTINUOUS,
    "block_table": CONTINUOUS,
    "cu_seq_lens_q": "several sequences are packed (cu_seq_lens_q)",
    "cu_seq_lens_k": "several sequences are packed (cu_seq_lens_k)",
}


class Settings(NamedTuple):
    """The knobs of `eah.enable`, the same for every swapped layer."""

    threshold: float
    min_density: float
    backend: str
    broadcast_to: int | str
    decode: str  # of decode.MODES
    tested: bool  # the model is of a known family


class Warned:
    """Shared by the layers of an enabled model: whether it was said that one of them never acted."""

    said = False


class History:
    """The last prefills, oldest first: of each its thread and the records of the layers that it reached. Shared by the
    layers.
    """

    def __init__(self, length: int):
        self.prefills: deque[tuple[int, dict[int, Record]]] = deque(maxlen=length)

    def remember(self, layer: int, record: Record, instead_of_last: bool) -> None:
        own = get_ident()
        last = next((records for thread, records in reversed(self.prefills) if thread == own), None)
        if last is None or (layer in last and not instead_of_last):
            last = {}
            self.prefills.append((own, last))
        last[layer] = record


class SwappedLayer:
    """One attention module while EAH acts in it. A forward changes `record`, `history` and the flags, nothing else."""

    def __init__(self, module: nn.Module, settings: Settings, history: History | None, warned: Warned):
        self.module = module
        self.index = module.layer_idx
        self.heads = query_heads(module)
        self.settings = settings
        self.config = module.config
        self.removal: torch.utils.hooks.RemovableHandle | None = None
        self.acted = False
        self.warned = warned
        self.record: Record | None = None
        self.history = history

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
            torch.compiler.disable(self.history.remember)(self.index, record, instead_of_last)

    def attach(self) -> None:
        config = copy.copy(self.config)
        config._attn_implementation_internal = NAME  # the public setter would also change the config's sub-configs
        self.module.config = config
        self.module.eah_layer = self
        self.removal = self.module.register_forward_pre_hook(hand_on, with_kwargs=True)

    def detach(self) -> None:
        """Also after an attach() that failed half way, or was not begun."""
        if self.removal is not None:
            self.removal.remove()
        self.module.config = self.config
        vars(self.module).pop("eah_layer", None)


def hand_on(module, args, kwargs):
    """Forward pre-hook (with kwargs) of an attention module: what some or all of them keep from their function."""
    more = {CACHE: cache_in(kwargs), MAPS: kwargs.get("output_attentions")}
    return args, {**kwargs, **{name: value for name, value in more.items() if value is not None}}


class ModuleView:
    """An attention module seen with its original config: what a base implementation is given as the module."""

    def __init__(self, layer: SwappedLayer):
        self.module = layer.module
        self.config = layer.config

    def __getattr__(self, name):
        return getattr(self.module, name)


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
    cache, maps = kwargs.pop(CACHE, None), kwargs.pop(MAPS, None)
    held = None if layer.settings.decode == "off" else decode.cache_layer(cache, layer.index)
    implementation = layer.config._attn_implementation
    if maps is not None and implementation == "eager":
        kwargs["output_attentions"] = maps
    namespace = attention_namespace(type(module))
    functions = namespace["ALL_ATTENTION_FUNCTIONS"]
    base = functions.get_interface(implementation, namespace["eager_attention_forward"])
    if base is functions["flash_attention_2"]:  # flash kernels from the hub go by their repository's name
        implementation = "flash_attention_2"
    view = ModuleView(layer)
    arguments = query, key, value, attention_mask
    if query.shape[2] <= 1 or prefill.stand_aside == CACHED:  # a decoding step, or several tokens on a cache
        return _later(layer, held, base, view, implementation, *arguments, prefill, kwargs)

    reason = why_not(layer, implementation, query, key, attention_mask, prefill, kwargs)
    one_sequence = attention_mask is None or plain_causal(layer.config, kwargs)  # of a mask made with the cache
    if reason is None and (cache is None or implementation in FLASH or not one_sequence):
        reason = prefill.without_cache
    if reason is not None:
        _stand_aside(layer, reason)
        decode.carry(held, None, why_none=reason)
        return base(view, *arguments, **kwargs)

    call = what_arrived(layer, implementation, *arguments, prefill, kwargs)
    rules, threshold, min_density = rules_of(layer, call, kwargs), layer.settings.threshold, layer.settings.min_density
    q, k, v = as_under_autocast(query, call.key, call.value)
    block = head_block(module) if _spread(layer, query) else None
    if block is not None and layer.settings.decode == "track":
        held = None
    fused = block is None and not _needs_base(layer, implementation, *arguments, kwargs)
    tracks = layer.settings.decode == "track" and held is not None
    if fused and not tracks:
        knobs = {"threshold": threshold, "min_density": min_density, "broadcast_to": layer.settings.broadcast_to}
        output, head, counts = eah_attention(q, k, v, call.image_mask, **knobs, **rules)
    else:
        with torch.no_grad():
            options = {"threshold": threshold, "return_column_mean": tracks}
            counts, _, mean = sink_statistics(q, k, call.image_mask, **options, **rules)
            counts = counts if block is None else of_all_heads(block, counts)
            head = select_head(counts, call.image_mask, min_density)
    receives = None if fused and held is None else decode.receivers(counts, head, layer.settings)
    if tracks:
        scoring = scoring_of(call)
        seeing = seeing_rows(q, k, call.attention_mask, causal=call.causal, sliding_window=call.sliding_window)
        seeing = seeing[:, : scoring.mask_heads].masked_fill(~call.image_mask[:, None], 0)
        carried = decode.Carried(head.clone(), receives, call.image_mask, mean * seeing, seeing)
        decode.carry(held, carried, decode.last_rows(q, scoring, q.shape[2], rules, layer.settings))
    elif held is not None:
        decode.carry(held, decode.Carried(head, receives))
    complete = held.complete if tracks else None
    seen = sight_of(call)
    layer.remember(Record(head, counts, call.image_mask, seen, complete=complete, by_embedding=prefill.by_embedding))
    layer.acted = True
    if not fused:
        return _lent(base, view, arguments, kwargs, head, receives, block)
    if tracks:
        output = shared_map_attention(q, k, v, head, receives=receives, **rules)
    return as_base_leaves_blind_rows(output, value, attention_mask, call).transpose(1, 2), None


def _later(layer, held, base, view, implementation, query, key, value, attention_mask, prefill: Prefill, kwargs):
    """A forward on a cache: with the head that the sequence carries, or ordinary attention and the reason."""
    mode, q_len = layer.settings.decode, query.shape[2]
    arguments = query, key, value, attention_mask
    if mode == "off":
        if q_len > 1:
            _stand_aside(layer, CACHED, afterwards=True)
        return base(view, *arguments, **kwargs)
    block = head_block(layer.module) if _spread(layer, query) else None
    needs_base = block is not None or _needs_base(layer, implementation, *arguments, kwargs)
    if mode == "track" and _spread(layer, query):
        reason = SPREAD
    elif getattr(held, "carried", None) is None:
        reason = decode.why_none(held)
    else:
        reason = why_not(layer, implementation, query, key, attention_mask, None, kwargs)
        by_flag = implementation in FLASH
        reason = reason or decode.why_not(held, mode, query, key, attention_mask, by_flag, needs_base)
    if reason is not None:
        _stand_aside(layer, reason, afterwards=True)
        decode.carry(held, None, why_none=reason)
        return base(view, *arguments, **kwargs)

    call = what_arrived_later(layer, implementation, *arguments, kwargs)
    rules = rules_of(layer, call, kwargs)
    q, k, v = as_under_autocast(query, call.key, call.value)
    if mode == "hold":
        head, receives = held.carried.head, held.carried.receives
        if q_len > 1 and layer.record is not None:
            held_so_far, held_now = layer.record.held, (head >= 0).any()
            held_now = held_now if held_so_far is None else held_so_far | held_now.to(held_so_far.device)
            layer.remember(layer.record._replace(held=held_now), instead_of_last=True)
    else:
        with torch.no_grad():
            head, receives = decode.track(held, q, k, scoring_of(call), prefill.image_mask, layer.settings, rules)
        if layer.record is not None and layer.record.complete is not held.complete:
            layer.remember(layer.record._replace(complete=held.complete), instead_of_last=True)
    if needs_base:
        return _lent(base, view, arguments, kwargs, head, receives, block)
    return shared_map_attention(q, k, v, head, receives=receives, **rules).transpose(1, 2), None


def _lent(base, view, arguments, kwargs, head: Tensor, receives: Tensor | None, block=None):
    """The base implementation, on the chosen head's query and key; on each head's own where it does not receive.

    For gradients, for the maps, and with the chosen head in another process (block).
    """
    query, key, value, attention_mask = arguments
    lent = lend(head, *arguments) if block is None else (*lend_across(block, head, query, key), value, attention_mask)
    output, maps = base(view, *lent, **kwargs)
    if receives is None:
        return output, maps
    receives = receives if block is None else of_own_heads(block, receives)
    own_output, own_maps = base(view, *arguments, **kwargs)
    receives = receives[:, :, None, None]
    output = torch.where(receives.transpose(1, 2), output, own_output)
    return output, maps if maps is None else torch.where(receives, maps, own_maps)


def why_not(layer, implementation, query, key, attention_mask, prefill: Prefill | None, kwargs) -> str | None:
    """The reason to leave this forward to the layer's own implementation, or None. prefill: None on a cache."""
    if prefill is not None and prefill.stand_aside is not None:
        return prefill.stand_aside
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            return reason
    if implementation not in HANDLED:
        return f"the attention implementation {implementation!r} is not handled; handled are {', '.join(HANDLED)}"
    if kwargs.get("dropout"):
        return DROPOUT
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    if _spread(layer, query):
        block = head_block(layer.module)
        if block is None or block.size * heads != layer.heads:
            return SOME_HEADS
        if attention_mask is not None and len(attention_mask.shape) == 4 and attention_mask.shape[1] > 1:
            return MASK_PER_HEAD
    if prefill is not None:
        aligned = kv_len == q_len or (kv_len > q_len and prefill.has_cache)
        if not aligned or tuple(prefill.image_mask.shape) != (batch, q_len):
            return UNALIGNED
    return None if mask_is_known(implementation, attention_mask, batch, heads, q_len, kv_len) else MASK_FORM


def _spread(layer, query) -> bool:
    """The layer has more heads than this process computes."""
    return query.shape[1] != layer.heads


def _stand_aside(layer: SwappedLayer, reason: str, afterwards: bool = False) -> None:
    last = layer.record
    if not afterwards or last is None:
        layer.remember(Record(stood_aside=reason))
        # Not while compiling: it would break the graph and guard the flags. Prefills of generate() are not compiled.
        if not torch.compiler.is_compiling() and not layer.acted and not layer.warned.said:
            layer.warned.said = True
            warnings.warn(
                f"EAH stood aside in layer {layer.index}, which kept its ordinary attention: {reason}. This is "
                "said once; handle.report() tells of every prefill.",
                UserWarning,
                stacklevel=2,
            )
    elif last.afterwards != reason and (last.stood_aside is None or reason == CACHED):  # the prefill stays on record
        layer.remember(last._replace(afterwards=reason), instead_of_last=True)


def _needs_base(layer, implementation, query, key, value, attention_mask, kwargs) -> bool:
    """Gradients and attention maps come from the base implementation, run on the chosen head's query and key.

    transformers skips a layer that returns None for its maps: the maps of the next would be taken for this one's.
    """
    arguments = query, key, value, attention_mask
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return True
    wanted = kwargs.get("output_attentions", getattr(layer.config, "output_attentions", False))
    return implementation == "eager" and bool(wanted)
