"""A head's attention map, averaged down to a size that can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from eah.method import Call
from eah_kernels import shared_map_attention

CELLS = 256  # a side of an averaged map, at most


def averaged_map(call: Call, head: int) -> Tensor:
    """P_h of the first batch row, averaged over blocks of rows and keys: (min(Sq, 256), min(Skv, 256)) float32.

    P_h times the weights of the averages over keys is attention with these as its values, and never held by itself.
    """
    (_, heads, q_len, _), (_, kv_heads, kv_len, _) = call.query.shape, call.key.shape
    kv_head = head // (heads // kv_heads)
    query, key = call.query[:1, head : head + 1].float(), call.key[:1, kv_head : kv_head + 1].float()
    rows_to, keys_to = (_averages(length, query.device) for length in (q_len, kv_len))
    own = torch.full((1,), -1, dtype=torch.int32, device=query.device)
    by_keys = shared_map_attention(query, key, keys_to[None, None], own, **call.scoring.at(0, head)._asdict())
    return rows_to.T @ by_keys[0, 0]


def _averages(length: int, device: torch.device) -> Tensor:
    """(length, cells): multiplied with it, a sequence becomes the means of as many blocks, as even as they can be."""
    cells = min(length, CELLS)
    cell = torch.arange(length, device=device) * cells // length
    belongs = (cell[:, None] == torch.arange(cells, device=device)).float()
    return belongs / belongs.sum(0)
