"""In which precision scores are made, whatever the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(query: Tensor) -> torch.autocast:
    """Scores are float32 under autocast, too."""
    return torch.autocast(query.device.type, enabled=False)


def reference_dtype(query: Tensor) -> torch.dtype:
    """Of the reference's scores and statistics."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
