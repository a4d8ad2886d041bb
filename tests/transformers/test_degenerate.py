"""What the report says of a choice that the prompt's length makes: ties, saturation, the level of uniform attention."""

from __future__ import annotations

import copy

import pytest
import torch

import eah

from ..support.family_models import FAMILIES
from ..support.family_models import attention_of as attention_in
from ..support.family_models import prompt as family_prompt
from ..support.tiny_models import IMAGE, build, prompt
from .test_attention_forms import flash_stand_in, with_text_attention
from .test_families import built

pytest.importorskip("transformers")

MIXED = ["abIcdefghi", "abcIde", "abcdef", "kIxI"]


def uniform(model, attention, inputs, layer):
    """u_j (B, S), nan where there is none: from the maps of a copy whose query is zero in the layer."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    query = attention(model, layer).q_proj
    torch.nn.init.zeros_(query.weight)
    if query.bias is not None:
        torch.nn.init.zeros_(query.bias)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[layer][:, 0].double()
    real = inputs["attention_mask"].bool()
    pairs = (maps > 0) & real[:, :, None] & ~torch.eye(maps.shape[1], dtype=torch.bool)
    means = (maps * pairs).sum(1) / pairs.sum(1)
    return means.masked_fill(inputs["input_ids"] != IMAGE, torch.nan)


def agree(rows, means, threshold):
    for row, u in zip(rows, means, strict=True):
        u = u[~u.isnan()]
        level, share = (u.mean().item(), (u > threshold).double().mean().item()) if len(u) else (0.0, 0.0)
        assert row.uniform_level == pytest.approx(level, rel=1e-5) and row.uniform_share == pytest.approx(share)
        most = max(row.sinks)
        assert row.tied == (row.head is not None and sorted(row.sinks)[-2] == most)
        assert row.saturated == (row.head is not None and most == row.image_tokens)


FORMS = {
    "sdpa": ("llava", "sdpa", {}),
    "eager": ("llava", "eager", {}),
    "window": ("llava", "sdpa", {"decoder": "MistralConfig", "sliding_window": 6}),
    "window, eager": ("llava", "eager", {"decoder": "MistralConfig", "sliding_window": 6}),
    "qwen2_5_vl": ("qwen2_5_vl", "sdpa", {}),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_uniform_attention_equals_a_zero_query(form, padding):
    family, attn, text = FORMS[form]
    model, inputs = build(family, attn, **text), prompt(family, MIXED, padding)
    means = uniform(model, lambda model, layer: model.get_decoder().layers[layer].self_attn, inputs, 1)
    threshold = means.nanmedian().item() * 1.0001
    with eah.enable(model, threshold=threshold, history=2) as handle, torch.no_grad():
        model(**inputs)
        agree(handle.report().layers[0].rows, means, threshold)
        model(**prompt(family, ["ab"]))
    agree(handle.history[0].layers[0].rows, means, threshold)
    (alone,) = handle.report().layers[0].rows
    assert (alone.tied, alone.saturated, alone.uniform_level, alone.uniform_share) == (False, False, 0.0, 0.0)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_image_tokens_that_see_each_other(family):
    model, inputs = built(family), family_prompt(family, ["abIcdefghi", "abcIde"])
    layer = FAMILIES[family].layer
    means = uniform(model, attention_in, inputs, layer)
    threshold = means.nanmedian().item() * 1.0001
    with eah.enable(model, layers=(layer,), threshold=threshold) as handle, torch.no_grad():
        model(**inputs)
    agree(handle.report().layers[0].rows, means, threshold)
    assert handle.report().layers[0].rows[0].uniform_share > 0


def test_flash_attention_and_compiled(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_stand_in)
    model, inputs = build("llava", decoder="MistralConfig", sliding_window=6), prompt("llava", MIXED)
    del inputs["pixel_values"]
    means = uniform(model, lambda model, layer: model.get_decoder().layers[layer].self_attn, inputs, 1)
    for compiled in (False, True):
        run = torch.compile(model, backend="eager") if compiled else with_text_attention(model, "flash_attention_2")
        with eah.enable(model, threshold=0.06) as handle, torch.no_grad():
            run(**inputs)
        agree(handle.report().layers[0].rows, means, 0.06)
        with_text_attention(model, "sdpa")


def test_the_report_tells():
    """A flat head in a short prompt: every image token is a sink, all heads tie, and uniform attention would do so."""
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    torch.nn.init.zeros_(model.get_decoder().layers[1].self_attn.q_proj.weight)
    with eah.enable(model) as handle, torch.no_grad():
        model(**inputs)
    (row,) = handle.report().layers[0].rows
    assert (row.head, row.tied, row.saturated, row.uniform_share) == (0, True, True, 1.0)
    told = "another head has as many sinks; all image tokens are its sinks; uniform attention, "
    assert told in str(handle.report()) and "would make sinks of 100 % of the image tokens" in str(handle.report())
    with eah.enable(model, threshold=0.9) as handle, torch.no_grad():
        model(**inputs)
    assert len(str(handle.report()).splitlines()) == 5  # nothing to tell but that no head has a sink
