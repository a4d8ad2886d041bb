"""What a sequence carries from its prefill to its later steps (spec, "Decoding"): the chosen head and, to track, sums.

It lives on the layer object of the sequence's own cache and so follows the cached keys: through beams, cropping, resets
and copies. "hold" carries the head. "track" also carries, per head and image column, the attention that the rows so far
paid it and how many they were; each later row adds its own and the head is chosen anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from eah.method import Call, Choice, Knobs, column_mean, receivers
from eah.reasons import Filled, Reason, Why
from eah_kernels import Scoring, heads_by_row, seeing_rows, select_head

TAKEN_BACK = 32  # rows of the last forward that can leave the sums again: more than are drafted by default
CROPPED = Filled(Reason.CROPPED, (TAKEN_BACK,))
UNSEEN = -1e30  # a visible key whose exponential is 0


class Tracked(NamedTuple):
    """A `Choice` and what it is made anew from: image_mask (B, S) bool and, over all rows of the sequence so far,
    c_h[j] n_j and n_j of the spec, 0 off the image: sums (B, Hq, S) float32 and rows (B, 1|Hq, S) int32.
    """

    head: Tensor
    receives: Tensor | None
    image_mask: Tensor
    sums: Tensor
    rows: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tracked:
        receives = None if self.receives is None else function(self.receives)
        return Tracked(function(self.head), receives, *map(function, (self.image_mask, self.sums, self.rows)))


class LastRows(NamedTuple):
    """What takes the last forward's rows out of the sums again, with the keys that the cache holds.

    query (B, Hq, n, D), n <= TAKEN_BACK; attention_mask (B, 1|Hq, n, Skv).
    """

    query: Tensor
    attention_mask: Tensor
    scale: float
    softcap: float | None
    knobs: Knobs

    def map(self, function: Callable[[Tensor], Tensor]) -> LastRows:
        return self._replace(query=function(self.query), attention_mask=function(self.attention_mask))


class Counted(NamedTuple):
    """How many tokens are in the sums: an int, or a tensor where the cache counts on the device, and then whether they
    are all that was cached, () bool. Both are counted on in place."""

    tokens: int | Tensor
    complete: Tensor | None


class Begun(NamedTuple):
    """To carry from a prefill; `last` and `counted` to track."""

    carried: Choice | Tracked
    last: LastRows | None = None
    counted: Counted = Counted(0, None)


class Advanced(NamedTuple):
    """To carry on after so many rows more, tracked."""

    carried: Tracked
    last: LastRows
    rows: int


class Nothing(NamedTuple):
    """Not to be carried, and why."""

    why: Why


@functools.cache
def _carrying(cls: type) -> type:
    """The class of a cache layer, which also keeps what it carries in step with its keys."""

    class Carrying(cls):
        """`last`: unless the last forward's rows cannot be taken back."""

        _layer_type = None  # transformers would register a subclass under the layer type that it inherits
        carried: Choice | Tracked | None = None
        last: LastRows | None = None
        tokens: int | Tensor = 0  # of `Counted`
        complete: Tensor | None = None
        why_none: Why | None = None

        def carry(self, what: Begun | Advanced | Nothing) -> None:
            if isinstance(what, Nothing):
                self.carried, self.last, self.why_none = None, None, what.why
            elif isinstance(what, Begun):
                self.carried, self.last, self.why_none = what.carried, what.last, None
                self.tokens, self.complete = what.counted
            else:
                self.tokens += what.rows
                before, now = self.carried, what.carried
                static = hasattr(self, "max_cache_len")
                if static and isinstance(before, Tracked) and before.sums.shape == now.sums.shape:
                    # In place, as the cache itself is written: CUDA graphs take no other input that changes.
                    for old, new in zip(before, now, strict=True):
                        if old is not None and new is not None:
                            old.copy_(new)
                    self.last = None
                else:
                    self.carried, self.last = now, what.last

        def empty(self) -> None:
            self.carried = self.last = self.why_none = None

        def reset(self, *args, **kwargs):
            super().reset(*args, **kwargs)
            self.empty()

        def crop(self, *args, **kwargs):
            before, keys = int(self.get_seq_length()), self.keys
            super().crop(*args, **kwargs)
            left = int(self.get_seq_length())
            if self.carried is None or left == before:
                return
            if left == 0:
                self.empty()
            elif isinstance(self.carried, Tracked) and left < int(self.tokens):
                first = 0 if hasattr(self, "max_cache_len") else before - keys.shape[2]  # the position of the first key
                if self.last is None or int(self.tokens) - left > self.last.query.shape[2]:
                    self.carry(Nothing(CROPPED))
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


