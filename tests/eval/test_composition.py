"""Contrastive decoding by the recipes of examples/, together with EAH, against two caches walked by hand."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import eah

from ..support.tiny_models import build, prompt

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
KNOBS = {"layers": (1,), "threshold": 0.05}


@pytest.fixture(scope="module")
def model():
    return build("llava")


def by_hand(model, inputs, disturbed, combine) -> list[int]:
    """Greedy tokens of two sequences that get the same tokens, by `combine` of their log-probabilities."""
    branches, chosen = [[dict(inputs), None], [dict(disturbed), None]], []
    for _ in range(STEPS):
        logits = []
        for branch in branches:
            output = model(**branch[0], past_key_values=branch[1], use_cache=True)
            branch[1] = output.past_key_values
            logits.append(output.logits[:, -1].log_softmax(-1))
        token = combine(*logits).argmax(-1, keepdim=True)
        chosen.append(token.item())
        for branch in branches:
            mask = torch.cat([branch[0]["attention_mask"], torch.ones(1, 1, dtype=torch.long)], -1)
            branch[0] = {"input_ids": token, "attention_mask": mask}
    return chosen


def vcd(own, other):
    return (2 * own - other).masked_fill(own < own.max() + torch.tensor(0.1).log(), -torch.inf)


@pytest.mark.parametrize("name", ["VCD", "ICD"])
def test_contrast_with_a_disturbed_prompt(model, name):
    Contrast = runpy.run_path(str(EXAMPLES / "contrast.py"))["Contrast"]
    inputs = prompt("llava", ["abIcd"])
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(5))
    disturbed = {**inputs, "pixel_values": noise} if name == "VCD" else prompt("llava", ["zyxIcd"])
    twin = copy.deepcopy(model)
    with torch.no_grad(), eah.enable(twin, **KNOBS):
        expected = by_hand(twin, inputs, disturbed, vcd)
    with eah.enable(model, history=2, **KNOBS) as handle:
        options = {"logits_processor": [Contrast(model, disturbed)], "max_new_tokens": STEPS, "do_sample": False}
        tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        first, second = handle.history
    assert tokens == expected
    assert first.layers[0].rows[0].head is not None and second.layers[0].rows[0].head is not None
    options["logits_processor"] = [Contrast(model, disturbed)]
    assert model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist() != tokens  # EAH is felt


def test_contrast_with_the_prompt_that_has_no_picture(model):
    inputs, blind = prompt("llava", ["abIcd"]), prompt("llava", ["abcd"])
    twin = copy.deepcopy(model)
    with torch.no_grad(), eah.enable(twin, **KNOBS):
        expected = by_hand(twin, inputs, blind, lambda own, other: 1.5 * own - 0.5 * other)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": blind["input_ids"], "max_new_tokens": STEPS}
    with eah.enable(model, history=2, **KNOBS) as handle:
        tokens = model.generate(**inputs, **options, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        first, second = handle.history
    assert tokens == expected
    assert first.layers[0].rows[0].head is not None
    assert second.layers[0].rows[0].head is None and second.layers[0].rows[0].why_none == "no image token"
    assert model.generate(**inputs, **options, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist() != tokens
