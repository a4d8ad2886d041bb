"""A head's attention map, averaged down to a size that can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from eah.method import Call

CELLS = 256  # a side of an averaged map, at most
ROWS = 256  # query rows at once


def averaged_map(call: Call, lse: Tensor, head: int) -> Tensor:
    """P_h of the first batch row, averaged over blocks of rows and keys: (min(Sq, 256), min(Skv, 256)) float32.

    lse (B, Hq, Sq): the natural log of each row's sum of exponentials, from `eah_kernels.sink_statistics`. P is made
    for some rows at a time: exp(score - lse) where the row sees the key.
    """
    query, key, _, scoring = call
    (_, heads, q_len, _), (_, kv_heads, kv_len, _) = query.shape, key.shape
    scoring = scoring.at(0, head)
    q, k = query[0, head].float(), key[0, head // (heads // kv_heads)].float()
    rows_to, keys_to = (_averages(length, q.device) for length in (q_len, kv_len))
    averaged = q.new_zeros(rows_to.shape[1], keys_to.shape[1])
    for start in range(0, q_len, ROWS):
        rows = slice(start, min(start + ROWS, q_len))
        score = q[rows] @ k.T * scoring.scale
        if scoring.softcap is not None:
            score = scoring.softcap * torch.tanh(score / scoring.softcap)
        every = slice(None)
        bias, seen = scoring.bias(rows, every), scoring.visible(q_len, kv_len, q.device, rows, every)[0, 0]
        score = score if bias is None else score + bias[0, 0]
        probability = torch.where(seen, (score - lse[0, head, rows, None]).exp(), 0.0)
        averaged += rows_to[rows].T @ (probability @ keys_to)
    return averaged


def _averages(length: int, device: torch.device) -> Tensor:
    """(length, cells): multiplied with it, a sequence becomes the means of as many blocks, as even as they can be."""
    cells = min(length, CELLS)
    cell = torch.arange(length, device=device) * cells // length
    belongs = (cell[:, None] == torch.arange(cells, device=device)).float()
    return belongs / belongs.sum(0)
