"""What a look says is what the model computes, and looking changes nothing."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import eah
from eah.inspect.compare import compare
from eah.inspect.look import look_at
from eah.inspect.maps import CELLS, averaged_map
from eah.inspect.numbers import numbers
from eah.method import Call
from eah.transformers.observe import observed
from eah_kernels import Scoring, sink_statistics

from ..support.family_models import build as build_family
from ..support.family_models import prompt as prompt_of
from ..support.tiny_models import FAMILIES, build, prompt

pytestmark = pytest.mark.seam
LAYERS = (0, 1, 2)
THRESHOLDS = (0.0, 0.002, 0.02, 0.05, 0.08, 0.3)


def seen_by(model, inputs, threshold=0.05, pictured=None):
    return look_at(model, inputs, None, "", threshold, pictured)


def state(model):
    """Whatever a look could leave behind."""
    modules = {
        name: (sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()
    }
    return modules, [id(m.config) for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_head_are_those_of_the_report_at_every_threshold_and_nothing_changes(family, attention):
    model, inputs = build(family, attention), prompt(family, ["abcIdefgh"])
    plain = model(**inputs).logits
    before = state(model)
    seen = seen_by(model, inputs)
    assert state(model) == before and torch.equal(seen.next_token, plain[0, -1])
    assert [layer.layer for layer in seen.layers] == list(LAYERS) and seen.without_map == {}
    heads = set()
    for layer in seen.layers:  # one at a time: a layer that acts changes what later ones are given
        for threshold in THRESHOLDS:
            with eah.enable(model, layers=(layer.layer,), threshold=threshold) as handle:
                model(**inputs)
                [row] = handle.report().layers[0].rows
            assert tuple(layer.counts(threshold).tolist()) == row.sinks and layer.head(threshold) == row.head
            assert len(seen.positions) == row.image_tokens
            level = numbers(seen)["layers"][layer.layer]["uniform_level"]
            assert level == pytest.approx(row.uniform_level, rel=1e-6)
            heads.add(row.head)
    assert None in heads and len(heads) > 2


@pytest.mark.parametrize("family", ["gemma3", "blip-2", "kosmos-2"])
@torch.no_grad()
def test_families_whose_masks_or_hooks_differ(family):
    model, inputs = build_family(family, "eager"), prompt_of(family, ["abIcdef"])
    plain = model(**inputs).logits
    seen = seen_by(model, inputs, threshold=0.03)
    assert torch.equal(seen.next_token, plain[0, -1])
    for layer in seen.layers:
        with eah.enable(model, layers=(layer.layer,), threshold=0.03) as handle:
            model(**inputs)
            [row] = handle.report().layers[0].rows
        assert tuple(layer.counts(0.03).tolist()) == row.sinks and layer.head(0.03) == row.head


@pytest.mark.parametrize("family", FAMILIES)
def test_column_means_and_maps_are_those_of_the_eager_maps(family):
    model, inputs = build(family, "eager"), prompt(family, ["abcIdefgh"])
    seen = seen_by(model, inputs)
    maps = model(**inputs, output_attentions=True).attentions
    for layer in seen.layers:
        every = maps[layer.layer][0]
        rows = torch.arange(seen.tokens - 1, -1, -1).clamp(min=1)
        mean = every.tril(-1).sum(-2) / rows
        torch.testing.assert_close(layer.column_mean, mean[:, list(seen.positions)], atol=1e-5, rtol=0)
        first, _, sparsest = layer.shown(0.05)
        assert sorted(layer.maps) == sorted({first, sparsest})
        for head, kept in layer.maps.items():
            torch.testing.assert_close(kept, every[head], atol=1e-5, rtol=0)


def test_observed_logits_are_the_plain_ones_in_every_row_and_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = build("llava").to(dtype), prompt("llava", ["abcIdefgh", "zI", "abc"])
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.no_grad():
            plain, met = model(**inputs).logits, []
            with observed(model, met.append) as without:
                assert torch.equal(model(**inputs).logits, plain)
        assert [seen.layer for seen in met] == list(LAYERS) and not without
        assert all(seen.head is None and seen.call.query.shape[0] == 3 for seen in met)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
@torch.no_grad()
def test_eah_acts_while_it_is_looked_at(layers):
    model, inputs = build("llava"), prompt("llava", ["abcIdefgh"])
    with eah.enable(model, layers=layers, threshold=0.05) as handle:
        enhanced = model(**inputs).logits
        before = state(model)
        seen = seen_by(model, inputs)
        assert torch.equal(seen.next_token, enhanced[0, -1]) and state(model) == before
        reported = {layer.layer: layer.rows[0].head for layer in handle.report().layers}
        assert {layer.layer: layer.lent for layer in seen.layers if layer.layer in layers} == reported
        assert all(layer.lent is None for layer in seen.layers if layer.layer not in layers)
        assert torch.equal(model(**inputs).logits, enhanced)
    assert not torch.equal(model(**inputs).logits, enhanced)


@pytest.mark.parametrize("enabled", [False, True])
def test_an_error_half_way_leaves_the_model_as_it_was(enabled):
    model, inputs = build("llava"), prompt("llava", ["abcIdefgh"])
    handle = eah.enable(model) if enabled else None
    own = model(**inputs).logits
    before = state(model)

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.get_decoder().layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        seen_by(model, inputs)
    hook.remove()
    with pytest.raises(RuntimeError, match="half way"), observed(model, fail):
        model(**inputs)
    assert state(model) == before and torch.equal(model(**inputs).logits, own)
    if handle:
        handle.disable()
    assert not any(hasattr(module, "eah_layer") for module in model.modules())


def test_one_look_at_a_time_and_other_threads_are_not_seen():
    model, inputs, met = build("llava"), prompt("llava", ["abcIdefgh"]), []
    with observed(model, met.append):
        with pytest.raises(ValueError, match="looked at already"), observed(model, met.append):
            pass
        other = threading.Thread(target=lambda: model(**inputs))
        other.start()
        other.join()
        assert not met
        model(**inputs)
    assert len(met) == 3


def test_a_shared_layer_of_an_enabled_model_is_refused():
    model = build("llava")
    twin = copy.copy(model)
    twin._modules = {"model": copy.copy(model.model), "lm_head": model.lm_head}
    twin.model._forward_pre_hooks = {}
    with eah.enable(model), pytest.raises(ValueError, match="shares layer 1"), observed(twin, print):
        pass


def test_a_compiled_model_and_one_without_a_head():
    model, inputs = build("llava"), prompt("llava", ["abcIdefgh"])
    plain = seen_by(model, inputs)
    bare = seen_by(model.base_model, inputs)
    model.compile(backend="eager")
    for seen in (bare, seen_by(model, inputs)):
        for one, other in zip(plain.layers, seen.layers, strict=True):
            assert torch.equal(one.column_mean, other.column_mean)
    assert bare.next_token is None
    with pytest.raises(ValueError, match="language model head"):
        compare(model.base_model, None, bare)


def test_layers_without_a_map_are_named_with_the_reason():
    model = build_family("qwen3_5")
    seen = seen_by(model, prompt_of("qwen3_5", ["abIcd"]))
    kinds = model.config.get_text_config().layer_types
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    assert [layer.layer for layer in seen.layers] == full and 0 not in full
    assert set(seen.without_map) == set(range(len(kinds))) - set(full) and all(seen.without_map.values())


def test_a_forward_in_which_no_layer_has_a_map_is_refused_with_the_reason():
    model, inputs = build("llava"), prompt("llava", ["abIcd"])
    model.train()
    model.config.text_config.attention_dropout = 0.5
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="dropout is active"):
        seen_by(model, inputs)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_what_is_kept_is_a_float_for_each_layer_head_and_token_and_two_small_maps_of_each_pictured_layer():
    model, inputs = build("llava"), prompt("llava", ["abcIdefgh" + 600 * "z"])
    seen = seen_by(model, inputs, pictured=(1,))
    for layer in seen.layers:
        heads, tokens = layer.column_mean.shape
        assert (heads, tokens) == (4, 9) and layer.column_mean.untyped_storage().nbytes() == 4 * heads * tokens
        assert layer.uniform.untyped_storage().nbytes() == 4 * tokens
        assert len(layer.maps) == (2 if layer.layer == 1 else 0)
        assert all(kept.shape == (CELLS, CELLS) for kept in layer.maps.values())


def test_nothing_is_made_of_sequence_times_sequence_elements():
    length, heads = 3000, 2
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, 16, generator=generator) for _ in range(2))
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, 5:2000] = True
    call = Call(query, key, key, Scoring(scale=0.25))
    with Largest() as largest:
        sink_statistics(query, key, image, scale=0.25)
        small = averaged_map(call, 1)
    assert largest.elements < length * length / 4
    exact = (query[0, 1] @ key[0, 1].T * 0.25).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    rows = torch.arange(length) * CELLS // length
    blocks = torch.zeros(CELLS, CELLS).index_put((rows[:, None], rows), exact.softmax(-1), accumulate=True)
    size = rows.bincount()
    torch.testing.assert_close(small, blocks / (size[:, None] * size), atol=1e-6, rtol=1e-4)


def test_what_is_shown_without_any_sink_and_of_few_heads():
    seen = seen_by(build("llava"), prompt("llava", ["abcIdefgh"]), threshold=1.0)
    for layer in seen.layers:
        assert layer.head(1.0) is None
        assert layer.shown(1.0)[0] == layer.column_mean.amax(-1).argmax()
        for heads in (1, 2):
            one = dataclasses.replace(layer, column_mean=layer.column_mean[:heads])
            assert [head is not None for head in one.shown(0.02)] == [True, heads > 1, False]


def test_a_prompt_without_image_token_is_refused():
    with pytest.raises(ValueError, match="no image token"):
        seen_by(build("llava"), prompt("llava", ["abc"]))
