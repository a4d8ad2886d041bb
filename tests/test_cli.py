"""The commands, run as a user would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from eah import cli, demo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """The demo's model and processor in a folder, as a user's would be, and a picture."""
    folder = tmp_path_factory.mktemp("model")
    processor, model = demo.small_llava()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    picture = folder / "picture.png"
    demo.load_picture(None)[0].resize((60, 80)).save(picture)
    return folder, picture


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_demo_in_json(capsys):
    status, out, err = run(capsys, "demo", "--json")
    results = json.loads(out)
    assert status == 0 and err == ""
    assert results["image_tokens"] == 576
    [layer] = results["layers"]
    assert layer["layer"] == 1 and layer["stood_aside"] is None
    [sinks], [head] = layer["sinks"], layer["heads"]
    assert len(sinks) == 8 and sinks[head] == max(sinks) and head == sinks.index(max(sinks))
    assert results["tokens_changed"] > 0
    assert all(found.get("equal", True) for found in results["agreement"].values())
    assert results["agreement"]["torch"]["largest_error"] < 1e-4
    assert {"plain SDPA", "EAH, eager", "EAH, torch backend"} <= set(results["timing"]["rows"])


def test_demo_for_people(capsys, saved_model, monkeypatch):
    monkeypatch.setattr(demo, "time_layer", lambda *_: {"shape": "s", "dtype": "d", "runs": 1, "rows": {}})
    status, out, _ = run(capsys, "demo", "--image", saved_model[1])
    assert status == 0
    for text in ("picture.png", "576 of them image tokens", "layer 1", "sinks per head", "weights are random"):
        assert text in out


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


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--layers", 9], "layers"), (["--threshold", -1], "threshold"), (["--image", "none.png"], "none.png")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_generate_names_what_is_wrong(capsys, saved_model, more, named):
    status, _, err = generate(capsys, saved_model, *more)
    assert status == 1 and named in err and err.count("\n") == 1


def test_a_missing_extra_is_named(capsys, monkeypatch):
    for module in ("matplotlib.cbook", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
        status, _, err = run(capsys, "demo")
        assert status == 1 and "eah-kernels[demo]" in err


def test_models_is_the_table_in_the_readme(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0 and "| llava | works | 1 |" in out
    text = (ROOT / "README.md").read_text().split("<!-- models: made by eah models -->")[1]
    assert text.split("<!-- end of models -->")[0].strip() == out.strip()


def test_doctor():
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": ""}
    command = [sys.executable, "-m", "eah", "doctor"]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    findings = json.loads(done.stdout)
    assert findings["versions"]["torch"] and findings["versions"]["eah-kernels"]
    cpu = findings["backends"]["cpu"]
    assert cpu["reference"] is None and cpu["torch"] is None and "TRITON_INTERPRET=1" in cpu["triton"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "reference  works" in text and "triton     no:" in text
    assert findings["native"]["cuda"] is None or "not built" in findings["native"]["cuda"]
    assert ("  cuda       built, not yet measured" in text) == (findings["native"]["cuda"] is None)
