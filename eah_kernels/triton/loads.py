"""From views to tiles. Offsets within a tile are 32-bit; every base they are added to is multiplied in 64 bits."""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import BOOL_MASK, PAD, Columns, KeyMask, Operand, View


@triton.jit
def at(ptr, index, stride):
    return ptr + tl.cast(index, tl.int64) * stride


@triton.jit
def head_of(view, b, h):
    """The same view, its pointer at one head of one batch row."""
    return View(at(at(view.ptr, b, view.b), h, view.h), view.b, view.h, view.row, view.column)


@triton.jit
def mask_of(mask, b, h, R: tl.constexpr, ODD: tl.constexpr = False):
    """head_of a mask, as launch.mask_view passes it."""
    if ODD or R.MASK == BOOL_MASK:
        ptr = at(at(mask.ptr, b, mask.b >> 1), h, mask.h >> 1)
        found = View(ptr, mask.b, mask.h, mask.row >> 1, mask.column)
    else:
        found = head_of(mask, b, h)
    return found


@triton.jit
def row_of(view, row):
    return View(at(view.ptr, row, view.row), view.b, view.h, view.row, view.column)


@triton.jit
def load_rows(view, start, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Rows start, start + 1, ... of a (rows, DIM) matrix: [len(keep), WIDTH] from feature FIRST on, 0 where dropped."""
    row = tl.arange(0, keep.shape[0])[:, None]
    feature = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = keep[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (feature < DIM)
    return tl.load(at(view.ptr, start, view.row) + row * view.row + feature * view.column, mask=mask, other=0.0)


@triton.jit
def load_operand(view, start, keep, R: tl.constexpr):
    main = load_rows(view, start, keep, 0, R.MAIN, R.HEAD_DIM)
    tail = main
    if R.TAIL > 0:
        tail = load_rows(view, start, keep, R.MAIN, R.TAIL, R.HEAD_DIM)
    return Operand(main, tail)


@triton.jit
def dot_rows(a, b, R: tl.constexpr):
    """a b^T over the head dim."""
    PRECISION: tl.constexpr = R.PRECISION
    product = tl.dot(a.main, tl.trans(b.main), input_precision=PRECISION)
    if R.TAIL > 0:
        product = tl.dot(a.tail, tl.trans(b.tail), product, input_precision=PRECISION)
    return product


@triton.jit
def value_columns(
    first_value, kv_heads, V: tl.constexpr, HEADS: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1
):
    """The columns of the HEADS value heads from first_value on, or one of as many parts of them."""
    WIDTH: tl.constexpr = HEADS * V.PAD // PARTS
    wide = PART * WIDTH + tl.arange(0, WIDTH)
    member = wide // V.PAD
    feature = wide % V.PAD
    exists = feature < V.DIM
    if HEADS > 1:
        exists = exists & (first_value + member < kv_heads)
    return Columns(member, feature, exists)


@triton.jit
def load_values(v, start_n, seen, columns):
    """[len(seen), columns]: 0 for keys that are not seen. 0 * NaN is NaN in a matrix product."""
    local_n = tl.arange(0, seen.shape[0])
    column = tl.cast(columns.member, tl.int64) * v.h + columns.feature * v.column
    tile = at(v.ptr, start_n, v.row) + local_n[:, None] * v.row + column[None, :]
    return tl.load(tile, mask=seen[:, None] & columns.exists[None, :], other=0.0)


@triton.jit
def count_image_tokens(image, kv_len):
    """Of one batch row of the image mask."""
    count = tl.zeros([1024], tl.int32)
    for start in range(0, kv_len, 1024):
        key = start + tl.arange(0, 1024)
        count += tl.load(image + key, mask=key < kv_len, other=0)
    return tl.sum(count, 0)


@triton.jit
def has_image_token(image, kv_len):
    """Whether a batch row of the image mask has any; reads up to the first."""
    found, start = 0, 0
    while (found == 0) & (start < kv_len):
        key = start + tl.arange(0, 1024)
        found = tl.sum(tl.load(image + key, mask=key < kv_len, other=0).to(tl.int32), 0)
        start += 1024
    return found != 0


@triton.jit
def key_mask(mask, kv_len):
    """mask: at one batch row, as launch.kernel_mask makes room for it."""
    keys = tl.cdiv(kv_len, PAD) * PAD + PAD
    shown = at(mask.ptr, 2, keys).to(tl.pointer_type(tl.uint8))
    return KeyMask(at(mask.ptr, 1, keys).to(tl.pointer_type(tl.int32)), shown, shown + keys)
