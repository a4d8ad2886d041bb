"""What travels together through the kernels, by name; and what their numbers mean.

A bundle is a NamedTuple. Triton flattens it into the parameters of the compiled kernel and specialises each member as
if it stood alone. Four limits (triton 3.6 and 3.7.1): `do_not_specialize` does not reach into a bundle, so kernels
take the lengths one by one and bundle them inside; 3.6 passes no string on from a constexpr bundle, so whoever needs
PRECISION binds it to a name first; past an early return 3.6 has lost a stride of 1 in a bundle's last bundle, so
kernels bind the views of a Packed to names before they may return; and a bundle that comes out of a tuple has lost its
names in 3.6. Fields in capitals are constexpr.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

# Rules.MASK: the form of the attention mask
NO_MASK: tl.constexpr = tl.constexpr(0)
KEY_MASK: tl.constexpr = tl.constexpr(1)  # (B, Skv) float32, 0 or -inf, read by key alone
BOOL_MASK: tl.constexpr = tl.constexpr(2)  # (B, Hq, Sq, Skv) bool
BIAS_MASK: tl.constexpr = tl.constexpr(3)  # (B, Hq, Sq, Skv) floating, added to the score

LSE_PAD: tl.constexpr = tl.constexpr(128)  # the row log-sum-exps of a head are padded to a multiple of this

# What a cell of CELL x CELL pairs holds, or a (B, Skv) mask's cell of CELL keys: a sum of these (pack.py)
CELL: tl.constexpr = tl.constexpr(64)
SHOWS: tl.constexpr = tl.constexpr(1)  # a visible pair
HIDES: tl.constexpr = tl.constexpr(2)  # a hidden pair
BIASED: tl.constexpr = tl.constexpr(4)  # a visible pair to whose score the mask adds a value other than 0

# What pack.py keeps per row or key is padded to a multiple of this and so of every tile: no bounds to test.
PAD: tl.constexpr = tl.constexpr(128)


class View(NamedTuple):
    """A tensor as a kernel sees it: its pointer and its strides in elements; a dimension that it lacks has stride 0."""

    ptr: Any
    b: Any
    h: Any
    row: Any
    column: Any


class Packed(NamedTuple):
    """A packed mask as one kernel reads it; None where this form of mask, or this kernel, has none."""

    words: Any = None  # View: the visible pairs, 32 to a word
    cells: Any = None  # View: what each cell holds
    seen: Any = None  # View: of each key, whether one of CELL rows sees it
    counts: Any = None  # View: of each key, how many of CELL rows count, see it and are not its own


class PackedMask(NamedTuple):
    """What pack.py leaves of a 4-D mask. MB and MH are 1 where one mask serves all; rows and keys are padded."""

    cells: Tensor  # (MB, MH, rows / CELL, keys / CELL) uint8, of SHOWS, HIDES, BIASED
    column_cells: Tensor  # (MB, MH, keys / CELL, rows / CELL), for `sinks`
    words: Tensor  # (MB, MH, keys / 32, rows) int32
    column_words: Tensor  # (MB, MH, rows / 32, keys)
    seen: Tensor  # (MB, MH, rows / CELL, keys) uint8, whether one of the CELL rows sees the key
    column_counts: Tensor  # (MB, MH, rows / CELL, keys) uint8, how many count, see it and are not its own


class KeyMask(NamedTuple):
    """What pack.py writes of a batch row of a (B, Skv) mask, behind its line of 0 and -inf; pointers."""

    before: Any  # int32 of each key: how many are shown before it
    shown: Any  # a byte of each key: whether it is shown
    cells: Any  # a byte of each CELL keys: SHOWS, HIDES


class Tally(NamedTuple):
    """What the choice is made from, all int32: pointers, or before the launch the tensors."""

    counts: Any  # (B, Hq) sinks
    progress: Any = None  # (B, 2): programs of a batch row that are done, its image tokens; or one_pass.py's tickets


class Choice(NamedTuple):
    """Where the choice of a head goes, and from which density on there is one."""

    head: Any  # (B,) int32
    min_density: Any


class Partial(NamedTuple):
    """What the stretches of keys leave behind in `few_rows`, float32."""

    out: Any  # (B, Hq, Sq, parts, DIM), relative to stat
    stat: Any  # (B, Hq, Sq, parts, 2): each row's maximum score and its sum of exponentials


class Batch(NamedTuple):
    """How many batch rows there are, or packed sequences: then where each begins and ends, and how many tokens there
    are. That number comes doubled plus one, as launch.mask_view passes strides."""

    number: Any
    cu_seqlens: Any = None
    tokens: Any = None


class Heads(NamedTuple):
    """How many there are. units: groups of Values.HEADS value heads."""

    units: Any
    query: Any
    kv: Any


class Scale(NamedTuple):
    """Scores in log2 units: product * factor; under a soft-cap, cap * tanh(product * factor)."""

    factor: Any
    cap: Any


class Sizes(NamedTuple):
    q_len: Any
    kv_len: Any
    window: Any


class Rules(NamedTuple):
    """What a layer's kernels are compiled for."""

    GROUP: int  # query heads of a KV head
    HEAD_DIM: int  # in two parts, MAIN and, for dims such as 80 or 192, TAIL features
    MAIN: int
    TAIL: int
    PRECISION: str  # of a float32 product
    MASK: int
    HIDDEN: float  # an entry of the mask up to this hides the key
    CAUSAL: bool
    WINDOW: bool
    SOFTCAP: bool
    RAW_MAX: bool  # the scale is positive, without a soft-cap: of products not scaled yet the maximum is the same
    BY_KEY: bool  # the mask, if any, is read by key
    BOTH_SIDES: bool  # a block that is not seen whole may lie before the whole ones and after them
    MMA_SYNC: bool  # sm_80, sm_89: the warps share out the rows of a product, or the columns if it is wider than high
    WGMMA: bool  # sm_90: a product runs beside its warps until it is waited for
    LATE_WORDS: bool  # sm_100: the words of a mask are read after Q K^T, not before it (score_block)


class Values(NamedTuple):
    """HEADS value heads share a map, side by side, PAD columns each, DIM of them features."""

    DIM: int
    PAD: int
    HEADS: int


class Operand(NamedTuple):
    """A tile of query or key rows in its two parts; without a tail, main twice."""

    main: Any
    tail: Any


class Columns(NamedTuple):
    """Columns of value heads side by side: to which of the heads each belongs, its feature, whether there is one."""

    member: Any
    feature: Any
    exists: Any


class Pairs(NamedTuple):
    """Where a tile of scores lies: rows start_m + local_m and keys start_n + local_n, which broadcast to the tile."""

    start_m: Any
    local_m: Any
    start_n: Any
    local_n: Any


class Span(NamedTuple):
    """The blocks of a walk over keys or rows: whole ones, which need no mask, and at their sides those that do.

        first ...... full ============ edge ...... last
              split          whole           split

    `biased`: whether the mask adds anything to a visible score.
    """

    first: Any
    full: Any
    edge: Any
    last: Any
    biased: Any


class RowBlock(NamedTuple):
    """A block of rows of one head, and what its walk over the keys reads."""

    rows: Any  # Operand, start_m and on
    start_m: Any
    k: Any
    mask: Any
    words: Any
    span: Any
    sizes: Any
    scale: Any


class Layer(NamedTuple):
    """What `attend` reads and writes, of every batch row and head."""

    q: Any
    k: Any
    v: Any
    out: Any
    mask: Any
    packed: Any
    minus_lse: Any
    kv_heads: Any
    sizes: Any
    scale: Any
