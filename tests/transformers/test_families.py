"""Every family of `eah models`, tiny and random, against the oracle: the rows of `FAMILIES` hold."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import eah
from eah.transformers.arguments import plain_causal
from eah.transformers.families import FAMILIES, PLAIN_CAUSAL_DECODERS, SPEECH, Refused, family_table
from eah.transformers.find import attention_namespace, head_dims, query_heads

from ..support.family_models import FAMILIES as TINY
from ..support.family_models import attention_of, build, prompt
from ..support.family_parts import QFORMER, SQUARE
from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, TEXT, VIDEO, VOCAB

transformers = pytest.importorskip("transformers")
modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")

PROMPTS = {
    "left padding": (["abIcdefghi", "abcIde"], "left"),
    "right padding": (["abIcdefghi", "abcIde"], "right"),
    "two images": (["abIcdIefgh", "kIxIl"], "left"),
    "a row without image": (["abIcdefgh", "abcdefghijkl"], "left"),
}


NEWEST_ONLY = {"apertus1p5"}  # in the newest transformers, and not in constraints.txt's
RAISE_BY_THEMSELVES = {("llama4", "5.24.0")}  # it reads image_outputs of an output that has none


def skip_without(*names):
    missing = [name for name in names if not hasattr(transformers, name)]
    if missing:
        pytest.skip(f"transformers {transformers.__version__} lacks {', '.join(missing)}")


def built(family, attn=None):
    """Shared by the tests, which leave it as it was."""
    skip_without(TINY[family].config, TINY[family].model)
    if (family, transformers.__version__) in RAISE_BY_THEMSELVES:
        pytest.skip(f"the forward of {family} in transformers {transformers.__version__} raises, enabled or not")
    return build_once(family, attn)


build_once = functools.cache(build)


def oracle_for(family, model, inputs):
    oracle = Oracle(model, inputs["input_ids"] == IMAGE, layers=(TINY[family].layer,))
    oracle.tune(inputs, TINY[family].layer)
    return oracle


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.seam] if name in NEWEST_ONLY else []) for name in TINY]
)
def test_logits(family):
    model = built(family)
    for case, (rows, padding) in PROMPTS.items():
        inputs = prompt(family, rows, padding)
        oracle = oracle_for(family, model, inputs)
        plain, want = logits(model, **inputs), oracle(**inputs)
        with eah.enable(model, threshold=oracle.threshold) as handle:
            got = logits(model, **inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-3, msg=lambda m, c=case: f"{c}: {m}")
        assert (got - plain)[real].abs().max() > 0.02, case
        report = handle.report().layers[0]
        assert report.layer == TINY[family].layer
        assert [row.image_tokens for row in report.rows] == oracle.image_mask.sum(-1).tolist(), case
        assert [-1 if row.head is None else row.head for row in report.rows] == oracle.head[
            TINY[family].layer
        ].tolist(), case
        assert torch.equal(logits(model, **inputs), plain), case


@pytest.mark.parametrize("family", TINY)
def test_generation(family):
    model, inputs = built(family), prompt(family, *PROMPTS["left padding"])
    oracle = oracle_for(family, model, inputs)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    want = oracle.model.generate(**inputs, **options)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = model.generate(**inputs, **options)
    layer = handle.report().layers[0]
    assert [-1 if row.head is None else row.head for row in layer.rows] == oracle.head[TINY[family].layer].tolist()
    assert layer.afterwards is None
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)
    assert not torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
    again = model.generate(**inputs, **options)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(
    "family",
    [
        "llava",
        "qwen2_5_vl",
        "gemma3",
        "paligemma",
        "kimi_k25",
        "kosmos-2",
        "kosmos-2.5",
        "llama4",
        "muse_spark",
        "step3p7",
    ],
)
def test_attention_maps_are_those_used(family):
    model, inputs = built(family, attn="eager"), prompt(family, *PROMPTS["left padding"])
    oracle = oracle_for(family, model, inputs)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions[1]
        with eah.enable(model, threshold=oracle.threshold):
            got = model(**inputs, output_attentions=True)
    want = oracle(**inputs)
    for row, head in enumerate(oracle.head[TINY[family].layer].tolist()):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got.logits[row][real], want[row][real], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.attentions[1][row][:, real], plain[row, head][real].expand(4, -1, -1))


def test_the_prompt_that_a_video_model_makes_by_itself():
    """Without ids generate() makes a prompt of the video's tokens and a start token."""
    family = "instructblipvideo"
    model, inputs = built(family), prompt(family, ["I"])
    model.config.text_config.bos_token_id = 1
    with eah.enable(model) as handle:
        model.generate(**{name: inputs[name] for name in ("pixel_values", "qformer_input_ids")}, max_new_tokens=2)
    model.config.text_config.bos_token_id = None
    assert [row.image_tokens for row in handle.report().layers[0].rows] == [36]


