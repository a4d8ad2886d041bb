"""How outputs lie in memory."""

from __future__ import annotations

from torch import Tensor


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """(B, Hq, Sq, Dv) laid out as (B, Sq, Hq, Dv): the transpose that transformers does next costs no copy."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
