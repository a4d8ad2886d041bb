"""A head chosen anew at each of several later rows, from all rows up to it: as a decoder chooses step by step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eah_kernels import ops
from eah_kernels.checks import (
    check_fraction,
    check_image_mask,
    check_scoring,
    describe,
    refuse_derivatives,
    require_tensors,
)
from eah_kernels.precision import exact


class HeadsByRow(NamedTuple):
    """head (B, Sq) int32, -1 = none; sink_counts (B, Hq, Sq) int32; column_sum and seeing as given, the rows added."""

    head: Tensor
    sink_counts: Tensor
    column_sum: Tensor
    seeing: Tensor


def heads_by_row(
    query: Tensor,
    key: Tensor,
    image_mask: Tensor,
    column_sum: Tensor,
    seeing: Tensor,
    *,
    threshold: float = 0.002,
    min_density: float = 0.0,
    attention_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> HeadsByRow:
    """At each row, the head that has the most vision sinks over all rows up to it (arXiv 2411.09968, section 4).

    Plain torch on every device, in blocks of rows: nothing of the size rows x columns x heads is held. Reads the image
    mask on the host.

    Args:
        query: (B, Hq, Sq, D), the new rows; key (B, Hkv, Skv, D), of their own tokens too, which come last.
        image_mask: (B, S) bool, S >= Skv: the columns of the whole sequence, which end with those of `key`. Columns
            before them, which a sliding window has left behind, are counted and not changed.
        column_sum: (B, Hq, S) float32, over the rows before: the attention that each image-token column was paid by
            the rows that count, their own columns left out. After `sink_statistics`, column_mean * seeing.
        seeing: (B, 1|Hq, S) int32: how many rows those were, as from `seeing_rows`.
        The others as for `eah_attention`, and so the errors.

    Returns:
        HeadsByRow. Density counts the image tokens up to the row.
    """
    scoring = check_scoring(query, key, attention_mask, causal, scale, sliding_window, softcap)
    batch, heads, q_len, _ = query.shape
    columns = image_mask.shape[-1] if isinstance(image_mask, Tensor) else 0
    check_image_mask(image_mask, batch, None, query.device)
    if columns < key.shape[2] or key.shape[2] < q_len:
        lengths = f"{columns} columns, {key.shape[2]} keys and {q_len} rows"
        raise ValueError(f"image_mask must have at least key's columns and key at least query's, got {lengths}")
    check_fraction("threshold", threshold, math.inf)
    check_fraction("min_density", min_density, 1.0)
    _check_sums("column_sum", column_sum, (batch, heads, columns), (heads,), torch.float32, query.device)
    _check_sums("seeing", seeing, (batch, heads, columns), (1, heads), torch.int32, query.device)
    refuse_derivatives("torch", query, key, attention_mask)
    arguments = query, key, image_mask, column_sum, seeing, threshold, min_density
    with exact(query):
        return HeadsByRow(*ops.heads_by_row(*arguments, *scoring, "torch"))


def _check_sums(name: str, tensor: Tensor, shape: tuple, heads: tuple, dtype: torch.dtype, device) -> None:
    require_tensors(**{name: tensor})
    fits = tensor.dim() == 3 and tuple(tensor.shape[::2]) == shape[::2] and tensor.shape[1] in heads
    if not fits or tensor.dtype != dtype or tensor.device != device:
        accepted = f"({shape[0]}, {'|'.join(map(str, heads))}, {shape[2]}) {dtype} on {device}"
        raise ValueError(f"{name} must be {accepted}, got {describe(tensor)}")
