"""EAH in a vision-language model of transformers: `eah.enable(model)` swaps the attention of a layer, and undoes it."""

from __future__ import annotations

from eah_kernels import __version__, eah_attention  # first: it holds back what torch says of a missing numpy

# isort: split
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch

from eah.chunked_prefill import ChunkedPrefill
from eah.decode import MODES
from eah.image_tokens import ImageTokens
from eah.inner_generate import InnerGenerate
from eah.models import (
    Family,
    UnsupportedModelError,
    attention_modules,
    family_of,
    head_dims,
    image_token_ids,
    named,
    query_heads,
)
from eah.report import LayerReport, Report, RowReport, layer_report
from eah.swap import History, Settings, SwappedLayer, Warned, register

__all__ = ["Handle", "LayerReport", "Report", "RowReport", "UnsupportedModelError", "__version__", "enable"]


def __dir__() -> list[str]:
    return list(__all__)


NEWEST_TESTED = (5, 24)  # of transformers; tests marked `seam` run on it and on the oldest that pyproject.toml allows


class DefaultLayers(tuple):
    """The layers when none are named. Only these may be moved to the first usable layer."""


DEFAULT_LAYERS = DefaultLayers((1,))


def enable(
    model,
    layers: Sequence[int] = DEFAULT_LAYERS,
    threshold: float = 0.002,
    min_density: float = 0.0,
    decode: str = "off",
    backend: str = "auto",
    broadcast_to: int | Literal["all"] = "all",
    video: bool = True,
    history: int = 0,
) -> Handle:
    """Lets the head with the most vision sinks lend its attention map to its whole layer, at every prefill.

    Args:
        model: a `transformers.PreTrainedModel`, with or without a head on top; not a wrapper of it. `eah models` lists
            the families that were tested. Another family with an image token works by the same rule, and its report
            says that it is untested. Under tensor parallelism every process has to enable it alike.
        layers: decoder layers, 0-based; the paper's "layer two" is 1. When none are named and layer 1 has no attention
            map (linear attention, convolutions), the first layer after it that has one, and the report says so.
        threshold: mean attention above which an image token is a sink of a head, >= 0.
        min_density: no head lends its map below this many sinks per image token, 0..1.
        decode: what the steps after a prefill do. "off": the model's own attention, as published. "hold": the head
            chosen at prefill keeps lending its map to every later token of that sequence, those of a second turn
            included. "track": every later token takes part in the statistics and the head is chosen anew for it, from
            all tokens up to it. Both need a cache; without one every step is a prefill.
        backend: as in `eah_kernels.eah_attention`.
        broadcast_to: how many heads of the layer take the map, those with the fewest sinks (the paper's ablation).
        video: count the placeholder tokens of videos as image tokens, in families that have them.
        history: how many prefills `handle.history` remembers. Under torch.compile it costs a graph break per layer.

    Returns:
        A `Handle`, also a context manager whose exit restores the model.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. Also when the model is enabled.
        UnsupportedModelError: a model or layer in which EAH cannot act.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import PreTrainedModel
    except ModuleNotFoundError as missing:
        raise ImportError('eah.enable needs transformers: pip install "transformers>=5.3"') from missing
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; of a wrapped model pass the "
            "model itself (PEFT: get_base_model(), torch.compile: _orig_mod, DistributedDataParallel: module)"
        )
    if _find(model) is not None:
        raise ValueError("model is enabled already: disable() its handle first; eah.Handle.of(model) finds it")
    shared = next((name for name, module in model.named_modules() if hasattr(module, "eah_layer")), None)
    if shared is not None:
        raise ValueError(f"model shares {shared} with another model that is enabled: disable() that one's handle first")
    layers = _checked_layers(layers)
    if decode not in MODES:
        raise ValueError(f"decode must be one of {', '.join(MODES)}, got {decode!r}")
    if type(history) is not int or history < 0:
        raise ValueError(f"history must be an int >= 0, got {history!r}")
    family = family_of(model)
    token_ids = image_token_ids(model, family or Family(), video)
    modules = attention_modules(model, layers, may_move=isinstance(layers, DefaultLayers))
    settings = Settings(threshold, min_density, backend, broadcast_to, decode, tested=family is not None)
    for module in modules:
        _check_knobs(model, module, settings)
    notes = _notes(model, family, layers, tuple(module.layer_idx for module in modules), decode)

    register()
    kept, warned = History(history) if history else None, Warned()
    swapped = tuple(SwappedLayer(module, settings, kept, warned) for module in modules)
    hook = EnabledModel(model, family or Family(), token_ids, swapped, notes)
    hook.attach()
    return Handle(hook)


class EnabledModel(ImageTokens):
    """The hook on an enabled model's base model, and all that undoing takes; copied and pickled with the model."""

    def __init__(self, model, family: Family, token_ids, layers: tuple[SwappedLayer, ...], notes: tuple[str, ...]):
        later = layers[0].settings.decode == "track"
        super().__init__(model.base_model, token_ids, family.position_mask, layers[0].index, later)
        self.layers = layers
        self.notes = notes
        inner = family.inner_generate if model.can_generate() else None
        self.inner_generate = InnerGenerate(model, inner, self) if inner else None
        prefilling = model.get_submodule(inner) if inner else model  # the one whose generate() calls its forward
        self.chunked_prefill = ChunkedPrefill(prefilling, self) if hasattr(prefilling, "_prefill") else None
        self.base = model.base_model
        below = getattr(model, family.inner_forward or "", None)
        self.hooked = [self.base, *([self.inner_generate.inner] if inner else []), *([below] if below else [])]
        self.removals: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """All of it or, where a part of it raises, nothing."""
        try:
            for module in self.hooked:
                self.removals.append(module.register_forward_pre_hook(self, with_kwargs=True))
            for part in self.parts():
                part.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        for removal in self.removals:
            removal.remove()
        for part in self.parts():
            part.detach()

    def parts(self) -> list:
        return [part for part in (self.inner_generate, self.chunked_prefill, *self.layers) if part is not None]


