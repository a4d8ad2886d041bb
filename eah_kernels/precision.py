"""In which precision scores are made, whatever the inputs' dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def exact(query: Tensor) -> AbstractContextManager[object]:
    """Scores are float32 under autocast, too; the meta device has none."""
    device = query.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def reference_dtype(query: Tensor) -> torch.dtype:
    """Of the reference's scores and statistics."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
