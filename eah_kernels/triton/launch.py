"""From tensors to kernel arguments: what the launchers share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.triton.configs import Tile, find_tile
from eah_kernels.triton.primitives import BIAS_MASK, BOOL_MASK, KEY_MASK, NO_MASK

LOG2E = math.log2(math.e)
LENGTHS = ["q_len", "kv_len", "window"]  # not specialised on: most new prompt lengths compile nothing


class Launch(NamedTuple):
    """One kernel launch, ready to run or, in bench/resources.py, to compile without a device."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.tile.options())


class Problem:
    """Query, key and scoring of one layer in the form that every kernel takes."""

    def __init__(self, query: Tensor, key: Tensor, scoring: Scoring, target: str | None = None):
        self.query, self.key = narrow(query), narrow(key)
        self.target = target or device_target(query.device)
        head_dim, kv_len = query.shape[-1], key.shape[2]
        mask, self.mask_form, hidden = scoring.attention_mask, NO_MASK.value, 0.0
        if mask is None:
            mask = query.new_empty(1, 1, 1, 1)  # never read
        elif mask.dim() == 2:
            mask = torch.where(mask, 0.0, -torch.inf).float()[:, None, None]
            self.mask_form, hidden = KEY_MASK.value, -math.inf
        elif mask.dtype == torch.bool:
            self.mask_form = BOOL_MASK.value
        else:
            self.mask_form, hidden = BIAS_MASK.value, torch.finfo(mask.dtype).min / 2
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        self.mask = narrow(mask)
        self.packed = None  # pack.py fills it
        main = 1 << (head_dim.bit_length() - 1)
        tail = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
        if main < 16 or main + tail >= 2 * main:
            main, tail = max(16, triton.next_power_of_2(head_dim)), 0
        scale, cap = scoring.scale * LOG2E, 0.0
        if scoring.softcap is not None:
            scale, cap = scoring.scale / scoring.softcap, scoring.softcap * LOG2E
        self.arguments = (
            operand("q", "qb qh qm qd", self.query)
            | operand("k", "kb kh kn kd", self.key)
            | operand("mask", "mb mh mm mn", self.mask.expand(*query.shape[:3], kv_len))
            | dict(batch=query.shape[0], q_len=query.shape[2], kv_len=kv_len, GROUP=query.shape[1] // key.shape[1])
            | dict(scale=scale, cap=cap, window=scoring.sliding_window or 0)
            | dict(HEAD_DIM=head_dim, MAIN=main, TAIL=tail, PRECISION=self._precision())
            | dict(MASK=self.mask_form, HIDDEN=hidden, CAUSAL=scoring.causal)
            | dict(WINDOW=scoring.sliding_window is not None, SOFTCAP=scoring.softcap is not None)
        )

    def packed_operand(self, name: str, strides: str, field: str | None = None) -> dict[str, Any]:
        """A field of the packed mask, for every batch row and head; nothing where it has none."""
        tensor = getattr(self.packed, field or name, None)
        return operand(name, strides, None if tensor is None else tensor.expand(*self.query.shape[:2], -1, -1))

    def tile(self, kernel: str, value_dim: int = 0) -> Tile:
        masked = self.mask_form != NO_MASK.value or self.arguments["WINDOW"]
        return find_tile(kernel, self.target, max(self.query.shape[-1], value_dim), self.query.dtype, masked)

    def _precision(self) -> str:
        """How a float32 product is made; never plain TF32. For 16-bit operands it means nothing."""
        return "ieee" if self.target in ("gfx942", "interpreter") else "tf32x3"


def operand(name: str, strides: str, tensor: Tensor | None) -> dict[str, Any]:
    """name_ptr and the strides; a last dimension without a name in `strides` is contiguous."""
    names = strides.split()
    numbers = [0] * len(names) if tensor is None else tensor.stride()[: len(names)]
    return {f"{name}_ptr": tensor} | {f"stride_{s}": n for s, n in zip(names, numbers, strict=True)}


def image_arguments(image_mask: Tensor | None) -> dict[str, Any]:
    return operand("image", "ib in", None if image_mask is None else image_mask.view(torch.uint8))


def value_groups(kv_heads: int, value_dim: int, tile: Tile) -> tuple[int, dict[str, int]]:
    """In how many groups the value heads share maps, tile.value_width features side by side, and their constexprs."""
    pad = max(16, triton.next_power_of_2(value_dim))
    together = max(1, min(tile.value_width // pad, triton.next_power_of_2(kv_heads)))
    return triton.cdiv(kv_heads, together), dict(VALUE_DIM=value_dim, VALUE_PAD=pad, VALUE_HEADS=together)


def narrow(tensor: Tensor) -> Tensor:
    """The tensor, copied if an offset within a tile would not fit 32 bits."""
    return tensor.contiguous() if any(stride * 512 >= 2**31 for stride in tensor.stride()[2:]) else tensor


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
