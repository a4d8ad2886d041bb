"""What later forwards find on a cache: tokens that were not seen, several tokens at once, drafted tokens taken back."""

from __future__ import annotations

import copy

import pytest
import torch

import eah
from eah.reasons import Reason
from eah.report import HELD
from eah.transformers.cache import CROPPED

from ..support.tiny_models import IMAGE, build, prompt
from .test_decode import MIXED, STEPS, cache_of, feed, skip_unless_tracked, step

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_cached_while_disabled(kind):
    """Missing from the sums: tracking ends there. A head that is held does not depend on them."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    for mode in ("hold", "track"):
        skip_unless_tracked(mode, kind == "static")
        cache = cache_of(kind, model)
        with eah.enable(model, threshold=0.02, decode=mode) as handle:
            feed(model, inputs, STEPS[:, :2].split(1, 1), cache)
        step(model, inputs, cache)
        plain = copy.deepcopy(cache)
        want = step(model, inputs, plain)
        with eah.enable(model, threshold=0.02, decode=mode) as handle:
            feed(model, inputs, (), cache_of("dynamic", model))
            got = step(model, inputs, cache)
            assert torch.allclose(got, want, atol=1e-5) == (mode == "track")
            assert handle.report().layers[0].afterwards == (Reason.MISSED.value if mode == "track" else None)
            feed(model, inputs, STEPS[:, :1].split(1, 1), cache_of(kind, model))
            assert handle.report().layers[0].afterwards is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_text_only_prefix_holds_nothing(kind):
    model, text, inputs = build("llava"), prompt("llava", ["abcdef"]), prompt("llava", MIXED[:1])
    with eah.enable(model, threshold=0.02, decode="hold") as handle:
        cache = cache_of(kind, model)
        feed(model, text, STEPS[:, :4].split([1, 3], 1), cache)
        layer = handle.report().layers[0]
        assert (layer.continued, layer.afterwards) == (None, Reason.NOTHING_HELD.value)
        other = cache_of(kind, model)
        feed(model, inputs, STEPS[:, :3].split([3], 1), other)
        assert (handle.report().layers[0].continued, handle.report().layers[0].afterwards) == (HELD, None)
        feed(model, text, (), cache_of(kind, model))
        assert handle.report().layers[0].continued is None  # of the last prefill, a text alone


def test_what_is_kept_of_many_tokens():
    """A few copies of the sums, however many tokens come at once, and nothing of the maps' size in between."""
    model, inputs = build("llava", max_position_embeddings=2048), prompt("llava", ["abI" + "c" * 500])
    del inputs["pixel_values"]
    with eah.enable(model, threshold=0.002, decode="track"):
        cache = cache_of("dynamic", model)
        feed(model, inputs, [torch.arange(600)[None] % 60 + 1], cache)
    layer = cache.layers[1]
    kept = [*layer.carried, layer.last.query, layer.last.attention_mask]
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
    assert layer.carried.sums.shape[2] == layer.tokens == len(inputs["input_ids"][0]) + 600
    assert size < 6 * layer.carried.sums.nbytes


def feed_on(model, inputs, chunks, cache):
    mask = inputs["attention_mask"]
    for chunk in chunks:
        ids = chunk.expand(len(mask), -1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)


def same(got, want):
    """What two caches carry, as far as the columns of the shorter."""
    columns = min(got.sums.shape[2], want.sums.shape[2])
    assert torch.equal(got.head, want.head) and torch.equal(got.receives, want.receives)
    for a, b in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(a[..., :columns], b[..., :columns], rtol=1e-4, atol=1e-5)
        assert not a[..., columns:].any() and not b[..., columns:].any()


@pytest.mark.parametrize("name, kind", [("llava", "dynamic"), ("llava", "static"), ("qwen2_5_vl", "dynamic")])
def test_drafted_tokens_taken_back(name, kind):
    """From a forward on the cache and from the prompt's own: the sums are then as if they had never been there."""
    if kind == "static" and not hasattr(transformers.cache_utils.StaticLayer, "crop"):
        pytest.skip(f"transformers {transformers.__version__}: static caches are not cropped")
    model, inputs = build(name), prompt(name, ["abIcdefghi", "abcIde"])
    whole = dict(inputs)
    drafted = torch.tensor([[9, 9, IMAGE, 4]]).expand(2, -1)
    for some in (whole, inputs):
        some.pop("pixel_values"), some.pop("image_grid_thw", None)
    with eah.enable(model, threshold=0.02, decode="track", broadcast_to=2) as handle, torch.no_grad():
        want = cache_of("dynamic", model)
        feed(model, inputs, STEPS[:, :3].split([1, 2], 1), want)
        cache = cache_of(kind, model)
        feed(model, inputs, (), cache)
        first = copy.deepcopy(cache.layers[1].carried)
        whole["input_ids"] = torch.cat([inputs["input_ids"], drafted], 1)
        whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        if name == "qwen2_5_vl":
            whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 4))
        cache = cache_of(kind, model)
        feed(model, whole, (), cache)
        cache.crop(-1)
        cache.crop(-3)
        same(cache.layers[1].carried, first)
        chunks = [STEPS[:, :1], torch.cat([STEPS[:, 1:3], drafted[:1]], 1)]  # two stay
        feed_on(model, inputs, chunks, cache)
        cache.crop(-4)
        same(cache.layers[1].carried, want.layers[1].carried)
        assert cache.layers[1].last.query.shape[2] == 2
        cache.crop(-3)
        assert cache.layers[1].why_none == CROPPED
    assert handle.report().layers[0].afterwards is None
