"""What is asked of EAH in vLLM: the knobs, checked as `eah.enable` checks them, and the flags that carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from eah.method import DEFAULT_LAYERS, Knobs, checked_layers
from eah_kernels import BACKENDS

TESTED = "0.32"  # the vLLM whose engines the tests start
WORKER, SCHEDULER = "eah.vllm.Worker", "eah.vllm.Scheduler"
ASKED = ("on", "off")


class Settings(NamedTuple):
    """The knobs of an engine. `default` is what a request asks that does not say."""

    layers: tuple[int, ...] = DEFAULT_LAYERS
    knobs: Knobs = Knobs()
    video: bool = True
    default: str = "on"
    decode: str = "off"


KNOBS = ("layers", *Knobs._fields, "decode", "video", "default")
MODES = ("off", "hold")


def checked_settings(asked: Mapping[str, Any]) -> Settings:
    """The settings that these knobs mean.

    What depends on the model is not known yet: whether the layers are there, how many heads `broadcast_to` may name,
    and whether `backend` runs on the device. `eah.vllm.Worker` checks it once the model is loaded.

    Raises:
        TypeError, ValueError: an unknown knob or a value that does not fit; the message names it.
    """
    if not isinstance(asked, Mapping):
        raise TypeError(f"the knobs must be a dict such as {{}} or {{'threshold': 0.002}}, got {asked!r}")
    for name in asked:
        if name not in KNOBS:
            raise ValueError(f"{name} is no knob; there are {', '.join(KNOBS)}; got {name}={asked[name]!r}")
    knobs = Knobs(**{name: value for name, value in asked.items() if name in Knobs._fields})
    heads = knobs.broadcast_to if type(knobs.broadcast_to) is int and knobs.broadcast_to > 0 else 1
    anywhere = knobs._replace(backend="reference") if knobs.backend in BACKENDS else knobs
    anywhere.check(heads, (32, 32), torch.float32, torch.device("cpu"))
    video, default = asked.get("video", True), asked.get("default", "on")
    if not isinstance(video, bool):
        raise TypeError(f"video must be a bool, got {video!r}")
    if default not in ASKED:
        raise ValueError(f'default must be "on" or "off", got {default!r}')
    decode = asked.get("decode", "off")
    if decode not in MODES:
        raise ValueError(f'decode must be "off" or "hold" in vLLM, got {decode!r}')
    if decode == "hold" and knobs.broadcast_to != "all":
        raise ValueError(
            f'broadcast_to must be "all" with decode="hold", got {knobs.broadcast_to!r}: heads that share keys in the '
            "cache cannot hold different ones"
        )
    return Settings(checked_layers(asked.get("layers", DEFAULT_LAYERS)), knobs, video, default, decode)


def engine_settings(additional_config: Any) -> Settings:
    """The settings in an engine's `additional_config`.

    Raises:
        ValueError: there are none, or they do not fit; the message begins with "eah:".
    """
    asked = additional_config.get("eah") if isinstance(additional_config, Mapping) else None
    if asked is None:
        raise ValueError(
            f'eah: additional_config must have a key "eah" with the knobs, got {additional_config!r}; accepted is '
            "--additional-config '{\"eah\":{}}' for the defaults (eah vllm-args prints it)"
        )
    try:
        return checked_settings(asked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"eah: in additional_config: {error}") from error


def engine_args(
    *,
    layers: Sequence[int] | None = None,
    threshold: float | None = None,
    min_density: float | None = None,
    backend: str | None = None,
    broadcast_to: int | Literal["all"] | None = None,
    decode: str | None = None,
    video: bool | None = None,
    default: str | None = None,
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` (and of `EngineArgs`) that put EAH into the engine: `LLM(model, **engine_args())`.

    Args:
        layers, threshold, min_density, backend, broadcast_to, video: as of `eah.enable`; None: its default.
        decode: "off" (the default) or "hold", as of `eah.enable`.
        default: "on" (the default) or "off", for a request that does not say. A request says it with
            `SamplingParams(extra_args={"eah": "off"})`, over HTTP with `"vllm_xargs": {"eah": "off"}`.

    Returns:
        worker_cls, scheduler_cls and additional_config; an `additional_config` of your own takes the "eah" of this one.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    asked = {
        "layers": None if layers is None else list(checked_layers(layers)),
        "threshold": threshold,
        "min_density": min_density,
        "backend": backend,
        "broadcast_to": broadcast_to,
        "decode": decode,
        "video": video,
        "default": default,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    checked_settings(asked)
    return {"worker_cls": WORKER, "scheduler_cls": SCHEDULER, "additional_config": {"eah": asked}}


def flags(arguments: dict[str, Any]) -> list[str]:
    """The same for `vllm serve`, word by word: no word has a space in it."""
    config = json.dumps(arguments["additional_config"], separators=(",", ":"))
    names = {"worker_cls": "--worker-cls", "scheduler_cls": "--scheduler-cls"}
    words = [word for name, flag in names.items() for word in (flag, arguments[name])]
    return [*words, "--additional-config", config]
