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

from eah_kernels import Scoring, heads_by_row, receiving_heads, select_head, sink_statistics

MODES = ("off", "hold", "track")
NO_CACHE_LAYER = "the cache has no layer object that could carry the head to later steps"
NOT_BEGUN = "the prefill of this sequence was not seen: no head was chosen for it"
OTHER_BATCH = "the cache carries the heads of another batch"
OTHER_MODE = 'the cache carries no column sums: its prefill ran without decode="track"'
TAKEN_BACK = 32  # rows of the last forward that can leave the sums again: more than are drafted by default
CROPPED = (
    f"the cache was cropped by more than {TAKEN_BACK} tokens or the last forward's: their rows cannot leave the sums"
)
MISSED = "tokens were cached that the column sums lack: EAH was disabled, or tracked no tokens, in between"
NO_MASK = "no attention mask says which keys these tokens see"
ROWS_WITH_MAPS = "gradients or attention maps of several tokens at once, each with a head of its own"
UNKNOWN_POSITION = "the static cache does not tell where it writes"
UNSEEN = -1e30  # a visible key whose exponential is 0
HELD = "a forward of several tokens on the cache was lent the held head's map, which no token of it helped to choose"
NOTHING_HELD = "no head was chosen at the prefill: there is none to hold"


class Carried(NamedTuple):
    """head (B,) int32; receives (B, Hq) bool, or None for all heads. To track, also image_mask (B, S) bool and, over
    all rows of the sequence so far, c_h[j] n_j and n_j of the spec, 0 off the image: sums (B, Hq, S) float32 and rows
    (B, 1|Hq, S) int32.
    """

    head: Tensor
    receives: Tensor | None = None
    image_mask: Tensor | None = None
    sums: Tensor | None = None
    rows: Tensor | None = None

    def map(self, function) -> Carried:
        return Carried(*(None if tensor is None else function(tensor) for tensor in self))


class LastRows(NamedTuple):
    """What takes the last forward's rows out of the sums again, with the keys that the cache holds.

    query (B, Hq, n, D), n <= TAKEN_BACK; attention_mask (B, 1|Hq, n, Skv); rules: softcap and scale.
    """

    query: Tensor
    attention_mask: Tensor
    rules: dict
    settings: NamedTuple

    def map(self, function) -> LastRows:
        return self._replace(query=function(self.query), attention_mask=function(self.attention_mask))


@functools.cache
def _carrying(cls: type) -> type:
    """The class of a cache layer, which also keeps what it carries in step with its keys."""

    class Carrying(cls):
        """To track, also: `tokens`, how many are in the sums, a tensor where the cache counts on the device, and then
        `complete`, whether they were all that was cached, () bool; `last`, unless it cannot be taken back.
        """

        _layer_type = None  # transformers would register a subclass under the layer type that it inherits
        carried: Carried | None = None
        last: LastRows | None = None
        tokens: int | Tensor = 0
        complete: Tensor | None = None
        why_none: str | None = None

        def begin(self, carried: Carried | None, last: LastRows | None = None, why_none: str | None = None):
            self.carried, self.last, self.why_none = carried, last, why_none
            if carried is not None and carried.sums is not None:
                tokens = self.get_seq_length()
                counts_on_device = isinstance(tokens, Tensor)
                self.tokens = tokens.clone() if counts_on_device else tokens
                self.complete = torch.ones_like(tokens, dtype=torch.bool) if counts_on_device else None

        def reset(self, *args, **kwargs):
            super().reset(*args, **kwargs)
            self.begin(None)

        def crop(self, *args, **kwargs):
            before, keys = int(self.get_seq_length()), self.keys
            super().crop(*args, **kwargs)
            left = int(self.get_seq_length())
            if self.carried is None or left == before:
                return
            if left == 0:
                self.begin(None)
            elif self.carried.sums is not None and left < int(self.tokens):
                first = 0 if hasattr(self, "max_cache_len") else before - keys.shape[2]  # the position of the first key
                if self.last is None or int(self.tokens) - left > self.last.query.shape[2]:
                    self.begin(None, why_none=CROPPED)
                else:
                    _take_back(self, keys[:, :, : int(self.tokens) - first], left)

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
            if self.last is not None:
                self.last = self.last.map(function)

        def __reduce_ex__(self, protocol):
            return _blank, (cls,), self.__dict__

    Carrying.__name__ = cls.__name__
    return Carrying


def _blank(cls: type):
    return object.__new__(_carrying(cls))


