"""`--compare`: its shares, changes and distances are those of the eager maps and outputs."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import eah
from eah.inspect import look
from eah.inspect.compare import compare, mark_differences
from eah.inspect.numbers import divergence

from ..support.processors import processor_of
from ..support.tiny_models import build

LAYERS, THRESHOLD = (0, 1, 2), 0.05


def eager(model, inputs, layer):
    """A layer's maps and its attention's output before the output projection, (tokens, heads * D), in the first row."""
    module, met = model.get_decoder().layers[layer].self_attn.o_proj, []
    hook = module.register_forward_pre_hook(lambda _, args: met.append(args[0][0]))
    output = model(**inputs, output_attentions=True)
    hook.remove()
    return output.attentions[layer][0], met[0], output.logits[0, -1]


@torch.no_grad()
def test_shares_changes_and_distance_are_those_of_the_eager_model(tiny, picture):
    model, processor = tiny
    seen = look(model, processor, picture, "abc", threshold=THRESHOLD)
    found = compare(model, processor, seen, max_new_tokens=4)
    model.set_attn_implementation("eager")
    image, after = list(seen.positions), slice(seen.positions[-1] + 1, seen.tokens)
    try:
        for one in found.layers:
            maps, output, logits = eager(model, seen.inputs, one.layer)
            with eah.enable(model, threshold=THRESHOLD) as handle:
                lent_maps, lent_output, lent_logits = eager(model, seen.inputs, one.layer)
                [row] = handle.report().layers[0].rows
            for shares, given in ((one.without, maps), (one.with_eah, lent_maps)):
                rows = given[:, after].mean((0, 1))
                assert shares.image == pytest.approx(rows[image].sum().item(), abs=1e-5)
                assert shares.first == pytest.approx(0 if 0 in image else rows[0].item(), abs=1e-5)
                assert shares.image + shares.first + shares.text == pytest.approx(1)
            change = (lent_output[after] - output[after]).norm() / output[after].norm()
            assert one.change == pytest.approx(change.item(), rel=1e-3, abs=1e-6)
            assert (one.change > 1e-3) == (one.layer >= 1)
    finally:
        model.set_attn_implementation("sdpa")
    p, q = logits.double().softmax(-1), lent_logits.double().softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3, abs=1e-9) and found.kl > 0
    assert found.numbers()["eah_layers"] == [{"layer": 1, "head": row.head, "stood_aside": None}]


def test_a_picture_that_ends_the_prompt_and_a_model_that_is_enabled(tiny, picture):
    model, processor = tiny
    seen = look(model, processor, picture, "ab<image>", threshold=THRESHOLD)
    assert seen.positions[-1] == seen.tokens - 1
    found = compare(model, processor, seen, max_new_tokens=2)
    assert all(0 < one.without.image < 1 for one in found.layers)
    with eah.enable(model), pytest.raises(ValueError, match="enabled already"):
        compare(model, processor, seen)


def test_the_words_that_differ_are_marked_and_nothing_is_html():
    assert mark_differences("a <b> dog sits", "a <b> cat sits") == (
        "a &lt;b&gt; <mark>dog</mark> sits",
        "a &lt;b&gt; <mark>cat</mark> sits",
    )
    assert mark_differences("a", "a b") == ("a", "a <mark>b</mark>") and mark_differences("", "") == ("", "")


def test_the_distance_of_distributions():
    never = torch.tensor([1.0, 2.0, -torch.inf])
    p, q = never[:2].double().softmax(-1), torch.tensor([1.0, 2.5]).double().softmax(-1)
    assert divergence(never, never) == 0
    assert divergence(never, torch.tensor([1.0, 2.5, -torch.inf])) == pytest.approx((p * (p / q).log()).sum().item())
    with pytest.raises(ValueError, match="the next token's logits are NaN"):
        divergence(never, torch.tensor([1.0, torch.nan, 0.0]))


def test_a_layer_whose_output_is_zero_does_not_change(picture):
    model, processor = build("llava"), processor_of("llava")
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.v_proj.weight.zero_()
    found = compare(model, processor, look(model, processor, picture, "abc"), max_new_tokens=1)
    assert found.layers[1].change == 0
