"""Enabling and disabling: restored bit for bit, copies, threads, and arguments that do not fit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eah
from eah.transformers import enable as enabling
from eah.transformers.enable import NEWEST_TESTED
from eah.transformers.families import FAMILIES as FAMILY_ROWS

from ..support.oracle import Oracle
from ..support.tiny_models import FAMILIES, IMAGE, TEXT, attention_of, build, prompt

transformers = pytest.importorskip("transformers")

ROWS = ["abIcdefghi", "abcIde"]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def state(model):
    """Everything that enabling may touch, by identity."""
    modules = [(m, m.__dict__.get("config"), sorted(m.__dict__), len(m._forward_pre_hooks)) for m in model.modules()]
    return [
        (id(m), id(config), names, hooks, len(m._forward_pre_hooks_with_kwargs)) for m, config, names, hooks in modules
    ]


@pytest.mark.seam
@pytest.mark.parametrize("family", FAMILIES)
def test_exit_restores_the_model(family):
    model, inputs = build(family), prompt(family, ROWS)
    plain = logits(model, **inputs)
    before, config = state(model), copy.deepcopy(model.config.to_dict())
    for _ in range(2):
        with pytest.raises(KeyError), eah.enable(model, threshold=0.0):
            assert not torch.equal(logits(model, **inputs), plain)
            raise KeyError
        assert state(model) == before and model.config.to_dict() == config
        assert torch.equal(logits(model, **inputs), plain)


def test_only_the_chosen_layer_is_touched():
    model = build("llava")
    configs = [id(attention_of(model, layer).config) for layer in range(3)]
    with eah.enable(model, layers=(2,)):
        now = [attention_of(model, layer).config for layer in range(3)]
        assert [id(config) for config in now[:2]] == configs[:2]
        assert [config._attn_implementation for config in now] == ["sdpa", "sdpa", "eah"]
        assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == "sdpa"


def test_enabling_twice_raises_and_disabling_twice_does_nothing():
    model = build("llava")
    first = eah.enable(model)
    for again in (model, model.model):
        with pytest.raises(ValueError, match="enabled already"):
            eah.enable(again)
    first.disable()
    first.disable()
    second = eah.enable(model)
    first.disable()  # not its model any more
    assert attention_of(model, 1).config._attn_implementation == "eah"
    second.disable()
    assert attention_of(model, 1).config._attn_implementation == "sdpa"


def test_the_base_model_itself():
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", ROWS)
    with torch.no_grad(), eah.enable(model.model, threshold=0.0) as handle:
        model.model(**inputs)
    assert len(handle.report().layers[0].rows) == 2


def test_save_and_reload_while_enabled(tmp_path):
    model, inputs = build("llava"), prompt("llava", ROWS)
    plain = logits(model, **inputs)
    with eah.enable(model, threshold=0.0):
        model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert "eah" not in saved and json.loads(saved)["model_type"] == "llava"
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(logits(again, **inputs), plain)


def test_set_attn_implementation_while_enabled():
    model, inputs = build("llava"), prompt("llava", ROWS)
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    real = inputs["attention_mask"].bool()
    with eah.enable(model, threshold=oracle.threshold):
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model, **inputs)[real], oracle(**inputs)[real], rtol=1e-4, atol=1e-4)
    assert attention_of(model, 1).config._attn_implementation == "eager"


@pytest.mark.seam
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_enabled_too(how):
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", ROWS)
    plain = logits(model, **inputs)
    with eah.enable(model, threshold=0.0):
        twin = how(model)
        wanted = logits(model, **inputs)
    assert torch.equal(logits(model, **inputs), plain)
    assert torch.equal(logits(twin, **inputs), wanted)
    handle = eah.Handle.of(twin)
    assert handle.report().layers[0].rows
    assert attention_of(twin, 1).eah_layer.config is twin.get_decoder().config
    handle.disable()
    assert torch.equal(logits(twin, **inputs), plain)
    assert attention_of(twin, 1).config is twin.get_decoder().config
    with pytest.raises(ValueError, match="not enabled"):
        eah.Handle.of(twin)


def test_an_unpickled_model_runs_in_a_fresh_process(tmp_path):
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", ROWS)
    with eah.enable(model, threshold=0.0):
        torch.save((model, inputs, logits(model, **inputs)), tmp_path / "model.pt")
    run = (
        f"import torch; m, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(m(**x).logits, y, rtol=1e-4, atol=1e-4)"
    )
    subprocess.run([sys.executable, "-c", run], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_two_threads_with_different_images():
    model = build("llava")
    calls = [prompt("llava", ["abIcdefghi"]), prompt("llava", ["abcdefgIhi"])]
    with eah.enable(model, threshold=0.03), ThreadPoolExecutor(2) as pool:
        alone = [logits(model, **call) for call in calls]
        order = [0, 1] * 20
        together = pool.map(lambda number: logits(model, **calls[number]), order)
        assert all(torch.equal(got, alone[number]) for number, got in zip(order, together, strict=True))


def test_weights_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("llava"), prompt("llava", ROWS)
    with eah.enable(model, threshold=0.0):
        wanted = logits(model, **inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with eah.enable(model, threshold=0.0) as handle:
        assert torch.equal(logits(model, **inputs), wanted)
    assert handle.report().layers[0].rows


def test_report_before_during_and_after():
    model, inputs = build("llava", layers=(0, 1)), prompt("llava", ["abIcd", "abcde"])
    handle = eah.enable(model, layers=(0, 1), threshold=0.0)
    assert handle.report() == eah.Report((eah.LayerReport(0), eah.LayerReport(1)))
    assert str(handle.report()) == "layer 0: nothing ran yet\nlayer 1: nothing ran yet"
    logits(model, **inputs)
    report = handle.report()
    handle.disable()
    assert handle.report() == report
    row, other = report.layers[1].rows
    level = row.uniform_level  # threshold 0: every head has nine, the first wins
    assert row == eah.RowReport(0, (9, 9, 9, 9), 9, 1.0, None, True, True, level, 1.0) and 0 < level < 1
    assert other == eah.RowReport(None, (0, 0, 0, 0), 0, 0.0, "no image token")
    assert "layer 1\n  row  head  sinks  image tokens  density\n    0     0      9             9    1.000" in str(
        report
    )
    logits(model, **inputs)
    assert handle.report() == report


def test_history_keeps_the_last_prefills():
    model = build("llava", layers=(0, 1))
    reports = []
    with eah.enable(model, layers=(0, 1), threshold=0.0, history=2) as handle:
        assert handle.history == ()
        for rows in (["abIcd"], ["abcde"], ["kIx", "abIcIef"]):
            model.generate(**prompt("llava", rows), max_new_tokens=2, do_sample=False)
            reports.append(handle.report())
        assert handle.history == tuple(reports[1:])
        compiled = torch.compile(model, backend="eager")
        torch._dynamo.utils.counters.clear()
        for _ in range(6):
            logits(compiled, **prompt("llava", ["abIcd"]))
            frames = dict(torch._dynamo.utils.counters["frames"])
        assert handle.history == (reports[0], reports[0])
        logits(compiled, **prompt("llava", ["abIcd"]))
        assert dict(torch._dynamo.utils.counters["frames"]) == frames  # nothing was compiled anew
    assert len(handle.history) == 2
    with eah.enable(model) as handle:
        logits(model, **prompt("llava", ["abIcd"]))
        assert handle.history == ()


def test_the_history_of_several_threads():
    """Their layers take turns in any order; each prefill is one report all the same."""
    model, prompts = build("llava", layers=(0, 1)), [prompt("llava", ["abIcd"] * rows) for rows in (1, 2)]
    turns = threading.Barrier(2, timeout=30)

    def wait(*arguments):
        turns.wait()

    hook = attention_of(model, 1).register_forward_pre_hook(wait)
    with eah.enable(model, layers=(0, 1), threshold=0.0, history=8) as handle, ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            list(pool.map(lambda inputs: logits(model, **inputs), prompts))
        sizes = [[len(layer.rows) for layer in report.layers] for report in handle.history]
    hook.remove()
    assert sorted(sizes) == [[1, 1]] * 3 + [[2, 2]] * 3


def continued(inputs, cache):
    """Two text tokens more."""
    rows = len(inputs["input_ids"])
    more = torch.ones(rows, 2, dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], more], 1)
    return {"input_ids": more * 5, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_turn_in_a_thread_of_its_own(compiled):
    """It is told of in the last prefill's report, whichever thread that ran in, and every prefill stays one report."""
    model, (first, second) = build("llava"), (prompt("llava", ["abIcd"] * rows) for rows in (1, 2))
    if compiled:
        attention_of(model, 1).compile(backend="eager")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with eah.enable(model, threshold=0.0, history=3) as handle:
        with ThreadPoolExecutor(1) as one:
            one.submit(logits, model, **first, past_key_values=cache).result()
            before = handle.history
            with ThreadPoolExecutor(1) as other:
                other.submit(logits, model, **continued(first, cache)).result()
            assert len(before) == len(handle.history) == 1 and handle.history != before
            assert handle.history == (handle.report(),) and "second turn" in handle.report().layers[0].afterwards
            before = handle.history
            logits(model, **second)
            one.submit(logits, model, **continued(first, cache)).result()
        assert handle.history == (*before, handle.report())
        assert [len(report.layers[0].rows) for report in handle.history] == [1, 2]


