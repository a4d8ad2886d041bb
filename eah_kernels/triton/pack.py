"""A mask tensor, read once: a bit for every pair, and what each CELL x CELL cell of pairs holds.

From the cells the other kernels learn which key blocks they can leave out (all hidden) or take as if there were no mask
(all visible); in the rest they read the bits, 32 pairs a word, and only where a visible pair adds a value other than 0
the mask itself. Causality, window and bounds are in the bits; in the words for `sinks`, which lie along the rows, the
rows that do not count and every row's own key are hidden too. All that is kept takes 2.3 bits an entry of the mask. A
(B, Skv) mask gets no words: the kernels read it by key, and its cells are CELL keys. What is kept of a batch row of it
is one line of memory, 0 or -inf for each key and then the KeyMask: 4 + 4 + 1 + 1 bytes a key, as a cell takes no more.
A kernel finds the parts from the number of keys (loads.key_mask).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eah_kernels.triton.bundles import BIASED, CELL, HIDES, PAD, SHOWS, Packed, PackedMask, Pairs, Scale, Sizes
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, cdiv, mask_view, view
from eah_kernels.triton.loads import at, head_of, key_mask, mask_of, row_of
from eah_kernels.triton.scores import counting_rows, score_tile
from eah_kernels.triton.tiles import Tile

TILE = Tile(0, 0, num_warps=4, num_stages=1)
CHUNK: tl.constexpr = tl.constexpr(1024)


@triton.jit
def kind_of(visible, hidden):
    return tl.max(visible.to(tl.int32)) * SHOWS | tl.max(hidden.to(tl.int32)) * HIDES


@triton.jit
def store_words(words, start, visible, AXIS: tl.constexpr):
    """A word for every 32 pairs of a [CELL, CELL] tile along AXIS, from `start` on across it."""
    along = tl.arange(0, CELL)
    bits = visible.to(tl.int32) << tl.expand_dims(along % 32, 1 - AXIS)
    for word in tl.static_range(CELL // 32):
        packed = tl.sum(tl.where(tl.expand_dims(along // 32 == word, 1 - AXIS), bits, 0), AXIS)
        tl.store(at(words.ptr, word, words.row) + start + along, packed)


@triton.jit(do_not_specialize=[*LENGTHS, "heads", "row_cells", "key_cells"])
def _pack_kernel(mask, rows, columns, heads, row_cells, key_cells, q_len, kv_len, window, R: tl.constexpr):
    """rows: what kernels that walk keys read; columns: what those that walk rows read."""
    sizes = Sizes(q_len, kv_len, window)
    pid = tl.program_id(0)
    key_cell = pid % key_cells
    row_cell = pid // key_cells % row_cells
    h = pid // (key_cells * row_cells) % heads
    b = pid // (key_cells * row_cells) // heads
    mask = mask_of(mask, b, h, R)
    start_m, start_n = row_cell * CELL, key_cell * CELL
    local = tl.arange(0, CELL)
    row, key = (start_m + local)[:, None], (start_n + local)[None, :]
    pairs = Pairs(start_m, local[:, None], start_n, local[None, :])
    nothing = tl.zeros([CELL, CELL], tl.float32)
    score, visible = score_tile(nothing, pairs, sizes, mask, Scale(0.0, 0.0), R, R.MASK, True, True)
    inside = (row < q_len) & (key < kv_len)
    visible = visible & inside
    biased = tl.max((visible & (score != 0)).to(tl.int32)) * BIASED

    words = row_of(head_of(rows.words, b, h), key_cell * (CELL // 32))
    store_words(words, start_m, visible, 1)
    cells = row_of(head_of(rows.cells, b, h), row_cell)
    tl.store(cells.ptr + key_cell, kind_of(visible, inside & (visible == 0)) | biased)
    seen = row_of(head_of(rows.seen, b, h), row_cell)
    tl.store(seen.ptr + start_n + local, tl.max(visible.to(tl.int32), 0))

    counts = counting_rows(start_m, sizes, mask, R, CELL)
    visible = visible & counts[:, None] & (key != row + (kv_len - q_len))
    words = row_of(head_of(columns.words, b, h), row_cell * (CELL // 32))
    store_words(words, start_n, visible, 0)
    cells = row_of(head_of(columns.cells, b, h), key_cell)
    tl.store(cells.ptr + row_cell, kind_of(visible, inside & (visible == 0)) | biased)
    counted = row_of(head_of(columns.counts, b, h), row_cell)
    tl.store(counted.ptr + start_n + local, tl.sum(visible.to(tl.int32), 0))


@triton.jit(do_not_specialize=["stride", "kv_len"])
def _pack_keys_kernel(shown_ptr, stride, mask, kv_len):
    """shown_ptr: the (B, Skv) mask, a byte a key, its rows a stride apart. mask: what the other kernels read."""
    b = tl.program_id(0)
    mask = head_of(mask, b, 0)
    before_ptr, shown_bytes, cells_ptr = key_mask(mask, kv_len)
    shown_ptr = at(shown_ptr, b, stride)
    shown_before = 0
    for start in range(0, kv_len + 2 * PAD, CHUNK):
        key = start + tl.arange(0, CHUNK)
        inside = key < kv_len
        shown = tl.load(shown_ptr + key, mask=inside, other=0) != 0
        tl.store(mask.ptr + key, tl.where(shown, 0.0, float("-inf")), mask=inside)
        tl.store(shown_bytes + key, shown, mask=key < tl.cdiv(kv_len, PAD) * PAD + PAD)
        number = shown.to(tl.int32)
        tl.store(before_ptr + key, shown_before + tl.cumsum(number, 0) - number, mask=key <= kv_len)
        shown_before += tl.sum(number, 0)
        shows = tl.max(tl.reshape(number, [CHUNK // CELL, CELL]), 1) * SHOWS
        hides = tl.max(tl.reshape((inside & (number == 0)).to(tl.int32), [CHUNK // CELL, CELL]), 1) * HIDES
        cell = start // CELL + tl.arange(0, CHUNK // CELL)
        tl.store(cells_ptr + cell, shows | hides, mask=cell * CELL < kv_len)


def pack(problem: Problem, given: Tensor) -> Launch:
    """Of a (B, Skv) mask, `given`, fills problem.mask. Of any other sets problem.packed and fills it, before `lse`,
    `sinks` and `attend` are made."""
    mask = problem.mask
    assert mask is not None, "without a mask there is nothing to pack"
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    batch, heads = mask.shape[:2]
    if problem.rules.BY_KEY:
        given = given if given.stride(1) == 1 else given.contiguous()
        shown = dict(shown_ptr=given.view(torch.uint8), stride=given.stride(0))
        shown |= {name: problem.arguments[name] for name in ("mask", "kv_len")}
        return Launch(_pack_keys_kernel, batch, TILE, shown)
    rows, keys = padded(q_len), padded(kv_len)

    def empty(*shape, dtype=torch.uint8):
        lines, length = shape  # strides that are multiples of 16 whatever the lengths: nothing compiles anew
        return mask.new_empty(batch, heads, lines, cdiv(length, 16) * 16, dtype=dtype)

    row_cells, key_cells = rows // CELL.value, keys // CELL.value
    cells, column_cells = empty(row_cells, key_cells), empty(key_cells, row_cells)
    words, column_words = empty(keys // 32, rows, dtype=torch.int32), empty(rows // 32, keys, dtype=torch.int32)
    seen, counts = empty(row_cells, keys), empty(row_cells, keys)
    problem.packed = PackedMask(cells, column_cells, words, column_words, seen, counts)
    names = "q_len", "kv_len", "window", "R"
    return Launch(
        _pack_kernel,
        batch * heads * row_cells * key_cells,
        TILE,
        dict(
            mask=mask_view(mask),
            rows=Packed(view(words), view(cells), seen=view(seen)),
            columns=Packed(view(column_words), view(column_cells), counts=view(counts)),
        )
        | dict(heads=heads, row_cells=row_cells, key_cells=key_cells)
        | {name: problem.arguments[name] for name in names},
    )


def padded(length: int) -> int:
    return cdiv(length, PAD.value) * PAD.value
