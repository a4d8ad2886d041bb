"""What uniform attention would come to in a prompt: the level that a threshold has to be seen against.

A row that sees n keys pays each of them 1 / n. The mean of that down an image column is the column mean of a head whose
query is zero, so the masks of every form are read in one place, `eah_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eah.arguments import Call
from eah_kernels import sink_statistics


class Sight(NamedTuple):
    """Who sees whom in a prefill, without anything S x S: a mask of keys and rules, or the means themselves."""

    padding_mask: Tensor | None = None  # (B, S) bool
    causal: bool = True
    sliding_window: int | None = None
    means: Tensor | None = None  # (B, 1|Hq, S) float32, of a mask with rows, which is not kept


def sight_of(call: Call) -> Sight:
    """Of a prefill. A mask with rows is reduced at once: a single head without products."""
    mask = call.attention_mask
    if mask is None or mask.dim() == 2:
        return Sight(None if mask is None else mask.clone(), call.causal, call.sliding_window)
    with torch.no_grad():
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return Sight(means=_means(call.image_mask, visible, call.causal, call.sliding_window))


def uniform_means(sight: Sight, image_mask: Tensor) -> Tensor:
    """u_j, (B, 1|Hq, S): the mean over the counting rows other than j that see key j of 1 / (keys that the row sees).

    0 off the image and where there is no such row.
    """
    if sight.means is not None:
        return sight.means
    with torch.no_grad():
        return _means(image_mask, sight.padding_mask, sight.causal, sight.sliding_window)


def _means(image_mask: Tensor, visible: Tensor | None, causal: bool, window: int | None) -> Tensor:
    heads = visible.shape[1] if visible is not None and visible.dim() == 4 else 1
    batch, length = image_mask.shape
    zero = torch.zeros(1, 1, 1, 1, device=image_mask.device)
    query, key = zero.expand(batch, heads, length, 16), zero.expand(batch, 1, length, 16)
    rules = {"attention_mask": visible, "causal": causal, "sliding_window": window}
    return sink_statistics(query, key, image_mask, return_column_mean=True, **rules).column_mean
