"""EAH (Enhancing Attention Heads, arXiv 2411.09968) as attention kernels."""

import warnings

with warnings.catch_warnings():  # without numpy torch warns when it is imported; nothing here needs numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from eah_kernels.api import (
    EAHResult,
    SinkStatistics,
    eah_attention,
    receiving_heads,
    seeing_rows,
    select_head,
    shared_map_attention,
    sink_statistics,
)
from eah_kernels.backends import BACKENDS, gluon_kernels, untested_triton
from eah_kernels.by_row import HeadsByRow, heads_by_row
from eah_kernels.checks import MAX_HEAD_DIM
from eah_kernels.masks import Scoring, shows
from eah_kernels.native import native_parts
from eah_kernels.varlen import eah_attention_varlen

__all__ = [
    "BACKENDS",
    "MAX_HEAD_DIM",
    "EAHResult",
    "HeadsByRow",
    "Scoring",
    "SinkStatistics",
    "eah_attention",
    "eah_attention_varlen",
    "gluon_kernels",
    "heads_by_row",
    "native_parts",
    "receiving_heads",
    "seeing_rows",
    "select_head",
    "shared_map_attention",
    "shows",
    "sink_statistics",
    "untested_triton",
]
__version__ = "0.1.0"
