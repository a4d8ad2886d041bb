"""What a request asks of EAH, read alike by the scheduler, which plans for it, and the worker, which does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eah.reasons import Reason
from eah.vllm.settings import ASKED, Settings

STREAMED = "streamed"  # what the scheduler puts in the place of "eah": the worker cannot see it otherwise


def asked(params: Any, settings: Settings) -> tuple[str, bool]:
    """ "on", "off" or STREAMED, and whether a request says it in a way that is accepted."""
    said = (getattr(params, "extra_args", None) or {}).get("eah", settings.default)
    known = said in (*ASKED, STREAMED) if isinstance(said, str) else False
    return (said, True) if known else (settings.default, False)


def has_image(features: Sequence[Any], settings: Settings) -> bool:
    return any(feature.modality in _modalities(settings) for feature in features)


def image_spans(features: Sequence[Any], settings: Settings) -> list[tuple[int, int]]:
    """(first, last) of each run of image tokens in the prompt, both within it."""
    counted = [feature for feature in features if feature.modality in _modalities(settings)]
    return [span for feature in counted for span in feature.mm_position.extract_embeds_range()]


def _modalities(settings: Settings) -> tuple[str, ...]:
    return ("image", "video") if settings.video else ("image",)


def why_aside(state: Any, settings: Settings) -> Reason | None:
    """Why a request that asks for EAH is not enhanced whatever the step holds, or None."""
    if asked(state.sampling_params, settings)[0] == STREAMED:
        return Reason.STREAMED
    if getattr(state, "prompt_embeds", None) is not None:
        return Reason.PROMPT_EMBEDS
    return None if has_image(state.mm_features, settings) else Reason.NO_IMAGE_TOKEN
