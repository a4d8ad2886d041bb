"""Heads spread over processes (tensor parallelism): one choice among all of them, its query and key lent to each.

Every process computes a block of the layer's heads, in the order of the device mesh that the layer's weights are
sharded over. What is decided here is the same in all of them, and so are the collectives that they enter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn


class HeadBlock(NamedTuple):
    """This process's heads, n of n * size: they start at rank * n."""

    group: torch.distributed.ProcessGroup
    rank: int
    size: int


def head_block(module: nn.Module) -> HeadBlock | None:
    """Where this process's heads stand among all, or None where no weight of the module is sharded over one mesh."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
            if len(sharded) == 1:
                return HeadBlock(mesh.get_group(sharded[0]), mesh.get_local_rank(sharded[0]), mesh.size(sharded[0]))
    return None


def of_all_heads(block: HeadBlock, counts: Tensor) -> Tensor:
    """(B, heads of all processes) from each one's (B, heads)."""
    every = counts.new_zeros(len(counts), block.size, counts.shape[1])
    every[:, block.rank] = counts
    return _Sum.apply(every, block.group).flatten(1)


def of_own_heads(block: HeadBlock, every: Tensor) -> Tensor:
    """This process's part of (B, heads of all processes)."""
    return every.unflatten(1, (block.size, -1))[:, block.rank]


def lend_across(block: HeadBlock, head: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen head's query and key in the place of every head's, from the process that computes it.

    head (B,) counts over all processes, -1 = the row keeps its own. query (B, Hq, S, D) and key (B, Hkv, Skv, D) are
    this process's. Differentiable.
    """
    local = head.long() - block.rank * query.shape[1]
    mine = (local >= 0) & (local < query.shape[1])
    source = torch.where(mine, local, 0)
    row = torch.arange(len(head), device=head.device)
    group = query.shape[1] // key.shape[1]
    chosen = torch.cat([query[row, source], key[row, source // group]], dim=1)
    chosen = _Sum.apply(torch.where(mine[:, None, None], chosen, 0.0), block.group)
    chosen_query, chosen_key = chosen[:, None].split([query.shape[2], key.shape[2]], dim=2)
    own = (head < 0)[:, None, None, None]
    return torch.where(own, query, chosen_query), torch.where(own, key, chosen_key)


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
