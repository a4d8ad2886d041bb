"""What becomes of a forward: `plan_of` decides, `run` does it.

Where EAH does not apply, the layer's own attention runs on exactly what arrived, and the reason is kept for the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eah.method import (
    Call,
    Choice,
    HeadBlock,
    Knobs,
    Selection,
    attend,
    enhance,
    enhance_each,
    lend,
    receivers,
    select,
)
from eah.reasons import Filled, Reason, Why
from eah.report import Acted, Record, StoodAside
from eah.transformers import cache
from eah.transformers.arguments import (
    as_base_leaves_blind_rows,
    call_of_prompt,
    call_on_cache,
    mask_is_known,
    plain_causal,
    sequences_are_apart,
)
from eah.transformers.cache import Advanced, Begun, Nothing, Tracked
from eah.transformers.forward import FLASH, HANDLED, Forward
from eah.transformers.parallel import head_block
from eah.transformers.prompt import Aside, Continued, Prompt
from eah.uniform import sight_of

if TYPE_CHECKING:
    from eah.transformers.layer import SwappedLayer

CHANGED_BY = {  # arguments that make the attention something else than a map of all keys
    "position_bias": Reason.POSITION_BIAS,
    "s_aux": Reason.S_AUX,
    "sinks": Reason.SINKS,
    "indices": Reason.INDICES,
    "block_indices": Reason.BLOCK_INDICES,
    "cache": Reason.CONTINUOUS,
    "block_table": Reason.CONTINUOUS,
    "cu_seq_lens_q": Reason.PACKED_QUERIES,
    "cu_seq_lens_k": Reason.PACKED_KEYS,
}


def plan_of(layer: SwappedLayer, forward: Forward) -> Plan:
    """The first reason to leave a forward to the layer's own attention, or else what is done instead."""
    mode, prompt, kept = layer.settings.decode, forward.prompt, forward.kept
    spread = forward.query.shape[1] != layer.heads  # the layer has more heads than this process computes
    if isinstance(prompt, Aside):
        return Own(prompt.reason)
    if isinstance(prompt, Continued):
        if mode == "off":
            return Own(Reason.CACHED) if forward.query.shape[2] > 1 else NOTHING_TO_DO
        if mode == "track" and spread:
            return Own(Reason.SPREAD)
        carried = cache.carried_by(kept)
        if isinstance(carried, Nothing):
            return Own(carried.why)
        why = _why_no_map(layer, forward) or _why_not_later(layer, forward, carried)
    else:
        why = _why_no_map(layer, forward) or _why_not_begun(layer, forward, prompt)
    if why is not None:
        return Own(why)

    block = head_block(layer.module) if spread else None
    through = Base(block) if spread or forward.wants_the_base(layer) else Fused()
    if isinstance(prompt, Continued):
        call = call_on_cache(layer, forward)
        return Hold(call, through) if mode == "hold" else Track(call, through, prompt.image_mask)
    if prompt.sequences is not None and not forward.has_cache:
        return ChooseEach(call_of_prompt(layer, forward, prompt), through, prompt)
    keeps = "off" if mode == "off" or kept is None or (mode == "track" and spread) else mode
    return Choose(call_of_prompt(layer, forward, prompt), through, prompt, keeps)


def _why_no_map(layer: SwappedLayer, forward: Forward) -> Why | None:
    """The layer has no map that a head could lend, or it is not known which."""
    for name, reason in CHANGED_BY.items():
        if forward.keywords.get(name) is not None:
            return reason
    if forward.implementation not in HANDLED:
        return Filled(Reason.NOT_HANDLED, (forward.implementation, ", ".join(HANDLED)))
    if forward.keywords.get("dropout"):
        return Reason.DROPOUT
    heads, mask = forward.query.shape[1], forward.mask
    if heads != layer.heads:
        block = head_block(layer.module)
        if block is None or block.size * heads != layer.heads:
            return Reason.SOME_HEADS
        if mask is not None and len(mask.shape) == 4 and mask.shape[1] > 1:
            return Reason.MASK_PER_HEAD
    return None


