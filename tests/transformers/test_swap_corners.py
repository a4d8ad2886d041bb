"""Corners of the swap: what it hands on, says once, refuses whole, and leaves to the model's owner."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import warnings

import pytest
import torch

import eah
from eah.reasons import Reason
from eah.transformers.chunked_prefill import ChunkedPrefill
from eah.transformers.layer import SwappedLayer

from ..support.family_models import build as build_family
from ..support.family_models import prompt as family_prompt
from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, attention_of, build, prompt
from .test_swap_lifecycle import state

transformers = pytest.importorskip("transformers")

ROWS = ["abIcdefghi", "abcIde"]


def tuned(model, inputs):
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    return oracle


def built(family, attn=None):
    try:
        return build_family(family, attn)
    except ValueError as error:  # the tower of BLIP-2 had no sdpa in 5.3
        pytest.skip(f"transformers {transformers.__version__} does not build it so: {error}")


def maps_of(out):
    return (out if out.get("attentions") is not None else out.language_model_outputs).attentions


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(name, marks=pytest.mark.seam) for name in ("chameleon", "fuyu")),
        "blip-2",
        "instructblip",
        "kosmos-2",
    ],
)
def test_every_layer_hands_out_its_own_map(family):
    """Also where the attention takes output_attentions for itself and does not pass it on."""
    model, inputs = built(family, "eager"), family_prompt(family, ROWS)
    with torch.no_grad():
        plain = maps_of(model(**inputs, output_attentions=True))
        with eah.enable(model, threshold=0.02) as handle:
            got = maps_of(model(**inputs, output_attentions=True))
    assert len(got) == len(plain) == model.get_decoder().config.get_text_config(decoder=True).num_hidden_layers
    assert torch.equal(got[0], plain[0]) and not torch.equal(got[2], plain[2])
    for number, row in enumerate(handle.report().layers[0].rows):
        real = inputs["attention_mask"][number].bool()
        want = plain[1][number, row.head].expand_as(got[1][number])
        torch.testing.assert_close(got[1][number][:, real], want[:, real])


def packed(inputs, rows=2):
    """Sequences of 12 tokens in each row; in more rows than one EAH stands aside."""
    ids = inputs["input_ids"].repeat(rows, 1)
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] % 12}


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "EAH" in str(warning.message)]


def test_standing_aside_is_said_once():
    """Where no prefill was enhanced so far; once per enabled model, whichever of its layers."""
    model, inputs = build("llava", layers=(0, 1)), prompt("llava", ROWS[:1])

    def run(model=model, **more):
        with torch.no_grad():
            model(**packed(inputs), use_cache=False, **more)

    with eah.enable(model, layers=(0, 1)):
        (message,) = said(run)
        assert message.startswith(
            f"EAH stood aside in layer 0, which kept its ordinary attention: {Reason.PACKED.value}"
        )
        assert said(run) == []
        assert said(lambda: run(copy.deepcopy(model))) == []
    with eah.enable(model):
        assert len(said(run)) == 1
    for rows in (["abcdef"], ["abIcd"]):  # a prompt without an image is no standing aside
        with eah.enable(model):
            assert said(lambda rows=rows: model(**prompt("llava", rows))) == []
            assert said(run) == []


def test_compiled_code_says_nothing_and_reports():
    model, inputs = build("llava"), prompt("llava", ROWS[:1])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), eah.enable(model) as handle:
        assert said(lambda: compiled(**packed(inputs), use_cache=False)) == []
        assert handle.report().layers[0].stood_aside == Reason.UNREADABLE_POSITIONS.value


def test_a_model_that_shares_an_enabled_decoder_is_refused():
    model, other = build("llava"), build("llava", seed=1)
    other.model.language_model = model.model.language_model
    inputs = prompt("llava", ROWS)
    with eah.enable(model, threshold=0.0), torch.no_grad():
        want, before = model(**inputs).logits, state(other)
        for layers in ((1,), (2,)):
            with pytest.raises(
                ValueError, match=r"model shares \S*layers\.1\.self_attn with another model that is ena"
            ):
                eah.enable(other, layers=layers)
        assert state(other) == before
        assert torch.equal(model(**inputs).logits, want)
    with eah.enable(other, threshold=0.0):
        pass


@pytest.mark.parametrize("decode", ["off", "hold"])
def test_an_enable_that_fails_half_way_leaves_nothing(monkeypatch, decode):
    """Whichever of its steps raises, a KeyboardInterrupt included."""
    model, done = build("llava"), 0
    before = state(model)
    places = [(torch.nn.Module, "register_forward_pre_hook", False)]
    places += [(cls, "attach", after) for cls in (SwappedLayer, ChunkedPrefill) for after in (False, True)]
    for place in places:
        for step in range(4):
            done += fails(monkeypatch, *place, step, lambda: eah.enable(model, (0, 1), decode=decode))
            assert state(model) == before
    assert done == 9  # three hooks; two layers and one method, before and after each
    with eah.enable(model, (0, 1), decode=decode):
        assert state(model) != before


def fails(monkeypatch, cls, name, after, step, run) -> bool:
    calls, original = [], getattr(cls, name)

    def faulty(*args, **kwargs):
        calls.append(name)
        if len(calls) == step + 1 and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(cls, name, faulty)
        try:
            run().disable()
        except KeyboardInterrupt:
            return True
    return False


def noted_generate(self, *args, **kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    return type(self).generate(self, *args, **kwargs)


def noted_prefill(self, *args, **kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    return type(self)._prefill(self, *args, **kwargs)


@pytest.mark.parametrize("how", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family, name", [("blip-2", "generate"), ("kosmos-2", "generate"), ("llava", "_prefill")])
def test_methods_that_the_owner_set_are_called_and_restored(family, name, how):
    model, inputs = built(family), family_prompt(family, ROWS)
    options = {"max_new_tokens": 2, "do_sample": False}
    own = functools.partial(globals()["noted_" + name.strip("_")], model)
    twin = copy.deepcopy(model)
    with eah.enable(twin, threshold=0.02):
        want = twin.generate(**inputs, **options)
    setattr(model, name, own)
    eah.enable(model, threshold=0.02)
    model = how(model)
    handle = eah.Handle.of(model)
    assert torch.equal(model.generate(**inputs, **options), want) and model.calls == 1
    assert handle.report().layers[0].rows
    handle.disable()
    model.generate(**inputs, **options)
    assert model.calls == 2
    assert vars(model)[name].args == (model,) and vars(model)[name].func is own.func


def test_an_owners_generate_with_other_arguments():
    """Where the image tokens are cannot be read from them: an error that says what helps."""
    model, inputs = built("blip-2"), family_prompt("blip-2", ROWS)

    def batched(batch):
        return type(model).generate(model, **batch, max_new_tokens=2, do_sample=False)

    with eah.enable(model, threshold=0.02):
        want = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.generate = lambda batch, *more: batched(batch)
    with eah.enable(model, threshold=0.02) as handle:
        for arguments in ([inputs], [inputs, *range(9)]):
            with pytest.raises(TypeError, match=r"input_ids, inputs_embeds or pixel_values .* handle\.image_mask"):
                model.generate(*arguments)
            with handle.image_mask(inputs["input_ids"] == IMAGE):
                assert torch.equal(model.generate(*arguments), want)
            assert [row.image_tokens for row in handle.report().layers[0].rows] == [9, 9]


@pytest.mark.seam
def test_a_mask_that_is_given_for_a_prompt_without_ids():
    """BLIP-2 then makes the prompt itself: the mask that was given is the one that counts."""
    model, inputs = built("blip-2"), family_prompt("blip-2", ROWS)
    model.config.text_config.bos_token_id = model.generation_config.bos_token_id = 1
    queries = model.config.num_query_tokens
    with eah.enable(model, threshold=0.02) as handle:
        for marked in (queries, 3):
            given = torch.arange(queries + 1)[None] < marked
            with contextlib.nullcontext() if marked == queries else handle.image_mask(given):
                model.generate(inputs["pixel_values"], max_new_tokens=2, do_sample=False)
            assert [row.image_tokens for row in handle.report().layers[0].rows] == [marked, marked]


def test_a_method_that_is_set_while_enabled_stays():
    model = build("llava")
    with eah.enable(model):
        below = model._prefill
        model._prefill = lambda *args, **kwargs: below(*args, **kwargs)
        own = model._prefill
    assert model._prefill is own
    model.generate(**prompt("llava", ROWS), max_new_tokens=2)


@pytest.mark.seam
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["restarting", "gaps"])
def test_positions_that_do_not_count_up(attn, positions):
    """One sequence where the model makes a cache, by default or by its config; packed ones where it does not."""
    model, inputs = build("llava", attn), prompt("llava", ["abIcdefghi"])
    ids = packed(inputs, rows=1)
    if positions == "gaps":
        ids["position_ids"] = 3 * torch.arange(inputs["input_ids"].shape[1])[None]
    oracle = tuned(model, {**inputs, "position_ids": ids["position_ids"]})
    want = oracle(**inputs, position_ids=ids["position_ids"])
    with torch.no_grad(), eah.enable(model, threshold=oracle.threshold) as handle:
        for more in ({}, {"use_cache": True}):
            got = model(**ids, pixel_values=inputs["pixel_values"], **more).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert handle.report().layers[0].rows[0].head == oracle.head[1].item()
        sequences = {"restarting": 2, "gaps": 18}[positions]
        model(**ids, use_cache=False)
        assert len(handle.report().layers[0].rows) == sequences
        model(**ids)
        assert len(handle.report().layers[0].rows) == 1
        model.config.text_config.use_cache = False
        model(**ids)
        assert len(handle.report().layers[0].rows) == sequences


@pytest.mark.seam
@pytest.mark.parametrize("mask", ["2-D", "4-D", "static cache"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 6])
def test_rows_of_padding_are_the_base_implementations(window, attn, mask):
    """With gradients and without: a loss that does not leave them out is the same."""
    text = {"decoder": "MistralConfig", "sliding_window": window} if window else {}
    model, inputs = build("llava", attn, **text), prompt("llava", ROWS)
    real = inputs["attention_mask"].bool()
    if mask == "4-D":
        seen = real[:, None, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
        inputs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        inputs["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    seen = []
    hook = attention_of(model, 1).register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))

    def run():
        if mask == "static cache":
            inputs["past_key_values"] = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
        return model(**inputs).logits.detach()

    with torch.no_grad():
        run()
        with eah.enable(model, threshold=0.02) as handle:
            got = run()
    with eah.enable(model, threshold=0.02):
        torch.testing.assert_close(run(), got, rtol=1e-4, atol=1e-4)
    hook.remove()
    plain, kernels, gradients = seen
    assert handle.report().layers[0].rows[1].head is not None
    assert (kernels - plain)[real].abs().max() > 1e-3
    torch.testing.assert_close(kernels[~real], plain[~real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[~real], plain[~real], rtol=1e-4, atol=1e-5)


def test_what_is_shown_at_a_prompt():
    model = build("llava", layers=(0, 1))
    with eah.enable(model, (0, 1)) as handle:
        assert repr(handle) == "<eah.Handle of LlavaModel, layers 0, 1: enabled>"
    assert repr(handle) == "<eah.Handle of LlavaModel, layers 0, 1: disabled>"
    assert dir(eah) == sorted(eah.__all__) and "enable" in dir(eah) and "torch" not in dir(eah)
    assert isinstance(eah.__version__, str)
