"""What a request asks of EAH, read alike by the scheduler, which plans for it, and the worker, which does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eah.reasons import Reason
from eah.vllm.settings import ASKED, Settings

STREAMED = "eah:streamed"  # what the scheduler puts in the place of "eah": the worker cannot see it otherwise


def options(state: Any) -> Mapping[str, Any]:
    """The free options of a request, of its `SamplingParams(extra_args=...)` or `PoolingParams(extra_kwargs=...)`."""
    if state.sampling_params is None:
        return getattr(state.pooling_params, "extra_kwargs", None) or {}
    return state.sampling_params.extra_args or {}


def asked(state: Any, settings: Settings) -> tuple[str, bool]:
    """ "on", "off" or STREAMED, and whether a request says it in a way that is accepted."""
    said = options(state).get("eah", settings.default)
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
    if asked(state, settings)[0] == STREAMED:
        return Reason.STREAMED
    if getattr(state, "prompt_embeds", None) is not None:
        return Reason.PROMPT_EMBEDS
    if not has_image(state.mm_features, settings):
        return Reason.NO_IMAGE_TOKEN
    return Reason.BEAM_SEARCH if _by_beam_search(state) else None


def enhances(state: Any, settings: Settings) -> bool:
    """Whether a request is to be enhanced."""
    return asked(state, settings)[0] != "off" and why_aside(state, settings) is None


def _by_beam_search(state: Any) -> bool:
    """Whether a request looks like a step of vLLM's beam search, which drops "eah". One that says it is none."""
    params = state.sampling_params
    if params is None or "eah" in options(state):
        return False
    return params.max_tokens == 1 and not params.detokenize and bool(params.logprobs or params.logprob_token_ids)
