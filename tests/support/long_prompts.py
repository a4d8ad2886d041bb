"""The reference of long causal prompts by blocks of rows: the float64 maps of 16k tokens in full want 40 GiB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eah_kernels import reference, shared_map_attention, sink_statistics
from eah_kernels.masks import Scoring

from .cases import Case, Inputs, assert_close, assert_statistics_close, make, pick_threshold, run

ROWS = 1024  # of a block


def row_blocks(inputs: Inputs, rows: int) -> Iterator[tuple[slice, slice, Scoring]]:
    """Rows, the keys that a causal mask lets them see, and the scoring between them. As many rows as keys."""
    mask, length = inputs.attention_mask, inputs.query.shape[2]
    for start in range(0, length, rows):
        end = min(start + rows, length)
        seen = None if mask is None else mask[:, :end]
        yield slice(start, end), slice(end), inputs.scoring._replace(attention_mask=seen)


def statistics(inputs: Inputs, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Row log-sum-exp (B, Hq, Sq) and column means (B, Hq, Skv), 0 off the image, in float64."""
    batch, heads, length, _ = inputs.query.shape
    mass, pairs = inputs.query.new_zeros(2, batch, heads, length, dtype=torch.float64)
    lse = []
    for block, keys, scoring in row_blocks(inputs, rows):
        query, key = inputs.query[:, :, block], inputs.key[:, :, keys]
        probability, block_lse, visible = reference.attention_maps(query, key, scoring, torch.float64)
        counting = scoring.counting_rows(query.shape[2], key.shape[2], query.device)
        counted = (visible & counting.unsqueeze(-1)).tril(block.start - 1)  # without the own key
        mass[..., keys] += probability.masked_fill(~counted, 0).sum(-2)
        pairs[..., keys] += counted.sum(-2)
        lse.append(block_lse)
    return torch.cat(lse, -1), (mass / pairs.clamp(min=1)).masked_fill(~inputs.image_mask[:, None], 0)


def shared_map(inputs: Inputs, head: Tensor, dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    """The output for the heads chosen, as a computation in `dtype` gives it."""
    tensors = (tensor.to(dtype) for tensor in (inputs.query, inputs.key, inputs.value))
    query, key, value = tensors
    blocks = [
        reference.shared_map_attention(query[:, :, block], key[:, :, keys], value[:, :, keys], head, scoring, dtype)
        for block, keys, scoring in row_blocks(inputs, rows)
    ]
    return torch.cat(blocks, 2)


def check(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    """Statistics, choice and output of a backend against the float64 reference, as support.check does it."""
    inputs = make(case, dtype, device)
    lse, mean = statistics(inputs)
    threshold = pick_threshold(mean, inputs.image_mask)
    counts = (mean > threshold).sum(-1, dtype=torch.int32)
    head = reference.select_head(counts, inputs.image_mask, 0.0)

    result = run(inputs, threshold, backend)
    assert torch.equal(result.sink_counts, counts) and torch.equal(result.head, head)
    assert_close(result.output, shared_map(inputs, head, torch.float64), shared_map(inputs, head, dtype))

    tensors = inputs.query, inputs.key, inputs.value
    options = dict(attention_mask=inputs.attention_mask, backend=backend, **inputs.rules)
    found = sink_statistics(*tensors[:2], inputs.image_mask, threshold=threshold, return_column_mean=True, **options)
    assert_statistics_close(found.lse, found.column_mean, lse, mean)

    none = torch.full_like(head, -1)
    plain = shared_map(inputs, none, dtype)
    assert_close(shared_map_attention(*tensors, none, **options), shared_map(inputs, none, torch.float64), plain)
