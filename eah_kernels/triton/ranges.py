"""Which blocks a program walks: those that a mask, causality or a window leaves, the whole ones apart."""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import BIASED, CELL, KEY_MASK, NO_MASK, SHOWS, Span, View
from eah_kernels.triton.loads import at, head_of, key_mask

# The side of the whole blocks at which the split ones lie
BEFORE: tl.constexpr = tl.constexpr(0)
AFTER: tl.constexpr = tl.constexpr(1)


@triton.jit
def walk(span, EDGE: tl.constexpr, SIDE: tl.constexpr, BOTH_SIDES: tl.constexpr):
    """(begin, end) of the loop over the whole blocks of a span (EDGE = False), or over its split ones.

    With BOTH_SIDES the split blocks before and after the whole ones are one loop, as if the whole ones were cut out:
    `place` says where a block of it lies.
    """
    if not EDGE:
        begin, end = span.full, span.edge
    elif BOTH_SIDES:
        begin, end = span.first, span.last - (span.edge - span.full)
    elif SIDE == BEFORE:
        begin, end = span.first, span.full
    else:
        begin, end = span.edge, span.last
    return begin, end


@triton.jit
def place(span, start, EDGE: tl.constexpr, BOTH_SIDES: tl.constexpr, BLOCK: tl.constexpr):
    if EDGE and BOTH_SIDES:
        start = tl.multiple_of(start + tl.where(start < span.full, 0, span.edge - span.full), BLOCK)
    return start


@triton.jit
def visible_range(cells_ptr, stride, length, local, LINES: tl.constexpr):
    """The span that LINES lines of cells leave of `length` pairs: whole cells are all visible and unbiased.

    local: 0, 1, ... 127.
    """
    cells = tl.cdiv(length, CELL)
    first, full, edge, last, biased = cells, 0, 0, 0, 0
    for start in range(0, cells, 128):
        cell = start + local
        kind = tl.load(cells_ptr + cell, mask=cell < cells, other=0).to(tl.int32)
        for line in tl.static_range(1, LINES):
            kind = kind | tl.load(at(cells_ptr, line, stride) + cell, mask=cell < cells, other=0).to(tl.int32)
        first = tl.minimum(first, tl.min(tl.where(kind & SHOWS != 0, cell, cells), 0))
        last = tl.maximum(last, tl.max(tl.where(kind & SHOWS != 0, cell + 1, 0), 0))
        biased = tl.maximum(biased, tl.max(kind, 0))
        end = tl.max(tl.where(kind == SHOWS, cell + 1, 0), 0)
        begin = tl.max(tl.where((kind != SHOWS) & (cell < end), cell + 1, start), 0)
        full = tl.where(end > 0, tl.where((begin == start) & (edge == start), full, begin), full)
        edge = tl.maximum(edge, end)
    return Span(first * CELL, full * CELL, edge * CELL, last * CELL, biased >= BIASED)


