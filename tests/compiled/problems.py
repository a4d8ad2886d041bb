"""The problems that planted faults are tried on (mutants.py), and their launches as they can be had again.

Lengths are those that together make the two sides of as many comparisons equal as they can: they fall into every part
of a tile, on its borders and one off, with more keys than rows and more rows than keys. What no row may read is NaN.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch

from eah_kernels import shared_map_attention
from eah_kernels.triton import launch as launching

from ..support.cases import Case, Inputs, exact, make, run
from .emulator import Executable, Fault
from .triton_launch import Launched, compiled

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class Problems(NamedTuple):
    """A layer, of each of these numbers of rows and keys.

    token: the only key that is an image token, in the last batch row; None: as the case says.
    """

    case: Case
    dtype: torch.dtype
    sizes: list[tuple[int, int]]
    token: int | None = None

    def cases(self) -> list[Case]:
        return [replace(self.case, q_len=q_len, kv_len=kv_len) for q_len, kv_len in self.sizes]


PLAIN = Case(heads=3, kv_heads=1, image="absent")
PADDED = Case(heads=2, kv_heads=2, mask="left", image="absent")
MASKED = Case(heads=2, kv_heads=1, mask="bool_causal", causal=False, image="absent")
WINDOW = Case(heads=2, kv_heads=1, sliding_window=40, dim=72, image="absent")
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
# The choice of a head among more than 128, after sinks of which many are the same.
CHOICES = [(replace(PLAIN, heads=129, kv_heads=43), BRAIN), (replace(PADDED, heads=129, kv_heads=129), HALF)]
CHOICES += [(replace(case, heads=130, kv_heads=65), dtype) for case, dtype in ((MASKED, BRAIN), (CLOSE, HALF))]
CHOICES += [(replace(FULL, heads=130, kv_heads=65), SINGLE)]
TALLIES = 4


def spread(tensor: torch.Tensor, room: int = 16) -> torch.Tensor:
    """The same, with room around each of its rows that belongs to nobody: an access one too far shows.

    room: behind each row.
    """
    shape = [n + 1 | 1 for n in tensor.shape[:-1]] + [tensor.shape[-1] + room]
    wide = torch.full(shape, torch.nan if tensor.is_floating_point() else 1, dtype=tensor.dtype)
    return wide[tuple(slice(n) for n in tensor.shape)].copy_(tensor)


def spread_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Spread, and none of its strides a multiple of 16 whatever the lengths: no further builds."""
    return None if mask is None else spread(mask, 17 - mask.shape[-1] % 2)


def spaced(inputs: Inputs) -> Inputs:
    """The same, spread, and NaN in the keys and values that no row sees and in the queries at hidden keys."""
    query, key, value = inputs.query.clone(), inputs.key.clone(), inputs.value.clone()
    q_len, kv_len = query.shape[2], key.shape[2]
    mask, window = inputs.attention_mask, inputs.rules["sliding_window"]
    seen = torch.ones(query.shape[0], kv_len, dtype=torch.bool)
    if window is not None:
        seen &= torch.arange(kv_len) > kv_len - q_len - window
    if mask is not None and mask.dim() == 2:
        seen &= mask
        own = torch.arange(max(kv_len - q_len, 0), kv_len)
        for b in range(query.shape[0]):
            query[b, :, (own + q_len - kv_len)[~mask[b, own]]] = torch.nan
    if mask is not None and mask.dtype == torch.bool and mask.dim() == 4:
        seen &= mask.any((1, 2))
    for b in range(query.shape[0]):
        key[b, :, ~seen[b]] = value[b, :, ~seen[b]] = torch.nan
    mask = mask if mask is None or mask.dim() == 2 else spread_mask(mask)
    return replace(
        inputs,
        query=spread(query),
        key=spread(key),
        value=spread(value),
        image_mask=spread_mask(inputs.image_mask),
        attention_mask=mask,
    )


class Replay:
    """A launch that can be had again: the bytes of its tensors' memory before it, its results and how long it took.

    tally: of `sinks`, which random counts every head has before it.
    happened: by PTX line, what happened there (emulator.py: CAME and so on).
    """

    def __init__(self, launched: Launched, tally: int | None = None):
        self.launched = launched
        self.memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in launched.tensors}
        if tally is not None:
            tensors = [t for t in launched.tensors if t.dtype == torch.int32 and t.dim() == 2]
            counts, progress = (next(t for t in tensors if (t.shape[-1] == 2) == small) for small in (False, True))
            counts.random_(0, 2 << 3 * tally, generator=torch.Generator().manual_seed(tally))
            progress[:, 0] = 0
        self.before = [s.clone() for s in self.memory.values()]

    def record(self) -> None:
        executable = Executable(self.launched.program)
        self.results = self.run(executable, seed=3)
        self.happened = executable.reached()

    def run(self, executable: Executable, **options) -> list[torch.Tensor]:
        for storage, before in zip(self.memory.values(), self.before, strict=True):
            storage.copy_(before)
        self.steps = self.launched.execute(executable, **options)
        return [t.clone() for t in self.launched.tensors]

    def caught(self, executable: Executable) -> str:
        """How changed code shows, or nothing."""
        limit = 20 * self.steps + 10000
        for seed in (3, 0, 1):
            try:
                results = self.run(executable, seed=seed, limit=limit)
            except Fault as fault:
                return str(fault)
            for want, got in zip(self.results, results, strict=True):
                if not torch.equal(want.contiguous().view(torch.uint8), got.contiguous().view(torch.uint8)):
                    return "another result"
        return ""


def launches(target: str) -> list[Replay]:
    """Those of LAYERS, STEPS and CHOICES."""
    replays: list[Replay] = []
    kernel_mask = launching.kernel_mask

    def spread_key_mask(mask, *by_key):
        made, *form = kernel_mask(mask, *by_key)
        return spread_mask(made) if mask is not None and mask.dim() == 2 else made, *form

    with (
        compiled(target, observe=lambda launched: replays.append(Replay(launched))),
        mock.patch.object(launching, "kernel_mask", spread_key_mask),
    ):
        for problems in LAYERS:
            for case in problems.cases():
                inputs = make(case, problems.dtype)
                if problems.token is not None:
                    inputs.image_mask[:] = False
                    inputs.image_mask[-1, problems.token % case.kv_len] = True
                threshold = exact(inputs)[-1] if case.kv_len < 1000 else 0.0
                run(spaced(inputs), threshold, "triton")
        for problems in STEPS:
            for case in problems.cases():
                inputs = spaced(make(case, problems.dtype))
                for head in ([case.heads - 1, -1], [-1, 0]):
                    options = dict(attention_mask=inputs.attention_mask, backend="triton", **inputs.rules)
                    tensors = inputs.query, inputs.key, inputs.value
                    shared_map_attention(*tensors, torch.tensor(head, dtype=torch.int32), **options)
        layers = len(replays)
        for case, dtype in CHOICES:
            run(spaced(make(replace(case, q_len=3, kv_len=9), dtype)), 0.0, "triton")
    choices = [r.launched for r in replays[layers:] if r.launched.name == "_sinks_kernel"]
    replays[layers:] = [Replay(launched, seed) for launched in choices for seed in range(TALLIES)]
    for replay in replays:
        replay.record()
    return replays


def by_build(replays: list[Replay], target: str) -> dict[str, list[Replay]]:
    """Every build with all of its launches, under a name."""
    builds: dict[int, list[Replay]] = defaultdict(list)
    for replay in replays:
        builds[id(replay.launched.program)].append(replay)
    return {f"{target} {number} {group[0].launched.name}": group for number, group in enumerate(builds.values())}
