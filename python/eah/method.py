"""The method on tensors, whatever runs the model: its knobs, the choice of a head, and its lending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed
from torch import Tensor

from eah_kernels import (
    EAHResult,
    Scoring,
    eah_attention,
    eah_attention_varlen,
    receiving_heads,
    select_head,
    shared_map_attention,
    sink_statistics,
)


class DefaultLayers(tuple[int, ...]):
    """The layers when none are named. Only these may be moved to the first usable layer."""


DEFAULT_LAYERS = DefaultLayers((1,))


def checked_layers(layers: object) -> tuple[int, ...]:
    """The layers as a tuple, or the error that says what they should be."""
    accepted = "layers must be a non-empty sequence of distinct ints such as (1,)"
    if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(layer) is not int for layer in layers):
        raise TypeError(f"{accepted}, got {layers!r}")
    if len(layers) == 0 or len(set(layers)) < len(layers):
        raise ValueError(f"{accepted}, got {layers!r}")
    return layers if isinstance(layers, DefaultLayers) else tuple(layers)


class Knobs(NamedTuple):
    """What is set once for every layer; `eah_kernels.eah_attention` says what each means."""

    threshold: float = 0.002
    min_density: float = 0.0
    backend: str = "auto"
    broadcast_to: int | Literal["all"] = "all"

    def check(self, heads: int, head_dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """For a layer of so many query heads and of keys and values of these head dims: an empty call checks it all.

        Raises:
            TypeError, ValueError: a knob that does not fit, or a backend that cannot run there; the message names it.
        """
        key, value = (torch.empty(0, heads, 1, dim, dtype=dtype, device=device) for dim in head_dims)
        enhance(Call(key, key, value, Scoring()), torch.empty(0, 1, dtype=torch.bool, device=device), self)


class Call(NamedTuple):
    """One forward of one layer as `eah_kernels` takes it, beside the image mask and the knobs.

    query (B, Hq, S, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring


class Choice(NamedTuple):
    """head (B,) int32, -1 = none; receives (B, Hq) bool, the heads that take its map, or None for all heads.

    By row of several on a cache: (B, S) and (B, Hq, S).
    """

    head: Tensor
    receives: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Choice:
        return Choice(function(self.head), None if self.receives is None else function(self.receives))


class HeadBlock(NamedTuple):
    """This process's heads, n of n * size: they start at rank * n.

    What is decided from all of them is the same in every process, and so are the collectives that they enter.
    """

    group: torch.distributed.ProcessGroup
    rank: int
    size: int

    def of_all(self, counts: Tensor) -> Tensor:
        """(B, heads of all processes) from each one's (B, heads)."""
        every = counts.new_zeros(len(counts), self.size, counts.shape[1])
        every[:, self.rank] = counts
        return _Sum.apply(every, self.group).flatten(1)

    def own(self, every: Tensor) -> Tensor:
        """This process's part of (B, heads of all processes)."""
        return every.unflatten(1, (self.size, -1))[:, self.rank]


def enhance(call: Call, image_mask: Tensor, knobs: Knobs) -> EAHResult:
    """The output with the chosen head's map, the head and every head's sinks, all in one."""
    return eah_attention(call.query, call.key, call.value, image_mask, **knobs._asdict(), **call.scoring._asdict())


def enhance_each(call: Call, image_mask: Tensor, cu_seqlens: Tensor, longest: int, knobs: Knobs) -> EAHResult:
    """As `enhance`, of N sequences packed into a batch of one row: head (N,), sink_counts (N, Hq).

    cu_seqlens, longest: as `eah_attention_varlen` takes them. Of the scoring there is no mask, and it is causal.
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in call[:3])
    _, _, scale, window, softcap = call.scoring
    rules = dict(scale=scale, sliding_window=window, softcap=softcap, **knobs._asdict())
    output, head, counts = eah_attention_varlen(query, key, value, image_mask[0], cu_seqlens, longest, **rules)
    return EAHResult(output.transpose(0, 1)[None], head, counts)


class Selection(NamedTuple):
    """sink_counts (B, heads of all processes) int32; column_mean (B, Hq, Skv) float32 if it was asked for."""

    choice: Choice
    sink_counts: Tensor
    column_mean: Tensor | None


def select(
    call: Call, image_mask: Tensor, knobs: Knobs, block: HeadBlock | None = None, return_column_mean: bool = False
) -> Selection:
    """The head whose map is lent and the heads that take it, without lending it; among all processes' heads."""
    options: dict[str, Any] = {"threshold": knobs.threshold, "backend": knobs.backend, **call.scoring._asdict()}
    with torch.no_grad():
        counts, _, mean = sink_statistics(
            call.query, call.key, image_mask, return_column_mean=return_column_mean, **options
        )
        counts = counts if block is None else block.of_all(counts)
        head = select_head(counts, image_mask, knobs.min_density)
        return Selection(Choice(head, receivers(counts, head, knobs)), counts, mean)


def column_mean(query: Tensor, key: Tensor, image_mask: Tensor, scoring: Scoring, backend: str = "auto") -> Tensor:
    """c_h[j] of every head and image-token key, (B, Hq, Skv) float32, 0 elsewhere."""
    options: dict[str, Any] = scoring._asdict()
    statistics = sink_statistics(query, key, image_mask, return_column_mean=True, backend=backend, **options)
    return cast(Tensor, statistics.column_mean)


def receivers(sink_counts: Tensor, head: Tensor, knobs: Knobs) -> Tensor | None:
    """(B, Hq) bool: the heads that take the map; None = all. By row, (B, Hq, S), where sink_counts is."""
    if knobs.broadcast_to == "all":
        return None
    if sink_counts.dim() == 2:
        return receiving_heads(sink_counts, head, knobs.broadcast_to)
    flat = sink_counts.transpose(1, 2).flatten(0, 1), head.flatten()
    return receiving_heads(*flat, knobs.broadcast_to).unflatten(0, head.shape).transpose(1, 2)


def attend(call: Call, choice: Choice, backend: str) -> Tensor:
    """(B, Hq, S, Dv): the chosen head's map for the heads that take it, by the kernels."""
    options = call.scoring._asdict()
    return shared_map_attention(*call[:3], choice.head, receives=choice.receives, backend=backend, **options)


Attention = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor | None]]


