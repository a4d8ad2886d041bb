"""Where a packed sequence lies: tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of tensors without a batch dimension.

Such a tensor's view has batch stride 0, and a kernel moves it to its sequence's first token. Grids are made for the
longest sequence; the programs past a shorter one's end leave at once.
"""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import LSE_PAD, View
from eah_kernels.triton.loads import at


@triton.jit
def sequence_of(cu_seqlens, tokens, b, longest):
    """Sequence b's first token and its length, whatever cu_seqlens holds within the tokens and 0 .. longest. tokens: as
    in Batch."""
    tokens = tokens >> 1
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), 0), tokens)
    return first, tl.minimum(tl.maximum(end - first, 0), longest)


@triton.jit
def lse_of(minus_lse, b, first):
    """The view of the row log-sum-exps at sequence b: each has room for its length, rounded up to LSE_PAD."""
    start = (first + b * LSE_PAD) // LSE_PAD * LSE_PAD
    return View(at(minus_lse.ptr, start, minus_lse.column), minus_lse.b, minus_lse.h, minus_lse.row, minus_lse.column)


@triton.jit
def is_past(start_m, length):
    """Whether not even the padding of a sequence's row log-sum-exps reaches to row start_m."""
    return start_m >= tl.cdiv(length, LSE_PAD) * LSE_PAD
