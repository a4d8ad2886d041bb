"""What a sequence carries from its prefill to its later steps (spec, "Decoding"): the chosen head and, to track, sums.

It lives on the layer object of the sequence's own cache and so follows the cached keys: through beams, cropping, resets
and copies. "hold" carries the head. "track" also carries, per head and image column, the attention that the rows so far
paid it and how many they were; each later row adds its own and the head is chosen anew.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from eah.image_tokens import cache_in
from eah_kernels import Scoring, receiving_heads, select_head, sink_statistics

MODES = ("off", "hold", "track")
CACHE = "eah_cache"  # the keyword that carries the cache to the attention function
NO_CACHE_LAYER = "the cache has no layer object that could carry the head to later steps"
NOT_BEGUN = "the prefill of this sequence was not seen: no head was chosen for it"
OTHER_BATCH = "the cache carries the heads of another batch"
OTHER_MODE = 'the cache carries no column sums: its prefill ran without decode="track"'
CROPPED = "the cache was cropped by more rows than the last forward had: their column sums cannot be taken back"
NO_MASK = "no attention mask says which keys these tokens see"
ROWS_WITH_MAPS = "gradients or attention maps of several tokens at once, each with a head of its own"
UNKNOWN_POSITION = "the static cache does not tell where it writes"
UNSEEN = -1e30  # a visible key whose exponential is 0
HELD = "a forward of several tokens on the cache was lent the held head's map, which no token of it helped to choose"


class Carried(NamedTuple):
    """head (B,) int32; receives (B, Hq) bool, or None for all heads. To track, also image_mask (B, S) bool and, over
    all rows of the sequence so far, c_h[j] n_j and n_j of the spec: sums (B, Hq, S) float32, rows (B, Hq, S) int32.
    """

    head: Tensor
    receives: Tensor | None = None
    image_mask: Tensor | None = None
    sums: Tensor | None = None
    rows: Tensor | None = None

    def map(self, function) -> Carried:
        return Carried(*(None if tensor is None else function(tensor) for tensor in self))


@functools.cache
def _carrying(cls: type) -> type:
    """The class of a cache layer, which also keeps what it carries in step with its keys."""

    class Carrying(cls):
        """`earlier` is what was carried before each row of the last forward."""

        _layer_type = None  # transformers would register a subclass under the layer type that it inherits
        carried: Carried | None = None
        earlier: tuple[Carried, ...] = ()
        why_none: str | None = None

        def reset(self, *args, **kwargs):
            super().reset(*args, **kwargs)
            self.carried, self.earlier, self.why_none = None, (), None

        def crop(self, *args, **kwargs):
            before = self.get_seq_length()
            super().crop(*args, **kwargs)
            left = self.get_seq_length()
            if self.carried is None or left == before:
                return
            if left == 0:
                self.carried, self.earlier = None, ()
            elif self.carried.sums is not None:
                kept = len(self.earlier) - (before - left)
                if kept < 0:
                    self.carried, self.earlier, self.why_none = None, (), CROPPED
                else:
                    self.carried, self.earlier = self.earlier[kept], self.earlier[:kept]

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self._map(lambda tensor: tensor[indices])

        def _map(self, function):
            if self.carried is not None:
                self.carried = self.carried.map(function)
                self.earlier = tuple(carried.map(function) for carried in self.earlier)

        def __reduce_ex__(self, protocol):
            return _blank, (cls,), self.__dict__

    Carrying.__name__ = cls.__name__
    return Carrying


def _blank(cls: type):
    return object.__new__(_carrying(cls))


def give_cache(module, args, kwargs):
    """Forward pre-hook (with kwargs) of an attention module: its function is not given the cache by transformers."""
    cache = cache_in(kwargs)
    return None if cache is None else (args, {**kwargs, CACHE: cache})


def cache_layer(cache, index: int):
    """The object that holds the cached keys of layer `index`, or None."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or index >= len(layers) or not hasattr(layers[index], "get_seq_length"):
        return None
    return layers[index]


def carry(layer, carried: Carried | None, why_none: str | None = None) -> None:
    """Puts what a prefill chose on the cache layer, or why there is nothing, in place of anything there."""
    if hasattr(layer, "carried"):
        layer.carried, layer.earlier, layer.why_none = carried, (), why_none
    elif carried is not None:
        # Not traced: a graph cannot change a class. Once per cache, so decoding steps are compiled without it.
        torch.compiler.disable(_start_carrying)(layer, carried)


def _start_carrying(layer, carried: Carried) -> None:
    layer.__class__ = _carrying(type(layer))
    layer.carried = carried


def receivers(sink_counts: Tensor, head: Tensor, settings) -> Tensor | None:
    """(B, Hq) bool: the heads that take the map; None = all."""
    return None if settings.broadcast_to == "all" else receiving_heads(sink_counts, head, settings.broadcast_to)


def why_none(layer) -> str:
    """Why a forward on a cache finds nothing carried there."""
    if layer is None:
        return NO_CACHE_LAYER
    return getattr(layer, "why_none", None) or NOT_BEGUN


