"""What an enabled model computes: logits and tokens against an eager oracle that computes `eah_kernels.reference`."""

from __future__ import annotations

import pytest
import torch

import eah
from eah import method

from ..support.oracle import Oracle
from ..support.tiny_models import FAMILIES, IMAGE, VIDEO, attention_of, build, prompt

pytest.importorskip("transformers")

CASES = {
    "no padding": (["abIcdef"], "left"),
    "left padding": (["abIcdefghi", "abcIde"], "left"),
    "right padding": (["abIcdefghi", "abcIde"], "right"),
    "two images": (["abIcdIef", "kIxIl"], "left"),
    "a row without image": (["abIcdef", "abcdefghijkl"], "left"),
}


def close(got, want, real):
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-4, atol=2e-4)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def tuned(model, inputs, **oracle):
    """An oracle for the model and inputs, its threshold chosen."""
    oracle = Oracle(model, inputs["input_ids"] == IMAGE, **oracle)
    oracle.tune(inputs)
    return oracle


def heads(report, layer=0):
    return [-1 if row.head is None else row.head for row in report.layers[layer].rows]


@pytest.mark.seam
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_oracle(family, case, attn):
    model, inputs = build(family, attn), prompt(family, *CASES[case])
    oracle = tuned(model, inputs)
    plain, want = logits(model, **inputs), oracle(**inputs)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = logits(model, **inputs)
    close(got, want, inputs["attention_mask"])
    assert (got - plain).abs().max() > 0.1
    rows = handle.report().layers[0].rows
    assert heads(handle.report()) == oracle.head[1].tolist()
    assert [list(row.sinks) for row in rows] == oracle.counts[1].tolist()
    assert [row.image_tokens for row in rows] == oracle.image_mask.sum(-1).tolist()
    assert torch.equal(logits(model, **inputs), plain)


def test_a_row_without_image_keeps_its_logits():
    model, inputs = build("llava"), prompt("llava", *CASES["a row without image"])
    plain, oracle = logits(model, **inputs), tuned(model, inputs)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        close(logits(model, **inputs)[1:], plain[1:], inputs["attention_mask"][1:])
    row = handle.report().layers[0].rows[1]
    assert (row.head, row.image_tokens, row.density, row.why_none) == (None, 0, 0.0, "no image token")


