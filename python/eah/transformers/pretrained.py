"""A model and its processor, from a folder or the hub, the device that they run on and the inputs: for the commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eah.transformers.enable import enable

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def device_of(name: str | None, called: str = "device") -> torch.device:
    """The device of that name; None: CUDA where there is one, else the CPU. called: what the user gave it as.

    Raises:
        ValueError: it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises, by kind of device
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{called} {name!r} cannot be used: {reason}") from error
    return torch.device(name)


def no_bars_in_files() -> None:
    """transformers and the hub show their progress on a terminal only."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def check_model(source: str, every: Sequence[Mapping[str, Any]], trust_remote_code: bool) -> None:
    """What can be told from the config, without the weights.

    Raises:
        OSError, ValueError: there is no such model, or none that `enable` takes with each of these knobs.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

    here = Path(source).exists()
    if here and not Path(source).is_dir():
        raise ValueError(f"model must be a folder or an id on the hub; {source} is a file")
    if not here and not HUB_ID.fullmatch(source):
        raise ValueError(f"there is no folder {source}, and an id on the hub has the form owner/name")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        if here:
            raise
        raise OSError(f"there is no folder {source}, and it cannot be had from the hub: {error}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise ValueError(f"{source} is no vision-language model (model_type {config.model_type!r})")
    if every:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
        for knobs in every:
            enable(model, **knobs).disable()


def load_pretrained(source: str, dtype: str, device: torch.device, trust_remote_code: bool) -> tuple[Any, Any]:
    """The processor and the model, from safetensors only.

    Raises:
        OSError, ValueError, ImportError: as transformers raises them, or what is no vision-language model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    no_bars_in_files()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # by which of its files is broken, and how
        raise ValueError(f"the processor of {source} cannot be read: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{source} has no processor of pictures and text: it is no vision-language model")
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {source} cannot be read: {error}") from error
    return processor, model.to(device).eval()
