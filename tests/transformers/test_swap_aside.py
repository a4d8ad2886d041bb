"""Where EAH stands aside: the model's own logits, bit for bit, and the reason in the report."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eah
from eah.reasons import Reason
from eah.transformers.forward import HANDLED
from eah.transformers.plan import CHANGED_BY
from eah.transformers.prompt import Prompt

from ..support.tiny_models import attention_of, build, prompt

transformers = pytest.importorskip("transformers")

ROWS = ["abIcdefghi", "abcIde"]


def stands_aside(model, reason, **inputs):
    """The forward of an enabled model equals the plain one, and the report's only layer names the reason."""
    with torch.no_grad():
        plain = model(**inputs).logits
        with eah.enable(model, threshold=0.0) as handle:
            got = model(**inputs).logits
    assert torch.equal(got, plain)
    assert handle.report().layers[0] == eah.LayerReport(1, stood_aside=reason)
    assert f"stood aside: {reason}" in str(handle.report())


@pytest.mark.seam
@pytest.mark.parametrize("name", CHANGED_BY)
def test_an_argument_that_changes_the_attention(name):
    if name in inspect.signature(transformers.LlamaModel.forward).parameters:
        pytest.skip("the name of the model's own cache in this transformers version")
    inputs = prompt("llava", ROWS)
    del inputs["pixel_values"]
    stands_aside(build("llava"), CHANGED_BY[name].value, **inputs, **{name: torch.zeros(1, 1, 1, 1)})


def test_another_base_implementation():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register("mine", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("mine", sdpa_mask)
    model = build("llava")
    model.set_attn_implementation("mine")
    reason = f"the attention implementation 'mine' is not handled; handled are {', '.join(HANDLED)}"
    stands_aside(model, reason, **prompt("llava", ROWS))


def test_a_base_implementation_sees_the_layers_own_config():
    """The flash path reads module.config._attn_implementation and the module's parameters."""
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.training, module.layer_idx, hasattr(module, "none")))
        seen.append(next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).weight.dtype)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("probe", probe)
    model = build("llava")
    model.set_attn_implementation({"text_config": "probe"})
    with torch.no_grad():
        model(**prompt("llava", ROWS))
        plain = list(seen)
        seen.clear()
        with eah.enable(model):
            model(**prompt("llava", ROWS))
    assert seen == plain and seen[2] == ("probe", False, 1, False)


def test_attention_dropout_in_training():
    model, inputs = build("llava", attention_dropout=0.5), prompt("llava", ROWS)
    with eah.enable(model, threshold=0.0) as handle:
        model.train()
        model(**inputs)
        assert handle.report().layers[0].stood_aside == Reason.DROPOUT.value
        model.eval()
        model(**inputs)
        assert handle.report().layers[0].stood_aside is None


def test_mask_of_an_unknown_form():
    mask = torch.ones(1, 1, 1, 19, dtype=torch.bool)
    inputs = prompt("llava", ["abIcdefghi"])
    stands_aside(build("llava"), Reason.MASK_FORM.value, **{**inputs, "attention_mask": mask[..., :18]})


def test_some_heads_only():
    """The best head of one process is not the layer's best; test_parallel.py has weights that say whose it is."""
    model, inputs = build("llava"), prompt("llava", ROWS)
    model.get_decoder().config.num_attention_heads = 8
    stands_aside(model, Reason.SOME_HEADS.value, **inputs)


def test_image_features_merged_by_the_caller():
    """Without ids and without a placeholder embedding nothing tells where the image is: the report asks for a mask."""
    model, inputs = build("llava"), prompt("llava", ROWS)
    embeds = torch.randn(*inputs["input_ids"].shape, 32)
    with torch.no_grad(), eah.enable(model, threshold=0.0) as handle:
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert [row.why_none for row in handle.report().layers[0].rows] == [Reason.NO_PLACEHOLDER.value] * 2


