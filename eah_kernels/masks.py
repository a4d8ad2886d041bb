"""What hides a key from a query row, and which rows count: every mask form, in one place.

Row i of Sq query rows stands at position i + Skv - Sq (bottom-right alignment); that key is its own key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # query rows at once where pairs are counted


class Scoring(NamedTuple):
    """How a score is made and who sees whom; the arguments are those of `eah_kernels.eah_attention`."""

    attention_mask: Tensor | None = None
    causal: bool = True
    scale: float = 1.0
    sliding_window: int | None = None
    softcap: float | None = None

    def at(self, batch: int, head: int | None = None) -> Scoring:
        """The same rules for one batch row, or for one query head of it; the mask keeps its rank."""
        mask = self.attention_mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[batch : batch + 1]
        if mask is not None and head is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask[:, head : head + 1]
        return self._replace(attention_mask=mask)

    @property
    def mask_heads(self) -> int:
        """How many heads the mask tells apart: 1, or Hq for a mask per head."""
        mask = self.attention_mask
        return 1 if mask is None or mask.dim() == 2 else mask.shape[1]

    def visible(self, q_len: int, kv_len: int, device: torch.device, rows: slice | Tensor, keys: slice) -> Tensor:
        """Bool (B|1, Hq|1, rows, keys): True where the row sees the key."""
        position = torch.arange(q_len, device=device)[rows, None] + (kv_len - q_len)
        key = torch.arange(kv_len, device=device)[None, keys]
        seen = key <= position if self.causal else torch.ones_like(key <= position)
        if self.sliding_window is not None:
            seen = seen & (key > position - self.sliding_window)
        seen = seen[None, None]
        mask = self.attention_mask
        if mask is None:
            return seen
        if mask.dim() == 2:
            return seen & mask[:, None, None, keys]
        return seen & shows(mask[:, :, rows, keys])

    def bias(self, rows: slice | Tensor, keys: slice) -> Tensor | None:
        """What an additive mask adds to the score, (B|1, Hq|1, rows, keys), or None."""
        mask = self.attention_mask
        if mask is None or mask.dtype == torch.bool:
            return None
        return mask[:, :, rows, keys]

    def of_rows(self, rows: Tensor | slice, q_len: int, kv_len: int, device: torch.device) -> Scoring:
        """The same rules for some rows in place of all, as one mask (B|1, 1|Hq, rows, Skv): no position tells it."""
        every = slice(None)
        mask, bias = self.visible(q_len, kv_len, device, rows, every), self.bias(rows, every)
        if bias is not None:
            mask = bias.masked_fill(~mask, -torch.inf)
        return self._replace(attention_mask=mask, causal=False, sliding_window=None)

    def counting_rows(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """Bool (B|1, Hq|1, Sq): True where the row sees its own key (spec, step 1)."""
        own = torch.arange(kv_len - q_len, kv_len, device=device)
        exists = own >= 0
        own = own.clamp(min=0)
        mask = self.attention_mask
        if mask is None:
            return exists[None, None]
        if mask.dim() == 2:
            return exists & mask[:, own][:, None]
        index = own[:, None].expand(*mask.shape[:2], q_len, 1)
        return exists & shows(mask.gather(-1, index)).squeeze(-1)

    def seeing_rows(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """int32 (B|1, Hq|1, Skv): n_j, how many counting rows other than its own see key j (spec, step 2)."""
        counting = self.counting_rows(q_len, kv_len, device).unsqueeze(-1)
        key, keys = torch.arange(kv_len, device=device), slice(None)
        rows = torch.zeros(1, 1, kv_len, dtype=torch.int32, device=device)
        for start in range(0, q_len, ROWS):
            block = slice(start, min(start + ROWS, q_len))
            own = torch.arange(block.start, block.stop, device=device)[:, None] + (kv_len - q_len)
            seen = self.visible(q_len, kv_len, device, block, keys) & counting[:, :, block] & (key != own)
            rows = rows + seen.sum(-2, dtype=torch.int32)
        return rows


def shows(mask: Tensor) -> Tensor:
    """True where a boolean or additive mask leaves the key visible."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