def cache_layer(cache, index: int):
    """The object that holds the cached keys of layer `index`, or None."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or index >= len(layers) or not hasattr(layers[index], "get_seq_length"):
        return None
    return layers[index]


def carry(layer, carried: Carried | None, last: LastRows | None = None, why_none: str | None = None) -> None:
    """Puts what a prefill chose on the cache layer, or why there is nothing, in place of anything there."""
    if hasattr(layer, "carried"):
        layer.begin(carried, last, why_none)
    elif carried is not None:
        # Not traced: a graph cannot change a class. Once per cache, so decoding steps are compiled without it.
        torch.compiler.disable(_start_carrying)(layer, carried, last)


def _start_carrying(layer, carried: Carried, last: LastRows | None) -> None:
    layer.__class__ = _carrying(type(layer))
    layer.begin(carried, last)


def receivers(sink_counts: Tensor, head: Tensor, settings) -> Tensor | None:
    """(B, Hq) bool: the heads that take the map; None = all. By row, (B, Hq, S), where sink_counts is."""
    if settings.broadcast_to == "all":
        return None
    if sink_counts.dim() == 2:
        return receiving_heads(sink_counts, head, settings.broadcast_to)
    flat = sink_counts.transpose(1, 2).flatten(0, 1), head.flatten()
    return receiving_heads(*flat, settings.broadcast_to).unflatten(0, head.shape).transpose(1, 2)


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
    if static and not isinstance(getattr(layer, "cumulative_length", None), Tensor):  # before transformers 5.8 or so
        return UNKNOWN_POSITION
    return MISSED if layer.complete is None and layer.get_seq_length() - q_len != layer.tokens else None


class Place(NamedTuple):
    """Where the row of a step stands: its own key among the keys, None where that is the last; and the position of the
    first key, which is not 0 once a sliding window has moved."""

    own: Tensor | None
    offset: int


def place(layer, kv_len: int) -> Place:
    """After the cache was updated."""
    if not hasattr(layer, "max_cache_len"):
        return Place(None, layer.get_seq_length() - kv_len)
    seen = getattr(layer, "cumulative_length_int", 0)  # of a sliding window; the tensor stops when that is full
    if seen >= kv_len:
        return Place(None, seen - kv_len)
    return Place(layer.cumulative_length - 1, 0)


def with_new_tokens(carried: Carried, image_mask: Tensor | None) -> Carried:
    """The columns of later forwards. image_mask: (B, S + new) bool, False for cached tokens, or None."""
    if image_mask is None:
        return carried
    more = image_mask.shape[1] - carried.image_mask.shape[1]
    old, sums, rows = (torch.nn.functional.pad(tensor, (0, more)) for tensor in carried[2:])
    return Carried(carried.head, carried.receives, old | image_mask.to(old.device), sums, rows)


def last_rows(query: Tensor, scoring: Scoring, kv_len: int, rules: dict, settings) -> LastRows:
    """Of a forward whose last row's own key is the last of kv_len."""
    q_len = query.shape[2]
    rows = slice(max(0, q_len - TAKEN_BACK), q_len)
    mask = scoring.of_rows(rows, q_len, kv_len, query.device).attention_mask
    mask = mask.expand(len(query), -1, -1, -1)
    query = query[:, :, rows].detach()
    query = query if rows.start == 0 else query.clone()  # not a view, which would hold all rows
    return LastRows(query, mask, *_how(rules, settings))


def _how(rules: dict, settings) -> tuple[dict, NamedTuple]:
    return {"scale": rules["scale"], "softcap": rules["softcap"]}, settings


def track(layer, query: Tensor, key: Tensor, scoring: Scoring, image_mask: Tensor | None, settings, rules):
    """Adds the rows of a forward on a cache to the sums. Returns the head and the receivers (or None) of each row: (B,)
    and (B, Hq) for one row, (B, S) and (B, Hq, S) for several.

    scoring: who sees whom; image_mask as for `with_new_tokens`; rules: those of `eah_kernels.sink_statistics`.
    """
    q_len, static, old = query.shape[2], hasattr(layer, "max_cache_len"), layer.carried
    carried = with_new_tokens(old, image_mask)
    if layer.complete is not None:
        layer.complete.logical_and_(layer.get_seq_length() - q_len == layer.tokens)
    if q_len == 1:
        new, last = _with_row(layer, carried, query, key, scoring, settings, rules)
        head, receives = new.head, new.receives
    else:
        written = image_mask.shape[1]
        if key.shape[2] > written:  # of a static cache
            key = key[:, :, :written]
            scoring = scoring._replace(attention_mask=scoring.attention_mask[..., :written])
        last = last_rows(query, scoring, key.shape[2], rules, settings)
        how = {name: value for name, value in rules.items() if name != "backend"}
        how |= {"attention_mask": scoring.attention_mask, "causal": scoring.causal}
        how |= {"threshold": settings.threshold, "min_density": settings.min_density}
        head, counts, sums, rows = heads_by_row(query, key, *carried[2:], **how)
        if layer.complete is not None:
            head = torch.where(layer.complete, head, -1)
        receives = receivers(counts, head, settings)
        chosen = head[:, -1].clone(), None if receives is None else receives[..., -1].clone()
        new = Carried(*chosen, carried.image_mask, sums, rows)
    layer.tokens += q_len
    if static and old.sums.shape == new.sums.shape:
        # In place, as the cache itself is written: CUDA graphs take no other input that changes.
        for before, after in zip(old, new, strict=True):
            if before is not None:
                before.copy_(after)
        layer.last = None
    else:
        layer.carried, layer.last = new, last
    return head, receives


