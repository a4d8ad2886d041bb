"""`eah.enable`: swaps the attention of some layers of a model, once everything that could be wrong is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from eah.method import DEFAULT_LAYERS, DefaultLayers, Knobs, checked_layers
from eah.transformers.enabled import EnabledModel, enabled_on
from eah.transformers.families import Differs, Works
from eah.transformers.find import attention_modules, family_of, head_dims, image_token_ids, named, query_heads
from eah.transformers.handle import Handle
from eah.transformers.layer import History, Settings, SwappedLayer, Warned, register
from eah.transformers.modes import MODES, NOTES
from eah_kernels import untested_triton

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:
    PreTrainedModel = torch.nn.Module  # to who reads the hints at run time: transformers is loaded by the first call

NEWEST_TESTED = (5, 24)  # of transformers; tests marked `seam` run on it and on the oldest that pyproject.toml allows


def enable(
    model: PreTrainedModel,
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
    check_pretrained(model)
    if enabled_on(model) is not None:
        raise ValueError("model is enabled already: disable() its handle first; eah.Handle.of(model) finds it")
    shared = next((name for name, module in model.named_modules() if hasattr(module, "eah_layer")), None)
    if shared is not None:
        raise ValueError(f"model shares {shared} with another model that is enabled: disable() that one's handle first")
    layers = checked_layers(layers)
    if decode not in MODES:
        raise ValueError(f"decode must be one of {', '.join(MODES)}, got {decode!r}")
    if type(history) is not int or history < 0:
        raise ValueError(f"history must be an int >= 0, got {history!r}")
    family = family_of(model)
    differs = Differs() if family is None else family.differs
    token_ids = image_token_ids(model, differs, video)
    modules = attention_modules(model, layers, may_move=isinstance(layers, DefaultLayers))
    knobs = Knobs(threshold, min_density, backend, broadcast_to)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for module in modules:
        knobs.check(query_heads(module), head_dims(module), model.dtype, device)
    settings = Settings(knobs, decode, tested=family is not None)

    register()
    kept, warned = History(history) if history else None, Warned()
    swapped = tuple(SwappedLayer(module, settings, kept, warned) for module in modules)
    on_triton = device.type == "cuda" and backend in ("auto", "triton")
    notes = _notes(model, family, layers, tuple(layer.index for layer in swapped), decode, on_triton)
    hook = EnabledModel(model, differs, token_ids, swapped, notes)
    hook.attach()
    return Handle(hook)


def check_pretrained(model: object) -> None:
    """
    Raises:
        TypeError: model is no `transformers.PreTrainedModel`.
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


def untested_transformers() -> str | None:
    """What is to be said of the transformers that is installed, None if it is no newer than what was tested."""
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"untested with transformers {transformers.__version__}: the newest version tested is {newest}"


def _notes(model, family: Works | None, asked: tuple, used: tuple, decode: str, on_triton: bool) -> tuple[str, ...]:
    notes = list(NOTES[decode])
    if family is None:
        notes.append(f"{named(model)} is of no family that was tested (eah models): the general rule was applied")
    if used != asked:
        notes.append(f"layer {asked[0]} has no attention map: layer {used[0]}, the first usable one, was taken")
    versions = untested_transformers(), untested_triton() if on_triton else None
    return *notes, *filter(None, versions)