@pytest.mark.parametrize("family", ["gemma3", "kosmos-2"])
def test_compiled_with_pixels(family):
    model, inputs = built(family), prompt(family, *PROMPTS["left padding"])
    oracle, real = oracle_for(family, model, inputs), inputs["attention_mask"].bool()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = logits(compiled, **inputs)
    torch.testing.assert_close(got[real], oracle(**inputs)[real], rtol=1e-3, atol=1e-3)
    assert handle.report().layers[0].rows


@pytest.mark.parametrize("family", TINY)
def test_nothing_is_left_behind(family, tmp_path):
    model = built(family)
    before = everything(model)
    with eah.enable(model):
        assert everything(model) != before
        model.save_pretrained(tmp_path)
    assert everything(model) == before
    assert "eah" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", TINY)
def test_plain_causal_decoders_hide_nothing_else(family, monkeypatch):
    """Where a mask is said to be causality and padding alone, it is, in every layer."""
    model = copy.deepcopy(built(family))
    model.set_attn_implementation("eager")
    seen = []

    def recorded(eager, module, query, key, value, attention_mask, **kwargs):
        seen.append((module, attention_mask, kwargs))
        return eager(module, query, key, value, attention_mask, **kwargs)

    for cls in {type(module) for module in model.get_decoder().modules() if hasattr(module, "layer_idx")}:
        namespace = attention_namespace(cls)
        if "eager_attention_forward" in namespace:
            eager = functools.partial(recorded, namespace["eager_attention_forward"])
            monkeypatch.setitem(namespace, "eager_attention_forward", eager)
    for padding in ("left", "right"):
        inputs = prompt(family, ["abIcdefghi", "abcIde"], padding)
        logits(model, **inputs)
        real = inputs["attention_mask"].bool()
        earlier = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
        decoder = set(model.get_decoder().modules())
        plain = [mask for module, mask, kwargs in seen if module in decoder and plain_causal(module.config, kwargs)]
        for mask in plain:
            visible = (mask > -1e30).expand(len(real), *mask.shape[1:])[:, 0]
            assert torch.equal(visible[real], (earlier & real[:, None])[real])
        windows = any(kwargs.get("sliding_window") for _, _, kwargs in seen)
        assert plain or windows or model.get_decoder().config.model_type not in PLAIN_CAUSAL_DECODERS
        seen.clear()


@pytest.mark.parametrize("family", [name for name in TINY if FAMILIES[name].video])
def test_video_tokens_count_unless_left_out(family):
    model = built(family)
    ids = torch.tensor([[1, 2, *[VIDEO] * 5, 3, *[IMAGE] * 4, 4]])
    for video, count in ((True, 9), (False, 4)):
        with eah.enable(model, video=video) as handle:
            logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert handle.report().layers[0].rows[0].image_tokens == count


@pytest.mark.parametrize("family", [name for name in TINY if not FAMILIES[name].video])
def test_families_without_a_video_token(family):
    config = built(family).config
    assert getattr(config, "video_token_id", None) in (None, IMAGE)


