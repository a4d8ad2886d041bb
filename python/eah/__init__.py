"""EAH in a vision-language model of transformers: `eah.enable(model)` swaps the attention of a layer, and undoes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eah.image_tokens import ImageTokens
from eah.models import UnsupportedModelError, attention_modules, image_token_ids
from eah.report import LayerReport, Report, RowReport, layer_report
from eah.swap import Settings, SwappedLayer, register
from eah_kernels import eah_attention

__all__ = ["Handle", "LayerReport", "Report", "RowReport", "UnsupportedModelError", "enable"]


def enable(
    model,
    layers: Sequence[int] = (1,),
    threshold: float = 0.002,
    min_density: float = 0.0,
    decode: str = "off",
    backend: str = "auto",
) -> Handle:
    """Lets the head with the most vision sinks lend its attention map to its whole layer, at every prefill.

    Args:
        model: a `transformers.PreTrainedModel` of a supported family (LLaVA, Qwen2.5-VL, InternVL), with or without a
            head on top. Not a wrapper of it.
        layers: decoder layers, 0-based; the paper's "layer two" is 1.
        threshold: mean attention above which an image token is a sink of a head, >= 0.
        min_density: no head lends its map below this many sinks per image token, 0..1.
        decode: what single-token steps do; "off" leaves them to the model's own attention.
        backend: as in `eah_kernels.eah_attention`.

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
        raise ImportError("eah.enable needs transformers: pip install 'eah-kernels[transformers]'") from missing
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; of a wrapped model pass the "
            "model itself (PEFT: get_base_model(), torch.compile: _orig_mod)"
        )
    if _find(model) is not None:
        raise ValueError("model is enabled already: disable() its handle first; eah.Handle.of(model) finds it")
    layers = _checked_layers(layers)
    if decode != "off":
        raise ValueError(f'decode must be "off", got {decode!r}')
    _check_knobs(model, threshold, min_density, backend)
    token_ids = image_token_ids(model)
    modules = attention_modules(model, layers)

    register()
    swapped = tuple(SwappedLayer(module, Settings(threshold, min_density, backend)) for module in modules)
    hook = EnabledModel(token_ids, swapped)
    hook.removal = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    for layer in swapped:
        layer.attach()
    return Handle(hook)


class EnabledModel(ImageTokens):
    """The hook on an enabled model's base model, and all that undoing takes; copied and pickled with the model."""

    removal: torch.utils.hooks.RemovableHandle

    def __init__(self, token_ids: tuple[int, ...], layers: tuple[SwappedLayer, ...]):
        super().__init__(token_ids, layers[0].index)
        self.layers = layers


class Handle:
    """An enabled model's switch and its report. As a context manager, exit disables."""

    def __init__(self, enabled: EnabledModel):
        self._enabled = enabled

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
        layers = self._enabled.layers
        return Report(tuple(layer_report(layer.index, layer.record, layer.settings.min_density) for layer in layers))

    def disable(self) -> None:
        """Restores the model as it was; a second call does nothing. The report stays readable."""
        if self._enabled.layers[0].attached:
            self._enabled.removal.remove()
            for layer in self._enabled.layers:
                layer.detach()

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
    return tuple(layers)


def _check_knobs(model, threshold, min_density, backend) -> None:
    """Raises for a bad knob, and for a backend that cannot run where the model is: an empty call checks them all."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    empty = torch.empty(0, 1, 1, 1, dtype=model.dtype, device=device)
    image_mask = torch.empty(0, 1, dtype=torch.bool, device=device)
    eah_attention(empty, empty, empty, image_mask, threshold=threshold, min_density=min_density, backend=backend)
