"""Base implementations other than sdpa and eager: the masks they are given, read by EAH as they mean it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import eah
from eah.transformers.forward import FLASH
from eah.transformers.layer import attention_forward
from eah_kernels.masks import Scoring

from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, attention_of, build, prompt
from .test_decode import STEPS, cache_of, feed
from .test_decode import tuned as decode_tuned

transformers = pytest.importorskip("transformers")

ROWS = {"padded": ["abIcdefghi", "abcIde"], "not padded": ["abIcdefghi"]}


def close(got, want, real):
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-4, atol=2e-4)


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes, dense: a (B, Skv) padding mask, causality by flag, a window by argument."""
    assert attention_mask is None or attention_mask.dim() == 2
    keys = key.shape[2] if attention_mask is None else attention_mask.shape[1]
    key, value = key[:, :, :keys], value[:, :, :keys]
    scoring = Scoring(None if attention_mask is None else attention_mask.bool(), True, 1.0, sliding_window)
    every = slice(None)
    mask = scoring.visible(query.shape[2], keys, query.device, every, every)
    output = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return output.nan_to_num().transpose(1, 2), None


HUB = "kernels-community/flash-attn2"


@pytest.fixture
def flash(monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    for name in (*FLASH, HUB):
        monkeypatch.setitem(functions._local_mapping, name, flash_stand_in)
    monkeypatch.setitem(masks._global_mapping, HUB, masks["flash_attention_2"])


def with_text_attention(model, name):
    """Set without the checks of the setter, which ask for the package."""
    model.get_decoder().config._attn_implementation_internal = name
    return model


def tuned(model, inputs):
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    return oracle


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("text", [{}, {"decoder": "MistralConfig", "sliding_window": 6}], ids=["full", "window"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", HUB])
def test_flash_masks(flash, name, text, rows):
    model, inputs = build("llava", **text), prompt("llava", ROWS[rows])
    oracle = tuned(model, inputs)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with_text_attention(model, name)
    with torch.no_grad(), eah.enable(model, threshold=oracle.threshold) as handle:
        close(model(**inputs).logits, oracle(**inputs), inputs["attention_mask"])
        assert [row.head for row in handle.report().layers[0].rows] == [int(head) for head in oracle.head[1]]
        close(model(**inputs, use_cache=False).logits, oracle(**inputs), inputs["attention_mask"])
        got = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, oracle.model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert not torch.equal(got, plain)


def test_flash_with_a_static_cache(flash):
    """Its mask is shorter than the keys of the cache."""
    model, inputs = build("llava"), prompt("llava", ROWS["padded"])
    oracle = tuned(model, inputs)
    with_text_attention(model, "flash_attention_2")
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
    with torch.no_grad(), eah.enable(model, threshold=oracle.threshold):
        close(model(**inputs, past_key_values=cache).logits, oracle(**inputs), inputs["attention_mask"])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("text", [{}, {"decoder": "MistralConfig", "sliding_window": 6}], ids=["full", "window"])
@pytest.mark.parametrize("mode", ["hold", "track"])
def test_later_steps_with_flash_masks(flash, mode, text, rows, kind):
    """One token, then several, then one."""
    model, inputs = build("llava", **text), prompt("llava", ROWS[rows])
    chunks = STEPS.split([1, 4, 3], 1)
    oracle, want = decode_tuned(model, inputs, mode, chunks, not text, window=text.get("sliding_window"))
    with_text_attention(model, "flash_attention_2")
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        got = feed(model, inputs, chunks, cache_of(kind, model))
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
    assert handle.report().layers[0].afterwards is None


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("text", [{}, {"decoder": "MistralConfig", "sliding_window": 6}], ids=["full", "window"])
def test_flex_masks(text, rows):
    """Layer 1 only: the others would compile flex attention."""
    model, inputs = build("llava", **text).requires_grad_(False), prompt("llava", ROWS[rows])
    oracle = tuned(model, inputs)
    seen = []

    def block_mask(module, query, key, value, attention_mask, **kwargs):
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        config = copy.copy(model.get_decoder().config)
        config._attn_implementation_internal = "flex_attention"
        make = create_sliding_window_causal_mask if text else create_causal_mask
        embeds = query.new_zeros(len(query), query.shape[2], 1)
        mask = make(config, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], past_key_values=None)
        seen.append(type(mask).__name__)
        return attention_forward(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("block_mask", block_mask)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        layer = attention_of(model, 1).eah_layer
        layer.config = copy.copy(layer.config)
        layer.config._attn_implementation_internal = "flex_attention"
        attention_of(model, 1).config._attn_implementation_internal = "block_mask"
        close(model(**inputs).logits, oracle(**inputs), inputs["attention_mask"])
    assert seen == ["BlockMask"] and handle.report().layers[0].rows


@pytest.mark.parametrize("mode", ["hold", "track"])
def test_later_steps_with_flex_masks(mode):
    """Layer 1 only, as above: a mask over the keys that a dynamic cache returns."""
    from torch.nn.attention.flex_attention import create_block_mask

    model, inputs = build("llava").requires_grad_(False), prompt("llava", ROWS["padded"])
    chunks = STEPS[:, :4].split([1, 2, 1], 1)
    oracle, want = decode_tuned(model, inputs, mode, chunks)

    def block_mask(module, query, key, value, attention_mask, **kwargs):
        q_len, kv_len = query.shape[2], key.shape[2]
        real = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, 64), value=True)

        def seen(b, h, row, at):
            return real[b, at] & (at <= row + kv_len - q_len)

        mask = create_block_mask(seen, len(query), None, q_len, kv_len, device="cpu")
        return attention_forward(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("block_mask", block_mask)
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        layer = attention_of(model, 1).eah_layer
        layer.config = copy.copy(layer.config)
        layer.config._attn_implementation_internal = "flex_attention"
        attention_of(model, 1).config._attn_implementation_internal = "block_mask"
        got = feed(model, inputs, chunks, cache_of("dynamic", model))
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
    assert handle.report().layers[0].rows and handle.report().layers[0].afterwards is None