def why_not(layer, mode: str, query, key, attention_mask, by_flag: bool, needs_base: bool) -> str | None:
    """Why what the cache layer carries is of no use to a forward on it, or None. by_flag: causality needs no mask."""
    q_len, static = query.shape[2], hasattr(layer, "max_cache_len")
    if len(layer.carried.head) != len(query):
        return OTHER_BATCH
    written = not static or getattr(layer, "cumulative_length_int", 0) >= key.shape[2]
    if attention_mask is None and not (written and (q_len == 1 or by_flag)):
        return NO_MASK
    if mode == "hold":
        return None
    if layer.carried.sums is None:
        return OTHER_MODE
    if needs_base and q_len > 1:
        return ROWS_WITH_MAPS
    told = isinstance(getattr(layer, "cumulative_length", None), Tensor)  # from transformers 5.8 or so on
    return UNKNOWN_POSITION if static and not told else None


class Place(NamedTuple):
    """Where the rows of a forward stand: the own key of the first among the keys, None where the last row's is the last
    key; and the position of the first key, which is not 0 once a sliding window has moved."""

    first: Tensor | None
    offset: int


def place(layer, kv_len: int, q_len: int) -> Place:
    """After the cache was updated."""
    if not hasattr(layer, "max_cache_len"):
        return Place(None, layer.get_seq_length() - kv_len)
    seen = getattr(layer, "cumulative_length_int", 0)  # of a sliding window; the tensor stops when that is full
    if seen >= kv_len:
        return Place(None, seen - kv_len)
    return Place(layer.cumulative_length - q_len, 0)


def with_new_tokens(carried: Carried, image_mask: Tensor | None) -> Carried:
    """The columns of later forwards. image_mask: (B, S + new) bool, False for cached tokens, or None."""
    if image_mask is None:
        return carried
    more = image_mask.shape[1] - carried.image_mask.shape[1]
    old, sums, rows = (torch.nn.functional.pad(tensor, (0, more)) for tensor in carried[2:])
    return Carried(carried.head, carried.receives, old | image_mask.to(old.device), sums, rows)


def bias_of(attention_mask: Tensor | None, causal: bool, window: int | None, q_len: int, key: Tensor) -> Tensor:
    """What the rows add to their scores, (B|1, 1|Hq, Sq, Skv) float32, -inf where a key is hidden."""
    scoring, every = Scoring(attention_mask, causal, sliding_window=window), slice(None)
    visible, bias = scoring.visible(q_len, key.shape[2], key.device, every, every), scoring.bias(every, every)
    bias = torch.zeros((), device=key.device) if bias is None else bias
    return torch.where(visible, bias.float(), -math.inf)


def track(layer, query: Tensor, key: Tensor, bias: Tensor, image_mask: Tensor | None, settings, rules) -> list[Carried]:
    """What is carried after each row of a forward on a cache, with the head that this row is to use.

    `bias` as from `bias_of`; image_mask as for `with_new_tokens`; `rules`: those of `eah_kernels.sink_statistics`.
    """
    q_len = query.shape[2]
    at = place(layer, key.shape[2], q_len)
    steps = [with_new_tokens(layer.carried, image_mask)]
    for row in range(q_len):
        steps.append(_with_row(steps[-1], query, key, bias, row, at, settings, rules))
    old, new = layer.carried, steps[-1]
    if hasattr(layer, "max_cache_len") and old.sums.shape == new.sums.shape:
        # In place, as the cache itself is written: CUDA graphs take no other input that changes. Never cropped.
        for before, after in zip(old, new, strict=True):
            if before is not None:
                before.copy_(after)
    else:
        layer.carried, layer.earlier = new, tuple(steps[:-1])
    return steps[1:]


def _with_row(carried: Carried, query, key, bias, row: int, at: Place, settings, rules) -> Carried:
    """The statistics see a row alone, its own key the last one: where that is not so, a last key without weight is
    added."""
    q_len, kv_len = query.shape[2], key.shape[2]
    slot = torch.arange(kv_len, device=key.device)
    own = slot[kv_len - q_len + row] if at.first is None else at.first + row
    bias = bias[:, :, row : row + 1]
    seen = (bias > -math.inf)[:, :, 0]
    real = seen.index_select(-1, own.reshape(1))  # the row counts when it sees its own key
    pairs = seen & real & (slot != own)
    column = slot + at.offset
    columns = carried.image_mask.shape[1]
    image = carried.image_mask.index_select(-1, column.clamp(max=columns - 1)) & (column < columns)
    if at.first is not None or row + 1 < q_len:
        key, image = torch.nn.functional.pad(key, (0, 0, 0, 1)), torch.nn.functional.pad(image, (0, 1))
        last = torch.full_like(bias[..., :1], UNSEEN).masked_fill(~real[:, :, None], -math.inf)
        bias = torch.cat([bias, last], -1)
    alone = {"attention_mask": bias, "causal": False, "sliding_window": None, "return_column_mean": True}
    share = sink_statistics(query[:, :, row : row + 1], key, image, **rules | alone).column_mean

    slot = torch.arange(columns, device=key.device) - at.offset  # of each column; some have left the window
    inside = (slot >= 0) & (slot < kv_len)
    slot = slot.clamp(0, kv_len - 1)
    pairs = pairs.index_select(-1, slot) & inside & carried.image_mask[:, None]
    sums = carried.sums + share.index_select(-1, slot).masked_fill(~pairs, 0)
    rows = carried.rows + pairs
    sinks = (sums / rows.clamp(min=1) > settings.threshold).sum(-1, dtype=torch.int32)
    head = select_head(sinks, carried.image_mask, settings.min_density)
    return Carried(head, receivers(sinks, head, settings), carried.image_mask, sums, rows)
