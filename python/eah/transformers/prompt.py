"""Where the image tokens are, and whether a forward starts from nothing: read once, before the base model runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor

from eah.reasons import Reason
from eah.transformers.packed import Sequences

PROMPT = "eah_prompt"  # the keyword that carries what is found here down to the attention layers


class Prompt(NamedTuple):
    """Of a forward that begins a sequence: what the attention layers cannot see for themselves."""

    image_mask: Tensor  # (B, S) bool
    padding_mask: Tensor | None = None  # (B, S) bool, True = real token; None without one
    own_mask: bool = False  # the caller passed finished attention masks (4-D, or one per layer type)
    has_cache: bool = False  # keys may be longer than S: a static cache
    by_embedding: bool = False  # image tokens were looked for among embeddings, without ids
    without_cache: Reason | None = None  # why this is no single sequence where the model makes no cache of its own
    sequences: Sequences | None = None  # what it then is, where that is known


class Continued(NamedTuple):
    """Of a forward of several tokens on a cache. image_mask (B, cached + S) bool, False for the cached tokens, where
    the layers want it."""

    image_mask: Tensor | None = None


class Aside(NamedTuple):
    """Of a forward that every layer leaves alone."""

    reason: Reason


def cache_in(kwargs):
    """The cache among the arguments of a forward, None without one: `past_key_values` until transformers 5.23, then
    `cache`, which is the paged one of continuous batching before. A caller may use the old name with the new version.
    """
    old = kwargs.get("past_key_values")
    return kwargs.get("cache") if old is None else old


class ImageTokens:
    """Forward pre-hook (with kwargs) of the base model: tells its layers, by a keyword argument, what they are to know.

    Threads may share the model: what a call needs travels with the call, and a given mask belongs to a thread.
    """

    def __init__(self, base, token_ids: tuple[int, ...], position_mask: str | None, layer: int, later: bool):
        self.ids_first = list(inspect.signature(type(base).forward).parameters)[1] == "input_ids"
        self.token_ids = token_ids
        self.position_mask = position_mask
        self.layer = layer
        self.later = later  # the image tokens of forwards on a cache are wanted, too
        self.given_masks: dict[int, Tensor] = {}  # by thread
        self.chunking: set[int] = set()  # the threads that feed a prompt in chunks

    def __call__(self, base, args, kwargs):
        if PROMPT in kwargs:  # an outer model's hook came first
            return None
        ids_by_position = len(args) == 1 and self.ids_first
        input_ids = args[0] if ids_by_position else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if args and not ids_by_position:
            return args, {**kwargs, PROMPT: Aside(Reason.BY_POSITION)}
        if tokens is None or tokens.shape[1] <= 1:
            return None
        return args, {**kwargs, PROMPT: self.describe(base, input_ids, tokens, kwargs)}

    @contextmanager
    def given(self, mask: Tensor) -> Iterator[None]:
        """Within it, in this thread, `mask` (B, S) bool says where the image tokens are."""
        thread = get_ident()
        before = self.given_masks.get(thread)
        self.given_masks[thread] = mask
        try:
            yield
        finally:
            if before is None:
                del self.given_masks[thread]
            else:
                self.given_masks[thread] = before

    @contextmanager
    def chunked(self) -> Iterator[None]:
        """Within it, in this thread, a forward sees a piece of a prompt."""
        self.chunking.add(get_ident())
        try:
            yield
        finally:
            self.chunking.remove(get_ident())

    def describe(self, base, input_ids, tokens, kwargs) -> Prompt | Continued | Aside:
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            return Aside(Reason.CONTINUOUS)
        cached = _tokens_in(cache, self.layer)
        if cached is None:
            return Aside(Reason.UNREADABLE_CACHE)
        if cached and not self.later:
            return Continued()
        if not cached and self.chunking and (torch.compiler.is_compiling() or get_ident() in self.chunking):
            return Aside(Reason.CHUNKED)
        one_sequence = cached or mask is not None or cache is not None
        packed = None if one_sequence else _packed(kwargs.get("position_ids"), len(tokens))
        if self.given_masks and torch.compiler.is_compiling():
            return Aside(Reason.UNREADABLE_MASK)
        image_mask = self.find(base, input_ids, tokens, kwargs, cached)
        if cached:
            return Continued(image_mask)
        padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return Prompt(
            image_mask=image_mask,
            padding_mask=padding,
            own_mask=mask is not None and padding is None,
            has_cache=cache is not None,
            by_embedding=input_ids is None and self.position_mask is None and self.given_mask() is None,
            without_cache=Reason.PACKED if isinstance(packed, Sequences) else packed,
            sequences=packed if isinstance(packed, Sequences) else None,
        )

    def given_mask(self) -> Tensor | None:
        return self.given_masks.get(get_ident()) if self.given_masks else None

    def find(self, base, input_ids, tokens, kwargs, cached: int = 0) -> Tensor:
        """(B, cached + S) bool, False for cached tokens: the mask that was given, else the placeholder tokens.

        Without ids, the embeddings that equal a placeholder's, as the models themselves find them.
        """
        given, (batch, length) = self.given_mask(), tokens.shape[:2]
        if given is not None:
            found = _fitted(given.to(tokens.device), batch, cached + length)[:, cached:]
        else:
            found = self.placeholders(base, input_ids, tokens, kwargs)
        return torch.nn.functional.pad(found, (cached, 0)) if cached else found

    def placeholders(self, base, input_ids, tokens, kwargs) -> Tensor:
        if self.position_mask is not None:
            mask = kwargs.get(self.position_mask)
            return tokens.new_zeros(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        first, *others = self.token_ids
        found = _placeholder(base, input_ids, tokens, first)
        for token in others:
            found = found | _placeholder(base, input_ids, tokens, token)
        return found


def _placeholder(base, input_ids, tokens, token: int) -> Tensor:
    if input_ids is not None:
        return input_ids == token
    with torch.no_grad():
        placeholder = base.get_input_embeddings()(torch.full((), token, device=tokens.device))
    return (tokens == placeholder).all(-1)


def _fitted(mask: Tensor, batch: int, length: int) -> Tensor:
    """The given mask for a forward whose rows are repeated (beams) or continued (generation without a cache)."""
    rows, columns = mask.shape
    if batch % rows or columns > length:
        called = f"the model was called with {batch} x {length} tokens"
        raise ValueError(f"the image mask given is {rows} x {columns}; {called}")
    return torch.nn.functional.pad(mask.repeat_interleave(batch // rows, 0), (0, length - columns))


def _tokens_in(cache, layer: int) -> int | None:
    """How many tokens the cache holds; None: that cannot be read now."""
    if cache is None:
        return 0
    seen = cache.get_seq_length(layer)
    if isinstance(seen, Tensor):  # an initialised static cache counts on the device: one read per prefill
        return int(seen.item()) if _readable() else None
    return seen


def _packed(position_ids, batch: int) -> Reason | Sequences | None:
    """Without mask and cache, transformers takes position_ids that do not count up as packed sequences. Those of a
    batch of one row, or a reason; None: a single sequence a row.

    Whether the decoder makes a cache (use_cache) is seen by its layers only.
    """
    if position_ids is None:
        return None
    if position_ids.dim() == 3:  # Qwen2-VL: (3, B, S) never packs; (4, B, S) has the text positions first
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    if not _readable():
        return Reason.UNREADABLE_POSITIONS
    if not (position_ids.diff(dim=-1) != 1).any().item():
        return None
    return Sequences.of(position_ids[0]) if batch == 1 else Reason.PACKED


def _readable() -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
