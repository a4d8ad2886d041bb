"""Sequences that are packed into one row: position_ids that begin anew say where each of them does."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from eah_kernels import shows


class Sequences(NamedTuple):
    """lengths: of one after the other, together the row's. from_zero: the positions of each begin with 0."""

    lengths: tuple[int, ...]
    from_zero: bool

    @classmethod
    def of(cls, positions: Tensor) -> Sequences:
        """positions (S,): a sequence begins wherever they do not go up by one, as in transformers' masks."""
        begins = [0, *(1 + (positions.diff() != 1).nonzero().flatten()).tolist()]
        lengths = tuple(end - begin for begin, end in zip(begins, [*begins[1:], len(positions)], strict=True))
        return cls(lengths, not positions[begins].any().item())

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """(N + 1,) int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)

    def of_tokens(self, device: torch.device) -> Tensor:
        """(S,) int64: to which sequence each token belongs."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=sum(self.lengths))

    def are_apart(self, mask: Tensor) -> bool:
        """Whether a causal mask (1, 1, S, S), boolean or additive, hides the token before each one's first from it."""
        first = torch.tensor(list(accumulate(self.lengths[:-1])), device=mask.device)
        return not shows(mask[0, 0, first, first - 1]).any().item()

    def as_rows(self, tokens: Tensor) -> Tensor:
        """(S,) bool as (N, longest), False behind each sequence's end."""
        return torch.nn.utils.rnn.pad_sequence(tokens.split(self.lengths), batch_first=True)
