"""Ways of generating: each gives the oracle's tokens, or the model's own and the reason in the report."""

from __future__ import annotations

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eah
from eah.reasons import Reason

from ..support.family_models import build as build_family
from ..support.family_models import prompt as family_prompt
from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, attention_of, build, prompt

transformers = pytest.importorskip("transformers")

MIXED = ["abIcdefghi", "abcIde", "abcdef", "kIxIl"]


def tuned(model, inputs):
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    return oracle


def generated(model, inputs, seed=0, **how):
    torch.manual_seed(seed)
    return model.generate(**inputs, max_new_tokens=6, **{"do_sample": False, **how})


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.seam
@pytest.mark.parametrize("way", WAYS)
def test_tokens_equal_the_oracle(way):
    """A batch of an image, an image, no image and two images, padded on the left."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle, how = tuned(model, inputs), WAYS[way]
    plain = generated(model, inputs, **how)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = generated(model, inputs, **how)
    dynamic = {name: value for name, value in how.items() if name not in ("cache_implementation", "disable_compile")}
    assert torch.equal(got, generated(oracle.model, inputs, **dynamic))
    assert not torch.equal(got, plain)
    assert handle.report().layers[0].rows
    assert torch.equal(generated(model, inputs, **how), plain)


def test_right_padding():
    model, inputs = build("llava"), prompt("llava", MIXED, "right")
    oracle = tuned(model, inputs)
    plain = generated(model, inputs)
    with eah.enable(model, threshold=oracle.threshold):
        got = generated(model, inputs)
    assert torch.equal(got, generated(oracle.model, inputs)) and not torch.equal(got, plain)


class Stream(contextlib.nullcontext):
    """In the place of a CUDA stream: here everything runs in order."""

    def wait_stream(self, other):
        pass


@pytest.mark.seam
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache(cache, monkeypatch):
    """The cache's own code without a second device to offload from; tests/gpu/test_generation.py has one."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle = tuned(model, inputs)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        out = generated(model, inputs, cache_implementation=cache, return_dict_in_generate=True)
    assert out.past_key_values.offloading
    assert torch.equal(out.sequences, generated(oracle.model, inputs))
    assert handle.report().layers[0].rows and handle.report().layers[0].afterwards is None


def test_quantised_cache():
    pytest.importorskip("optimum.quanto")
    model, inputs = build("llava"), prompt("llava", MIXED)
    with eah.enable(model, threshold=0.02) as handle:
        config = {"backend": "quanto", "nbits": 4, "q_group_size": 8}
        generated(model, inputs, cache_implementation="quantized", cache_config=config)
    assert handle.report().layers[0].rows


def embedded(model, inputs):
    """The prompt as embeddings into which the image features are merged: nothing tells where the image is."""
    kept = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return {"inputs_embeds": kept[0], "attention_mask": inputs["attention_mask"]}


def test_embeddings_with_an_image_mask():
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle, embeds = tuned(model, inputs), embedded(model, inputs)
    plain = generated(model, embeds)
    want = generated(oracle.model, inputs)[:, inputs["input_ids"].shape[1] :]
    with eah.enable(model, threshold=oracle.threshold) as handle:
        assert torch.equal(generated(model, embeds), plain)
        assert {row.why_none for row in handle.report().layers[0].rows} == {Reason.NO_PLACEHOLDER.value}
        with handle.image_mask(inputs["input_ids"] == IMAGE):
            assert torch.equal(generated(model, embeds), want)
            assert {row.why_none for row in handle.report().layers[0].rows} == {None, Reason.NO_IMAGE_TOKEN.value}
            got = generated(model, inputs, use_cache=False)
        assert torch.equal(generated(model, embeds), plain)
    assert not torch.equal(want, plain)
    assert torch.equal(got, generated(oracle.model, inputs, use_cache=False))


def test_embeddings_of_placeholders():
    model, inputs = build("llava"), prompt("llava", MIXED)
    oracle = tuned(model, inputs)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    ids = embeds.pop("input_ids")
    with eah.enable(model, threshold=oracle.threshold):
        got = generated(model, embeds)
    assert torch.equal(got, generated(oracle.model, inputs)[:, ids.shape[1] :])


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ([[True]], TypeError, "mask must be a torch.bool tensor, got list"),
        (torch.ones(1, 4), TypeError, "mask must be a torch.bool tensor, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"mask must be \(B, S\) with B >= 1, got \(4,\)"),
        (torch.ones(1, 40, dtype=torch.bool), ValueError, r"given is 1 x 40; .* called with 4 x \d+ tokens"),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, r"given is 3 x 4; .* called with 4 x \d+ tokens"),
    ],
)
def test_image_masks_that_do_not_fit(mask, error, message):
    model, inputs = build("llava"), prompt("llava", MIXED)
    with eah.enable(model) as handle, pytest.raises(error, match=message), handle.image_mask(mask):
        model(**inputs)


def test_image_masks_of_two_threads():
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    embeds = embedded(model, inputs)
    masks = [inputs["input_ids"] == IMAGE, inputs["input_ids"] < 5]

    def logits(number):
        with torch.no_grad(), handle.image_mask(masks[number]):
            return model(**embeds).logits

    with eah.enable(model, threshold=0.02) as handle, ThreadPoolExecutor(2) as pool:
        alone = [logits(0), logits(1)]
        assert not torch.equal(*alone)
        order = [0, 1] * 20
        assert all(torch.equal(got, alone[n]) for n, got in zip(order, pool.map(logits, order), strict=True))


