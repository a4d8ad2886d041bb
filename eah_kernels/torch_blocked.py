"""backend="torch": EAH in plain torch, one block of rows at a time, on any device.

Extra memory is two blocks of scores (rows x keys x a few heads) and, for float16 and bfloat16, one batch row's operands
in float32. The statistics cost one matrix product and one exp per score; the shared map is computed once and multiplied
once with each KV head's values. Masks and choices are read on the host: on a GPU this backend synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.selection import densest_head, select_head

ROWS = 128  # query rows per block
SCORES = 1 << 19  # scores per block: as many KV heads at once as this allows, at least one


class RowBlock(NamedTuple):
    rows: slice
    keys: slice  # those that some row of the block can see, by position
    visible: Tensor  # (Hq|1, rows, keys) bool


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring):
    sink_counts, _, _ = _statistics(query, key, image_mask, threshold, scoring, want_lse=False)
    head = select_head(sink_counts, image_mask, min_density)
    return shared_map_attention(query, key, value, head, scoring), head, sink_counts


def sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring: Scoring):
    sink_counts, lse, mean = _statistics(query, key, image_mask, threshold, scoring, want_lse=True)
    return sink_counts, lse.float(), mean.float() if return_column_mean else mean.new_empty(0, dtype=torch.float32)


def shared_map_attention(query, key, value, head, scoring: Scoring) -> Tensor:
    output = empty_output(query, value)
    kv_heads, q_len, kv_len = key.shape[1], query.shape[2], key.shape[2]
    for b, chosen in enumerate(head.tolist()):
        rules = scoring.at(b, chosen if chosen >= 0 else None)
        out = output[b].unflatten(0, (kv_heads, -1))
        q, k, v = query[b].unflatten(0, (kv_heads, -1)), _widened(key[b]), _widened(value[b])
        if chosen >= 0:
            kv_head, member = divmod(chosen, q.shape[1])
            q, k = q[kv_head, member][None, None], k[kv_head][None]
        blocks = list(_row_blocks(rules, q_len, kv_len, query.device))
        v = _seen_values(v, rules, blocks)
        for block in blocks:
            for group, _, maps in _maps(q, k, rules, block):
                if chosen >= 0:
                    out[:, :, block.rows] = (maps[0, 0] @ v[:, 0, block.keys])[:, None]
                else:
                    per_value = maps.reshape(maps.shape[0], v.shape[1], -1, maps.shape[-1])
                    out[group, :, block.rows] = (per_value @ v[group, :, block.keys]).reshape(*maps.shape[:3], -1)
    return output


def _statistics(query, key, image_mask, threshold, scoring: Scoring, want_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sink counts, row log-sum-exp (empty unless wanted) and column means. Rows before the image are skipped."""
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    offset = kv_len - q_len
    mean = _widened(query.new_zeros(batch, heads, kv_len))
    lse = mean.new_full((batch, heads, q_len if want_lse else 0), -torch.inf)
    for b in range(batch):
        image = image_mask[b].nonzero().flatten().tolist()
        if not image and not want_lse:
            continue
        rules = scoring.at(b)
        q, k = query[b].unflatten(0, (kv_heads, -1)), _widened(key[b])
        counting = rules.counting_rows(q_len, kv_len, query.device)[0]
        mass, seen_by = mean[b].unflatten(0, (kv_heads, -1)), mean.new_zeros(1, kv_len)
        row_lse = lse[b].unflatten(0, (kv_heads, -1))
        for block in _row_blocks(rules, q_len, kv_len, query.device):
            start = max(image[0], block.keys.start) if image else kv_len
            columns = slice(start, max(start, min(image[-1] + 1, block.keys.stop)) if image else kv_len)
            if columns.start == columns.stop and not want_lse:
                continue
            tile = slice(columns.start - block.keys.start, columns.stop - block.keys.start)
            own = block.rows.start + offset - columns.start  # column of the first row's own key
            counts = counting[:, block.rows, None]
            pairs = block.visible[..., tile] & counts
            pairs.diagonal(own, -2, -1).fill_(False)
            seen_by = seen_by + torch.nn.functional.pad(pairs.sum(-2), (columns.start, kv_len - columns.stop))
            left_out = None if counts.all() else ~_by_kv_head(counts, kv_heads)
            for group, score_lse, maps in _maps(q, k, rules, block, want_lse):
                if want_lse:
                    row_lse[group, :, block.rows] = score_lse
                share = maps[..., tile]
                share.diagonal(own, -2, -1).zero_()
                if left_out is not None:
                    share.masked_fill_(_pick(left_out, group), 0)
                mass[group, :, columns] += share.sum(-2)
        mean[b] /= seen_by.clamp(min=1)
        mean[b].masked_fill_(~image_mask[b], 0)
    return (mean > threshold).sum(-1, dtype=torch.int32), lse, mean