def lend(
    choice: Choice,
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    block: HeadBlock | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, by any ordinary attention: for its gradients or maps, and with the chosen head in another process.

    Ordinary attention gives every head the chosen head's map when it is given that head's query and key in the place of
    every head's; the heads that do not receive it come from a second run.

    With a choice by row, (B, S), in which rows of different heads do not see each other (packed sequences), a key is
    that of its own row's head.

    Args:
        attention: of a query (B, Hq, S, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv) and a mask makes the output
            (B, S, Hq, Dv) and the maps (B, Hq, S, Skv), or None in their place.
        mask: where it is a tensor (B|1, Hq, S, Skv), the chosen head's is lent, too.
        block: where the heads of query and key are those of this process; choice counts over all processes.
    """
    head, receives = choice
    source = (head if block is None else head - block.rank * query.shape[1]).long()
    mine = (source >= 0) & (source < query.shape[1])
    row, source = torch.arange(len(head), device=head.device), torch.where(mine, source, 0)
    kv_source = source // (query.shape[1] // key.shape[1])
    if head.dim() == 1:
        lent_query, lent_key = query[row, source], key[row, kv_source]
    else:
        token = torch.arange(query.shape[2], device=head.device)
        lent_query, lent_key = query[row[:, None], source, token], key[row[:, None], kv_source, token]
    if block is not None:
        lent = torch.where(mine[:, None, None], torch.cat([lent_query, lent_key], dim=1), 0.0)
        lent_query, lent_key = _Sum.apply(lent, block.group).split([query.shape[2], key.shape[2]], dim=1)
    own, lent_mask = (head < 0).view(len(head), 1, -1, 1), mask
    lent_query = torch.where(own, query, lent_query[:, None])
    lent_key = torch.where(own, key, lent_key[:, None])
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        lent_mask = mask.expand(len(head), -1, -1, -1)
        lent_mask = torch.where(own, lent_mask, lent_mask[row, source][:, None])
    output, maps = attention(lent_query, lent_key, value, lent_mask)
    if receives is None:
        return output, maps
    own_output, own_maps = attention(query, key, value, mask)
    receives = receives if block is None else block.own(receives)
    receives = receives.view(*receives.shape[:2], -1, 1)
    output = torch.where(receives.transpose(1, 2), output, own_output)
    return output, maps if maps is None or own_maps is None else torch.where(receives, maps, own_maps)


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group; each of them goes on with it in its own way, so gradients sum up too."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None