def _with_row(layer, carried: Carried, query, key, scoring: Scoring, settings, rules) -> tuple[Carried, LastRows]:
    """One row more. The statistics take the last key for its own: where it is not, one without weight is added."""
    kv_len, every = key.shape[2], slice(None)
    at = place(layer, kv_len)
    visible, bias = scoring.visible(1, kv_len, key.device, every, every), scoring.bias(every, every)
    bias = torch.zeros((), device=key.device) if bias is None else bias
    bias = torch.where(visible, bias.float(), -math.inf)
    last = LastRows(query.detach(), bias.expand(len(query), -1, -1, -1), *_how(rules, settings))
    slot = torch.arange(kv_len, device=key.device)
    own = slot[-1] if at.own is None else at.own
    seen = (bias > -math.inf)[:, :, 0]
    real = seen.index_select(-1, own.reshape(1))  # the row counts when it sees its own key
    pairs = seen & real & (slot != own)
    column = slot + at.offset
    columns = carried.image_mask.shape[1]
    image = carried.image_mask.index_select(-1, column.clamp(max=columns - 1)) & (column < columns)
    if at.own is not None:
        key, image = torch.nn.functional.pad(key, (0, 0, 0, 1)), torch.nn.functional.pad(image, (0, 1))
        weightless = torch.full_like(bias[..., :1], UNSEEN).masked_fill(~real[:, :, None], -math.inf)
        bias = torch.cat([bias, weightless], -1)
    alone = {"attention_mask": bias, "causal": False, "sliding_window": None, "return_column_mean": True}
    share = sink_statistics(query, key, image, **rules | alone).column_mean

    slot = torch.arange(columns, device=key.device) - at.offset  # of each column; some have left the window
    inside = (slot >= 0) & (slot < kv_len)
    slot = slot.clamp(0, kv_len - 1)
    pairs = pairs.index_select(-1, slot) & inside & carried.image_mask[:, None]
    sums = carried.sums + share.index_select(-1, slot).masked_fill(~pairs, 0)
    return _chosen(carried.image_mask, sums, carried.rows + pairs, settings, layer.complete), last


def _chosen(image_mask, sums: Tensor, rows: Tensor, settings, complete: Tensor | None) -> Carried:
    sinks = (sums > rows * settings.threshold).sum(-1, dtype=torch.int32)
    head = select_head(sinks, image_mask, settings.min_density)
    head = head if complete is None else torch.where(complete, head, -1)
    return Carried(head, receivers(sinks, head, settings), image_mask, sums, rows)


def _take_back(layer, keys: Tensor, left: int) -> None:
    """Takes the rows from position `left` on out of the sums. keys: those of the last forward, the last row's at their
    end, and perhaps some before them."""
    last, tokens, carried = layer.last, int(layer.tokens), layer.carried
    number, kv_len = tokens - left, last.attention_mask.shape[3]
    image = torch.nn.functional.pad(carried.image_mask, (0, tokens - carried.image_mask.shape[1]))
    sums, rows = (torch.nn.functional.pad(tensor, (0, tokens - tensor.shape[2])) for tensor in carried[3:])
    key = keys[:, :, -kv_len:].to(last.query)
    mask = last.attention_mask[:, :, -number:]
    nothing = image, torch.zeros_like(sums), torch.zeros_like(rows)
    shares = heads_by_row(last.query[:, :, -number:], key, *nothing, attention_mask=mask, causal=False, **last.rules)
    rows = (rows - shares.seeing)[..., :left]
    sums = (sums - shares.column_sum)[..., :left].clamp(min=0).masked_fill(rows == 0, 0)
    layer.carried = _chosen(image[:, :left], sums, rows, last.settings, layer.complete)
    mask = last.attention_mask[:, :, :-number, :-number]
    layer.last = last._replace(query=last.query[:, :, :-number], attention_mask=mask)
    layer.tokens -= number