def layer_of(cache, index: int):
    """The object that holds the cached keys of layer `index`, or None."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or index >= len(layers) or not hasattr(layers[index], "get_seq_length"):
        return None
    return layers[index]


def carry(kept, what: Begun | Advanced | Nothing) -> None:
    """Puts what a forward chose on the cache layer, or why there is nothing, in place of anything there."""
    if hasattr(kept, "carried"):
        kept.carry(what)
    elif isinstance(what, Begun):
        # Not traced: a graph cannot change a class. Once per cache, so decoding steps are compiled without it.
        torch.compiler.disable(_start_carrying)(kept, what)


def _start_carrying(kept, what: Begun) -> None:
    cls: Any = type(kept)
    kept.__class__ = _carrying(cls)
    kept.carry(what)


def counted(kept) -> Counted:
    """With the tokens of this prefill, which are cached by now."""
    tokens = kept.get_seq_length()
    if not isinstance(tokens, Tensor):
        return Counted(tokens, None)
    return Counted(tokens.clone(), torch.ones_like(tokens, dtype=torch.bool))


def carried_by(kept) -> Choice | Tracked | Nothing:
    """What a forward on a cache finds there."""
    carried = getattr(kept, "carried", None)
    if carried is not None:
        return carried
    return Nothing(Reason.NO_CACHE_LAYER if kept is None else getattr(kept, "why_none", None) or Reason.NOT_BEGUN)


class Place(NamedTuple):
    """Where the row of a step stands: its own key among the keys, None where that is the last; and the position of the
    first key, which is not 0 once a sliding window has moved."""

    own: Tensor | None
    offset: int


def place(kept, kv_len: int) -> Place:
    """After the cache was updated."""
    if not hasattr(kept, "max_cache_len"):
        return Place(None, kept.get_seq_length() - kv_len)
    seen = getattr(kept, "cumulative_length_int", 0)  # of a sliding window; the tensor stops when that is full
    if seen >= kv_len:
        return Place(None, seen - kv_len)
    return Place(kept.cumulative_length - 1, 0)


def with_new_tokens(carried: Tracked, image_mask: Tensor) -> Tracked:
    """The columns of later forwards. image_mask: (B, S + new) bool, False for cached tokens."""
    more = image_mask.shape[1] - carried.image_mask.shape[1]
    old, sums, rows = (
        torch.nn.functional.pad(tensor, (0, more)) for tensor in (carried.image_mask, carried.sums, carried.rows)
    )
    return Tracked(carried.head, carried.receives, old | image_mask.to(old.device), sums, rows)


def first_sums(call: Call, image_mask: Tensor, choice: Choice, mean: Tensor) -> Tracked:
    """Of a prefill, whose column means are given."""
    scoring = call.scoring
    seeing = seeing_rows(
        call.query, call.key, scoring.attention_mask, causal=scoring.causal, sliding_window=scoring.sliding_window
    )
    seeing = seeing[:, : scoring.mask_heads].masked_fill(~image_mask[:, None], 0)
    return Tracked(choice.head.clone(), choice.receives, image_mask, mean * seeing, seeing)


def last_rows(call: Call, knobs: Knobs) -> LastRows:
    """Of a forward whose last row's own key is the last."""
    query, q_len, kv_len = call.query, call.query.shape[2], call.key.shape[2]
    rows = slice(max(0, q_len - TAKEN_BACK), q_len)
    mask = cast(Tensor, call.scoring.of_rows(rows, q_len, kv_len, query.device).attention_mask)
    query = query[:, :, rows].detach()
    query = query if rows.start == 0 else query.clone()  # not a view, which would hold all rows
    return LastRows(query, mask.expand(len(query), -1, -1, -1), call.scoring.scale, call.scoring.softcap, knobs)