def heads_by_row(query, key, image_mask, column_sum, seeing, threshold, min_density, scoring: Scoring):
    """See eah_kernels/by_row.py. A few KV heads and ROWS rows at a time; the sums run on from block to block."""
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    offset = image_mask.shape[1] - kv_len  # columns before the first key
    column_sum, counts = column_sum.clone(), query.new_zeros(batch, heads, q_len, dtype=torch.int32)
    seeing = seeing.expand(-1, max(scoring.mask_heads, seeing.shape[1]), -1).clone()
    for b in range(batch):
        image = image_mask[b].nonzero().flatten().tolist()
        if not image:
            continue
        rules = scoring.at(b)
        q, k = query[b].unflatten(0, (kv_heads, -1)), _widened(key[b])
        counting = rules.counting_rows(q_len, kv_len, query.device)[0]
        sums, number = column_sum[b].unflatten(0, (kv_heads, -1)), seeing[b]
        row_counts = counts[b].unflatten(0, (kv_heads, -1))
        for block in _row_blocks(rules, q_len, kv_len, query.device):
            first, last = max(image[0], block.keys.start + offset), min(image[-1] + 1, block.keys.stop + offset)
            columns = slice(first, max(first, last))
            keys = slice(columns.start - offset - block.keys.start, columns.stop - offset - block.keys.start)
            own = block.rows.start + kv_len - q_len - block.keys.start - keys.start  # of the first row, in the tile
            left_out = ~(block.visible[..., keys] & counting[:, block.rows, None] & image_mask[b, columns])
            left_out.diagonal(own, -2, -1).fill_(True)
            seen_by = _by_kv_head(number[:, None, columns] + (~left_out).cumsum(-2), kv_heads)
            least = seen_by * threshold
            elsewhere = column_sum[b] > number * threshold
            elsewhere[:, columns] = False
            row_counts[:, :, block.rows] = elsewhere.sum(-1, dtype=torch.int32).view(kv_heads, -1, 1)
            left_out = _by_kv_head(left_out, kv_heads)
            for group, _, maps in _maps(q, k, rules, block) if columns.start < columns.stop else ():
                share = maps[..., keys].masked_fill_(_pick(left_out, group), 0)
                running = share.cumsum(-2).add_(sums[group, :, None, columns])
                row_counts[group, :, block.rows] += (running > _pick(least, group)).sum(-1, dtype=torch.int32)
                sums[group, :, columns] = running[..., -1, :]
            number[:, columns] = seen_by[..., -1, :].flatten(0, 1)
    image_tokens = image_mask.cumsum(-1)[:, image_mask.shape[1] - q_len :]
    head = densest_head(counts.transpose(1, 2), image_tokens, min_density)
    return head, counts, column_sum, seeing


def _row_blocks(rules: Scoring, q_len: int, kv_len: int, device: torch.device) -> Iterator[RowBlock]:
    offset = kv_len - q_len
    for start in range(0, q_len, ROWS):
        rows = slice(start, min(start + ROWS, q_len))
        first = 0 if rules.sliding_window is None else max(0, rows.start + offset - rules.sliding_window + 1)
        keys = slice(first, rows.stop + offset if rules.causal else kv_len)
        yield RowBlock(rows, keys, rules.visible(q_len, kv_len, device, rows, keys)[0])


def _maps(q: Tensor, k: Tensor, rules: Scoring, block: RowBlock, want_lse: bool = False):
    """Yields, a few KV heads at a time: their slice, row log-sum-exps (n, G, rows) or None, maps (n, G, rows, keys).

    q is (Hkv, G, Sq, D) in any dtype, k (Hkv, Skv, D) in the dtype of the computation. The maps are overwritten by the
    next step.
    """
    kv_heads, members = q.shape[:2]
    rows, keys = block.visible.shape[-2:]
    step = max(1, SCORES // (members * rows * keys))
    scratch = k.new_empty(2, min(step, kv_heads) * members * rows * keys)
    hidden = ~_by_kv_head(block.visible, kv_heads)
    hiding = hidden.flatten(0, -2).any(0).nonzero()
    edge = int(hiding[0]) if hiding.numel() else keys  # every row sees the columns before it
    blind = hidden.all(-1)
    any_blind = bool(blind.any())
    bias = rules.bias(block.rows, block.keys)
    cap = rules.softcap
    for start in range(0, kv_heads, step):
        group = slice(start, min(start + step, kv_heads))
        shape = (group.stop - start, members, rows, keys)
        score, maps = scratch[:, : shape[0] * members * rows * keys].view(2, *shape)
        scaled = q[group, :, block.rows].to(k.dtype) * (rules.scale if cap is None else rules.scale / cap)
        torch.bmm(scaled.flatten(1, 2), k[group, block.keys].mT, out=score.flatten(1, 2))
        if cap is not None:
            score.tanh_().mul_(cap)
        if bias is not None:
            score += _pick(_by_kv_head(bias[0], kv_heads), group)
        score[..., edge:].masked_fill_(_pick(hidden, group)[..., edge:], -torch.inf)
        torch.softmax(score, -1, out=maps)
        if any_blind:
            maps.masked_fill_(_pick(blind, group)[..., None], 0)
        row_lse = None
        if want_lse:
            row_lse = (score.amax(-1) - maps.amax(-1).log()).masked_fill(_pick(blind, group), -torch.inf)
        yield group, row_lse, maps


def _seen_values(v: Tensor, rules: Scoring, blocks: list[RowBlock]) -> Tensor:
    """v (Hkv, Skv, Dv) as (Hkv, G|1, Skv, Dv), zero where no row sees the key: whatever it holds reaches nothing."""
    if rules.attention_mask is None:
        return v[:, None]  # by position alone, every key of a block is seen by some row of it
    seen = torch.zeros(blocks[0].visible.shape[0], v.shape[1], dtype=torch.bool, device=v.device)
    for block in blocks:
        seen[:, block.keys] |= block.visible.any(-2)
    return v[:, None].masked_fill(~_by_kv_head(seen, v.shape[0])[..., None], 0)


def _by_kv_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """(Hq|1, ...) as (Hkv|1, G|1, ...)."""
    return tensor[None] if tensor.shape[0] == 1 else tensor.unflatten(0, (kv_heads, -1))


def _pick(tensor: Tensor, group: slice) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[group]


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