VIT = {**SQUARE, "embed_dim": 16}
BART = {"model_type": "bart", "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "encoder_layers": 2}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
REFUSED = {  # why, and what makes the config small, or complete where its defaults are not
    "blip": ("cross-attention", {"text_config": TEXT, "vision_config": VIT}),
    "diffusion_gemma": (
        "by diffusion",
        {
            "text_config": {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8, "num_hidden_layers": 2},
            "vision_config": {"model_type": "gemma4_vision"},
        },
    ),
    "evolla": ("proteins", {"num_hidden_layers": 2}),
    "florence2": ("an encoder", {"text_config": BART}),
    "git": ("no token of the prompt", {**TEXT, "vision_config": VIT}),
    "glm5_next": ("selected keys only", {}),
    "hy_v4_vl": ("selected keys only", {}),
    "idefics": ("cross-attention", {**TEXT, "vision_config": VIT}),
    "inkling2": ("position bias", {}),
    "inkling2_loop": ("position bias", {}),
    "inkling_mm_model": ("position bias", {}),
    "mistral4": ("text model", {"num_hidden_layers": 2}),
    "mistral_large4": ("selected keys only", {}),
    "mllama": (
        "cross-attention",
        {
            "text_config": {**TEXT, "bos_token_id": 1},
            "vision_config": {**VIT, "num_global_layers": 1, "intermediate_layers_indices": [0]},
        },
    ),
    "pi0": ("robot actions", {}),
    "pix2struct": ("an encoder", {}),
    "pixtral": ("vision tower", {"num_hidden_layers": 2}),
    "pp_formulanet": ("an encoder", {}),
    "qwen2_5_omni": ("model.thinker", {}),
    "qwen3_omni_moe": ("model.thinker", {"enable_audio_output": False}),
    "qwen4_exp": ("selected keys only", {"text_config": {**INDEXER, "num_hidden_layers": 4}}),
    "t5gemma2": ("an encoder", {}),
    "udop": ("an encoder", {}),
    "vision-encoder-decoder": (
        "an encoder",
        {"encoder": {"model_type": "vit", **VIT}, "decoder": {"model_type": "gpt2", "n_layer": 1}},
    ),
    **{name: ("no image", {}) for name, family in FAMILIES.items() if family == Refused(SPEECH)},
}
OUTSIDE_THE_MAPS = {"mistral_large4": "MistralLarge4ForConditionalGeneration", "pixtral": "PixtralVisionModel"}
MODELS = {
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **OUTSIDE_THE_MAPS,
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    reason, config = REFUSED[family]
    if family not in MODELS or not hasattr(transformers, MODELS[family]):
        pytest.skip(f"transformers {transformers.__version__} lacks {family}")
    name = MODELS[family]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    with pytest.raises(eah.UnsupportedModelError, match=f"{name} .*{family}.*cannot be enabled: .*{reason}"):
        eah.enable(model)


@pytest.mark.seam
def test_every_model_that_takes_images_and_text_has_a_row():
    """In the transformers at hand: a type that a later one adds is reported here."""
    assert set(MODELS) - set(FAMILIES) == set()


@pytest.mark.parametrize("name", ["Bert", "CLIP", "GPT2", "Llama", "Mamba", "T5", "ViT", "Whisper"])
def test_models_without_an_image_token_are_refused(name):
    cls = getattr(transformers, f"{name}Model")
    with torch.device("meta"):
        model = cls(cls.config_class())
    with pytest.raises(eah.UnsupportedModelError, match=r"no image token|an encoder"):
        eah.enable(model)


def test_an_encoder_decoder_is_refused():
    t5 = {"model_type": "t5", "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2}
    config = transformers.Blip2Config(
        use_decoder_only_language_model=False, text_config=t5, vision_config=VIT, qformer_config=QFORMER
    )
    with torch.device("meta"):
        model = transformers.Blip2ForConditionalGeneration(config)
    with pytest.raises(eah.UnsupportedModelError, match=r"'blip-2'.* its images enter an encoder"):
        eah.enable(model)


@pytest.mark.parametrize(
    ("family", "changes", "layer", "reason"),
    [
        ("minimax_m3_vl", {}, 2, "its attention looks at selected keys only"),
        ("dots3_note", {}, 1, "its attention looks at selected keys only"),
        ("gemma3n", {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}, 2, "no keys of its own"),
        ("gemma4", {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}, 2, "no keys of its own"),
        ("gemma4", {"global_head_dim": 512}, 2, "its head dim is 512, the largest possible is 256"),
    ],
)
def test_refused_layers(family, changes, layer, reason):
    skip_without(TINY[family].config)
    model = build(family, **changes)
    first = FAMILIES[family].first_layer
    with pytest.raises(
        eah.UnsupportedModelError,
        match=f"layer {layer} of .* no attention map .*{reason}.* first usable layer is {first}",
    ):
        eah.enable(model, layers=(layer,))


@pytest.mark.parametrize("family", TINY)
def test_heads_and_their_dims(family):
    """What is said of the layer before any forward is what its attention then gets."""
    model, inputs = built(family), prompt(family, ["abIc"])
    oracle = Oracle(model, inputs["input_ids"] == IMAGE, layers=(TINY[family].layer,))
    oracle(**inputs)
    module = attention_of(model, TINY[family].layer)
    assert (query_heads(module), *head_dims(module)) == oracle.dims[TINY[family].layer]


def everything(model):
    """What enabling may touch, by identity."""
    return [
        (id(module), id(module.__dict__.get("config")), sorted(module.__dict__), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def test_the_table_and_the_tests_name_the_same_families():
    working = {row.family for row in family_table() if row.status == "works"}
    assert working == set(TINY)
    assert {row.family for row in family_table() if row.status == "refused"} == set(REFUSED)
    for name, tiny in TINY.items():
        assert FAMILIES[name].first_layer == tiny.layer, name
