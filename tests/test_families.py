"""Every family of `eah models`, tiny and random, against the oracle: the rows of `eah.models.FAMILIES` hold."""

from __future__ import annotations

import pytest
import torch

import eah
from eah.models import FAMILIES, family_table
from family_models import FAMILIES as TINY
from family_models import attention_of, build, prompt
from oracle import Oracle
from tiny_models import IMAGE, one_thread  # noqa: F401

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


@pytest.mark.parametrize("family", TINY)
def test_nothing_is_left_behind(family, tmp_path):
    model = built(family)
    before = everything(model)
    with eah.enable(model):
        assert everything(model) != before
        model.save_pretrained(tmp_path)
    assert everything(model) == before
    assert "eah" not in (tmp_path / "config.json").read_text()


def everything(model):
    """What enabling may touch, by identity."""
    return [
        (id(module), id(module.__dict__.get("config")), sorted(module.__dict__), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def test_the_table_and_the_tests_name_the_same_families():
    working = {row.family for row in family_table() if row.status == "works"}
    assert working - set(TINY) == {"minimax_m3_vl"}
    assert set(TINY) <= working
    for name, tiny in TINY.items():
        assert FAMILIES[name].first_layer == tiny.layer, name
