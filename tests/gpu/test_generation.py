"""Generation with what only a GPU has: offloaded caches, CUDA graphs of decoding steps, flash attention itself."""

from __future__ import annotations

import pytest
import torch

import eah

from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, build, prompt
from ..transformers.test_decode import STEPS, tuned

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PADDED = ["abIcdefghi", "abcIde"]
MIXED = [*PADDED, "abcdef", "kIxIl"]
WINDOW = {"decoder": "MistralConfig", "sliding_window": 6}
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def on_device(rows, **text):
    """A model, its inputs, and its oracle with a threshold."""
    model = build("llava", **text).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt("llava", rows).items()}
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    return model, inputs, oracle


def heads(handle):
    return [-1 if row.head is None else row.head for row in handle.report().layers[0].rows]


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "offloaded_static"])
def test_caches(cache):
    """Decoding with a static cache is compiled, and replayed as CUDA graphs."""
    model, inputs, oracle = on_device(MIXED)
    torch.compiler.reset()
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = model.generate(**inputs, **options, cache_implementation=cache)
    assert torch.equal(got, oracle.model.generate(**inputs, **options)) and not torch.equal(got, plain)
    assert heads(handle) == oracle.head[1].tolist()
    assert handle.report().layers[0].afterwards is None


@pytest.mark.parametrize("mode", ["hold", "track"])
@pytest.mark.parametrize("cache", [None, "static", "offloaded", "offloaded_static"])
def test_later_steps(cache, mode):
    """Twice: a static cache is kept, and its CUDA graphs are replayed on another choice."""
    model, inputs, _ = on_device(MIXED)
    oracle, _ = tuned(model, inputs, mode, STEPS.to(DEVICE).split(1, 1))
    torch.compiler.reset()
    options = {"max_new_tokens": 6, "do_sample": False}
    want = oracle.model.generate(**inputs, **options, past_key_values=transformers.DynamicCache())
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), want)
    assert handle.report().layers[0].afterwards is None


@pytest.mark.parametrize("text", [{"seed": 2}, {"seed": 3, **WINDOW}], ids=["full", "window"])
@pytest.mark.parametrize("name", FLASH_PACKAGES)
def test_flash_attention(name, text):
    """In float16, with gentle heads and column means far from the threshold: rounding must not move a count."""
    pytest.importorskip(FLASH_PACKAGES[name])
    model, inputs, oracle = on_device(PADDED, layers=(), **text)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain, want = model(**inputs).logits, oracle(**inputs)
        model.half().set_attn_implementation({"text_config": name})
        inputs["pixel_values"] = inputs["pixel_values"].half()
        rounding = (model(**inputs).logits - plain)[real].abs().max()
        with eah.enable(model, threshold=oracle.threshold) as handle:
            got = model(**inputs).logits
    assert heads(handle) == oracle.head[1].tolist()
    assert (got - want)[real].abs().max() <= 2 * rounding < (want - plain)[real].abs().max()