@triton.jit
def intersect(span, seen, shift, length, BLOCK: tl.constexpr):
    """The blocks of a span, narrowed to those that the mask's, which lies `shift` further, leaves."""
    first = tl.maximum(span.first, tl.maximum(seen.first - shift, 0) // BLOCK * BLOCK)
    last = tl.minimum(span.last, seen.last - shift)
    full = tl.maximum(span.full, tl.cdiv(tl.maximum(seen.full - shift, 0), BLOCK) * BLOCK)
    whole = tl.maximum(seen.edge - shift, 0) // BLOCK * BLOCK
    edge = tl.minimum(tl.where(seen.edge < length, tl.minimum(span.edge, whole), span.edge), last)
    return Span(first, full, edge, last, seen.biased)


@triton.jit
def key_range(start_m, sizes, cells, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that rows start_m, ... may see; a whole block is one that they all see. cells: of all rows of the head, or
    of all keys under a (B, Skv) mask."""
    offset = sizes.kv_len - sizes.q_len
    first, full, edge, last = 0, 0, sizes.kv_len // BLOCK_N * BLOCK_N, sizes.kv_len
    end_m = tl.minimum(start_m + BLOCK_M, sizes.q_len)
    if R.CAUSAL:
        edge = tl.minimum(tl.maximum(start_m + offset + 1, 0), sizes.kv_len) // BLOCK_N * BLOCK_N
        last = end_m + offset
    if R.WINDOW:
        first = tl.maximum(start_m + offset - sizes.window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(end_m + offset - sizes.window, 0), BLOCK_N) * BLOCK_N
    span = Span(first, full, edge, last, False)
    if R.MASK != NO_MASK:
        LINES: tl.constexpr = 1 if R.BY_KEY else (BLOCK_M + CELL - 1) // CELL
        line = cells.ptr if R.BY_KEY else at(cells.ptr, start_m // CELL, cells.row)
        span = intersect(
            span, visible_range(line, cells.row, sizes.kv_len, tl.arange(0, 128), LINES), 0, sizes.kv_len, BLOCK_N
        )
    if R.BOTH_SIDES:
        span = whole_or_none(span, BLOCK_N)
    return span


@triton.jit
def row_range(start_n, sizes, cells, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows that may see a key of start_n, ... beside their own; in a whole block all rows that exist see them all and
    count."""
    offset = sizes.kv_len - sizes.q_len
    first = tl.maximum(-offset, 0) // BLOCK_M * BLOCK_M
    full = tl.cdiv(tl.maximum(start_n + BLOCK_N - offset, 0), BLOCK_M) * BLOCK_M
    edge, last = sizes.q_len, sizes.q_len
    if R.CAUSAL:
        first = tl.maximum(start_n + 1 - offset, 0) // BLOCK_M * BLOCK_M
    if R.WINDOW:
        last = tl.minimum(sizes.q_len, start_n + BLOCK_N - 1 + sizes.window - offset)
        edge = tl.minimum(tl.maximum(start_n + sizes.window - offset, 0) // BLOCK_M * BLOCK_M, last)
    span = Span(first, full, edge, last, False)
    if R.MASK != NO_MASK:
        LINES: tl.constexpr = 1 if R.BY_KEY else (BLOCK_N + CELL - 1) // CELL
        line = cells.ptr if R.BY_KEY else at(cells.ptr, start_n // CELL, cells.row)
        length = sizes.kv_len if R.BY_KEY else sizes.q_len  # a (B, Skv) mask hides the rows whose own keys it hides
        shift = offset if R.BY_KEY else 0
        span = intersect(span, visible_range(line, cells.row, length, tl.arange(0, 128), LINES), shift, length, BLOCK_M)
    return whole_or_none(span, BLOCK_M)


@triton.jit
def whole_or_none(span, BLOCK: tl.constexpr):
    """Where no block is whole, the split ones reach from first to full = edge = last, rounded up."""
    full = tl.cdiv(tl.where(span.full < span.edge, span.full, span.last), BLOCK) * BLOCK
    return Span(span.first, full, tl.maximum(span.edge, full), span.last, span.biased)


@triton.jit
def seeing_rows(key, sizes, mask, R: tl.constexpr):
    """n_j of the keys: rows at positions since .. until - 1, without the own one, that count (spec, step 2).

    Without a mask all count; with a (B, Skv) mask, at this batch row, those at real keys. A hidden key's number means
    nothing.
    """
    since = tl.full(key.shape, 0, tl.int32) + tl.maximum(sizes.kv_len - sizes.q_len, 0)
    until = tl.full(key.shape, 0, tl.int32) + sizes.kv_len
    if R.CAUSAL:
        since = tl.maximum(since, key + 1)
    if R.WINDOW:
        until = tl.minimum(until, key + sizes.window)
    since = tl.minimum(since, until)
    own = (since <= key) & (key < until)
    if R.MASK == NO_MASK:
        rows = until - since
    else:
        before = key_mask(mask, sizes.kv_len).before
        rows = tl.load(before + until) - tl.load(before + since)
    return rows - own.to(tl.int32)


@triton.jit
def cells_of(cells, mask, b, h, kv_len, R: tl.constexpr):
    """The view of a head's cells."""
    if R.MASK == KEY_MASK:
        found = View(key_mask(head_of(mask, b, 0), kv_len).cells, 0, 0, 0, 1)
    else:
        found = head_of(cells, b, h)
    return found
