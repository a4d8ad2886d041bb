"""Where the image tokens are, and whether a forward starts from nothing: read once, before the base model runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PREFILL = "eah_prefill"  # the keyword that carries a `Prefill` down to the attention layers

BY_POSITION = "arguments after input_ids were passed to the base model by position; pass them by name"
CACHED = "tokens were in the cache before this forward (a second turn, a chunk of a prompt, or drafted tokens)"
PACKED = "the position_ids restart within a row: several packed sequences"
UNREADABLE_CACHE = "whether the cache is empty cannot be read while compiling or capturing"
UNREADABLE_POSITIONS = "position_ids without an attention_mask cannot be read for packing while compiling or capturing"


class Prefill(NamedTuple):
    """What the attention layers cannot see for themselves. Either `stand_aside` or the rest."""

    image_mask: Tensor | None = None  # (B, S) bool
    padding_mask: Tensor | None = None  # (B, S) bool, True = real token; None without one
    own_mask: bool = False  # the caller passed finished attention masks (4-D, or one per layer type)
    has_cache: bool = False  # keys may be longer than S: a static cache
    stand_aside: str | None = None


class ImageTokens:
    """Forward pre-hook (with kwargs) of the base model: adds a `Prefill` to the keyword arguments of its layers.

    Holds no state of a call, so that threads may share the model.
    """

    def __init__(self, token_ids: tuple[int, ...], layer: int):
        self.token_ids = token_ids
        self.layer = layer

    def __call__(self, base, args, kwargs):
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if tokens is None or tokens.shape[1] <= 1:
            return None
        by_name = len(args) <= 1
        prefill = self.describe(base, input_ids, tokens, kwargs) if by_name else Prefill(stand_aside=BY_POSITION)
        return args, {**kwargs, PREFILL: prefill}

    def describe(self, base, input_ids, tokens, kwargs) -> Prefill:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        reason = _why_not_empty(cache, self.layer)
        if reason is None and mask is None and cache is None:
            reason = _why_not_one_sequence(kwargs.get("position_ids"))
        if reason is not None:
            return Prefill(stand_aside=reason)
        padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return Prefill(
            image_mask=self.find(base, input_ids, tokens),
            padding_mask=padding,
            own_mask=mask is not None and padding is None,
            has_cache=cache is not None,
        )

    def find(self, base, input_ids, tokens) -> Tensor:
        """(B, S) bool. Without ids, the embeddings that equal a placeholder's, as the models themselves find them."""
        found = None
        for token in self.token_ids:
            if input_ids is not None:
                here = input_ids == token
            else:
                with torch.no_grad():
                    placeholder = base.get_input_embeddings()(torch.full((), token, device=tokens.device))
                here = (tokens == placeholder).all(-1)
            found = here if found is None else found | here
        return found


def _why_not_empty(cache, layer: int) -> str | None:
    if cache is None:
        return None
    seen = cache.get_seq_length(layer)
    if isinstance(seen, Tensor):  # an initialised static cache counts on the device: one read per prefill
        if not _readable():
            return UNREADABLE_CACHE
        seen = seen.item()
    return CACHED if seen else None


def _why_not_one_sequence(position_ids) -> str | None:
    """Without mask and cache, transformers takes position_ids that do not count up as packed sequences."""
    if position_ids is None:
        return None
    if position_ids.dim() == 3:  # Qwen2-VL: (3, B, S) never packs; (4, B, S) has the text positions first
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    if not _readable():
        return UNREADABLE_POSITIONS
    return PACKED if (position_ids.diff(dim=-1) != 1).any().item() else None


def _readable() -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