def _why_not_begun(layer: SwappedLayer, forward: Forward, prompt: Prompt) -> Why | None:
    """This is neither a whole prompt of one sequence a row nor one of packed sequences that keep apart."""
    (batch, _, q_len, _), kv_len = forward.query.shape, forward.key.shape[2]
    aligned = kv_len == q_len or (kv_len > q_len and prompt.has_cache)
    if not aligned or tuple(prompt.image_mask.shape) != (batch, q_len):
        return Reason.UNALIGNED
    if not mask_is_known(forward):
        return Reason.MASK_FORM
    if prompt.without_cache is None:
        return None
    if not forward.has_cache or forward.implementation in FLASH:
        known = forward.query.shape[1] == layer.heads and sequences_are_apart(layer, forward, prompt)
        return None if known else prompt.without_cache
    one_sequence = forward.mask is None or plain_causal(layer.config, forward.keywords)  # of a mask made with the cache
    return None if one_sequence else prompt.without_cache


def _why_not_later(layer: SwappedLayer, forward: Forward, carried: Choice | Tracked) -> Why | None:
    """What the sequence carries is of no use to this forward."""
    (batch, _, q_len, _), kv_len, kept = forward.query.shape, forward.key.shape[2], forward.kept
    static = hasattr(kept, "max_cache_len")
    if not mask_is_known(forward):
        return Reason.MASK_FORM
    if len(carried.head) != batch:
        return Reason.OTHER_BATCH
    written = not static or getattr(kept, "cumulative_length_int", 0) >= kv_len
    if forward.mask is None and not (written and (q_len == 1 or forward.implementation in FLASH)):
        return Reason.NO_MASK
    if layer.settings.decode == "hold":
        return None
    if not isinstance(carried, Tracked):
        return Reason.OTHER_MODE
    if q_len > 1 and forward.wants_the_base(layer):
        return Reason.ROWS_WITH_MAPS
    if static and not isinstance(getattr(kept, "cumulative_length", None), Tensor):  # before transformers 5.8 or so
        return Reason.UNKNOWN_POSITION
    return Reason.MISSED if kept.complete is None and kept.get_seq_length() - q_len != kept.tokens else None


class Fused:
    """A way to the output: the kernels."""

    def choose(self, call: Call, image_mask: Tensor, knobs: Knobs, keeps: str) -> tuple[Selection, Tensor | None]:
        """And the output (B, Hq, S, Dv)."""
        if keeps == "track":
            selection = select(call, image_mask, knobs, return_column_mean=True)
            return selection, attend(call, selection.choice, knobs.backend)
        output, head, counts = enhance(call, image_mask, knobs)
        receives = receivers(counts, head, knobs) if keeps == "hold" else None
        return Selection(Choice(head, receives), counts, None), output

    def output(self, layer: SwappedLayer, forward: Forward, call: Call, choice: Choice) -> tuple[Tensor, None]:
        return attend(call, choice, layer.settings.knobs.backend).transpose(1, 2), None


class Base(NamedTuple):
    """A way to the output: the layer's own attention, for gradients or maps, or with heads in other processes."""

    block: HeadBlock | None

    def choose(self, call: Call, image_mask: Tensor, knobs: Knobs, keeps: str) -> tuple[Selection, Tensor | None]:
        """Without the output, which takes the choice."""
        return select(call, image_mask, knobs, self.block, keeps == "track"), None

    def output(self, layer: SwappedLayer, forward: Forward, call: Call, choice: Choice) -> tuple[Tensor, Tensor | None]:
        arrived = forward.query, forward.key, forward.value, forward.mask
        return lend(choice, forward.attention, *arrived, self.block)


class Done(NamedTuple):
    """Output (B, S, Hq, Dv) and maps, or None in their place; what the layer records and the sequence carries, None
    where that stays as it was. instead_of: the record of the prefill before that this one adds to."""

    output: Tensor
    maps: Tensor | None
    record: Record | None = None
    carried: Begun | Advanced | Nothing | None = None
    instead_of: Record | None = None


