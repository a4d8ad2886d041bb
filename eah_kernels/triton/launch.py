"""From tensors to kernel arguments: what the launchers share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.triton.bundles import (
    BIAS_MASK,
    BOOL_MASK,
    KEY_MASK,
    NO_MASK,
    Packed,
    PackedMask,
    Rules,
    Scale,
    Values,
    View,
)
from eah_kernels.triton.tiles import FAST, SHORT, FastTile, Tile, find_short_tile, find_tile

LOG2E = math.log2(math.e)
LENGTHS = ["q_len", "kv_len", "window"]  # not specialised on: most new prompt lengths compile nothing


class Launch(NamedTuple):
    """One kernel launch, ready to run or, in tests/compiled/resources.py, to compile without a device."""

    kernel: Any
    programs: int
    tile: Tile | FastTile
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.tile.options())


class Problem:
    """Query, key and scoring of one layer in the form that every kernel takes.

    fast: whether the Gluon kernels may run, where they suit.
    """

    def __init__(self, query: Tensor, key: Tensor, scoring: Scoring, target: str | None = None, fast: bool = False):
        self.query, self.key = narrow(query), narrow(key)
        self.target = target or device_target(query.device)
        self.mask, self.mask_form, hidden = kernel_mask(scoring.attention_mask)
        self.packed: PackedMask | None = None  # pack.py fills it
        head_dim, kv_len, windowed = query.shape[-1], key.shape[2], scoring.sliding_window is not None
        self.masked = self.mask is not None or windowed
        main = 1 << (head_dim.bit_length() - 1)
        tail = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
        if main < 16 or main + tail >= 2 * main:
            main, tail = max(16, triton.next_power_of_2(head_dim)), 0
        scale = Scale(scoring.scale * LOG2E, 0.0)
        if scoring.softcap is not None:
            scale = Scale(scoring.scale / scoring.softcap, scoring.softcap * LOG2E)
        self.rules = Rules(
            GROUP=query.shape[1] // key.shape[1],
            HEAD_DIM=head_dim,
            MAIN=main,
            TAIL=tail,
            # Never plain TF32. For 16-bit operands it means nothing.
            PRECISION="ieee" if self.target in ("gfx942", "interpreter") else "tf32x3",
            MASK=self.mask_form,
            HIDDEN=hidden,
            CAUSAL=scoring.causal,
            WINDOW=windowed,
            SOFTCAP=scoring.softcap is not None,
            BY_KEY=self.mask_form in (NO_MASK.value, KEY_MASK.value),
            BOTH_SIDES=self.masked,
        )
        self.fast = fast and self._suits_gluon(scoring)
        mask = None if self.mask is None else view(self.mask.expand(*query.shape[:3], kv_len))
        self.arguments = dict(q=view(self.query), k=view(self.key), mask=mask, batch=query.shape[0]) | dict(
            q_len=query.shape[2], kv_len=kv_len, window=scoring.sliding_window or 0, scale=scale, R=self.rules
        )

    def packed_for_keys(self) -> Packed:
        """The packed mask for a kernel that walks the keys of a row block; empty without a mask."""
        packed = self.packed
        return Packed() if packed is None else self._every_head(packed.words, packed.cells, packed.seen)

    def packed_for_rows(self) -> Packed:
        """The packed mask for a kernel that walks the rows of a key block."""
        packed = self.packed
        if packed is None:
            return Packed()
        return self._every_head(packed.column_words, packed.column_cells, None, packed.column_counts, packed.before)

    def _every_head(self, *tensors: Tensor | None) -> Packed:
        """Views over every batch row and head, also where one mask serves them all."""
        shape = self.query.shape[:2]
        return Packed(*(None if tensor is None else view(tensor.expand(*shape, -1, -1)) for tensor in tensors))

    def image(self, image_mask: Tensor | None) -> View | None:
        return None if image_mask is None else view(image_mask.view(torch.uint8), "b column")

    def tile(self, kernel: str, value_dim: int = 0) -> Tile:
        return find_tile(kernel, *self._row(value_dim))

    def short_tile(self, kernel: str, value_dim: int = 0) -> Tile | None:
        """The tile for a short prompt, from its first token on; None for any other problem."""
        q_len, kv_len = self.query.shape[2], self.key.shape[2]
        return find_short_tile(kernel, *self._row(value_dim)) if q_len == kv_len <= SHORT else None

    def _row(self, value_dim: int) -> tuple[str, int, torch.dtype, bool]:
        return self.target, max(self.query.shape[-1], value_dim), self.query.dtype, self.masked

    def fast_tile(self, kernel: str) -> FastTile | None:
        """The row of a Gluon kernel, where it may run; None for the Triton kernel."""
        return FAST[kernel].get(self.target, {}).get(self.query.shape[-1]) if self.fast else None

    def _suits_gluon(self, scoring: Scoring) -> bool:
        """Plain causal scores of 16 bits, every row with its own key, the maximum before the scale."""
        plain = scoring.causal and not self.masked and scoring.softcap is None and scoring.scale > 0
        in_reach = self.query.dtype != torch.float32 and self.key.shape[2] >= self.query.shape[2]
        return plain and in_reach and suits_tma(self.query) and suits_tma(self.key)


def kernel_mask(mask: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The mask as the kernels read it, 4-D, its form, and the highest entry that hides a key."""
    if mask is None:
        return None, NO_MASK.value, 0.0
    if mask.dim() == 2:
        return narrow(torch.where(mask, 0.0, -torch.inf).float()[:, None, None]), KEY_MASK.value, -math.inf
    if mask.dtype == torch.bool:
        return narrow(mask.view(torch.uint8)), BOOL_MASK.value, 0.0
    return narrow(mask), BIAS_MASK.value, torch.finfo(mask.dtype).min / 2


def view(tensor: Tensor, dimensions: str = "b h row column") -> View:
    """The tensor's View; `dimensions` names what its dimensions are."""
    strides = dict(zip(dimensions.split(), tensor.stride(), strict=True))
    return View(tensor, *(strides.get(name, 0) for name in View._fields[1:]))


def value_groups(kv_heads: int, value_dim: int, tile: Tile) -> tuple[int, Values]:
    """In how many groups the value heads share maps, tile.value_width features side by side, and of what form."""
    pad = max(16, triton.next_power_of_2(value_dim))
    together = max(1, min(tile.value_width // pad, triton.next_power_of_2(kv_heads)))
    return triton.cdiv(kv_heads, together), Values(value_dim, pad, together)


def narrow(tensor: Tensor) -> Tensor:
    """The tensor, copied if an offset within a tile would not fit 32 bits."""
    return tensor.contiguous() if any(stride * 512 >= 2**31 for stride in tensor.stride()[2:]) else tensor


def suits_tma(tensor: Tensor) -> bool:
    """Whether a tensor map describes it: features side by side, all else, and the address, at multiples of 16 bytes."""
    apart = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    steps = [stride * tensor.element_size() for size, stride in apart if size > 1]
    aligned = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    return aligned and all(0 < step < 2**40 and step % 16 == 0 for step in steps)


@lru_cache
def device_target(device: torch.device) -> str:
    """The row of the tile table for a device; unknown devices take the most cautious one."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(
        torch.cuda.get_device_capability(device), "sm_89"
    )
