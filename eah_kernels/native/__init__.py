"""backend="native": the C++ extension of csrc/, for CPU tensors (cpu.py) and for CUDA tensors (cuda.py)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.native import cpu, cuda


def native_parts() -> dict[str, str | None]:
    """The parts of the native extension, "cpu" and "cuda": None where it is built and loads, else why not."""
    return {"cpu": cpu.why_not(), "cuda": cuda.why_not()}


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring):
    return _part(query).eah_attention(query, key, value, image_mask, threshold, min_density, scoring)


def sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring: Scoring):
    return cpu.sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring)


def shared_map_attention(query, key, value, head, scoring: Scoring) -> Tensor:
    return _part(query).shared_map_attention(query, key, value, head, scoring)


def _part(query: Tensor) -> ModuleType:
    return cuda if query.device.type == "cuda" else cpu
