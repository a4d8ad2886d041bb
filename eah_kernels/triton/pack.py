"""A mask tensor, read once: a bit for every pair, and what each CELL x CELL cell of pairs holds.

From the cells the other kernels learn which key blocks they can leave out (all hidden) or take as if there were no mask
(all visible); in the rest they read the bits, 32 pairs a word, and only where a visible pair adds a value other than 0
the mask itself. Causality, window and bounds are in the bits; in the words for `sinks`, which lie along the rows, the
rows that do not count and every row's own key are hidden too. All that is kept takes 2.3 bits an entry of the mask. A
(B, Skv) mask gets no words: its cells are CELL keys, and the kernels read it by key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eah_kernels.triton.configs import Tile
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, operand
from eah_kernels.triton.primitives import BIASED, CELL, HIDES, KEY_MASK, SHOWS, at, counting_rows, score_tile

PAD = 128  # what is kept per row or key is padded to a multiple of this and so of every tile: no bounds to test
CHUNK: tl.constexpr = tl.constexpr(1024)


class Packed(NamedTuple):
    """MB and MH are 1 where one mask serves all; rows and keys are padded to PAD."""

    cells: Tensor  # (MB, MH, rows / CELL, keys / CELL) uint8, of SHOWS, HIDES, BIASED; of a (B, Skv) mask (B, 1, 1, ..)
    column_cells: Tensor  # (MB, MH, keys / CELL, rows / CELL), for `sinks`; of a (B, Skv) mask the same as cells
    words: Tensor | None = None  # (MB, MH, keys / 32, rows) int32
    column_words: Tensor | None = None  # (MB, MH, rows / 32, keys)
    seen: Tensor | None = None  # (MB, MH, rows / CELL, keys) uint8, whether one of the CELL rows sees the key
    column_counts: Tensor | None = None  # (MB, MH, rows / CELL, keys) uint8, how many count, see it and are not its own
    before: Tensor | None = None  # (B, 1, 1, keys) int32, of a (B, Skv) mask: how many keys it shows before each


@triton.jit
def kind_of(visible, hidden):
    return tl.max(visible.to(tl.int32)) * SHOWS | tl.max(hidden.to(tl.int32)) * HIDES


@triton.jit
def store_words(ptr, stride, visible, AXIS: tl.constexpr):
    """A word for every 32 pairs of a [CELL, CELL] tile along AXIS."""
    along = tl.arange(0, CELL)
    bits = visible.to(tl.int32) << tl.expand_dims(along % 32, 1 - AXIS)
    for word in tl.static_range(CELL // 32):
        packed = tl.sum(tl.where(tl.expand_dims(along // 32 == word, 1 - AXIS), bits, 0), AXIS)
        tl.store(at(ptr, word, stride) + along, packed)


@triton.jit(do_not_specialize=[*LENGTHS, "row_cells", "key_cells"])
def _pack_kernel(
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
    seen_ptr, stride_sb, stride_sh, stride_sm,
    column_words_ptr, stride_xb, stride_xh, stride_xm, column_cells_ptr, stride_yb, stride_yh, stride_yn,
    column_counts_ptr, stride_zb, stride_zh, stride_zm,
    heads, row_cells, key_cells, q_len, kv_len, window,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    key_cell = pid % key_cells
    row_cell = pid // key_cells % row_cells
    h = pid // (key_cells * row_cells) % heads
    b = pid // (key_cells * row_cells) // heads
    mask_ptr = at(at(mask_ptr, b, stride_mb), h, stride_mh)
    start_m, start_n = row_cell * CELL, key_cell * CELL
    local = tl.arange(0, CELL)
    row, key = (start_m + local)[:, None], (start_n + local)[None, :]
    score, visible = score_tile(
        tl.zeros([CELL, CELL], tl.float32), start_m, local[:, None], start_n, local[None, :], q_len, kv_len,
        mask_ptr, stride_mm, stride_mn, 0.0, 0.0, window, MASK, HIDDEN, CAUSAL, WINDOW, False, True, True,
    )  # fmt: skip
    inside = (row < q_len) & (key < kv_len)
    visible = visible & inside
    biased = tl.max((visible & (score != 0)).to(tl.int32)) * BIASED

    words = at(at(words_ptr, b, stride_wb), h, stride_wh)
    store_words(at(words, key_cell * (CELL // 32), stride_wn) + start_m, stride_wn, visible, 1)
    cells = at(at(at(cells_ptr, b, stride_cb), h, stride_ch), row_cell, stride_cm)
    tl.store(cells + key_cell, kind_of(visible, inside & (visible == 0)) | biased)
    seen = at(at(at(seen_ptr, b, stride_sb), h, stride_sh), row_cell, stride_sm)
    tl.store(seen + start_n + local, tl.max(visible.to(tl.int32), 0))

    counts = counting_rows(start_m, q_len, kv_len, mask_ptr, stride_mm, stride_mn, CELL, MASK, HIDDEN)
    visible = visible & counts[:, None] & (key != row + (kv_len - q_len))
    words = at(at(column_words_ptr, b, stride_xb), h, stride_xh)
    store_words(at(words, row_cell * (CELL // 32), stride_xm) + start_n, stride_xm, visible, 0)
    cells = at(at(at(column_cells_ptr, b, stride_yb), h, stride_yh), key_cell, stride_yn)
    tl.store(cells + row_cell, kind_of(visible, inside & (visible == 0)) | biased)
    counts = at(at(at(column_counts_ptr, b, stride_zb), h, stride_zh), row_cell, stride_zm)
    tl.store(counts + start_n + local, tl.sum(visible.to(tl.int32), 0))


@triton.jit(do_not_specialize=LENGTHS)
def _pack_keys_kernel(mask_ptr, stride_mb, stride_mn, cells_ptr, stride_cb, before_ptr, stride_bb, kv_len):
    b = tl.program_id(0)
    before = 0
    for start in range(0, kv_len + 1, CHUNK):
        key = start + tl.arange(0, CHUNK)
        inside = key < kv_len
        shown = tl.load(at(at(mask_ptr, b, stride_mb), key, stride_mn), mask=inside, other=float("-inf")) == 0
        number = shown.to(tl.int32)
        tl.store(at(before_ptr, b, stride_bb) + key, before + tl.cumsum(number, 0) - number, mask=key <= kv_len)
        before += tl.sum(number, 0)
        shows = tl.max(tl.reshape(number, [CHUNK // CELL, CELL]), 1) * SHOWS
        hides = tl.max(tl.reshape((inside & (number == 0)).to(tl.int32), [CHUNK // CELL, CELL]), 1) * HIDES
        cell = start // CELL + tl.arange(0, CHUNK // CELL)
        tl.store(at(cells_ptr, b, stride_cb) + cell, shows | hides, mask=cell * CELL < kv_len)


def pack(problem: Problem) -> Launch:
    """Sets problem.packed and fills it; for a problem with a mask, before `lse`, `sinks` and `attend` are made."""
    kept = problem.arguments
    rows, keys = padded(kept["q_len"]), padded(kept["kv_len"])
    batch, heads = problem.mask.shape[:2]
    tile = Tile(0, 0, num_warps=4, num_stages=1)

    def empty(*shape, dtype=torch.uint8):
        lines, length = shape  # strides that are multiples of 16 whatever the lengths: nothing compiles anew
        return problem.mask.new_empty(batch, heads, lines, triton.cdiv(length, 16) * 16, dtype=dtype)[..., :length]

    if problem.mask_form == KEY_MASK.value:
        cells = empty(1, keys // CELL.value)
        packed = problem.packed = Packed(cells, cells, before=empty(1, keys + 1, dtype=torch.int32))
        return Launch(
            _pack_keys_kernel,
            batch,
            tile,
            {name: kept[name] for name in ("mask_ptr", "stride_mb", "stride_mn", "kv_len")}
            | operand("cells", "cb", packed.cells)
            | operand("before", "bb", packed.before),
        )
    row_cells, key_cells = rows // CELL.value, keys // CELL.value
    packed = problem.packed = Packed(
        empty(row_cells, key_cells),
        empty(key_cells, row_cells),
        empty(keys // 32, rows, dtype=torch.int32),
        empty(rows // 32, keys, dtype=torch.int32),
        empty(row_cells, keys),
        empty(row_cells, keys),
    )
    names = "q_len", "kv_len", "window", "MASK", "HIDDEN", "CAUSAL", "WINDOW"
    return Launch(
        _pack_kernel,
        batch * heads * row_cells * key_cells,
        tile,
        operand("mask", "mb mh mm mn", problem.mask)
        | operand("words", "wb wh wn", packed.words)
        | operand("cells", "cb ch cm", packed.cells)
        | operand("seen", "sb sh sm", packed.seen)
        | operand("column_words", "xb xh xm", packed.column_words)
        | operand("column_cells", "yb yh yn", packed.column_cells)
        | operand("column_counts", "zb zh zm", packed.column_counts)
        | dict(heads=heads, row_cells=row_cells, key_cells=key_cells)
        | {name: kept[name] for name in names},
    )


def padded(length: int) -> int:
    return triton.cdiv(length, PAD) * PAD
