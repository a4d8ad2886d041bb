"""The numbers of a look as plain data, for inspect.json and the page."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from eah.inspect.look import LayerLook, Look


def numbers(look: Look) -> dict:
    """Everything but the pictures. The same look gives the same numbers; a float is the shortest that reads back as the
    float32 it was.
    """
    return {
        "prompt": look.prompt,
        "threshold": look.threshold,
        "tokens": look.tokens,
        "image_tokens": list(look.positions),
        "layers": [layer_numbers(layer, look.threshold) for layer in look.layers],
        "grids": [asdict(grid) for grid in look.grids],
        "without_map": {str(layer): why for layer, why in sorted(look.without_map.items())},
    }


def layer_numbers(layer: LayerLook, threshold: float) -> dict:
    counts, tokens = layer.counts(threshold).tolist(), layer.column_mean.shape[1]
    head, (_, runner_up, sparsest) = layer.head(threshold), layer.shown(threshold)
    most, level = max(counts), layer.uniform[layer.uniform > 0]  # elsewhere no row counts
    return {
        "layer": layer.layer,
        "head": head,
        "runner_up": runner_up,
        "sparsest": sparsest,
        "sinks": counts,
        "density": [count / tokens for count in counts],
        "tied": head is not None and counts.count(most) > 1,
        "saturated": head is not None and most == tokens,
        "uniform_level": level.double().mean().item() if len(level) else 0.0,
        "uniform_share": (level > threshold).double().mean().item() if len(level) else 0.0,
        "uniform": _short(layer.uniform),
        "column_mean": [_short(row) for row in layer.column_mean],
    }


def divergence(plain: Tensor, enhanced: Tensor) -> float:
    """KL(plain || enhanced) of two next-token distributions, in nats, from their logits (V,); -inf: never this token.

    Raises:
        ValueError: the logits have NaN.
    """
    p, q = (logits.double().log_softmax(-1) for logits in (plain, enhanced))
    if p.isnan().any() or q.isnan().any():
        raise ValueError("the next token's logits are NaN: the weights or the dtype do not bear this prompt")
    return max(0.0, torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum().item())


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.9g}") for value in values.tolist()]
