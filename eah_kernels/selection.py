"""Which head is chosen, and which heads take its map, from the sinks of each (spec, steps 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def select_head(sink_counts: Tensor, image_mask: Tensor, min_density: float) -> Tensor:
    """h* = argmax_h N_h, lowest index on a tie; -1 without a sink, without an image, or below `min_density`. (B,)."""
    return densest_head(sink_counts, image_mask.sum(-1), min_density)


def densest_head(sink_counts: Tensor, image_tokens: Tensor, min_density: float) -> Tensor:
    """`select_head` for sink_counts (..., Hq) and as many image_tokens (...)."""
    count, head = sink_counts.max(-1)
    density = count.float() / image_tokens.clamp(min=1).float()
    chosen = (count > 0) & (density >= min_density)
    return torch.where(chosen, head, -1).int()


def receiving_heads(sink_counts: Tensor, head: Tensor, number: int) -> Tensor:
    """The `number` heads with the fewest sinks, the higher index on a tie; none where h* = -1. (B, Hq) bool."""
    fewest_first = sink_counts.flip(-1).argsort(dim=-1, stable=True)
    rank = fewest_first.argsort(-1).flip(-1)
    return (rank < number) & (head >= 0)[:, None]
