"""The commands, run as a user would."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import eah_kernels
from bench.contestants import published_eager
from bench.layers import Inputs
from eah import cli
from eah.cli import demo, doctor, models, samples

from ..support.saved_model import save_small_llava

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("model"), "picture.png")


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where weights are read: what is wrong has to be told before."""
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read"))


def run(capsys, *arguments):
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_bare_eah_prints_the_help(capsys):
    status, out, err = run(capsys)
    assert status == 0 and err == "" and out == run(capsys, "--help")[1]
    assert all(command in out for command in ("demo", "generate", "models", "doctor"))


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"eah-kernels {eah_kernels.__version__}\n", "")


def test_demo_in_json(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as on a user's machine, and the interpreter is slow
    whole = demo.layer_inputs  # the timing on a small layer: its form is tested here, not its figures
    monkeypatch.setattr(demo, "layer_inputs", lambda *a: whole(*(*a, 90, 4)[:4]))
    status, out, err = run(capsys, "demo", "--json")
    results = json.loads(out)
    assert status == 0 and err == ""
    assert results["image_tokens"] == 576
    [layer] = results["layers"]
    assert layer["layer"] == 1 and layer["stood_aside"] is None
    [sinks], [head] = layer["sinks"], layer["heads"]
    assert len(sinks) == 8 and sinks[head] == max(sinks) and head == sinks.index(max(sinks))
    assert results["tokens_changed"] > 0 and results["page"] is None
    assert all(found["equal"] and found["agrees"] for found in results["agreement"].values() if "equal" in found)
    assert 0 < results["agreement"]["torch"]["largest_error"] < 1e-4
    rows = results["timing"]["rows"]
    assert {"plain SDPA", "EAH, as published", "EAH, torch"} <= set(rows) and "EAH, eager" not in rows
    assert demo.MIN_ROUNDS <= results["timing"]["rounds"] <= demo.MAX_ROUNDS
    assert all(row["fastest_ms"] <= row["ms"] <= row["slowest_ms"] for row in rows.values())


def test_demo_for_people(capsys, saved_model, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    times = {"plain SDPA": [2.0, 2.0, 2.5], "EAH, as published": [9.0, 8.0, 8.0], "EAH, torch": [1.0, 2.0, 9.0]}
    timing = {"shape": "s", "dtype": "d", "rounds": 3, "rows": demo.timing_rows(times)}
    monkeypatch.setattr(demo, "time_layer", lambda *_: timing)
    monkeypatch.setattr(demo, "DRAWN", (1,))
    status, out, _ = run(capsys, "demo", "--image", saved_model[1], "--out", tmp_path)
    assert status == 0
    assert f"attends to in the picture: {tmp_path / 'inspect.html'}\n" in out and (tmp_path / "inspect.html").exists()
    for text in ("picture.png", "576 of them image tokens", "layer 1", "sinks per head", "weights are random"):
        assert text in out
    assert re.search(r"EAH, as published +8\.00 +8\.00-9\.00 +4\.00 x", out)
    assert re.search(r"EAH, torch +2\.00 +1\.00-9\.00 +-\n", out) and "the machine is busy" in out


def test_no_ratio_is_told_where_rounds_differ_by_more_than_twofold():
    steady, busy = [1.0, 2.0, 1.5], [1.0, 2.1, 1.5]
    assert demo.timing_rows({"plain SDPA": steady, "other": steady})["other"]["ratio"] == 1
    assert demo.timing_rows({"plain SDPA": steady, "other": busy})["other"]["ratio"] is None
    assert {row["ratio"] for row in demo.timing_rows({"plain SDPA": busy, "other": steady}).values()} == {None}


def test_the_demo_times_the_published_form_of_the_benchmark():
    inputs = samples.layer_inputs("cpu", torch.float32, 90, 4)
    result = demo.published(*inputs, 0.01)
    for ours, theirs in zip(result, published_eager(Inputs(*inputs, None, 0.01)), strict=True):
        assert torch.equal(ours, theirs)
    assert result.head.item() >= 0


def generate(capsys, saved_model, *more):
    folder, picture = saved_model
    common = ("--model", folder, "--image", picture, "--prompt", "Hi", "--max-new-tokens", 3, "--device", "cpu")
    return run(capsys, "generate", *common, *more)


def test_generate(capsys, saved_model):
    status, out, err = generate(capsys, saved_model, "--decode", "hold")
    assert status == 0, err
    assert "layer 1" in out and "sinks per head" in out and "keeps lending its map" in out


def test_generate_compares(capsys, saved_model):
    status, out, _ = generate(capsys, saved_model, "--compare", "--layers", 0, 2, "--threshold", 0.004)
    assert status == 0
    assert out.index("without EAH") < out.index("with EAH") < out.index("layer 0") < out.index("layer 2")


def test_generate_without_eah(capsys, saved_model):
    status, out, _ = generate(capsys, saved_model, "--no-eah")
    assert status == 0 and "layer" not in out


def test_generate_in_json(capsys, saved_model):
    status, out, err = generate(capsys, saved_model, "--compare", "--json", "--layers", "0,2")
    assert status == 0, err
    results = json.loads(out)
    assert results["device"] == "cpu" and results["prompt_tokens"] > 576
    assert list(results["answers"]) == ["without", "with"] and all(map(str.strip, results["answers"].values()))
    first, second = results["report"]["layers"]
    assert (first["layer"], second["layer"]) == (0, 2) and len(first["rows"][0]["sinks"]) == 8
    assert "report" not in json.loads(generate(capsys, saved_model, "--no-eah", "--json")[1])


@pytest.mark.parametrize(
    ("more", "status", "named"),
    [
        (["--layers", 9], 1, "layers must be within 0..3"),
        (["--layers", 1, 1], 1, "layers must be a non-empty sequence of distinct ints"),
        (["--layers", -1], 2, "layers are numbers from 0 on, such as 1 or 0,1; got '-1'"),
        (["--layers", "0;1"], 2, "got '0;1'"),
        (["--layers", ","], 2, "got ','"),
        (["--threshold", -1], 1, "threshold must be a number >= 0, got -1"),
        (["--threshold", "nan"], 1, "threshold must be"),
        (["--threshold", "low"], 2, "--threshold: invalid float value: 'low'"),
        (["--min-density", 2], 1, "min_density must be a number in 0..1"),
        (["--max-new-tokens", 0], 1, "max-new-tokens must be an int >= 1, got 0"),
        (["--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["--device", "meta"], 1, "device 'meta' cannot be used"),
        (["--device", "cuda:99"], 1, "device 'cuda:99' cannot be used"),
        (["--backend", "cuda"], 2, "--backend: invalid choice: 'cuda'"),
        (["--decode", "on"], 2, "--decode: invalid choice: 'on'"),
        (["--image", "none.png"], 1, "there is no picture none.png"),
        (["--image", __file__], 1, "test_cli.py is no picture that can be read"),
        (["--image", ROOT], 1, "is no picture that can be read"),
        (["--model", "no/such/folder"], 1, "there is no folder no/such/folder"),
        (["--model", "./none"], 1, "there is no folder ./none, and an id on the hub has the form owner/name"),
        (["--model", "none"], 1, "there is no folder none"),
        (["--model", __file__], 1, "test_cli.py is a file"),
        (["--model", ROOT], 1, "config.json"),
        (["--colour", "red"], 2, "unrecognized arguments: --colour red"),
    ],
    ids=lambda v: " ".join(map(str, v)).replace(str(ROOT), "") if isinstance(v, list) else "",
)
def test_generate_refuses_before_the_weights_are_read(capsys, saved_model, no_weights, more, status, named):
    found, out, err = generate(capsys, saved_model, *more)
    assert found == status and named in err and err.count("\n") == 1 and out == ""
    assert err.startswith("eah generate: ") or status == 2


def test_generate_refuses_a_backend_that_cannot_run(capsys, saved_model, no_weights, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, _, err = generate(capsys, saved_model, "--backend", "triton")
    assert status == 1 and 'backend="triton" cannot be used' in err and err.count("\n") == 1


def test_a_backend_is_asked_about_the_device_that_it_will_run_on(capsys, saved_model, no_weights, monkeypatch):
    """Not about the one of the model without weights: with --device cuda Triton would be refused there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("eah.cli.generate.check_knobs", lambda *_: None)  # as with a GPU
    with pytest.raises(pytest.fail.Exception, match="the weights were read"):
        generate(capsys, saved_model, "--backend", "triton")


@pytest.mark.parametrize("kind", ["text", "refused"])
def test_generate_refuses_a_model_by_its_config(capsys, saved_model, no_weights, tmp_path, kind):
    import transformers

    config = transformers.LlamaConfig() if kind == "text" else transformers.MllamaConfig()
    config.save_pretrained(tmp_path)
    status, _, err = generate(capsys, saved_model, "--model", tmp_path)
    wanted = "no vision-language model (model_type 'llama')" if kind == "text" else "enter by cross-attention"
    assert status == 1 and wanted in err and err.count("\n") == 1


def test_generate_says_that_weights_are_broken(capsys, saved_model, tmp_path):
    for file in saved_model[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    status, _, err = generate(capsys, saved_model, "--model", tmp_path)
    assert status == 1 and "weights" in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json", "tokenizer.json"])
def test_generate_says_that_the_processor_is_broken(capsys, saved_model, tmp_path, name, content):
    for file in saved_model[0].iterdir():
        (tmp_path / file.name).write_bytes(content.encode() if file.name == name else file.read_bytes())
    status, out, err = generate(capsys, saved_model, "--model", tmp_path)
    assert status == 1 and out == "" and err.count("\n") == 1 and str(tmp_path) in err


def test_an_id_that_the_hub_does_not_give(capsys, saved_model, monkeypatch):
    from transformers import AutoConfig

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    status, _, err = generate(capsys, saved_model, "--model", "llava-hf/none")
    assert status == 1 and "there is no folder llava-hf/none, and it cannot be had from the hub: We couldn't" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "advice"),
    [("matplotlib.cbook", "pip install matplotlib"), ("PIL", "pip install pillow"), ("transformers", "pip install")],
)
def test_a_missing_package_is_named_with_what_installs_it(capsys, saved_model, monkeypatch, module, advice):
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = run(capsys, "demo")
    assert status == 1 and advice in err and "eah-kernels[" not in err and err.count("\n") == 1
    if module != "matplotlib.cbook":  # there the picture is the user's
        assert generate(capsys, saved_model)[2] == err.replace("eah demo", "eah generate")


@pytest.mark.parametrize("command", [["models"], ["doctor"], ["demo"]], ids=lambda c: c[0])
def test_an_interrupt_ends_in_one_line(capsys, monkeypatch, command):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("models.family_table", "doctor.doctor", "demo.demo"):
        monkeypatch.setattr(f"eah.cli.{name}", interrupted)
    assert run(capsys, *command) == (130, "", f"eah {command[0]}: interrupted\n")


@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--help"], ["doctor"], ["demo"]], ids=" ".join)
def test_an_interrupt_while_torch_loads_ends_in_one_line(arguments):
    """Also where `python -m eah` is still finding out which arguments there are."""
    code = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            raise KeyboardInterrupt\n"
        f"sys.meta_path.insert(0, Interrupted()); sys.argv[1:] = {arguments}\n"
        "runpy.run_module('eah', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    command = "" if "--" in arguments[-1] else f" {arguments[0]}"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"eah{command}: interrupted\n")


def test_what_needs_no_torch_does_not_load_it():
    for arguments in ("", "--help", "models", "demo --help"):
        code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = '{arguments}'.split(); import eah.__main__"
        subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def test_a_traceback_is_shown_on_request(capsys, saved_model):
    for arguments in (["--debug", "demo", "--image", "none.png"], ["demo", "--image", "none.png", "--debug"]):
        with pytest.raises(ValueError, match=r"no picture none\.png"):
            cli.main(arguments)


def test_models_in_markdown_is_the_table_in_the_readme(capsys):
    status, out, _ = run(capsys, "models", "--markdown")
    assert status == 0 and "| llava | works | 1 |" in out
    text = (ROOT / "docs/models.md").read_text().split("<!-- models: made by eah models -->")[1]
    assert text.split("<!-- end of models -->")[0].strip() == out.strip()


def test_models(capsys, monkeypatch):
    status, out, _ = run(capsys, "models")
    rows = models.family_table()
    lines = out.splitlines()
    assert status == 0 and "|" not in out and len(lines) == len(rows) + 3
    column = lines[0].index("status")
    assert all(line[column:].startswith(row.status) for line, row in zip(lines[1:], rows, strict=False))
    assert json.loads(run(capsys, "models", "--json")[1]) == [row._asdict() for row in rows]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    folded = models.models_text()
    assert max(map(len, folded.splitlines())) <= 90
    assert folded.split() == out.split() and "\n  " in folded


def started(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", "eah", *arguments], env=environment, text=True, stderr=subprocess.PIPE, **options
    )


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    process = started("models", stdout=writing)
    os.close(writing)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    findings = json.loads(run(capsys, "doctor", "--json")[1])
    assert findings["versions"]["torch"] and findings["versions"]["eah-kernels"] and findings["enable"] is None
    cpu = findings["backends"]["cpu"]
    assert cpu["reference"] is None and cpu["torch"] is None and cpu["triton"].startswith("it runs on CUDA and ROCm")
    assert "tensors" not in cpu["triton"]
    assert set(findings["eval"]) == {"nltk", "spacy"}
    assert findings["native"]["cuda"] is None or "not built" in findings["native"]["cuda"]
    text = run(capsys, "doctor")[1]
    assert "eah.enable     works" in text and "  reference    works" in text and "  triton       no: it runs on" in text
    assert ("  cuda         built, not yet measured" in text) == (findings["native"]["cuda"] is None)
    assert findings["gluon"]["cpu"] == [] and "Gluon" not in text
    doctor.print_doctor(findings | {"gluon": findings["gluon"] | {"cpu": ["lse", "sinks"]}})
    assert "Gluon kernels (lse, sinks), built, not measured" in capsys.readouterr().out


def test_doctor_says_which_versions_were_not_tested(monkeypatch, capsys):
    assert doctor.untested(with_transformers=True) == []
    monkeypatch.setattr("eah_kernels.backends._triton", lambda: (3, 10, 0))
    monkeypatch.setattr("eah.transformers.enable.NEWEST_TESTED", (5, 2))
    triton, transformers = doctor.untested(with_transformers=True)
    assert triton.startswith("untested with triton 3.10.0: ") and transformers.startswith("untested with transformers ")
    assert doctor.untested(with_transformers=False) == [triton]
    monkeypatch.setattr("eah_kernels.backends._triton", lambda: import_module("no_such_library"))
    assert doctor.untested(with_transformers=False) == ["triton cannot be imported: No module named 'no_such_library'"]


def test_doctor_finds_a_transformers_that_is_too_old_or_broken(monkeypatch):
    import transformers

    assert f'"transformers>={doctor.OLDEST_TRANSFORMERS}"' in (ROOT / "pyproject.toml").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "4.57.1")
        assert doctor.why_no_enable().startswith("it needs transformers >= 5.3, and 4.57.1 is installed: pip install")
        patch.setattr(transformers, "__version__", "5.10.0")
        assert doctor.why_no_enable() is None
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    assert doctor.why_no_enable().startswith("transformers cannot be imported: cannot import name")