def test_the_decoder_called_by_itself():
    model, inputs = build("llava"), prompt("llava", ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    decoder = model.get_decoder()
    with torch.no_grad():
        plain = decoder(inputs_embeds=embeds).last_hidden_state
        with eah.enable(model, threshold=0.0) as handle:
            assert torch.equal(decoder(inputs_embeds=embeds).last_hidden_state, plain)
            assert handle.report().layers[0].stood_aside == Reason.NO_IMAGE_MASK.value
            other = Prompt(image_mask=torch.ones(2, 3, dtype=torch.bool))
            assert torch.equal(decoder(inputs_embeds=embeds, eah_prompt=other).last_hidden_state, plain)
            assert handle.report().layers[0].stood_aside == Reason.UNALIGNED.value


def test_arguments_by_position():
    model, inputs = build("llava"), prompt("llava", ROWS)
    arguments = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    with torch.no_grad():
        plain = model.model(*arguments).last_hidden_state
        with eah.enable(model, threshold=0.0) as handle:
            assert torch.equal(model.model(*arguments).last_hidden_state, plain)
            assert handle.report().layers[0].stood_aside == Reason.BY_POSITION.value
            model.model(inputs["input_ids"], pixel_values=inputs["pixel_values"])
            assert handle.report().layers[0].stood_aside is None


@pytest.mark.seam
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_second_turn_on_a_cache(cache):
    """The first prefill stays on record, the second is the model's own attention, and the report says so."""
    model, inputs = build("llava"), prompt("llava", ["abIcde"])
    tokens = torch.tensor([[5, 6, 7]])

    def turns():
        kept = transformers.DynamicCache(config=model.config.text_config)
        if cache == "static":
            kept = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
        model(**inputs, past_key_values=kept)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        before = attention_of(model, 1).eah_layer.record
        model(input_ids=tokens, attention_mask=mask, past_key_values=kept)
        return before, kept

    with torch.no_grad():
        with eah.enable(model, threshold=0.0) as handle:
            before, kept = turns()
        report = handle.report().layers[0]
        assert report.rows and before.head.tolist() == [report.rows[0].head]
        assert report.stood_aside is None and report.afterwards == Reason.CACHED.value
        assert Reason.CACHED.value in str(handle.report())
        with eah.enable(model, threshold=0.0) as handle:
            model(input_ids=tokens, past_key_values=kept)
        assert handle.report().layers[0] == eah.LayerReport(1, stood_aside=Reason.CACHED.value)


@pytest.mark.seam
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_chunks(cache):
    """No chunk of it is enhanced, neither is the first; a prompt within one chunk is whole."""
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    del inputs["pixel_values"]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    plain = model.generate(**inputs, **options)
    with eah.enable(model, threshold=0.0, history=4) as handle:
        got = model.generate(**inputs, **options, prefill_chunk_size=8)
        report = handle.report().layers[0]
        whole = model.generate(**inputs, **options, prefill_chunk_size=18)
        assert handle.report().layers[0].rows
        assert torch.equal(whole, model.generate(**inputs, **options))
        assert len(handle.history) == 3
    assert torch.equal(got, plain) and not torch.equal(whole, plain)
    assert report == eah.LayerReport(1, stood_aside=Reason.CHUNKED.value, afterwards=Reason.CACHED.value)


def test_chunks_of_one_thread_and_whole_prompts_of_others():
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    del inputs["pixel_values"]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def stood_aside(run):
        with torch.no_grad():
            run(**inputs)
        return handle.report().layers[0].stood_aside

    with eah.enable(model, threshold=0.0) as handle, ThreadPoolExecutor(1) as pool:
        with handle._enabled.chunked():
            assert stood_aside(model) == Reason.CHUNKED.value
            assert pool.submit(stood_aside, model).result() is None
            assert stood_aside(compiled) == Reason.CHUNKED.value
        assert stood_aside(model) is None
        assert stood_aside(compiled) is None


def test_what_cannot_be_read_while_compiling():
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    del inputs["pixel_values"]
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.reset()
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        with eah.enable(model, threshold=0.0) as handle:
            compiled(**inputs, past_key_values=cache)
            assert handle.report().layers[0].stood_aside == Reason.UNREADABLE_CACHE.value
            positions = torch.arange(inputs["input_ids"].shape[1])[None]
            compiled(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False)
            assert handle.report().layers[0].stood_aside == Reason.UNREADABLE_POSITIONS.value


def test_one_token_is_left_alone():
    model = build("llava")
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([[5]])).logits
        with eah.enable(model, threshold=0.0) as handle:
            assert torch.equal(model(input_ids=torch.tensor([[5]])).logits, plain)
    assert str(handle.report()) == "layer 1: nothing ran yet"


def test_the_name_alone_does_nothing():
    model = build("llava")
    with eah.enable(model):
        pass
    attention_of(model, 1).config._attn_implementation_internal = "eah"
    with pytest.raises(RuntimeError, match=r"eah\.enable"):
        model(**prompt("llava", ROWS))
