"""The launches of the problems that planted faults are tried on (mutants.py), as they can be had again."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from eah_kernels import shared_map_attention
from eah_kernels.native import cuda as native_cuda
from eah_kernels.triton import launch as launching

from ..support.cases import Inputs, exact, make, run
from . import cuda_launch
from .cuda_launch import CompiledCuda
from .emulator import Executable, Fault
from .problems import ATTEND, CHOICES, CUDA_LAYERS, CUDA_STEPS, LAYERS, MORE_LAYERS, MORE_STEPS, STEPS
from .triton_launch import Launched, compiled

SEEDS = 3, 0, 1  # orders of blocks and warps; the first is that of the unchanged run, and enough for most faults
TALLIES = 4  # all the same, the last of 128 the most and then the last of all, the last of all the most, random ones


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


def spaced(inputs: Inputs, unseen: float = torch.nan) -> Inputs:
    """The same, spread, and NaN in the keys and values that no row sees and in the queries at hidden keys.

    unseen: in the place of NaN.
    """
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
            query[b, :, (own + q_len - kv_len)[~mask[b, own]]] = unseen
    if mask is not None and mask.dtype == torch.bool and mask.dim() == 4:
        seen &= mask.any((1, 2))
    for b in range(query.shape[0]):
        key[b, :, ~seen[b]] = value[b, :, ~seen[b]] = unseen
    mask = mask if mask is None or mask.dim() == 2 else spread_mask(mask)
    return replace(
        inputs,
        query=spread(query),
        key=spread(key),
        value=spread(value),
        image_mask=spread_mask(inputs.image_mask),
        attention_mask=mask,
    )


KEPT: dict[int, torch.UntypedStorage] = {}  # by address, what was last copied from there


def kept(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy, the last one where it is still the same: the kernels of a layer read the same tensors."""

    def data(of: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(of)

    last = KEPT.get(storage.data_ptr())
    if last is None or not torch.equal(data(last), data(storage)):
        last = KEPT[storage.data_ptr()] = storage.clone()
    return last


def digest(tensor: torch.Tensor) -> bytes:
    """Of its elements' bits."""
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy(), digest_size=16).digest()


class Replay:
    """A launch that can be had again: the bytes of its tensors' memory before it, its results and how long it took.

    tally: of `sinks`, which counts the heads have before it, a number of TALLIES.
    happened: by PTX line, what happened there (emulator.py: CAME and so on).
    """

    def __init__(self, launched: Launched | cuda_launch.Launched, tally: int | None = None):
        self.launched = launched
        self.memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in launched.tensors}
        if tally is not None:
            tensors = [t for t in launched.tensors if t.dtype == torch.int32 and t.dim() == 2]
            counts, progress = (next(t for t in tensors if (t.shape[-1] == 2) == small) for small in (False, True))
            if tally == TALLIES - 1:
                counts.random_(0, 1000, generator=torch.Generator().manual_seed(tally))
            else:
                counts[:] = 3
                counts[:, -1] += 50 * min(tally, 1)
                counts[:, (0, 127, -1)[tally]] += 100 * min(tally, 1)
            progress[:, 0] = 0
        self.before = [kept(s) for s in self.memory.values()]

    def record(self) -> None:
        executable = Executable(self.launched.program)
        self.steps = self.run(executable, seed=SEEDS[0])
        self.results = [digest(t) for t in self.launched.tensors]
        self.happened = executable.reached()

    def run(self, executable: Executable, **options) -> int:
        """The instructions that it took; the results are in the tensors."""
        for storage, before in zip(self.memory.values(), self.before, strict=True):
            storage.copy_(before)
        return self.launched.execute(executable, **options)

    def caught(self, executable: Executable, seeds: Iterable[int] = SEEDS) -> str:
        """How changed code shows in one of these orders of blocks and warps, or nothing."""
        for seed in seeds:
            try:
                self.run(executable, seed=seed, limit=8 * self.steps + 10000)
            except Fault as fault:
                return str(fault)
            if self.results != [digest(t) for t in self.launched.tensors]:
                return "another result"
        return ""