def track(kept, call: Call, image_mask: Tensor | None, knobs: Knobs) -> tuple[Choice, Advanced]:
    """Adds the rows of a forward on a cache to the sums. Returns the head and the receivers of each row: (B,) and
    (B, Hq) for one row, (B, S) and (B, Hq, S) for several; and what to carry on. The cache's own count goes on.

    image_mask: (B, S + new) bool, False for cached tokens; None for one new token, which is no image token.
    """
    q_len, carried = call.query.shape[2], kept.carried
    if image_mask is not None:
        carried = with_new_tokens(carried, image_mask)
    if kept.complete is not None:
        kept.complete.logical_and_(kept.get_seq_length() - q_len == kept.tokens)
    if q_len == 1:
        new, last = _with_row(kept, carried, call, knobs)
        return Choice(new.head, new.receives), Advanced(new, last, 1)
    written = carried.image_mask.shape[1]
    if call.key.shape[2] > written:  # of a static cache
        mask = call.scoring.attention_mask
        scoring = call.scoring._replace(attention_mask=None if mask is None else mask[..., :written])
        call = call._replace(key=call.key[:, :, :written], scoring=scoring)
    rules = {"threshold": knobs.threshold, "min_density": knobs.min_density, **call.scoring._asdict()}
    head, counts, sums, rows = heads_by_row(
        call.query, call.key, carried.image_mask, carried.sums, carried.rows, **rules
    )
    if kept.complete is not None:
        head = torch.where(kept.complete, head, -1)
    receives = receivers(counts, head, knobs)
    chosen = head[:, -1].clone(), None if receives is None else receives[..., -1].clone()
    new = Tracked(*chosen, carried.image_mask, sums, rows)
    return Choice(head, receives), Advanced(new, last_rows(call, knobs), q_len)


def _with_row(kept, carried: Tracked, call: Call, knobs: Knobs) -> tuple[Tracked, LastRows]:
    """One row more. The statistics take the last key for its own: where it is not, one without weight is added."""
    query, key, scoring, kv_len, every = call.query, call.key, call.scoring, call.key.shape[2], slice(None)
    at = place(kept, kv_len)
    visible, bias = scoring.visible(1, kv_len, key.device, every, every), scoring.bias(every, every)
    bias = torch.zeros((), device=key.device) if bias is None else bias
    bias = torch.where(visible, bias.float(), -math.inf)
    last = LastRows(query.detach(), bias.expand(len(query), -1, -1, -1), scoring.scale, scoring.softcap, knobs)
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
    alone = scoring._replace(attention_mask=bias, causal=False, sliding_window=None)
    share = column_mean(query, key, image, alone, knobs.backend)

    slot = torch.arange(columns, device=key.device) - at.offset  # of each column; some have left the window
    inside = (slot >= 0) & (slot < kv_len)
    slot = slot.clamp(0, kv_len - 1)
    pairs = pairs.index_select(-1, slot) & inside & carried.image_mask[:, None]
    sums = carried.sums + share.index_select(-1, slot).masked_fill(~pairs, 0)
    return _chosen(carried.image_mask, sums, carried.rows + pairs, knobs, kept.complete), last


def _chosen(image_mask: Tensor, sums: Tensor, rows: Tensor, knobs: Knobs, complete: Tensor | None) -> Tracked:
    sinks = (sums > rows * knobs.threshold).sum(-1, dtype=torch.int32)
    head = select_head(sinks, image_mask, knobs.min_density)
    head = head if complete is None else torch.where(complete, head, -1)
    return Tracked(head, receivers(sinks, head, knobs), image_mask, sums, rows)


def _take_back(kept, keys: Tensor, left: int) -> None:
    """Takes the rows from position `left` on out of the sums. keys: those of the last forward, the last row's at their
    end, and perhaps some before them."""
    last, tokens, carried = kept.last, int(kept.tokens), kept.carried
    number, kv_len = tokens - left, last.attention_mask.shape[3]
    image = torch.nn.functional.pad(carried.image_mask, (0, tokens - carried.image_mask.shape[1]))
    sums, rows = (torch.nn.functional.pad(t, (0, tokens - t.shape[2])) for t in (carried.sums, carried.rows))
    key = keys[:, :, -kv_len:].to(last.query)
    scoring = Scoring(last.attention_mask[:, :, -number:], False, last.scale, softcap=last.softcap)
    nothing = image, torch.zeros_like(sums), torch.zeros_like(rows)
    shares = heads_by_row(last.query[:, :, -number:], key, *nothing, **scoring._asdict())
    rows = (rows - shares.seeing)[..., :left]
    sums = (sums - shares.column_sum)[..., :left].clamp(min=0).masked_fill(rows == 0, 0)
    kept.carried = _chosen(image[:, :left], sums, rows, last.knobs, kept.complete)
    mask = last.attention_mask[:, :, :-number, :-number]
    kept.last = last._replace(query=last.query[:, :, :-number], attention_mask=mask)
    kept.tokens -= number
