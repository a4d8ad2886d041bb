"""What uniform attention would come to in a prompt: the level that a threshold has to be seen against.

A row that sees n keys pays each of them 1 / n. The mean of that down an image column is the column mean of a head whose
query is zero, so the masks of every form are read in one place, `eah_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eah.method import column_mean
from eah_kernels import Scoring, shows

Sight = Scoring | Tensor
"""Who sees whom in a prefill, without anything S x S: a mask of keys and rules, or the means themselves,
(B, 1|Hq, S) float32, of a mask with rows, which is not kept."""


def sight_of(image_mask: Tensor, scoring: Scoring) -> Sight:
    """Of a prefill. A mask with rows is reduced at once: a single head without products."""
    mask = scoring.attention_mask
    keys = Scoring(mask, scoring.causal, sliding_window=scoring.sliding_window)
    if mask is None:
        return keys
    if mask.dim() == 2:
        return keys._replace(attention_mask=mask.clone())
    with torch.no_grad():
        return _means(image_mask, keys._replace(attention_mask=shows(mask)))


def uniform_means(sight: Sight, image_mask: Tensor) -> Tensor:
    """u_j, (B, 1|Hq, S): the mean over the counting rows other than j that see key j of 1 / (keys that the row sees).

    0 off the image and where there is no such row.
    """
    if isinstance(sight, Tensor):
        return sight
    with torch.no_grad():
        return _means(image_mask, sight)


def _means(image_mask: Tensor, scoring: Scoring) -> Tensor:
    batch, length = image_mask.shape
    zero = torch.zeros(1, 1, 1, 1, device=image_mask.device)
    query, key = zero.expand(batch, scoring.mask_heads, length, 16), zero.expand(batch, 1, length, 16)
    return column_mean(query, key, image_mask, scoring)