@pytest.mark.seam
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beam", "static", "no cache"],
)
def test_generated_tokens_equal_the_oracle(family, how):
    """EAH at prefill only; without a cache every step is a prefill. Twice: the static cache is kept and reset."""
    model, inputs = build(family), prompt(family, *CASES["left padding"])
    oracle = tuned(model, inputs)
    options = {"max_new_tokens": 6, "do_sample": False, **how}
    plain = model.generate(**inputs, **options)
    dynamic = {key: value for key, value in options.items() if key != "cache_implementation"}
    want = oracle.model.generate(**inputs, **dynamic)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        assert torch.equal(model.generate(**inputs, **options), want)
        assert torch.equal(model.generate(**inputs, **options), want)
        assert handle.report().layers[0].rows and handle.report().layers[0].afterwards is None
    assert not torch.equal(want, plain)
    assert torch.equal(model.generate(**inputs, **options), plain)


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
MISTRAL_WINDOW = {"decoder": "MistralConfig", "sliding_window": 6}
GEMMA2 = {"decoder": "Gemma2Config", "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0}


@pytest.mark.seam
@pytest.mark.parametrize(
    "family, attn, text",
    [
        ("qwen2_5_vl", "sdpa", QWEN_WINDOW),
        ("qwen2_5_vl", "eager", QWEN_WINDOW),
        ("llava", "sdpa", MISTRAL_WINDOW),
        ("llava", "eager", MISTRAL_WINDOW),
        ("llava", "eager", GEMMA2),  # transformers' sdpa refuses soft-caps
    ],
)
def test_sliding_window_and_softcap(family, attn, text):
    model, inputs = build(family, attn, **text), prompt(family, *CASES["left padding"])
    oracle = tuned(model, inputs)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        close(logits(model, **inputs), oracle(**inputs), inputs["attention_mask"])
        assert heads(handle.report()) == oracle.head[1].tolist()
        static = model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(static, oracle.model.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    "attn, text, dims", [("sdpa", {}, 2), ("eager", {}, 2), ("sdpa", MISTRAL_WINDOW, 4), ("eager", GEMMA2, 4)]
)
def test_plain_causal_layers_are_given_the_padding_mask(monkeypatch, attn, text, dims):
    model, inputs = build("llava", attn, **text), prompt("llava", *CASES["left padding"])
    arrived = []

    def enhance(call, image_mask, knobs):
        arrived.append((call.scoring.attention_mask.dim(), call.scoring.causal))
        return method.enhance(call, image_mask, knobs)

    monkeypatch.setattr("eah.transformers.plan.enhance", enhance)
    with eah.enable(model):
        logits(model, **inputs)
    assert arrived == [(dims, dims == 2)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_two_layers_and_named_backends(backend):
    model, inputs = build("internvl", layers=(0, 1)), prompt("internvl", *CASES["left padding"])
    oracle = tuned(model, inputs, layers=(0, 1))
    with eah.enable(model, layers=(0, 1), threshold=oracle.threshold, backend=backend) as handle:
        close(logits(model, **inputs), oracle(**inputs), inputs["attention_mask"])
    report = handle.report()
    assert [heads(report, 0), heads(report, 1)] == [oracle.head[0].tolist(), oracle.head[1].tolist()]


def test_min_density_keeps_rows_out():
    model, inputs = build("llava"), prompt("llava", *CASES["no padding"])
    oracle, plain = tuned(model, inputs), logits(model, **inputs)
    density = oracle.counts[1].max().item() / 9
    with eah.enable(model, threshold=oracle.threshold, min_density=min(density + 0.01, 1.0)) as handle:
        close(logits(model, **inputs), plain, inputs["attention_mask"])
    row = handle.report().layers[0].rows[0]
    assert row.head is None and "min_density" in row.why_none and row.density == pytest.approx(density)


@pytest.mark.parametrize("way", ["kernels", "maps", "gradients"])
@pytest.mark.parametrize("family", FAMILIES)
def test_some_heads_receive_the_map(family, way):
    model, inputs = build(family, "eager"), prompt(family, *CASES["a row without image"])
    oracle = tuned(model, inputs, number=2)
    all_heads = tuned(model, inputs)(**inputs)
    with eah.enable(model, threshold=oracle.threshold, broadcast_to=2), torch.set_grad_enabled(way == "gradients"):
        got = model(**inputs, output_attentions=way == "maps").logits.detach()
    close(got, oracle(**inputs), inputs["attention_mask"])
    assert (got - all_heads)[0].abs().max() > 0.01


@pytest.mark.seam
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_without_ids(family):
    model, inputs = build(family), prompt(family, *CASES["left padding"])
    oracle = tuned(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {key: value for key, value in inputs.items() if key != "input_ids"}
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = logits(model, **given, inputs_embeds=embeds)
    found = [row.image_tokens for row in handle.report().layers[0].rows]
    assert found == [9, 9]
    close(got, oracle(**given, inputs_embeds=embeds), inputs["attention_mask"])


def test_video_tokens_count_as_image_tokens():
    model = build("qwen2_5_vl")
    ids = torch.tensor([[1, 2, *[VIDEO] * 5, 3, *[IMAGE] * 4, 4]])
    with eah.enable(model) as handle:
        logits(model, input_ids=ids)
    assert handle.report().layers[0].rows[0].image_tokens == 9


def test_masks_of_the_callers_own():
    """A 4-D mask is used as it is: here one that also hides the first real token."""
    model, inputs = build("llava"), prompt("llava", *CASES["left padding"])
    padding = inputs["attention_mask"].bool()
    mask = torch.ones(padding.shape[1], padding.shape[1], dtype=torch.bool).tril() & padding[:, None, None]
    mask[0, :, 1:, 0] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    oracle = tuned(model, {**inputs, "attention_mask": additive})
    with eah.enable(model, threshold=oracle.threshold) as handle:
        for own in (mask, additive):
            got = logits(model, **{**inputs, "attention_mask": own})
            close(got, oracle(**{**inputs, "attention_mask": additive}), inputs["attention_mask"])
            assert heads(handle.report()) == oracle.head[1].tolist()


@pytest.mark.seam
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_no_attention_mask_and_plain_positions(attn):
    model, inputs = build("llava", attn), prompt("llava", *CASES["no padding"])
    oracle = tuned(model, inputs)
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with eah.enable(model, threshold=oracle.threshold) as handle:
        for positions in (None, torch.arange(inputs["input_ids"].shape[1])[None]):
            got = logits(model, **bare, position_ids=positions, use_cache=False)
            close(got, oracle(**inputs), inputs["attention_mask"])
            assert heads(handle.report()) == oracle.head[1].tolist()


@pytest.mark.seam
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_with_gradients(family, checkpointing):
    """A model called without no_grad: the same logits, and the gradients of ordinary attention on the lent q and k."""
    model, inputs = build(family), prompt(family, *CASES["left padding"])
    oracle = tuned(model, inputs)
    want = oracle(**inputs)
    target = torch.randn(want.shape)
    real = inputs["attention_mask"].bool()
    (oracle.model(**inputs).logits * target)[real].sum().backward()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(checkpointing)
    with eah.enable(model, threshold=oracle.threshold) as handle:
        got = model(**inputs).logits
        (got * target)[real].sum().backward()
    close(got.detach(), want, inputs["attention_mask"])
    assert heads(handle.report()) == oracle.head[1].tolist()
    for name in ("q_proj", "k_proj", "v_proj"):
        grad = getattr(attention_of(model, 1), name).weight.grad
        wanted = getattr(attention_of(oracle.model, 1), name).weight.grad
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_forward_mode_and_functorch():
    """Derivatives that requires_grad does not tell of: of every logit along a tangent, and their sum's gradient."""
    model, inputs = build("llava", "eager").requires_grad_(False), prompt("llava", *CASES["left padding"])
    oracle, weight, real = tuned(model, inputs), model.get_input_embeddings().weight, inputs["attention_mask"].bool()
    tangent = torch.randn_like(weight)

    def logits_of(model, weight):
        name = "model.language_model.embed_tokens.weight"
        return torch.func.functional_call(model, {name: weight}, kwargs=inputs).logits

    wanted = torch.func.jvp(lambda weight: logits_of(oracle.model, weight), (weight,), (tangent,))[1]
    with eah.enable(model, threshold=oracle.threshold):
        with torch.no_grad():
            along = torch.func.jvp(lambda weight: logits_of(model, weight), (weight,), (tangent,))[1]
        gradient = torch.func.grad(lambda weight: logits_of(model, weight)[real].sum())(weight)
    close(along, wanted, real)
    torch.testing.assert_close((gradient * tangent).sum(), along[real].sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.seam
def test_attention_maps_are_those_used():
    model, inputs = build("llava", "eager"), prompt("llava", *CASES["a row without image"])
    oracle = tuned(model, inputs)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions
        with eah.enable(model, threshold=oracle.threshold):
            out = model(**inputs, output_attentions=True)
    close(out.logits, oracle(**inputs), inputs["attention_mask"])
    head = oracle.head[1][0]
    assert len(out.attentions) == 3 and torch.equal(out.attentions[0], plain[0])
    torch.testing.assert_close(out.attentions[1][0], plain[1][0, head].expand(4, -1, -1))
    torch.testing.assert_close(out.attentions[1][1], plain[1][1])


def test_autocast():
    """Under autocast q and k arrive in float32 and v in bfloat16. Gentle heads: rounding must not move a count."""
    model, inputs = build("llava", layers=()), prompt("llava", *CASES["left padding"])
    oracle, real = tuned(model, inputs), inputs["attention_mask"].bool()
    plain, want = logits(model, **inputs), oracle(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounding = (logits(model, **inputs) - plain)[real].abs().max()
        with eah.enable(model, threshold=oracle.threshold) as handle:
            got = logits(model, **inputs)
            got_with_grad = model(**inputs).logits.detach()
    assert heads(handle.report()) == oracle.head[1].tolist()
    assert (got - want)[real].abs().max() <= 2 * rounding < (want - plain)[real].abs().max()
    assert (got_with_grad - want)[real].abs().max() <= 2 * rounding


def test_compiled_without_a_graph_break():
    """Compiled first, enabled after, disabled again: the guards notice. Pixels are left out: the model breaks there."""
    model, inputs = build("llava"), prompt("llava", *CASES["left padding"])
    del inputs["pixel_values"]
    oracle = tuned(model, inputs)
    plain = logits(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    close(logits(compiled, **inputs), plain, inputs["attention_mask"])
    with eah.enable(model, threshold=oracle.threshold) as handle:
        close(logits(compiled, **inputs), oracle(**inputs), inputs["attention_mask"])
        assert heads(handle.report()) == oracle.head[1].tolist()
    close(logits(compiled, **inputs), plain, inputs["attention_mask"])
