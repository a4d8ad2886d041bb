"""decode="hold" and "track": every step's head and logits equal a recomputation over all rows so far."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import eah
from eah.method import Choice
from eah.reasons import Reason, sentence
from eah.report import HELD
from eah.transformers.cache import CROPPED

from ..support.decode_oracle import DecodeOracle
from ..support.tiny_models import IMAGE, attention_of, build, prompt

transformers = pytest.importorskip("transformers")

MIXED = ["abIcdefghi", "abcIde", "abcdef", "kIxIl"]
STEPS = torch.tensor([[7, 30, 2, 60, 41, 12, 9, 55]])
MODELS = {
    "llava": ("llava", {"num_key_value_heads": 4}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "window": ("llava", {"decoder": "MistralConfig", "sliding_window": 6}),
}


def feed(model, inputs, chunks, cache, seen=None):
    """Logits of the prompt and then of each chunk of tokens, with generate()'s arguments."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        out = [model(**inputs, past_key_values=cache).logits]
        for chunk in chunks:
            if seen is not None:
                seen.append(cache.layers[1].carried.head.clone())
            mask = torch.cat([mask, mask.new_ones(len(tokens), chunk.shape[1])], 1)
            positions = (mask.cumsum(-1) - 1)[:, -chunk.shape[1] :]
            ids = chunk.expand(len(tokens), -1)
            out.append(model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    if seen is not None:
        seen.append(cache.layers[1].carried.head.clone())
    return out


def skip_unless_tracked(mode, static=True):
    """Until transformers 5.8 or so a static cache does not tell where it writes: "track" then stands aside."""
    layer = transformers.StaticCache(config=transformers.LlamaConfig(num_hidden_layers=1), max_cache_len=2).layers[0]
    if static and mode == "track" and not hasattr(layer, "cumulative_length"):
        pytest.skip(f"transformers {transformers.__version__}: {Reason.UNKNOWN_POSITION.value}")


def cache_of(kind, model):
    config = model.config.get_text_config()
    if kind == "static":
        return transformers.StaticCache(config=config, max_cache_len=48)
    return transformers.DynamicCache(config=config)


def tuned(model, inputs, mode, chunks, changes=True, **oracle):
    """An oracle with a threshold for these chunks, and what it gives. The layer's q and k do not depend on either."""
    first = DecodeOracle(model, inputs, "track", **oracle)
    feed(first.model, inputs, chunks, transformers.DynamicCache())
    result = DecodeOracle(model, inputs, mode, first.tune(changes), **oracle)
    return result, feed(result.model, inputs, chunks, transformers.DynamicCache())


def close(got, want, real):
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        kept = real.bool() if at == 0 else slice(None)
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-4, atol=2e-4)


@pytest.mark.seam
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["hold", "track"])
def test_every_step_equals_a_recomputation(mode, name, kind, attn):
    skip_unless_tracked(mode, kind == "static")
    family, text = MODELS[name]
    model, inputs = build(family, attn, **text), prompt(family, MIXED)
    chunks = STEPS.split(1, 1)
    oracle, want = tuned(model, inputs, mode, chunks, window=text.get("sliding_window"))
    plain = feed(model, inputs, chunks, cache_of(kind, model))
    heads = []
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        got = feed(model, inputs, chunks, cache_of(kind, model), heads)
    assert torch.equal(torch.stack(heads), torch.stack(oracle.heads))
    close(got, want, inputs["attention_mask"])
    assert (got[-1][0] - plain[-1][0]).abs().max() > 1e-3
    layer = handle.report().layers[0]
    assert layer.rows and layer.afterwards is None and layer.continued is None
    close(feed(model, inputs, chunks, cache_of(kind, model)), plain, inputs["attention_mask"])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llava", "window"])
