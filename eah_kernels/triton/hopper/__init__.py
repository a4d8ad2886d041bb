"""backend="triton" by name on sm_90: Gluon kernels where they suit, Triton kernels elsewhere (docs/kernels.md)."""

from functools import partial

from eah_kernels import triton

eah_attention_varlen = triton.eah_attention_varlen  # TMA knows no sequence's end
eah_attention = partial(triton.eah_attention, fast=True)
sink_statistics = partial(triton.sink_statistics, fast=True)
shared_map_attention = partial(triton.shared_map_attention, fast=True)
