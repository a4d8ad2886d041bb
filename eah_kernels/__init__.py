"""EAH (Enhancing Attention Heads, arXiv 2411.09968) as attention kernels."""

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
from eah_kernels.masks import Scoring
from eah_kernels.native import native_parts

__all__ = [
    "EAHResult",
    "Scoring",
    "SinkStatistics",
    "eah_attention",
    "native_parts",
    "receiving_heads",
    "seeing_rows",
    "select_head",
    "shared_map_attention",
    "sink_statistics",
]
__version__ = "0.1.0"