class Handle:
    """An enabled model's switch and its report. As a context manager, exit disables."""

    def __init__(self, enabled: EnabledModel):
        self._enabled = enabled

    def __repr__(self) -> str:
        layers = ", ".join(str(layer.index) for layer in self._enabled.layers)
        state = "enabled" if self._enabled.layers[0].attached else "disabled"
        return f"<eah.Handle of {type(self._enabled.base).__name__}, layers {layers}: {state}>"

    @classmethod
    def of(cls, model) -> Handle:
        """The handle of an enabled model: for a deep copy or an unpickled model, which is enabled too.

        Raises:
            ValueError: the model is not enabled.
        """
        enabled = _find(model)
        if enabled is None:
            raise ValueError("model is not enabled: eah.enable(model) does that")
        return cls(enabled)

    def report(self) -> Report:
        """What the last prefill did in each layer, or why EAH stood aside. Waits for the device."""
        return self._report([layer.record for layer in self._enabled.layers])

    @property
    def history(self) -> tuple[Report, ...]:
        """The reports of the last prefills, oldest first, as many as `enable(history=...)` asked for.

        A layer that an interrupted prefill did not reach has no rows there.
        """
        layers = self._enabled.layers
        prefills = layers[0].history.prefills if layers[0].history else ()
        return tuple(self._report([records.get(layer.index) for layer in layers]) for _, records in prefills)

    def _report(self, records) -> Report:
        layers = zip(self._enabled.layers, records, strict=True)
        reports = tuple(layer_report(layer.index, record, layer.settings) for layer, record in layers)
        return Report(reports, self._enabled.notes)

    def image_mask(self, mask: torch.Tensor) -> AbstractContextManager[None]:
        """Within `with handle.image_mask(mask):` the prompt's image tokens are those that `mask` marks.

        For a prompt given as embeddings into which the image features were merged already, or to choose among the
        image tokens. It holds for the calls of this thread only.

        Args:
            mask: (B, S) bool, S the length of the prompt with its padding, B its rows or a divisor of them.

        Raises:
            TypeError, ValueError: mask is not that; the second also from a forward that it does not fit.
        """
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a torch.bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2 or mask.shape[0] == 0:
            raise ValueError(f"mask must be (B, S) with B >= 1, got {tuple(mask.shape)}")
        return self._enabled.given(mask)

    def disable(self) -> None:
        """Restores the model as it was; a second call does nothing. The report stays readable."""
        if self._enabled.layers[0].attached:
            self._enabled.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.disable()


def _find(model) -> EnabledModel | None:
    hooks = model.base_model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, EnabledModel)), None)


def _checked_layers(layers) -> tuple[int, ...]:
    accepted = "layers must be a non-empty sequence of distinct ints such as (1,)"
    if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(layer) is not int for layer in layers):
        raise TypeError(f"{accepted}, got {layers!r}")
    if len(layers) == 0 or len(set(layers)) < len(layers):
        raise ValueError(f"{accepted}, got {layers!r}")
    return layers if isinstance(layers, DefaultLayers) else tuple(layers)


DECODE_NOTES = {
    "off": (),
    "hold": ("the head chosen at prefill keeps lending its map to later tokens",),
    "track": ("the table is of the prefill; each later token takes part in the statistics and has a head chosen anew",),
}


def _notes(model, family: Family | None, asked: tuple, used: tuple, decode: str) -> tuple[str, ...]:
    import transformers

    notes = list(DECODE_NOTES[decode])
    if family is None:
        notes.append(f"{named(model)} is of no family that was tested (eah models): the general rule was applied")
    if used != asked:
        notes.append(f"layer {asked[0]} has no attention map: layer {used[0]}, the first usable one, was taken")
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        notes.append(f"untested with transformers {transformers.__version__}: the newest version tested is {newest}")
    return tuple(notes)


def _check_knobs(model, module: torch.nn.Module, settings: Settings) -> None:
    """Raises for a bad knob, and for a backend that cannot run where the model is: an empty call checks them all."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    key, value = (
        torch.empty(0, query_heads(module), 1, dim, dtype=model.dtype, device=device) for dim in head_dims(module)
    )
    image_mask = torch.empty(0, 1, dtype=torch.bool, device=device)
    eah_attention(
        *(key, key, value, image_mask),
        threshold=settings.threshold,
        min_density=settings.min_density,
        broadcast_to=settings.broadcast_to,
        backend=settings.backend,
    )
