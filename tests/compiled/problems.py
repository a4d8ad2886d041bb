"""The problems that planted faults are tried on (mutants.py).

Lengths are those that together make the two sides of as many comparisons equal as they can: they fall into every part
of a tile, on its borders and one off, with more keys than rows and more rows than keys. What no row may read is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..support.cases import Case, Inputs, make

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class Problems(NamedTuple):
    """A layer, of each of these numbers of rows and keys.

    token: the only key that is an image token, in the last batch row; None: as the case says. shown: the mask hides all
    keys but those from the first to before the second of each of these pairs. seeing: the mask shows every key to these
    rows, none to the others. spoilt: values from this key on are NaN, and every score is so low that to the row's
    log-sum-exp a score of 0 is infinite. lost: values before this key are NaN. level: every score is the same, the
    threshold is this part of an even share, and what nobody sees is 0 instead of NaN. chosen: the queries of all other
    heads are NaN, which makes no sinks. only: the kernels that it is for.
    """

    case: Case
    dtype: torch.dtype
    sizes: list[tuple[int, int]]
    token: int | None = None
    shown: tuple[tuple[int, int], ...] | None = None
    spoilt: int | None = None
    lost: int | None = None
    seeing: tuple[tuple[int, int], ...] | None = None
    level: float | None = None
    chosen: tuple[int, ...] = ()
    only: tuple[str, ...] = ()

    def inputs(self) -> Iterator[Inputs]:
        for q_len, kv_len in self.sizes:
            inputs = make(replace(self.case, q_len=q_len, kv_len=kv_len), self.dtype)
            if self.token is not None:
                inputs.image_mask[:] = False
                inputs.image_mask[-1, self.token % kv_len] = True
            if self.shown is not None:
                inputs.attention_mask &= within(self.shown, kv_len)
            if self.seeing is not None:
                inputs.attention_mask[:] = within(self.seeing, q_len)[:, None]
            if self.level is not None:
                inputs.query[:] = 0
            if self.chosen:
                others = [head for head in range(self.case.heads) if head not in self.chosen]
                inputs.query[:, others] = torch.nan
            if self.spoilt is not None:
                inputs.value[:, :, self.spoilt :] = torch.nan
                inputs.key[..., 0], inputs.query[..., 0] = 40, -40
            if self.lost is not None:
                inputs.value[:, :, : self.lost] = torch.nan
            yield inputs


def within(pairs: tuple[tuple[int, int], ...], length: int) -> torch.Tensor:
    """Which of 0, 1, ... lie from the first of a pair to before the second."""
    found = torch.zeros(length, dtype=torch.bool)
    for first, end in pairs:
        found[first:end] = True
    return found


PLAIN = Case(heads=3, kv_heads=1, image="absent")
PADDED = Case(heads=2, kv_heads=2, mask="left", image="absent")
MASKED = Case(heads=2, kv_heads=1, mask="bool_causal", causal=False, image="absent")
WINDOW = Case(heads=2, kv_heads=1, sliding_window=40, dim=72, image="absent")
ONE_PASS, SINKS, ATTEND = ("_one_pass_kernel",), ("_sinks_kernel",), ("_attend_kernel",)
CLOSE, WIDE_WINDOW = replace(WINDOW, sliding_window=5), replace(WINDOW, sliding_window=200)
FULL = Case(heads=2, kv_heads=1, image="absent")
LAYERS = [
    Problems(PLAIN, BRAIN, [(1, 1), (5, 33), (8, 8), (46, 257), (75, 75), (129, 259), (230, 230), (256, 256)]),
    Problems(PLAIN, BRAIN, [(300, 300), (194, 194), (40, 1024)]),
    Problems(PADDED, HALF, [(1, 1), (2, 7), (30, 30), (35, 65), (62, 62), (64, 145), (94, 235), (127, 256)]),
    Problems(PADDED, HALF, [(160, 257), (300, 300), (1, 66), (20, 8300)]),
    Problems(MASKED, BRAIN, [(1, 1), (11, 31), (64, 64), (65, 257), (97, 256), (110, 110), (126, 107), (129, 105)]),
    Problems(MASKED, BRAIN, [(149, 125), (166, 96), (181, 127), (189, 42), (257, 192), (300, 300)]),
    Problems(WINDOW, HALF, [(16, 91), (19, 119), (21, 255), (44, 65), (64, 175), (127, 192), (129, 160), (99, 99)]),
    Problems(WINDOW, HALF, [(2, 131), (24, 44), (31, 135), (53, 61), (69, 69), (80, 80), (83, 96), (87, 192)]),
    Problems(WIDE_WINDOW, HALF, [(114, 278), (135, 292), (140, 340), (208, 208), (300, 390), (33, 257)]),
    Problems(FULL, SINGLE, [(1, 1), (1, 169), (2, 129), (20, 130), (31, 31), (32, 64), (49, 49), (57, 57), (75, 75)]),
    Problems(FULL, SINGLE, [(96, 256), (110, 110)]),
    # A sum over the keys that loses a lane or a warp: each of these tokens is one that all the steps of it bring.
    *[
        Problems(case, dtype, [(9, 70), (9, 130)], token)
        for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF), (MASKED, BRAIN), (WINDOW, HALF), (FULL, SINGLE))
        for token in (31, 63, 127)
    ],
    *[Problems(case, dtype, [(3, 1024)], 1023) for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF), (FULL, SINGLE))],
]
STEPS = [
    Problems(Case(heads=4, kv_heads=2), BRAIN, [(1, 1), (1, 300), (3, 191), (1, 127), (13, 65), (2, 37)]),
    Problems(
        Case(heads=4, kv_heads=2, mask="bool_heads"), HALF, [(1, 1), (5, 70), (2, 160), (1, 127), (11, 96), (3, 200)]
    ),
]
# What the others leave unfelt; the run of all planted faults has these too.
CELLS = [
    ((2112, 2304), (4500, 4501), (7000, 7040)),
    ((4500, 4501), (6400, 6528), (7000, 7040)),
    ((100, 101), (640, 768), (900, 910)),
    ((64, 192), (2100, 2101), (8000, 8001)),
    ((64, 128), (8192, 8256)),
    ((8250, 8260),),
    ((4160, 8300),),
]
EVEN, ODD = (tuple((key, key + 1) for key in range(first, 512, 2)) for first in range(2))
MORE_LAYERS = [
    Problems(PLAIN, BRAIN, [(1, 127), (1, 128), (129, 256), (124, 160), (7, 37), (32, 32), (64, 204), (120, 246)]),
    Problems(PLAIN, BRAIN, [(13, 632), (17, 775), (11, 1051)]),
    Problems(PADDED, HALF, [(128, 255), (18, 594), (8, 857), (10, 620), (17, 58), (16, 959), (132, 293)]),
    Problems(MASKED, BRAIN, [(16, 963), (6, 1058), (118, 40), (71, 25), (100, 40), (93, 68), (3, 2), (40, 40)]),
    Problems(MASKED, BRAIN, [(51, 51), (53, 42), (110, 15), (127, 63), (24, 73), (31, 101), (76, 76), (69, 69)]),
    Problems(MASKED, BRAIN, [(78, 73), (112, 112), (107, 177), (87, 204), (121, 213), (147, 147), (14, 542)]),
    Problems(MASKED, BRAIN, [(251, 251), (1, 40), (128, 130)]),
    # Rows whose own key would lie before the first, each at another place of a cell.
    Problems(MASKED, BRAIN, [(rows, 1) for rows in (4, 8, 10, 16, 18, 22, 28, 30, 34, 36)]),
    Problems(MASKED, BRAIN, [(rows, 1) for rows in (38, 40, 42, 44, 48, 50, 52, 56, 58, 62)]),
    Problems(WINDOW, HALF, [(39, 121), (29, 41), (1, 53), (56, 56), (51, 201), (3, 156), (1, 64), (1, 106)]),
    Problems(WINDOW, HALF, [(118, 186), (49, 95), (50, 166), (100, 100), (3, 118), (3, 112), (90, 216), (92, 159)]),
    Problems(WINDOW, HALF, [(1, 138), (13, 243), (8, 211), (17, 174), (64, 208), (6, 653), (3, 50), (139, 229)]),
    Problems(CLOSE, HALF, [(43, 114), (2, 30), (122, 205), (75, 75), (79, 216), (111, 188), (61, 229), (4, 943)]),
    Problems(CLOSE, HALF, [(2, 14), (126, 239), (41, 197), (9, 1095), (130, 262), (23, 23), (103, 266)]),
    Problems(FULL, SINGLE, [(8, 22), (79, 109), (1, 35), (64, 193), (6, 512), (13, 488), (7, 710), (1, 780)]),
    Problems(FULL, SINGLE, [(8, 910), (14, 1061), (64, 64)]),
    # The key before the first row's window, NaN, at further places of a block.
    Problems(WINDOW, HALF, [(1, keys) for keys in (45, 49, 50, 54, 56, 57, 59, 60, 61, 63, 67, 68, 70)]),
    Problems(WINDOW, HALF, [(1, keys) for keys in range(73, 105)], only=ATTEND),
    # No block that is not whole, and none at all; as many rows as the row log-sum-exps are padded to.
    Problems(PLAIN, BRAIN, [(1, 63)]),
    Problems(
        WIDE_WINDOW, HALF, [(128, 228), *[(rows, 300) for rows in (5, 8, 11, 13, 14, 18, 20, 22, 25, 27, 30, 31)]]
    ),
    Problems(replace(WINDOW, sliding_window=300), HALF, [(128, 384)]),
    Problems(FULL, SINGLE, [(128, 128)]),
    Problems(PADDED, HALF, [(128, 128)]),
    Problems(replace(PADDED, image="middle"), HALF, [(128, 256)]),
    Problems(replace(MASKED, image="middle"), BRAIN, [(128, 256)]),
    Problems(PADDED, HALF, [(1, 128)]),
    Problems(replace(PADDED, image="middle"), HALF, [(1, 64), (1, 128)]),
    Problems(replace(MASKED, image="middle"), BRAIN, [(1, 128)]),
    Problems(replace(WINDOW, sliding_window=64), HALF, [(1, 128)]),
    Problems(FULL, SINGLE, [(1, 128)]),
    # No block that is split: a mask hides all behind a whole one.
    Problems(PADDED, HALF, [(192, 192)], shown=((0, 64),)),
    Problems(replace(PADDED, image="middle"), HALF, [(192, 192)], shown=((0, 64),)),
    Problems(replace(PADDED, image="middle"), HALF, [(70, 70)], shown=((0, 0),)),
    Problems(replace(MASKED, image="middle"), BRAIN, [(70, 70)], shown=((0, 0),)),
    # The same of a chosen head, and a row block of which only the last tile is seen.
    Problems(replace(PADDED, mask="right"), HALF, [(192, 192)], token=20, shown=((0, 64),)),
    Problems(replace(WINDOW, sliding_window=1), HALF, [(256, 256)], only=ONE_PASS),
    # A map of one key, and an image token in the second thousand.
    Problems(replace(MASKED, mask="bool"), BRAIN, [(5, 1)]),
    *[
        Problems(case, dtype, [(3, 1100)], 1090)
        for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF), (MASKED, BRAIN), (WINDOW, HALF), (FULL, SINGLE))
    ],
    # What sm_90's tiles leave: the last row of a prompt, its keys' end and a window's edge in every lane.
    *[
        Problems(replace(WINDOW, sliding_window=n // 2), HALF, [(n, n)], only=ONE_PASS)
        for n in (2, 4, 8, 12, 16, 24, 28, 32, 36)
    ],
    *[
        Problems(replace(WINDOW, sliding_window=window), HALF, [(n, n)], lost=65 - window, only=ATTEND)
        for n, window in (
            *((66, 14), (67, 27), (69, 53), (70, 2), (71, 15), (72, 28), (73, 41), (74, 54), (75, 3), (76, 16)),
            *((77, 29), (78, 42), (79, 55), (80, 4), (81, 17), (82, 30), (84, 56), (89, 57), (90, 6), (91, 19)),
            *((92, 32), (94, 58), (95, 7), (96, 20), (102, 34), (110, 10), (115, 11), (118, 50), (120, 12), (125, 13)),
            (127, 39),
        )
    ],
    Problems(WIDE_WINDOW, HALF, [(q_len, q_len + 200) for q_len in (56, 62, 65, 68, 74, 77, 80, 86, 89, 92)]),
    Problems(WIDE_WINDOW, HALF, [(q_len, q_len + 200) for q_len in (98, 101, 104, 110, 113, 116, 122, 125)]),
    Problems(replace(WINDOW, sliding_window=64), HALF, [(70, 134)]),
    Problems(replace(WINDOW, sliding_window=128), HALF, [(200, 260)]),
    Problems(
        replace(PADDED, image="all"), HALF, [(22, 25), (34, 36), (43, 48), (44, 47), (62, 66), (76, 77), (91, 92)]
    ),
    Problems(replace(PADDED, image="all"), HALF, [(112, 115), (115, 119)]),
    Problems(PADDED, HALF, [(3, 9), (3, 23), (10, 142)]),
    Problems(PLAIN, BRAIN, [(17, 17), (49, 49)], only=ATTEND),
    # Blocks too many.
    *[
        Problems(replace(case, image=image), dtype, [(rows, 256)], spoilt=spoilt)
        for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF), (MASKED, BRAIN), (WINDOW, HALF), (FULL, SINGLE))
        for image, rows, spoilt in (("absent", 256, 128), ("middle", 256, 128), ("middle", 224, 160))
    ],
    # More than 128 cells, of which those that are seen, and the whole ones, are of one warp or another.
    Problems(PADDED, HALF, [(20, 8192)]),
    Problems(MASKED, BRAIN, [(20, 8192)]),
    Problems(replace(MASKED, image="middle"), BRAIN, [(8192, 40)], seeing=((0, 8192),), only=SINKS),
    *[Problems(PADDED, HALF, [(20, 8300)], shown=shown) for shown in CELLS],
    *[Problems(MASKED, BRAIN, [(20, 8300)], shown=shown, only=ATTEND) for shown in CELLS[:4]],
    *[
        Problems(replace(MASKED, image="middle"), BRAIN, [(8300, 40)], seeing=seeing, only=SINKS)
        for seeing in CELLS[:4]
    ],
    Problems(replace(MASKED, mask="bool", image="middle"), BRAIN, [(1200, 40)]),
    # A whole block that is a line's last, whose flags end where the memory does.
    *[
        Problems(replace(MASKED, image=image), BRAIN, [(128, 128), (128, 256)], seeing=((0, 128),))
        for image in ("absent", "middle")
    ],
    Problems(replace(PADDED, mask="right"), HALF, [(192, 192), (300, 300), (100, 230), (20, 8300)]),
    # Every key hidden between two that are seen.
    *[
        Problems(replace(PADDED, image="all"), HALF, [(256, 256), (512, 512), (200, 256)], shown=shown, level=level)
        for shown in (EVEN, ODD)
        for level in (None, 0.5)
    ],
    # Means of columns between which thresholds lie so closely that a part of a sum less shows.
    *[
        Problems(replace(case, image="all"), dtype, sizes, level=level)
        for case, dtype, sizes in (
            (PLAIN, BRAIN, [(256, 256), (512, 512), (130, 200)]),
            (PADDED, HALF, [(256, 256), (512, 512), (130, 200)]),
            (MASKED, BRAIN, [(130, 200)]),
            (WINDOW, HALF, [(256, 256), (130, 200)]),
            (FULL, SINGLE, [(256, 256), (130, 200)]),
        )
        for level in (0.95, 1.2, 1.5, 1.9, 2.4, 3.0, 3.8)
    ],
    # The only image token in each part of the first thousand that a load brings.
    *[
        Problems(case, dtype, [(3, 1024)], token)
        for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF), (MASKED, BRAIN), (WINDOW, HALF), (FULL, SINGLE))
        for token in range(150, 900, 128)
    ],
    *[Problems(case, dtype, [(300, 300)], 270) for case, dtype in ((PLAIN, BRAIN), (PADDED, HALF))],
    # A choice among more than 128 heads, of which one in the second hundred has sinks, or it and one before it.
    *[
        Problems(
            replace(case, heads=heads, kv_heads=kv_heads, image="all"),
            dtype,
            [(3, 3)],
            level=0.5,
            chosen=chosen,
            only=ONE_PASS,
        )
        for case, dtype, heads, kv_heads in (
            (PLAIN, BRAIN, 129, 43),
            (PADDED, HALF, 129, 129),
            (WINDOW, HALF, 130, 65),
            (FULL, SINGLE, 130, 65),
        )
        for chosen in ((128,), (100, 128))
    ],
    *[
        Problems(case, dtype, [(rows, rows) for rows in lengths], only=ONE_PASS + ATTEND * (case is WINDOW))
        for case, dtype, lengths in (
            (PLAIN, BRAIN, (3, 10, 41, 59, 64, 65, 96, 129, 160, 192, 193, 226, 240)),
            (PADDED, HALF, (2, *range(8, 225, 8), *range(9, 226, 8), 43, 74, 130, 162, 194, 240)),
            (replace(WINDOW, sliding_window=63), HALF, (200,)),
            (replace(WINDOW, sliding_window=65), HALF, (200,)),
            (replace(WINDOW, sliding_window=127), HALF, (256,)),
            (WINDOW, HALF, (42, 59, 65, *range(44, 256, 4), 253)),
            (replace(WINDOW, sliding_window=None), HALF, (1, 6, 11, 37, 65, *range(12, 256, 4), 253)),
            # Up to 512 keys.
            (PLAIN, BRAIN, (257, 271, 320, 321, 352, 385, 416, 449, 490, 512)),
            (PADDED, HALF, (257, 258, 271, *range(289, 512, 32), *range(320, 513, 32), 322, 386, 450, 490)),
        )
    ],
]
# Stretches of many blocks.
MORE_STEPS = [
    # The highest score in any of them, and so high that what is not scaled by it overflows.
    *[Problems(replace(steps.case, peak=30.0), steps.dtype, [(1, 8200)]) for steps in STEPS],
    *[Problems(steps.case, steps.dtype, [(16, 300)]) for steps in STEPS],
    Problems(STEPS[0].case, BRAIN, [(7, 83), (2, 8200), (2, 512), (2, 1100), (1, 1500), (3, 2000)]),
    Problems(STEPS[1].case, HALF, [(3, 8200), (2, 512), (2, 1100), (1, 1500), (3, 2000)]),
]
# The choice of a head among more than 128, after sinks of which many are the same.
CHOICES = [(replace(PLAIN, heads=129, kv_heads=43), BRAIN), (replace(PADDED, heads=129, kv_heads=129), HALF)]
CHOICES += [(replace(case, heads=130, kv_heads=65), dtype) for case, dtype in ((MASKED, BRAIN), (CLOSE, HALF))]
CHOICES += [(replace(FULL, heads=130, kv_heads=65), SINGLE)]
# csrc/cuda, both head dims and every dtype. Lengths lie on both sides of every tile's border; heads and batch rows make
# for each number of rounds of the loops that are unrolled.
PREFILL = [(HALF, 64), (BRAIN, 128)]
CUDA_LAYERS = [
    problems
    for dtype, dim in PREFILL
    for problems in (
        Problems(
            Case(heads=4, kv_heads=2, image="absent", mask="left", dim=dim), dtype, [(1, 1), (63, 63), (200, 200)]
        ),
        Problems(Case(heads=3, kv_heads=1, image="scattered", mask="right", dim=dim), dtype, [(64, 64), (130, 130)]),
        Problems(Case(heads=2, kv_heads=2, image="last", dim=dim), dtype, [(3, 3), (65, 65), (129, 129)]),
        Problems(
            Case(heads=1, kv_heads=1, batch=1, image="all", dim=dim), dtype, [(n, n) for n in range(193, 1024, 64)]
        ),
        Problems(Case(heads=1, kv_heads=1, batch=1, image="all", dim=dim), dtype, [(1024, 1024)]),
        # The only image token that of the last row but one, which the last row alone sees, first of its block.
        Problems(Case(heads=4, kv_heads=4, batch=1, dim=dim), dtype, [(n, n) for n in range(193, 1024, 64)], token=-2),
        Problems(Case(heads=257, kv_heads=257, batch=1, dim=dim), dtype, [(3, 3)]),
        Problems(Case(heads=100, kv_heads=100, image="absent", dim=dim), dtype, [(2, 2)]),
        Problems(Case(heads=40, kv_heads=40, dim=dim), dtype, [(2, 2)]),
        Problems(Case(heads=40, kv_heads=40, dim=dim), dtype, [(2, 2)], token=0),
        Problems(Case(heads=9, kv_heads=1, dim=dim), dtype, [(40, 40)]),
        Problems(Case(heads=2, kv_heads=1, batch=9, dim=dim), dtype, [(5, 5)]),
        Problems(Case(heads=4, kv_heads=1, batch=4, mask="left", dim=dim), dtype, [(85, 85), (113, 113)]),
        Problems(Case(heads=7, kv_heads=1, batch=7, image="absent", mask="left", dim=dim), dtype, [(65, 65)]),
        Problems(Case(heads=2, kv_heads=1, dim=dim), dtype, [(256, 256)], spoilt=128),
    )
]
CUDA_STEPS = [
    problems
    for dtype, dim in (*PREFILL, (SINGLE, 64), (SINGLE, 128))
    for problems in (
        Problems(Case(heads=7, kv_heads=1, mask="left", batch=3, dim=dim), dtype, [(1, 1), (1, 63), (1, 256)]),
        Problems(Case(heads=8, kv_heads=8, mask="right", batch=7, dim=dim), dtype, [(1, 129), (1, 128)]),
        Problems(Case(heads=3, kv_heads=1, batch=1, dim=dim), dtype, [(1, keys) for keys in (300, 1500, 2048, 2500)]),
        Problems(Case(heads=3, kv_heads=1, batch=1, dim=dim), dtype, [(1, keys) for keys in (3800, 5120, 6144, 7400)]),
        Problems(Case(heads=3, kv_heads=1, batch=1, dim=dim), dtype, [(1, 16640)]),
        Problems(Case(heads=4, kv_heads=1, batch=4, dim=dim), dtype, [(1, 70)]),
        Problems(Case(heads=10, kv_heads=1, dim=dim), dtype, [(1, 40)]),
        Problems(Case(heads=4, kv_heads=4, batch=128, mask="left", dim=dim), dtype, [(1, 100), (1, 200)]),
    )
]
# Two tiles a stretch. Not in float32, for which it takes more memory than a small machine has.
CUDA_STEPS += [Problems(Case(heads=1, kv_heads=1, batch=128, dim=dim), dtype, [(1, 600)]) for dtype, dim in PREFILL]
