"""What the layers of a model are given to attend to, seen while the model runs; no output changes by a bit.

A layer's own attention runs, or EAH where the model is enabled, and beside it what arrived is handed to an observer: a
whole prompt as `eah_kernels` takes it. The model is left as it was found, also after an error half way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import NamedTuple

from torch import Tensor

from eah.method import Call, Knobs
from eah.reasons import Reason, sentence
from eah.report import Acted
from eah.transformers.enable import check_pretrained
from eah.transformers.enabled import EnabledModel, enabled_on
from eah.transformers.families import Differs
from eah.transformers.find import UnsupportedModelError, family_of, image_token_ids, modules_with_maps, named
from eah.transformers.forward import Forward
from eah.transformers.layer import Settings, SwappedLayer, Warned, register
from eah.transformers.plan import NOTHING_TO_DO, Base, Choose, Done, Own, Plan
from eah.transformers.stand_in import StandIn


class Seen(NamedTuple):
    """One layer's part in a prompt. head (B,) int32, the head that lent its map, or None where EAH is not enabled.

    image_mask (B, S) bool; output (B, S, Hq, Dv), what the layer's attention made of it.
    """

    layer: int
    call: Call
    image_mask: Tensor
    output: Tensor
    head: Tensor | None


class Observer(StandIn):
    """In the place of a layer's `plan`: the same is done, and seen."""

    name = "plan"

    def __init__(self, layer: SwappedLayer, acts: bool, see: Callable[[Seen], None], without: dict[int, str]):
        super().__init__(layer)
        self.acts = acts
        self.see = see
        self.without = without
        self.thread = get_ident()  # another thread's forwards are its own

    def __call__(self, forward: Forward) -> Plan | Observed:
        plan: Plan = self.original(forward)
        done_by = plan if self.acts else NOTHING_TO_DO
        return Observed(self, plan, done_by) if get_ident() == self.thread else done_by


class Observed(NamedTuple):
    """plan: what EAH does, or would do, and so what arrived, as it takes it. done_by: what is done."""

    observer: Observer
    plan: Plan
    done_by: Plan

    def run(self, layer: SwappedLayer, forward: Forward) -> Done:
        done, plan, without = self.done_by.run(layer, forward), self.plan, self.observer.without
        if isinstance(plan, Own) and plan.why is not None:
            without[layer.index] = sentence(plan.why)
        if not isinstance(plan, Choose):
            return done
        if isinstance(plan.through, Base) and plan.through.block is not None:
            without[layer.index] = sentence(Reason.SPREAD_MAPS)
            return done
        without.pop(layer.index, None)
        head = done.record.head if isinstance(done.record, Acted) else None
        mask = plan.prompt.image_mask.to(plan.call.query.device)
        self.observer.see(Seen(layer.index, plan.call, mask, done.output, head))
        return done


class ObservedModel(EnabledModel):
    """The hook that tells the observed layers where the image tokens are."""


@contextmanager
def observed(model, see: Callable[[Seen], None]) -> Iterator[dict[int, str]]:
    """Within it, in this thread, `see` is called for each layer that reads a whole prompt and has a map.

    Args:
        model: a `transformers.PreTrainedModel`; EAH may be enabled on it, and then acts.

    Yields:
        Why the other layers have no map, by layer; complete once a forward is over.

    Raises:
        UnsupportedModelError: no layer has a map, or the model has no image token.
        TypeError, ValueError: no such model; one that is observed already, or whose layers another enabled model has.
    """
    check_pretrained(model)
    enabled = enabled_on(model)
    if isinstance(enabled, ObservedModel):
        raise ValueError("model is looked at already, in another thread for instance: wait for that to end")
    family = family_of(model)
    differs = Differs() if family is None else family.differs
    modules, without = modules_with_maps(model)
    if not modules:
        raise UnsupportedModelError(f"no layer of {named(model)} has an attention map")
    acting = {layer.index: layer for layer in enabled.layers} if enabled else {}
    shared = [index for index, module in modules.items() if index not in acting and hasattr(module, "eah_layer")]
    if shared:
        raise ValueError(
            f"model shares layer {shared[0]} with another model that is enabled: disable() its handle first"
        )
    settings, warned = Settings(Knobs(), "off", tested=family is not None), Warned()
    others = tuple(
        SwappedLayer(module, settings, None, warned) for index, module in modules.items() if index not in acting
    )
    parts: list = [Observer(layer, layer.index in acting, see, without) for layer in (*acting.values(), *others)]
    if others:
        register()
        token_ids = image_token_ids(model, differs, video=True)
        parts.append(ObservedModel(model, differs, token_ids, others, ()))
    try:
        for part in parts:
            part.attach()
        yield without
    finally:
        for part in reversed(parts):
            part.detach()
