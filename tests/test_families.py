"""Every family of `eah models`, tiny and random, against the oracle: the rows of `eah.models.FAMILIES` hold."""

from __future__ import annotations

import pytest
import torch

import eah
from eah.models import FAMILIES, family_table
from family_models import FAMILIES as TINY
from family_models import attention_of, build, prompt
from family_parts import QFORMER, SQUARE
from oracle import Oracle
from tiny_models import IMAGE, TEXT, VIDEO, VOCAB, one_thread  # noqa: F401

transformers = pytest.importorskip("transformers")

PROMPTS = {
    "left padding": (["abIcdefghi", "abcIde"], "left"),
    "right padding": (["abIcdefghi", "abcIde"], "right"),
    "two images": (["abIcdIefgh", "kIxIl"], "left"),
    "a row without image": (["abIcdefgh", "abcdefghijkl"], "left"),
}


def built(family, **options):
    if not hasattr(transformers, TINY[family].model):
        pytest.skip(f"transformers {transformers.__version__} lacks {TINY[family].model}")
    return build(family, **options)


def oracle_for(family, model, inputs):
    oracle = Oracle(model, lambda twin: attention_of(twin, TINY[family].layer), inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    return oracle


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", TINY)
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
        assert [-1 if row.head is None else row.head for row in report.rows] == oracle.head.tolist(), case
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
    assert [-1 if row.head is None else row.head for row in layer.rows] == oracle.head.tolist()
    assert layer.afterwards is None
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)
    assert not torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
    again = model.generate(**inputs, **options)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "kimi_k25", "kosmos-2", "llama4"])
def test_attention_maps_are_those_used(family):
    model, inputs = built(family, attn="eager"), prompt(family, *PROMPTS["left padding"])
    oracle = oracle_for(family, model, inputs)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions[1]
        with eah.enable(model, threshold=oracle.threshold):
            got = model(**inputs, output_attentions=True)
    want = oracle(**inputs)
    for row, head in enumerate(oracle.head.tolist()):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got.logits[row][real], want[row][real], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.attentions[1][row][:, real], plain[row, head][real].expand(4, -1, -1))


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
    assert getattr(config, "video_token_id", None) in (None, getattr(config, "image_token_id", None))


VIT = {**SQUARE, "embed_dim": 16}
BART = {"model_type": "bart", "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "encoder_layers": 2}
REFUSED = {
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {**TEXT, "bos_token_id": 1},
            "vision_config": {**VIT, "num_global_layers": 1, "intermediate_layers_indices": [0]},
        },
        "cross-attention",
    ),
    "florence2": ("Florence2ForConditionalGeneration", {"text_config": BART}, "an encoder"),
    "idefics": ("IdeficsForVisionText2Text", {**TEXT, "vision_config": VIT}, "cross-attention"),
    "blip": ("BlipForConditionalGeneration", {"vision_config": VIT}, "cross-attention"),
    "git": ("GitForCausalLM", {**TEXT, "vision_config": VIT}, "no token of the prompt"),
    "inkling_mm_model": ("InklingForConditionalGeneration", {}, "position bias"),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", {}, "selected keys only"),
    "qwen2_5_omni": ("Qwen2_5OmniForConditionalGeneration", {"text_config": None}, "model.thinker"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    name, config, reason = REFUSED[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} lacks {name}")
    cls = getattr(transformers, name)
    config = {"text_config": dict(TEXT), **config} if "num_hidden_layers" not in config else config
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    with pytest.raises(eah.UnsupportedModelError, match=f"{name} .*cannot be enabled: .*{reason}"):
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


def test_layers_of_sparse_attention_are_refused():
    model = built("minimax_m3_vl")
    with pytest.raises(eah.UnsupportedModelError, match=r"layer 2 of .* no attention map .* first usable layer is 1"):
        eah.enable(model, layers=(2,))


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