def launches(target: str, more: bool = True) -> list[Replay]:
    """Those of LAYERS, STEPS and CHOICES, and with `more` those of MORE_LAYERS and MORE_STEPS."""
    replays: list[Replay] = []
    kernel_mask, only = launching.kernel_mask, ()

    def spread_key_mask(mask, *by_key):
        made, *form = kernel_mask(mask, *by_key)
        if mask is None or mask.dim() != 2:
            return made, *form
        return spread_mask(made.zero_()), *form  # past the last key, too: 0 shows one

    def observe(launched):
        if only and launched.name not in only:
            return launched.name in ATTEND  # which comes last
        replays.append(Replay(launched))
        replays[-1].record()
        return True

    with (
        compiled(target, observe=observe),
        mock.patch.object(launching, "kernel_mask", spread_key_mask),
    ):
        for problems in LAYERS + MORE_LAYERS * more:
            only = problems.only
            for inputs in problems.inputs():
                kv_len, level = inputs.key.shape[2], problems.level
                if level is not None:
                    run(spaced(inputs, unseen=0.0), level / kv_len, "triton")
                else:
                    run(
                        spaced(inputs),
                        exact(inputs)[-1] if max(kv_len, inputs.query.shape[2]) < 1000 else 0.0,
                        "triton",
                    )
        only = ()
        for problems in STEPS + MORE_STEPS * more:
            for inputs in map(spaced, problems.inputs()):
                for head in ([inputs.query.shape[1] - 1, -1], [-1, 0]):
                    options = dict(attention_mask=inputs.attention_mask, backend="triton", **inputs.rules)
                    tensors = inputs.query, inputs.key, inputs.value
                    shared_map_attention(*tensors, torch.tensor(head, dtype=torch.int32), **options)
        layers = len(replays)
        for case, dtype in CHOICES:
            run(spaced(make(replace(case, q_len=3, kv_len=9), dtype)), 0.0, "triton")
    choices = [r.launched for r in replays[layers:] if r.launched.name == "_sinks_kernel"]
    replays[layers:] = [Replay(launched, seed) for launched in choices for seed in range(TALLIES)]
    for replay in replays[layers:]:
        replay.record()
    return replays


def cuda_launches() -> list[Replay]:
    """Those of CUDA_LAYERS and CUDA_STEPS, by nvcc's PTX for compute_80."""
    replays: list[Replay] = []
    with TemporaryDirectory() as folder:
        cuda = CompiledCuda(Path(folder))

    def observe(launched):
        replays.append(Replay(launched))
        replays[-1].record()
        return True

    cuda.observe = observe
    for problems in CUDA_LAYERS:
        for inputs in problems.inputs():
            threshold, inputs = exact(inputs)[-1], spaced(inputs)
            tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
            for min_density in (0.0, 0.3):
                with cuda.calls(blocks=1 if problems.case.heads > 128 else 5, seed=3):
                    native_cuda.eah_attention(*tensors, threshold, min_density, inputs.scoring)
    for problems in CUDA_STEPS:
        for inputs in map(spaced, problems.inputs()):
            batch, heads = inputs.query.shape[:2]
            for first in (-1, 0) if batch == 1 else (-1,):
                head = (torch.arange(first, first + batch, dtype=torch.int32) + 1) % (heads + 1) - 1
                with cuda.calls(blocks=5, seed=3):
                    native_cuda.shared_map_attention(inputs.query, inputs.key, inputs.value, head, inputs.scoring)
    return replays


def by_build(replays: list[Replay], target: str) -> dict[str, list[Replay]]:
    """Every build with all of its launches, under a name."""
    KEPT.clear()  # all is recorded
    builds: dict[int, list[Replay]] = defaultdict(list)
    for replay in replays:
        builds[id(replay.launched.program)].append(replay)
    return {f"{target} {number} {group[0].launched.name}": group for number, group in enumerate(builds.values())}