def test_compiled_decoding_with_a_static_cache():
    """generate() compiles the decoding steps; the prefill runs as it is."""
    model, inputs = build("llava"), prompt("llava", ["abIcdefghi"])
    oracle = tuned(model, inputs)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    how = transformers.CompileConfig(backend="eager")
    how._compile_all_devices = True  # without it, a GPU is waited for
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = generated(model, inputs, cache_implementation="static", compile_config=how)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert torch.equal(got, generated(oracle.model, inputs))
    assert handle.report().layers[0].rows


@pytest.mark.parametrize("how", ["prompt lookup", pytest.param("assistant", marks=pytest.mark.seam)])
def test_drafted_tokens(how):
    """The prefill may hold drafted tokens, which the choice then sees; later drafts get ordinary attention."""
    model, inputs = build("llava"), prompt("llava", ["Iabcabcab"])
    options = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        options = {"assistant_model": build("llava", seed=1)}
    with eah.enable(model, threshold=0.02) as handle:
        got = generated(model, inputs, **options)
    layer = handle.report().layers[0]
    assert got.shape[1] == inputs["input_ids"].shape[1] + 6
    assert layer.rows[0].image_tokens == 9 and layer.rows[0].head is not None
    assert layer.afterwards == Reason.CACHED.value


def test_pipeline():
    """image-text-to-text, as far as it goes without a processor: the model is called by the pipeline's generate."""
    Image = pytest.importorskip("PIL.Image")
    from ..support.processors import processor_of

    model, process = build_family("llava"), processor_of("llava")
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=process, device="cpu")
    picture = Image.fromarray(torch.full((12, 12, 3), 90, dtype=torch.uint8).numpy())
    with eah.enable(model, threshold=0.02) as handle:
        out = pipe(images=[picture], text="<image>abcdef", max_new_tokens=3, do_sample=False)
    assert out[0]["generated_text"]
    assert handle.report().layers[0].rows[0].image_tokens == 9


@pytest.mark.seam
def test_continuous_batching_is_delegated():
    from transformers.generation import configuration_utils

    if not hasattr(configuration_utils, "ContinuousBatchingConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no ContinuousBatchingConfig")
    model = build("llava")
    requests = [[5, 6, *[IMAGE] * 9, 7, 8], [9, 10, 11]]
    memory = configuration_utils.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32, use_cuda_graph=False)
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)

    def tokens():
        outputs = model.generate_batch(requests, settings, memory, progress_bar=False)
        return [output.generated_tokens for output in outputs.values()]

    plain = tokens()
    with eah.enable(model, threshold=0.0) as handle:
        assert tokens() == plain
    assert handle.report().layers[0].stood_aside == Reason.CONTINUOUS.value


def test_pixels_by_position():
    """The first argument of a model with image features first is not taken for token ids."""
    model, inputs = build_family("blip-2"), family_prompt("blip-2", ["abIc"])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad(), eah.enable(model) as handle:
        model(pixels, **inputs)
    assert handle.report().layers[0].stood_aside == Reason.BY_POSITION.value


def test_blip_without_a_prompt():
    """The model makes the prompt itself: its image tokens and a start token."""
    model, inputs = build_family("blip-2"), family_prompt("blip-2", ["Ia", "Ib"])
    model.config.text_config.bos_token_id = 2
    with torch.no_grad(), eah.enable(model, threshold=0.02) as handle:
        model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=3, do_sample=False)
    assert [row.image_tokens for row in handle.report().layers[0].rows] == [9, 9]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["instructblip", pytest.param("kosmos-2", marks=pytest.mark.seam)])
def test_copies_of_models_with_an_inner_generate(family, how):
    model, inputs = build_family(family), family_prompt(family, ["abIcdefghi", "abcIde"])
    plain = generated(model, inputs)
    with eah.enable(model, threshold=0.02):
        twin = how(model)
        want = generated(model, inputs)
    assert torch.equal(generated(twin, inputs), want) and not torch.equal(want, plain)
    handle = eah.Handle.of(twin)
    assert [row.image_tokens for row in handle.report().layers[0].rows] == [9, 9]
    handle.disable()
    assert torch.equal(generated(twin, inputs), plain)
    assert "generate" not in vars(twin)


def test_weights_on_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("llava"), prompt("llava", MIXED)
    with eah.enable(model, threshold=0.02):
        want = generated(model, inputs)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    device_map |= {"model.language_model.rotary_emb": "cpu"}
    device_map |= {f"model.language_model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    accelerate.dispatch_model(model, device_map, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert attention_of(model, 1).q_proj.weight.device.type == "meta"
    with eah.enable(model, threshold=0.02) as handle:
        assert torch.equal(generated(model, inputs), want)
    assert handle.report().layers[0].rows


def test_peft_adapters():
    peft = pytest.importorskip("peft")
    model, inputs = build("llava"), prompt("llava", MIXED)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with eah.enable(adapted.get_base_model(), threshold=0.02) as handle:
        adapted.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert handle.report().layers[0].rows