def test_the_history_read_while_prefills_run(monkeypatch):
    model, inputs = build("llava"), prompt("llava", ["abIcd"])
    with eah.enable(model, threshold=0.0, history=8) as handle:
        for _ in range(2):
            logits(model, **inputs)
        read = eah.Handle._report

        def read_slowly(handle, records):
            logits(model, **inputs)  # another thread's, meanwhile
            return read(handle, records)

        monkeypatch.setattr(eah.Handle, "_report", read_slowly)
        assert len(handle.history) == 2


@pytest.mark.parametrize("history", [1, 4])
def test_a_prefill_that_is_interrupted_between_layers(history):
    """The history stays readable and never shows layers of different prefills as one."""
    model, reports = build("llava", layers=(0, 1)), []

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with eah.enable(model, layers=(1, 0), threshold=0.0, history=history) as handle:
        logits(model, **prompt("llava", ["abIcd"]))
        reports.append(handle.report())
        hook = attention_of(model, 1).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, **prompt("llava", ["kIx", "abIcIef"]))
        hook.remove()
        cut = handle.history[-1]
        assert [len(layer.rows) for layer in cut.layers] == [0, 2]
        assert len(handle.history) == min(history, 2) and handle.history[:-1] == tuple(reports[: history - 1])
        logits(model, **prompt("llava", ["abcde"]))
        reports.append(handle.report())
        assert handle.history == (reports[0], cut, reports[1])[-history:]