class Own(NamedTuple):
    """The layer's own attention, on exactly what arrived. why: None for a step that EAH has nothing to do with."""

    why: Why | None

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        done = forward.attention(forward.query, forward.key, forward.value, forward.mask)
        if self.why is None:
            return Done(*done)
        last = layer.record if forward.later else None
        return Done(*done, _aside(self.why, last), Nothing(self.why), last)


NOTHING_TO_DO = Own(None)


def _aside(why: Why, last: Record | None) -> Record | None:
    """last: the record of the prefill before, which stays."""
    if last is None:
        return StoodAside(why)
    if last.afterwards == why or (isinstance(last, StoodAside) and why is not Reason.CACHED):
        return None
    return last._replace(afterwards=why)


class Choose(NamedTuple):
    """A whole prompt: a head is chosen and lends its map. keeps: what later steps need of it, of `modes.MODES`."""

    call: Call
    through: Fused | Base
    prompt: Prompt
    keeps: str

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        call, through, prompt, keeps = self
        image_mask, knobs = prompt.image_mask.to(call.query.device), layer.settings.knobs
        (choice, counts, mean), output = through.choose(call, image_mask, knobs, keeps)
        carried = Begun(choice) if keeps == "hold" else None
        if mean is not None:
            sums = cache.first_sums(call, image_mask, choice, mean)
            carried = Begun(sums, cache.last_rows(call, knobs), cache.counted(forward.kept))
        sight, complete = sight_of(image_mask, call.scoring), carried and carried.counted.complete
        record = Acted(choice.head, counts, image_mask, sight, prompt.by_embedding, complete)
        if output is None:
            return Done(*through.output(layer, forward, call, choice), record, carried)
        output = as_base_leaves_blind_rows(output, forward, call.scoring)
        return Done(output.transpose(1, 2), None, record, carried)


class ChooseEach(NamedTuple):
    """Packed sequences in a batch of one row, without a cache: for each a head is chosen, which lends its map in it."""

    call: Call
    through: Fused | Base
    prompt: Prompt

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        call, through, prompt = self
        sequences, knobs, device = prompt.sequences, layer.settings.knobs, call.query.device
        assert sequences is not None  # plan_of
        image_mask, cu_seqlens = prompt.image_mask.to(device), sequences.cu_seqlens(device)
        with torch.no_grad():
            output, head, counts = enhance_each(call, image_mask, cu_seqlens, max(sequences.lengths), knobs)
        images, real = (sequences.as_rows(tokens) for tokens in (image_mask[0], torch.ones_like(image_mask[0])))
        sight = sight_of(images, call.scoring._replace(attention_mask=real))
        record = Acted(head, counts, images, sight, prompt.by_embedding)
        if isinstance(through, Fused):
            return Done(output.transpose(1, 2), None, record)
        of_tokens, receives = sequences.of_tokens(device), receivers(counts, head, knobs)
        choice = Choice(head[of_tokens][None], None if receives is None else receives[of_tokens].T[None])
        return Done(*through.output(layer, forward, call, choice), record)


class Hold(NamedTuple):
    """A forward on a cache, with the head that its sequence carries."""

    call: Call
    through: Fused | Base

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        head, receives = forward.kept.carried[:2]
        record, last = None, layer.record
        if forward.query.shape[2] > 1 and isinstance(last, Acted):
            held = (head >= 0).any()
            record = last._replace(held=held if last.held is None else last.held | held.to(last.held.device))
        return Done(*self.through.output(layer, forward, self.call, Choice(head, receives)), record, None, last)


class Track(NamedTuple):
    """A forward on a cache, each of whose rows takes part in the statistics and has a head chosen anew.

    image_mask: as for `cache.track`.
    """

    call: Call
    through: Fused | Base
    image_mask: Tensor | None

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        kept, last = forward.kept, layer.record
        with torch.no_grad():
            choice, carried = cache.track(kept, self.call, self.image_mask, layer.settings.knobs)
        record = None
        if isinstance(last, Acted) and last.complete is not kept.complete:
            record = last._replace(complete=kept.complete)
        return Done(*self.through.output(layer, forward, self.call, choice), record, carried, last)


Plan = Own | Choose | ChooseEach | Hold | Track
