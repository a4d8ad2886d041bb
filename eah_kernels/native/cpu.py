"""backend="native" on CPUs: the C++ kernels of csrc/cpu/, or why they cannot be used here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.selection import select_head


def why_not() -> str | None:
    """Why eah_kernels._C cannot be used, or None: its ops are then registered."""
    return _load()


# torch.compiler.assume_constant_result, which would import torch._dynamo
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _load() -> str | None:
    try:
        import_module("eah_kernels._C")
    except ModuleNotFoundError:
        return (
            "the extension eah_kernels._C is not built; `pip install --no-build-isolation .` in a clone builds it "
            "where a C++ compiler and torch are"
        )
    except ImportError as error:
        return f"the extension eah_kernels._C does not load: {error}"
    return None


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring):
    _, mean = torch.ops.eah_kernels_native.statistics(query, key, image_mask, False, *scoring)
    sink_counts = (mean > threshold).sum(-1, dtype=torch.int32)
    head = select_head(sink_counts, image_mask, min_density)
    return shared_map_attention(query, key, value, head, scoring), head, sink_counts


def sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring: Scoring):
    lse, mean = torch.ops.eah_kernels_native.statistics(query, key, image_mask, True, *scoring)
    return (mean > threshold).sum(-1, dtype=torch.int32), lse, mean if return_column_mean else mean.new_empty(0)


def shared_map_attention(query, key, value, head, scoring: Scoring) -> Tensor:
    output = empty_output(query, value)
    torch.ops.eah_kernels_native.attend(query, key, value, head, output, *scoring)
    return output