@pytest.mark.parametrize(
    "argument, value, error, message",
    [
        ("layers", 1, TypeError, "layers must be .* got 1"),
        ("layers", "1", TypeError, "layers must be .* got '1'"),
        ("layers", (True,), TypeError, r"layers must be .* got \(True,\)"),
        ("layers", (1.0,), TypeError, r"layers must be .* got \(1.0,\)"),
        ("layers", (), ValueError, r"layers must be .* got \(\)"),
        ("layers", [1, 1], ValueError, r"layers must be .* distinct .* got \[1, 1\]"),
        ("layers", (0, 3), ValueError, r"layers must be within 0\.\.2 .* got 3"),
        ("layers", (-1,), ValueError, r"layers must be within 0\.\.2 .* got -1"),
        ("threshold", -0.1, ValueError, "threshold must be a number >= 0, got -0.1"),
        ("threshold", float("nan"), ValueError, "threshold must be a number >= 0, got nan"),
        ("threshold", "0.1", ValueError, "threshold must be a number >= 0, got '0.1'"),
        ("min_density", 1.5, ValueError, r"min_density must be a number in 0\.\.1, got 1.5"),
        ("broadcast_to", 5, ValueError, r'broadcast_to must be "all" or an int within 1\.\.4, got 5'),
        ("decode", "on", ValueError, "decode must be one of off, hold, track, got 'on'"),
        ("history", -1, ValueError, "history must be an int >= 0, got -1"),
        ("history", True, ValueError, "history must be an int >= 0, got True"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit(argument, value, error, message):
    model = build("llava")
    before = state(model)
    with pytest.raises(error, match=message):
        eah.enable(model, **{argument: value})
    assert state(model) == before


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='backend="triton" cannot be used'):
        eah.enable(build("llava"), backend="triton")


def test_models_that_are_none():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        eah.enable(torch.nn.Linear(2, 2))


def test_models_without_an_image_token():
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    with pytest.raises(eah.UnsupportedModelError, match=r"LlamaForCausalLM .*'llama'\) has no image token"):
        eah.enable(text)
    with pytest.raises(eah.UnsupportedModelError, match="has no image token"):
        eah.enable(build("llava").get_decoder())


def test_a_family_that_is_not_in_the_table(monkeypatch):
    """It works by the general rule, on the mask that arrives, and the report says that it is untested."""
    monkeypatch.delitem(FAMILY_ROWS, "llava")
    model, inputs = build("llava"), prompt("llava", ROWS)
    oracle = Oracle(model, inputs["input_ids"] == IMAGE)
    oracle.tune(inputs)
    real = inputs["attention_mask"].bool()
    with eah.enable(model, threshold=oracle.threshold) as handle:
        torch.testing.assert_close(logits(model, **inputs)[real], oracle(**inputs)[real], rtol=1e-4, atol=1e-4)
    report = handle.report()
    assert report.layers[0].rows and len(report.notes) == 1
    assert "LlavaForConditionalGeneration (model_type 'llava') is of no family that was tested" in str(report)


@pytest.mark.seam
def test_a_newer_transformers_is_called_untested(monkeypatch):
    """The newest version tested is at least the installed one, and any beyond it is said to be untested."""
    for newest, notes in {
        NEWEST_TESTED: (),
        (5, 2): (f"untested with transformers {transformers.__version__}: the newest version tested is 5.2",),
    }.items():
        monkeypatch.setattr("eah.transformers.enable.NEWEST_TESTED", newest)
        with eah.enable(build("llava")) as handle:
            assert handle.report().notes == notes


def test_an_untested_triton_is_named_where_it_would_run(monkeypatch):
    monkeypatch.setattr("eah_kernels.backends._triton", lambda: (3, 10, 0))
    model = build("llava")
    with eah.enable(model) as handle:
        assert handle.report().notes == ()
    (note,) = enabling._notes(model, FAMILY_ROWS["llava"], (1,), (1,), "off", on_triton=True)
    assert note.startswith("untested with triton 3.10.0: the newest version tested is 3.9; ")


def test_layers_without_an_attention_map():
    """The default moves to the first layer with a map; a layer that was named does not."""
    convolutional = {"layer_types": ["conv", "conv", "full_attention"], "decoder": "Lfm2Config"}
    model = build("llava", layers=(), **convolutional)
    with pytest.raises(eah.UnsupportedModelError, match=r"layer 1 of .* no attention map .* first usable layer is 2"):
        eah.enable(model, layers=(1,))
    with eah.enable(model, threshold=0.0) as handle:
        logits(model, **prompt("llava", ROWS))
    assert handle.report().layers[0].layer == 2 and handle.report().layers[0].rows
    assert handle.report().notes == ("layer 1 has no attention map: layer 2, the first usable one, was taken",)
    with eah.enable(model, layers=(2,)) as handle:
        assert handle.report().notes == ()
    with pytest.raises(eah.UnsupportedModelError, match=r"no layer of .* has an attention map"):
        eah.enable(build("llava", layers=(), decoder="Lfm2Config", layer_types=["conv"] * 3))


def test_without_transformers(monkeypatch):
    model = build("llava")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"eah\.enable needs transformers: pip install"):
        eah.enable(model)
