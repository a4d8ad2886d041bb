"""Percentile bootstrap over images: how far a metric, or a difference of metrics, is from noise."""

from __future__ import annotations

import numpy as np

LEVEL = 0.95
SEED = 0
AT_ONCE = 2**23  # numbers held of the draws


def resampled(sums: np.ndarray, resamples: int) -> np.ndarray:
    """Sums over images drawn with replacement, as many as there are.

    Args:
        sums: (images, K), what each image adds to each of K sums.
        resamples: how often all images are drawn. The draws are the same at every call, whatever K is.

    Returns:
        (resamples, K) float64. What is in one row comes from the same images: that makes differences paired ones.
    """
    images = len(sums)
    generator, uniform = np.random.default_rng(SEED), np.full(images, 1 / images)
    chunk = max(1, AT_ONCE // images)
    counts = [min(chunk, resamples - begin) for begin in range(0, resamples, chunk)]
    return np.concatenate([generator.multinomial(images, uniform, size=n).astype(np.float64) @ sums for n in counts])


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of the resamples in which the value is defined (not NaN)."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