@pytest.mark.parametrize("mode", ["hold", "track"])
def test_several_tokens_at_once(mode, name, kind):
    """Drafted tokens, or a second turn, here with an image of its own: to "hold" its tokens are like any others."""
    skip_unless_tracked(mode, kind == "static")
    family, text = MODELS[name]
    model, inputs = build(family, **text), prompt(family, MIXED)
    steps = STEPS.clone()
    steps[0, 2:5] = IMAGE
    new = (steps == IMAGE).expand(len(MIXED), -1)
    chunks = steps.split([1, 4, 1, 2], 1)
    oracle, want = tuned(model, inputs, mode, chunks, window=text.get("sliding_window"), more_images=new)
    heads = []
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        got = feed(model, inputs, chunks, cache_of(kind, model), heads)
    rows = torch.tensor([0, 1, 5, 6, 8])  # the last ones of the forwards
    if mode == "track":
        assert torch.equal(torch.stack(heads), torch.stack(oracle.heads)[rows])
    close(got, want, inputs["attention_mask"])
    layer = handle.report().layers[0]
    assert layer.afterwards is None and layer.continued == (HELD if mode == "hold" else None)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["hold", "track"])
def test_some_heads_receive(mode, kind, attn):
    """Those with the fewest sinks. Eager: by the base implementation, which also gives the maps."""
    skip_unless_tracked(mode, kind == "static")
    model, inputs = build("llava", attn), prompt("llava", MIXED)
    model.config.text_config.output_attentions = attn == "eager"
    chunks = STEPS.split(1, 1)
    oracle, want = tuned(model, inputs, mode, chunks, receivers=2)
    with eah.enable(model, threshold=oracle.threshold, decode=mode, broadcast_to=2) as handle:
        close(feed(model, inputs, chunks, cache_of(kind, model)), want, inputs["attention_mask"])
    assert handle.report().layers[0].afterwards is None


def generated(model, inputs, cache=None, **how):
    return model.generate(**inputs, past_key_values=cache, **{"do_sample": False, "max_new_tokens": 7, **how})


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static", "compile": True},
}


@pytest.mark.seam
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["hold", "track"])
def test_generated_tokens(mode, way):
    skip_unless_tracked(mode, "cache_implementation" in WAYS[way])
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle, _ = tuned(model, inputs, mode, STEPS.split(1, 1))
    how = dict(WAYS[way])
    beams = {name: value for name, value in how.items() if name.startswith("num")}
    want = generated(oracle.model, inputs, transformers.DynamicCache(), **beams)
    off = DecodeOracle(model, inputs, "off", oracle.threshold)
    assert not torch.equal(want, generated(off.model, inputs, transformers.DynamicCache(), **beams))
    if how.pop("compile", False):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        config = transformers.CompileConfig(backend="eager", fullgraph=True)
        config._compile_all_devices = True
        how["compile_config"] = config
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        assert torch.equal(generated(model, inputs, **how), want)
        assert torch.equal(generated(model, inputs, **how), want)
    assert handle.report().layers[0].afterwards is None
    assert way != "compiled" or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_drafted_tokens(how):
    """Held: also by drafted tokens. Tracked: those that are taken back leave the sums, the prompt's among them."""
    model, inputs = build("llava"), prompt("llava", ["Iabcabcab"])
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 40}
    if how == "assistant":
        options = {"assistant_model": build("llava", seed=1)}
    with eah.enable(model, threshold=0.02, decode="hold") as handle:
        generated(model, inputs, **options)
    layer = handle.report().layers[0]
    assert layer.rows[0].head is not None and (layer.continued, layer.afterwards) == (HELD, None)
    with eah.enable(model, threshold=0.02, decode="track") as handle:
        generated(model, inputs, **options)
    assert handle.report().layers[0].afterwards is None


