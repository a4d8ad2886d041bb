"""Packed sequences: each is enhanced as it is alone, and has a row of the report."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import eah
from eah.reasons import Reason

from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, build, prompt

transformers = pytest.importorskip("transformers")

SEQUENCES = ["abIcdefghi", "xyzw", "bIdefIgh", "cI"]  # the second has no image, and the last rows behind its image none


def packed(rows=SEQUENCES, family="llava"):
    """The inputs of one row, and those of each sequence alone."""
    alone = [prompt(family, [row]) for row in rows]
    for inputs in alone:
        inputs.pop("attention_mask")
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    inputs = {
        "input_ids": torch.cat([inputs["input_ids"] for inputs in alone], 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
    }
    for name in ("pixel_values", "image_grid_thw"):
        found = [one[name] for one in alone if name in one]
        inputs |= {name: torch.cat(found)} if found else {}
    return inputs, alone, lengths


def threshold_of(model, alone):
    """At which the heads of the first sequence are told apart."""
    oracle = Oracle(model, alone[0]["input_ids"] == IMAGE)
    oracle.tune(alone[0])
    return oracle.threshold


def each_alone(model, alone, threshold, **options):
    """Logits and report rows."""
    with torch.no_grad(), eah.enable(model, threshold=threshold, **options) as handle:
        logits, rows = [], []
        for inputs in alone:
            logits.append(model(**inputs).logits)
            rows += handle.report().layers[0].rows
    return torch.cat(logits, 1), rows


@pytest.mark.seam
@pytest.mark.parametrize("broadcast_to", ["all", 2])
@pytest.mark.parametrize("grad", [False, True], ids=["kernels", "gradients"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_each_sequence_is_enhanced_as_it_is_alone(attn, grad, broadcast_to):
    model, (inputs, alone, _) = build("llava", attn), packed()
    threshold = threshold_of(model, alone)
    want, rows = each_alone(model, alone, threshold, broadcast_to=broadcast_to)
    with torch.no_grad():
        plain = model(**inputs).logits
    with torch.set_grad_enabled(grad), eah.enable(model, threshold=threshold, broadcast_to=broadcast_to) as handle:
        got = model(**inputs).logits
    torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-4)
    assert (got.detach() - plain).abs().max() > 1e-2
    assert handle.report().layers[0].rows == tuple(rows)
    assert [row.image_tokens for row in rows] == [9, 0, 18, 9]
    assert rows[0].head is not None and rows[1].head is None
    assert len({row.head for row in rows}) > 2  # the sequences do not all have one head
    if grad:
        got.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava"])
def test_every_layer_of_other_decoders(family):
    """Qwen2.5-VL has the text's positions before the three of its rotary embedding."""
    model = build(family, layers=(0, 2), **({"decoder": "Qwen2Config"} if family == "llava" else {}))
    inputs, alone, lengths = packed(["abIcdefghi", "bIdefgh"], family)
    if family == "qwen2_5_vl":
        inputs["position_ids"] = inputs["position_ids"].expand(4, -1, -1)
        alone = [
            {**one, "position_ids": torch.arange(n).expand(4, 1, -1)} for one, n in zip(alone, lengths, strict=True)
        ]
    with torch.no_grad(), eah.enable(model, layers=(0, 2), threshold=0.02) as handle:
        want = torch.cat([model(**one).logits for one in alone], 1)
        got = model(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert [len(layer.rows) for layer in handle.report().layers] == [2, 2]


def flash_of_packed(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """What flash attention computes where position_ids begin anew, dense."""
    assert attention_mask is None
    sequence = (position_ids[0] == position_ids.min()).cumsum(0)
    seen = (sequence[:, None] == sequence).tril()
    return scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True).transpose(1, 2), None


@pytest.mark.parametrize("first", [0, 3])
def test_flash_attention_begins_a_sequence_at_the_lowest_position(first, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    monkeypatch.setitem(functions._local_mapping, "flash_attention_2", flash_of_packed)
    model, (inputs, alone, lengths) = build("llava"), packed()
    threshold = threshold_of(model, alone)
    want, rows = each_alone(model, alone, threshold)
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    inputs["position_ids"][0, : lengths[0]] += first  # the first sequence is then none of flash attention's
    with torch.no_grad(), eah.enable(model, threshold=threshold) as handle:
        got = model(**inputs).logits
    if first:
        assert handle.report().layers[0].stood_aside == Reason.PACKED.value
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert handle.report().layers[0].rows == tuple(rows)


def test_maps_are_those_of_the_lending_heads():
    """transformers gives maps of the eager implementation."""
    model, (inputs, alone, lengths) = build("llava", "eager"), packed()
    with torch.no_grad(), eah.enable(model, threshold=threshold_of(model, alone)) as handle:
        maps = model(**inputs, output_attentions=True).attentions[1][0]
        rows, first = handle.report().layers[0].rows, 0
        for one, row, length in zip(alone, rows, lengths, strict=True):
            block = maps[:, first : first + length, first : first + length]
            torch.testing.assert_close(block, model(**one, output_attentions=True).attentions[1][0])
            if row.head is not None:
                torch.testing.assert_close(block, block[:1].expand_as(block))
            first += length


@pytest.mark.parametrize("aside", ["two rows", "a window", "another mask", "one sequence's mask"])
def test_where_they_are_not_known_to_keep_apart(aside, monkeypatch):
    text = {"decoder": "MistralConfig", "sliding_window": 6} if aside == "a window" else {}
    model, (inputs, _, _) = build("llava", "eager", **text), packed(["abcdefghij", "abcdefg"])
    if aside == "two rows":
        inputs = {name: t.repeat(2, 1) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    if aside == "another mask":
        model.config.text_config.model_type = "of nobody"
    if aside == "one sequence's mask":  # a decoder that tells its masks nothing of positions
        module = __import__(type(model.get_decoder()).__module__, fromlist=["create_causal_mask"])
        make = module.create_causal_mask
        monkeypatch.setattr(module, "create_causal_mask", lambda *args, position_ids, **more: make(*args, **more))
    with torch.no_grad():
        plain = model(**inputs).logits
        with eah.enable(model, threshold=0.0) as handle:
            assert torch.equal(model(**inputs).logits, plain)
    assert handle.report().layers[0].stood_aside == Reason.PACKED.value
