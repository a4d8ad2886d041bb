"""The attention function that replaces a layer's own, and its attachment to that layer.

transformers looks the function up under the name in the attention module's config at every call. A swapped layer gets a
copy of its config with the name "eah"; masks are made from the model's config, which stays as it is, as do the other
layers. Where EAH does not apply, the layer's own implementation runs on exactly what arrived.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eah.method import Knobs
from eah.reasons import sentence
from eah.report import Acted, Record, StoodAside
from eah.transformers import cache
from eah.transformers.find import query_heads
from eah.transformers.forward import CACHE, MAPS, Forward
from eah.transformers.plan import Plan, plan_of
from eah.transformers.prompt import cache_in

NAME = "eah"


def attention_forward(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    """What transformers calls. query (B, Hq, S, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv).

    Returns:
        Output (B, S, Hq, Dv) and the attention maps, or None in their place as the base implementation does.
    """
    layer = getattr(module, "eah_layer", None)
    if layer is None:
        raise RuntimeError('the attention implementation "eah" is set by eah.enable(model), not by name')
    forward = Forward.of(layer, query, key, value, attention_mask, kwargs)
    done = layer.plan(forward).run(layer, forward)
    if done.carried is not None:
        cache.carry(forward.kept, done.carried)
    if done.record is not None:
        layer.remember(done.record, done.instead_of)
    return done.output, done.maps


class Settings(NamedTuple):
    """What `eah.enable` was told, the same for every swapped layer."""

    knobs: Knobs
    decode: str  # of modes.MODES
    tested: bool  # the model is of a known family


class Warned:
    """Shared by the layers of an enabled model: whether it was said that one of them never acted."""

    said = False


class History:
    """The last prefills, oldest first: of each its thread and the records of the layers that it reached. Shared by the
    layers.
    """

    def __init__(self, length: int):
        self.prefills: deque[tuple[int, dict[int, Record]]] = deque(maxlen=length)

    def remember(self, layer: int, record: Record, instead_of: Record | None) -> None:
        own, prefills = get_ident(), tuple(self.prefills)  # other threads add to it meanwhile
        if instead_of is not None:
            found = (records for _, records in reversed(prefills) if records.get(layer) is instead_of)
            next(found, {})[layer] = record
            return
        last = next((records for thread, records in reversed(prefills) if thread == own), None)
        if last is None or layer in last:
            last = {}
            self.prefills.append((own, last))
        last[layer] = record


class SwappedLayer:
    """One attention module while EAH acts in it. A forward changes `record`, `history` and the flags, nothing else."""

    def __init__(self, module: Any, settings: Settings, history: History | None, warned: Warned):
        self.module = module
        self.index: int = module.layer_idx
        self.heads = query_heads(module)
        self.settings = settings
        self.config = module.config
        self.removal: torch.utils.hooks.RemovableHandle | None = None
        self.acted = False
        self.warned = warned
        self.record: Record | None = None
        self.history = history

    def __setstate__(self, state):
        self.__dict__.update(state)
        register()  # an unpickled model may be the first enabled one of its process

    @property
    def attached(self) -> bool:
        return getattr(self.module, "eah_layer", None) is self

    def plan(self, forward: Forward) -> Plan:
        """What becomes of a forward. `observe.py` puts an object in its place."""
        return plan_of(self, forward)

    def remember(self, record: Record, instead_of: Record | None) -> None:
        """instead_of: what the last prefill left behind, to which a forward on a cache adds; None of a new prefill."""
        self.record = record
        if self.history is not None:
            # Not traced: a compiled forward would be compiled anew whenever the history grows.
            torch.compiler.disable(self.history.remember)(self.index, record, instead_of)
        if isinstance(record, Acted):
            self.acted = True
        elif instead_of is None:
            self.warn(record)

    def warn(self, record: StoodAside) -> None:
        # Not while compiling: it would break the graph and guard the flags. Prefills of generate() are not compiled.
        if torch.compiler.is_compiling() or self.acted or self.warned.said:
            return
        self.warned.said = True
        warnings.warn(
            f"EAH stood aside in layer {self.index}, which kept its ordinary attention: {sentence(record.why)}. This "
            "is said once; handle.report() tells of every prefill.",
            UserWarning,
            stacklevel=2,
        )

    def attach(self) -> None:
        config = copy.copy(self.config)
        config._attn_implementation_internal = NAME  # the public setter would also change the config's sub-configs
        self.module.config = config
        self.module.eah_layer = self
        self.removal = self.module.register_forward_pre_hook(hand_on, with_kwargs=True)

    def detach(self) -> None:
        """Also after an attach() that failed half way, or was not begun."""
        if self.removal is not None:
            self.removal.remove()
        self.module.config = self.config
        vars(self.module).pop("eah_layer", None)


def hand_on(module, args, kwargs):
    """Forward pre-hook (with kwargs) of an attention module: what some or all of them keep from their function."""
    more = {CACHE: cache_in(kwargs), MAPS: kwargs.get("output_attentions")}
    return args, {**kwargs, **{name: value for name, value in more.items() if value is not None}}


def register() -> None:
    """Makes the name known to transformers; without effect the second time."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