def test_cropping():
    """Rows of the last forward can be taken back; of an earlier one not with "track"."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    chunks = STEPS[:, :6].split([1, 3, 2], 1)
    oracle, _ = tuned(model, inputs, "track", STEPS[:, :3].split([1, 2], 1))
    with eah.enable(model, threshold=oracle.threshold, decode="track") as handle:
        cache = cache_of("dynamic", model)
        feed(model, inputs, chunks[:2], cache)
        cache.crop(-1)
        assert torch.equal(cache.layers[1].carried.head, oracle.heads[-1])
        cache.crop(-1)
        cache.crop(-1)
        assert torch.equal(cache.layers[1].carried.head, oracle.heads[1])
        cache.crop(-1)
        assert cache.layers[1].carried is None
        step(model, inputs, cache)
        assert handle.report().layers[0].afterwards == sentence(CROPPED)
    with eah.enable(model, threshold=oracle.threshold, decode="hold") as handle:
        cache = cache_of("dynamic", model)
        feed(model, inputs, chunks, cache)
        cache.crop(-20)
        step(model, inputs, cache)
        assert handle.report().layers[0].afterwards is None
        cache.crop(-cache.get_seq_length())
        assert cache.layers[1].carried is None


def step(model, inputs, cache, rows=None):
    rows = len(inputs["input_ids"]) if rows is None else rows
    with torch.no_grad():
        return model(input_ids=torch.full((rows, 1), 5), past_key_values=cache).logits


@pytest.mark.seam
@pytest.mark.parametrize("mode", ["hold", "track"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_takes_it_along(kind, mode):
    skip_unless_tracked(mode, kind == "static")
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle, _ = tuned(model, inputs, mode, STEPS.split(1, 1))
    with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
        cache = cache_of(kind, model)
        feed(model, inputs, STEPS[:, :2].split(1, 1), cache)
        carried = cache.layers[1].carried
        assert repr(cache.layers[1]) == repr(cache.layers[0])
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(step(model, inputs, copied), step(model, inputs, copy.deepcopy(cache)))
        cache.reorder_cache(torch.tensor([2, 0, 0, 3]))
        assert torch.equal(cache.layers[1].carried.head, carried.head[[2, 0, 0, 3]])
        if kind == "dynamic":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1, 4]))
            assert torch.equal(cache.layers[1].carried.head, carried.head[[2, 0]])
        cache.reset()
        assert cache.layers[1].carried is None and handle.report().layers[0].afterwards is None


def test_steps_that_stand_aside():
    model, inputs = build("llava"), prompt("llava", MIXED)
    plain, cache = cache_of("dynamic", model), cache_of("dynamic", model)
    feed(model, inputs, (), plain)
    held = {"threshold": 0.02, "decode": "hold"}
    with eah.enable(model, **held) as handle:
        want = step(model, inputs, copy.deepcopy(plain))
        assert handle.report().layers[0].stood_aside == Reason.NOT_BEGUN.value
        feed(model, inputs, (), cache)
        assert torch.equal(step(model, inputs, plain), want)
        assert handle.report().layers[0].afterwards == Reason.NOT_BEGUN.value
    with eah.enable(model, threshold=0.02, decode="track") as handle:
        feed(model, inputs, (), cache_of("dynamic", model))
        step(model, inputs, copy.deepcopy(cache))
        assert handle.report().layers[0].afterwards == Reason.OTHER_MODE.value
    with eah.enable(model, **held) as handle:
        feed(model, inputs, (), cache_of("dynamic", model))
        one = copy.deepcopy(cache)
        one.layers[1].carried = Choice(one.layers[1].carried.head[:1])
        step(model, inputs, one)
        assert handle.report().layers[0].afterwards == Reason.OTHER_BATCH.value
        assert one.layers[1].carried is None
        feed(model, inputs, (), cache_of("dynamic", model))
        model.train()
        attention_of(model, 1).attention_dropout = 0.5
        step(model, inputs, cache)
        assert handle.report().layers[0].afterwards == Reason.DROPOUT.value


def test_maps_and_gradients_of_a_step():
    model, inputs = build("llava", "eager"), prompt("llava", MIXED)
    oracle, want = tuned(model, inputs, "track", STEPS[:, :1].split(1, 1), changes=False)
    for mode in ("hold", "track"):
        with eah.enable(model, threshold=oracle.threshold, decode=mode) as handle:
            cache = cache_of("dynamic", model)
            with torch.no_grad():
                model(**inputs, past_key_values=cache)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            options = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
            ids = STEPS[:, :1].expand(len(MIXED), -1)
            out = model(input_ids=ids, past_key_values=cache, output_attentions=True, **options)
            maps, head = out.attentions[1], cache.layers[1].carried.head
            assert (head >= 0).tolist() == [True, True, False, True]
            assert torch.equal(maps[0], maps[0, :1].expand(4, -1, -1)) and not torch.equal(maps[2, 0], maps[2, 1])
            assert out.logits.requires_grad
            if mode == "track":
                torch.testing.assert_close(out.logits.detach(), want[-1], rtol=1e-4, atol=2e-4)
                with torch.no_grad():
                    model(input_ids=ids.expand(-1, 2), past_key_values=cache, output_attentions=True)
                assert handle.report().layers[0].afterwards == Reason.ROWS_WITH_MAPS.value


def test_another_decode_is_refused():
    with pytest.raises(ValueError, match="decode must be one of off, hold, track, got 'on'"):
        eah.enable(build("llava"), decode="on")


def test_disabled_without_a_trace():
    model = build("llava")
    hooks = attention_of(model, 1)._forward_pre_hooks
    with eah.enable(model, decode="hold"):
        assert hooks
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert not hooks
    eah.Handle.of(twin).disable()
    assert not attention_of(twin, 1)._forward_pre_hooks


def test_compiled():
    """Prefill and steps. A fresh cache costs the prefill a graph break; decoding without one is tested above."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    del inputs["pixel_values"]
    chunks = STEPS[:, :2].split(1, 1)
    oracle, want = tuned(model, inputs, "track", chunks, changes=False)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with eah.enable(model, threshold=oracle.threshold, decode="track") as handle:
        close(feed(compiled, inputs, chunks, cache_of("dynamic", model)), want, inputs["attention_mask"])
    assert handle.report().layers[0].afterwards is None


