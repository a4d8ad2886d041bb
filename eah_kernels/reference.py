"""EAH as it is defined: eager, with the S x S maps in full, differentiable (arXiv 2411.09968).

Slow and obvious on purpose; every other backend is tested against this file. `dtype` is the precision of the
computation (float32 as defined, float64 to measure the rounding of others).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.selection import receiving_heads, select_head

EVERYTHING = slice(None)


def attention_maps(query: Tensor, key: Tensor, scoring: Scoring, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """P (B, Hq, Sq, Skv), its row log-sum-exp (B, Hq, Sq), and who sees whom (B|1, Hq|1, Sq, Skv)."""
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), dim=1)
    score = scoring.scale * (query.to(dtype) @ key.to(dtype).mT)
    if scoring.softcap is not None:
        score = scoring.softcap * torch.tanh(score / scoring.softcap)
    bias = scoring.bias(EVERYTHING, EVERYTHING)
    if bias is not None:
        score = score + bias.to(dtype)
    visible = scoring.visible(query.shape[2], key.shape[2], query.device, EVERYTHING, EVERYTHING)
    score = score.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1, keepdim=True)
    probability = score.masked_fill(blind, 0).softmax(-1).masked_fill(~visible, 0)
    return probability, score.logsumexp(-1), visible


def column_means(probability: Tensor, visible: Tensor, counting: Tensor) -> Tensor:
    """c_h[j] = sum_{i != j} P_h[i, j] / n_j over the n_j counting rows that see j; 0 where n_j = 0. (B, Hq, Skv)."""
    q_len, kv_len = visible.shape[-2:]
    own_key = torch.arange(q_len, device=visible.device)[:, None] + kv_len - q_len
    off_diagonal = torch.arange(kv_len, device=visible.device) != own_key
    pairs = visible & counting.unsqueeze(-1) & off_diagonal
    return probability.masked_fill(~pairs, 0).sum(-2) / pairs.sum(-2).clamp(min=1)


def sink_statistics(query, key, image_mask, threshold, scoring: Scoring, dtype=torch.float32):
    """Sinks per head N_h (B, Hq) int32, row log-sum-exp (B, Hq, Sq), column means (B, Hq, Skv), 0 off the image."""
    probability, lse, visible = attention_maps(query, key, scoring, dtype)
    counting = scoring.counting_rows(query.shape[2], key.shape[2], query.device)
    image = image_mask[:, None]
    mean = column_means(probability, visible, counting).masked_fill(~image, 0)
    return (mean > threshold).sum(-1, dtype=torch.int32), lse, mean


def shared_map_attention(query, key, value, head, scoring: Scoring, dtype=torch.float32, receives=None) -> Tensor:
    """Every head, or those that `receives` marks, outputs P_{h*} V_h; else P_h V_h. (B, Hq, Sq, Dv).

    head is (B,) or (B, Sq); receives has the heads as its second dimension.
    """
    probability, _, visible = attention_maps(query, key, scoring, dtype)
    head = head[:, None] if head.dim() == 2 else head[:, None, None]  # (B, 1, 1|Sq)
    if receives is not None and receives.dim() == 2:
        receives = receives[..., None]
    batch, heads, rows = (torch.arange(n, device=query.device) for n in query.shape[:3])
    lent = head >= 0 if receives is None else receives & (head >= 0)
    source = torch.where(lent, head, heads[:, None])
    where = batch[:, None, None], source, rows
    shared, seen = probability[where], visible.expand_as(probability)[where].any(-2)
    value = value.to(dtype).repeat_interleave(query.shape[1] // max(value.shape[1], 1), dim=1)
    return (shared @ value.masked_fill(~seen.unsqueeze(-1), 0)).to(query.dtype)


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring, dtype=torch.float32, number=None):
    """(output, head, sink_counts) of one layer, `number` of its heads receiving; the choice carries no gradient."""
    with torch.no_grad():
        sink_counts, _, _ = sink_statistics(query, key, image_mask, threshold, scoring, dtype)
        head = select_head(sink_counts, image_mask, min_density)
        receives = None if number is None else receiving_heads(sink_counts, head, number)
    return shared_map_attention(query, key, value, head, scoring, dtype, receives), head, sink_counts
