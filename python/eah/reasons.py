"""Why EAH left a forward, or a row of it, as it was: code compares the members, users read `sentence`s."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Reason(Enum):
    """One reason each; the value is its sentence. `Filled` fills the blanks of those that have some."""

    # of a forward that begins a sequence, as its arguments show it
    NO_IMAGE_MASK = "no image mask reached the layer: the forward did not go through the enabled model's base model"
    BY_POSITION = "arguments after input_ids were passed to the base model by position; pass them by name"
    CACHED = "tokens were in the cache before this forward (a second turn, a chunk of a prompt, or drafted tokens)"
    CHUNKED = "the prompt is fed in chunks (prefill_chunk_size), and the head is chosen by all of it"
    PACKED = (
        "the position_ids restart within a row: several packed sequences, which are enhanced in a batch of one row, "
        "without a cache, where the attention is plainly causal"
    )
    CONTINUOUS = "continuous batching packs several sequences"
    UNREADABLE_CACHE = "whether the cache is empty cannot be read while compiling or capturing"
    UNREADABLE_POSITIONS = (
        "position_ids without an attention_mask cannot be read for packing while compiling or capturing"
    )
    UNREADABLE_MASK = "an image mask that was given (handle.image_mask) cannot be read while compiling"

    # of a layer's attention
    POSITION_BIAS = "the layer adds a position bias"
    S_AUX = "the layer has attention sinks of its own (s_aux)"
    SINKS = "the layer has attention sinks of its own (sinks)"
    INDICES = "the layer attends to selected keys only (indices)"
    BLOCK_INDICES = "the layer attends to selected keys only (block_indices)"
    PACKED_QUERIES = "several sequences are packed (cu_seq_lens_q)"
    PACKED_KEYS = "several sequences are packed (cu_seq_lens_k)"
    NOT_HANDLED = "the attention implementation {!r} is not handled; handled are {}"
    DROPOUT = "attention dropout is active"
    SOME_HEADS = "the layer computes only some of its heads here, and its weights do not say which (tensor parallel)"
    MASK_PER_HEAD = "each head has a mask of its own, and the heads are spread over processes (tensor parallel)"
    SPREAD_MAPS = "the heads are spread over processes (tensor parallel): none has the maps of all"
    UNALIGNED = "the layer has other keys than the tokens of this forward"
    MASK_FORM = "the attention mask is of a form that is not known for this attention implementation"

    # of a forward on a cache, to which a head should have been carried
    NO_CACHE_LAYER = "the cache has no layer object that could carry the head to later steps"
    NOT_BEGUN = "the prefill of this sequence was not seen: no head was chosen for it"
    OTHER_BATCH = "the cache carries the heads of another batch"
    OTHER_MODE = 'the cache carries no column sums: its prefill ran without decode="track"'
    CROPPED = "the cache was cropped by more than {} tokens or the last forward's: their rows cannot leave the sums"
    MISSED = "tokens were cached that the column sums lack: EAH was disabled, or tracked no tokens, in between"
    NO_MASK = "no attention mask says which keys these tokens see"
    ROWS_WITH_MAPS = "gradients or attention maps of several tokens at once, each with a head of its own"
    UNKNOWN_POSITION = "the static cache does not tell where it writes"
    SPREAD = "the heads are spread over processes (tensor parallel), whose column sums are not gathered at every step"
    NOTHING_HELD = "no head was chosen at the prefill: there is none to hold"

    # of a request in vLLM
    STREAMED = "a streamed session: its prompt grows while it is answered, and the head is chosen by all of it"
    PROMPT_EMBEDS = "the prompt holds embeddings in the place of token ids"
    BEAM_SEARCH = (
        "a step of beam search: vLLM asks for each token by a new prompt, which holds the answer so far and not the "
        'request\'s "eah"'
    )
    CUT = "the prompt was computed in several steps, and the head is chosen by all of it"
    FUSED_WRITE = "a fused kernel wrote the keys to the cache: they did not reach the layer's attention"
    NOT_REACHED = "the layer's attention was computed past EAH: a fault of EAH with this vLLM, please report it"
    FAILED = "layer {}: {} was raised, see the log"
    MISREAD = 'the request\'s "eah" is neither "on" nor "off": the default was taken'

    # of a batch row for which no head was chosen
    NO_IMAGE_TOKEN = "no image token"
    NO_PLACEHOLDER = "no image token: no embedding is a placeholder's; handle.image_mask(mask) can say where they are"
    NO_SINK = "no head has a sink"
    SPARSE = "density below min_density {:g}"


class Filled(NamedTuple):
    """A reason whose sentence has blanks, with what stands in them."""

    reason: Reason
    blanks: tuple[object, ...]


Why = Reason | Filled


def sentence(why: Why) -> str:
    """What users read."""
    return why.reason.value.format(*why.blanks) if isinstance(why, Filled) else why.value