class Bare:
    """A cache that hides its layers."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        if name in ("cache", "layers"):
            raise AttributeError(name)
        return getattr(self.cache, name)


def test_a_cache_without_layers():
    model, inputs = build("llava"), prompt("llava", MIXED)
    with eah.enable(model, threshold=0.02) as handle:
        want = feed(model, inputs, STEPS[:, :2].split(1, 1), cache_of("dynamic", model))
    with eah.enable(model, threshold=0.02, decode="hold") as handle:
        got = feed(model, inputs, STEPS[:, :2].split(1, 1), Bare(cache_of("dynamic", model)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert handle.report().layers[0].rows and handle.report().layers[0].afterwards == Reason.NO_CACHE_LAYER.value


@pytest.mark.parametrize("mode", ["hold", "track"])
def test_quantised_cache(mode):
    pytest.importorskip("optimum.quanto")
    model, inputs = build("llava"), prompt("llava", MIXED)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8}
    with eah.enable(model, threshold=0.02, decode=mode) as handle:
        generated(model, inputs, cache_implementation="quantized", cache_config=config)
    assert handle.report().layers[0].afterwards is None


@pytest.mark.parametrize("mode", ["hold", "track"])
def test_a_prompt_in_chunks_is_left_alone(mode):
    model, inputs = build("llava"), prompt("llava", MIXED[:1])
    del inputs["pixel_values"]
    plain = generated(model, inputs)
    with eah.enable(model, threshold=0.0, decode=mode) as handle:
        assert torch.equal(generated(model, inputs, prefill_chunk_size=8), plain)
    assert handle.report().layers[0].stood_aside == Reason.CHUNKED.value


def test_flash_attention_without_a_mask_on_a_static_cache(monkeypatch):
    """Nothing says then which keys are written."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .test_attention_forms import flash_stand_in, with_text_attention

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_stand_in)
    model, inputs = with_text_attention(build("llava"), "flash_attention_2"), prompt("llava", MIXED[:1])
    with eah.enable(model, threshold=0.02, decode="hold") as handle:
        cache = cache_of("static", model)
        feed(model, inputs, (), cache)
        step(model, inputs, cache)
    assert handle.report().layers[0].afterwards == Reason.NO_MASK.value
