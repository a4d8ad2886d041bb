"""From tensors to kernel arguments: what the launchers share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.triton.bundles import (
    BIAS_MASK,
    BOOL_MASK,
    KEY_MASK,
    NO_MASK,
    PAD,
    Batch,
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
    form: int = 0  # what the build depends on beside the tile, and lengths change

    def run(self) -> Any:
        """By Triton's own way; the build that it chose. plan.py has a shorter one."""
        return self.kernel[(self.programs,)](**self.arguments, **self.tile.options)


class Problem:
    """Query, key and scoring of one layer in the form that every kernel takes.

    fast: whether the Gluon kernels may run, where they suit.
    by_key: a (B, Skv) mask is read by key, after pack.py; else like a boolean one of 4 dimensions.
    cu_seqlens, longest: query and key are `packed_view`s of sequences; so many tokens are taken of any, at most.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scoring: Scoring,
        target: str | None = None,
        fast: bool = False,
        by_key: bool = True,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ):
        self.query, self.key = narrow(query), narrow(key)
        self.target = target or device_target(query.device)
        self.mask, mask_form, hidden = kernel_mask(scoring.attention_mask, by_key)
        self.packed: PackedMask | None = None  # of a 4-D mask; pack.py fills it
        (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
        self.batch = Batch(batch) if longest is None else Batch(batch, cu_seqlens, 2 * q_len + 1)
        self.q_len, self.kv_len = q_len, kv_len = (q_len, kv_len) if longest is None else (longest, longest)
        windowed, capped = scoring.sliding_window is not None, scoring.softcap is not None
        self.masked = self.mask is not None or windowed
        if scoring.softcap is None:
            scale = Scale(scoring.scale * LOG2E, 0.0)
        else:
            scale = Scale(scoring.scale / scoring.softcap, scoring.softcap * LOG2E)
        self.rules = rules_for(
            self.target,
            heads // kv_heads,
            head_dim,
            mask_form,
            hidden,
            scoring.causal,
            windowed,
            capped,
            scoring.scale > 0,
        )
        self.fast = fast and self._suits_gluon(scoring)
        mask = None
        if self.mask is not None:
            mask = mask_view(self.mask, odd=not by_key)
        self.arguments = dict(
            q=view(self.query), k=view(self.key), mask=mask, batch=batch, q_len=q_len, kv_len=kv_len,
            window=scoring.sliding_window or 0, scale=scale, R=self.rules,
        )  # fmt: skip

    def packed_for_keys(self) -> Packed:
        """The packed mask for a kernel that walks the keys of a row block; empty without a 4-D mask."""
        packed = self.packed
        return Packed() if packed is None else _views(packed.words, packed.cells, packed.seen)

    def packed_for_rows(self) -> Packed:
        """The packed mask for a kernel that walks the rows of a key block."""
        packed = self.packed
        if packed is None:
            return Packed()
        return _views(packed.column_words, packed.column_cells, None, packed.column_counts)

    def tile(self, kernel: str, value_dim: int = 0) -> Tile:
        return find_tile(kernel, *self._row(value_dim))

    def short_tile(self, kernel: str, value_dim: int = 0) -> Tile | None:
        """The tile for a short prompt, from its first token on; None for any other problem."""
        return find_short_tile(kernel, *self._row(value_dim)) if self.q_len == self.kv_len <= SHORT else None

    def _row(self, value_dim: int) -> tuple[str, int, torch.dtype, bool]:
        return self.target, max(self.query.shape[-1], value_dim), self.query.dtype, self.masked

    def fast_tile(self, kernel: str, value: Tensor | None = None) -> FastTile | None:
        """The row of a Gluon kernel, where it may run; None for the Triton kernel. value: if the kernel reads it."""
        head_dim = self.query.shape[-1]
        suits = self.fast and (value is None or (value.shape[-1] == head_dim and suits_tma(value)))
        return FAST[kernel].get(self.target, {}).get(head_dim) if suits else None

    def _suits_gluon(self, scoring: Scoring) -> bool:
        """Plain causal scores of 16 bits, every row with its own key, the maximum before the scale; a mask by key."""
        plain = scoring.causal and scoring.softcap is None and scoring.scale > 0
        plain = plain and scoring.sliding_window is None and self.rules.BY_KEY
        in_reach = self.query.dtype != torch.float32 and self.key.shape[2] >= self.query.shape[2]
        return plain and in_reach and suits_tma(self.query) and suits_tma(self.key)


def cdiv(a: int, b: int) -> int:
    """Rounded up. triton.cdiv and triton.next_power_of_2 take 2 us a call on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache
def rules_for(
    target: str,
    group: int,
    head_dim: int,
    mask: int,
    hidden: float,
    causal: bool,
    windowed: bool,
    capped: bool,
    positive: bool,
) -> Rules:
    main = 1 << (head_dim.bit_length() - 1)
    tail = max(16, power_of_two(head_dim - main)) if head_dim > main else 0
    if main < 16 or main + tail >= 2 * main:
        main, tail = max(16, power_of_two(head_dim)), 0
    return Rules(
        GROUP=group,
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        # Never plain TF32. For 16-bit operands it means nothing.
        PRECISION="ieee" if target in ("gfx942", "interpreter") else "tf32x3",
        MASK=mask,
        HIDDEN=hidden,
        CAUSAL=causal,
        WINDOW=windowed,
        SOFTCAP=capped,
        RAW_MAX=positive and not capped and target in ("sm_80", "sm_90", "interpreter"),  # the others: not compared yet
        BY_KEY=mask in (NO_MASK.value, KEY_MASK.value),
        BOTH_SIDES=mask != NO_MASK.value or windowed,
        MMA_SYNC=target in ("sm_80", "sm_89", "interpreter"),
        WGMMA=target == "sm_90",
        LATE_WORDS=target in ("sm_100", "interpreter"),
    )


def kernel_mask(mask: Tensor | None, by_key: bool = True) -> tuple[Tensor | None, int, float]:
    """The mask as the kernels read it, 4-D, its form, and the highest entry that hides a key.

    by_key: of a (B, Skv) mask, room for what pack.py makes of it, 10 bytes a key.
    """
    if mask is None:
        return None, NO_MASK.value, 0.0
    if mask.dim() == 2 and by_key:
        batch, kv_len = mask.shape
        line = (cdiv(kv_len, PAD.value) + 1) * PAD.value * 10 // 4
        return mask.new_empty(batch, 1, 1, line, dtype=torch.float32), KEY_MASK.value, -math.inf
    if mask.dim() == 2:
        batch, kv_len = mask.shape
        mask = mask.as_strided((batch, 1, 1, kv_len), (mask.stride(0), 0, 0, mask.stride(1)))  # one line for all rows
    if mask.dtype == torch.bool:
        return narrow(mask.view(torch.uint8)), BOOL_MASK.value, 0.0
    return narrow(aligned(mask) if by_key else mask), BIAS_MASK.value, torch.finfo(mask.dtype).min / 2


def aligned(mask: Tensor) -> Tensor:
    """An additive mask whose rows begin at multiples of 16 entries, copied where it lies otherwise.

    The kernels read its entries in pairs, which without this knowledge would cost registers that they do not have.
    """
    if mask.stride(3) == 1 and mask.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in mask.stride()[:3]):
        return mask
    distinct = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride()[:3])]
    *lines, length = distinct.shape
    rows = mask.new_empty(*lines, cdiv(length, 16) * 16)[..., :length]
    return rows.copy_(distinct).expand(mask.shape)


def view(tensor: Tensor) -> View:
    """Of (B, H, rows, columns)."""
    return View(tensor, *tensor.stride())


def every_view(tensor: Tensor) -> View:
    """Of (B|1, H|1, rows, columns), the one for all where there is one. Torch's expand takes 1.5 us."""
    batch, heads, _, _ = tensor.shape
    b, h, row, column = tensor.stride()
    return View(tensor, b if batch > 1 else 0, h if heads > 1 else 0, row, column)


def _views(*tensors: Tensor | None) -> Packed:
    return Packed(*[None if tensor is None else every_view(tensor) for tensor in tensors])


def mask_view(mask: Tensor, odd: bool = False) -> View:
    """every_view of a mask. Of a boolean one, or if `odd`, the strides that follow the lengths come doubled plus one:
    so they are never divisible by 16, and a new length compiles nothing. loads.mask_of undoes it. Those of an additive
    mask otherwise always are, by `aligned`."""
    found = every_view(mask)
    if not odd and mask.dtype != torch.uint8:
        return found
    _, b, h, row, column = found
    return View(mask, 2 * b + 1, 2 * h + 1, 2 * row + 1, column)


def packed_view(tensor: Tensor, sequences: int) -> Tensor:
    """(T, H, D) as (N, H, T, D), all tokens for each of N sequences; where it begins, a kernel reads (sequences.py)."""
    return narrow(tensor.transpose(0, 1)[None]).expand(sequences, -1, -1, -1)


def image_bytes(image_mask: Tensor) -> Tensor:
    """(B, Skv) or (T,) uint8, contiguous: a kernel needs no stride of it."""
    return image_mask.contiguous().view(torch.uint8)


def view_lines(tensor: Tensor) -> View:
    """Of (B, H, columns), a line a head."""
    b, h, column = tensor.stride()
    return View(tensor, b, h, 0, column)


@lru_cache
def value_groups(kv_heads: int, value_dim: int, tile: Tile) -> tuple[int, Values]:
    """In how many groups the value heads share maps, tile.value_width features side by side, and of what form."""
    pad = max(16, power_of_two(value_dim))
    together = max(1, min(tile.value_width // pad, power_of_two(kv_heads)))
    return cdiv(kv_heads, together), Values(value_dim, pad, together)


def narrow(tensor: Tensor) -> Tensor:
    """The tensor, copied if an offset within a tile would not fit 32 bits."""
    _, _, row, column = tensor.stride()
    return tensor.contiguous() if max(row, column) * 512 >= 2**31 else tensor


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
