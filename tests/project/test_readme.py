"""What README.md and docs/ show is so: their Python runs, and their errors are those that are printed."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import transformers

import eah
from eah import cli
from eah.cli import demo, samples
from eah_kernels import eah_attention, native

ROOT = Path(__file__).parents[2]
README, USAGE, TROUBLESHOOTING = (
    (ROOT / name).read_text() for name in ("README.md", "docs/usage.md", "docs/troubleshooting.md")
)
[REAL_MODEL] = re.findall(r"```python\n(import torch.+?)```", README, re.S)
[HANDLE] = re.findall(r"```python\n(handle = .+?)```", USAGE, re.S)
ONE_LAYER, PACKED = re.findall(r"```python\n(from eah_kernels .+?)```", USAGE, re.S)
ERRORS = TROUBLESHOOTING.split("<!-- errors -->")[1].split("<!-- end of errors -->")[0]


@pytest.fixture(scope="module")
def llava():
    return samples.small_llava()


@pytest.fixture(scope="module")
def inputs(llava):
    return llava[0](images=samples.load_picture(None)[0], text=demo.PROMPT, return_tensors="pt")


def test_the_code_for_a_real_model(llava, monkeypatch, tmp_path, capsys):
    processor, model = llava
    asked = []
    for cls, found in ((transformers.AutoProcessor, processor), (transformers.LlavaForConditionalGeneration, model)):
        monkeypatch.setattr(cls, "from_pretrained", lambda name, found=found, **_: asked.append(name) or found)
    photo = tmp_path / "photo.jpg"
    samples.load_picture(None)[0].save(photo)
    code = REAL_MODEL
    for shown, here in {"photo.jpg": str(photo), "cuda": "cpu", "float16": "float32", "=128": "=3"}.items():
        assert shown in code
        code = code.replace(shown, here)
    names = {}
    exec(code, names)
    assert asked == ["llava-hf/llava-1.5-7b-hf"] * 2
    prompt = names["inputs"]["input_ids"].shape[1]
    assert names["output"].shape[0] == 1 and prompt < names["output"].shape[1] <= prompt + 3
    printed = capsys.readouterr().out
    assert re.search(
        r"layer 1\n  row  head  sinks  image tokens  density\n    0 .+  576  .+\n       sinks per h", printed
    )


def test_the_code_for_the_handle(llava, inputs):
    _, model = llava
    mask = inputs["input_ids"] == model.config.image_token_id
    names = dict(eah=eah, model=model, inputs={**inputs, "max_new_tokens": 1}, mask=mask)
    exec(HANDLE.replace("report = ", "model.generate(**inputs)\nreport = ", 1), names)
    assert names["report"].layers[0].rows[0].head is not None
    assert len(names["handle"].history) == 2
    with pytest.raises(ValueError, match="not enabled"):
        eah.Handle.of(model)


def test_the_code_for_the_kernels():
    query, key, value, image_mask = samples.layer_inputs("cpu", torch.float32, 60, 4)
    names = dict(query=query, key=key, value=value, image_mask=image_mask)
    exec(ONE_LAYER, names)
    assert names["output"].shape == query.shape and names["head"].shape == (1,) and names["sink_counts"].shape == (1, 4)
    packed = {name: names[name][0].transpose(0, 1) for name in ("query", "key", "value")}
    cu_seqlens = torch.tensor([0, 45, 60], dtype=torch.int32)
    names |= packed | dict(image_mask=image_mask[0], cu_seqlens=cu_seqlens, max_seqlen=45)
    exec(PACKED, names)
    assert names["output"].shape == packed["query"].shape and names["head"].shape == (2,)


def printed_errors(llava, monkeypatch, capsys):
    """Makes the mistakes of docs/troubleshooting.md; gives what each one prints, in the table's order."""
    _, model = llava
    query, key, value, image_mask = samples.layer_inputs("cpu", torch.float32, 60, 4)

    def message(function, *arguments, **options):
        with pytest.raises((ImportError, RuntimeError, TypeError, ValueError)) as raised:
            function(*arguments, **options)
        return str(raised.value)

    def command(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err.split(": ", 1)[1].strip()

    def generate(**options):
        options = {"model": "no/such/folder", "image": __file__, "prompt": "Hi", **options}
        return command("generate", *(word for name, value in options.items() for word in (f"--{name}", value)))

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        yield message(eah.enable, model)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        yield command("demo")
    with monkeypatch.context() as patch:
        patch.setattr("eah.cli.generate.load_picture", lambda file: (None, file))
        yield generate()
    yield generate(device="cuda:99")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield message(eah_attention, query, key, value, image_mask, backend="triton")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "eah_kernels._C", None)
        native.cpu._load.cache_clear()
        yield message(eah_attention, query, key, value, image_mask, backend="native")
    native.cpu._load.cache_clear()
    yield message(eah.enable, torch.nn.Linear(1, 1))
    with eah.enable(model):
        yield message(eah.enable, model)
    with torch.device("meta"):
        refused = transformers.MllamaForConditionalGeneration(transformers.MllamaConfig())
        text = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    yield message(eah.enable, refused)
    yield message(eah.enable, text)
    yield message(eah.enable, model, layers=(9,))
    yield message(eah_attention, query.clone().requires_grad_(), key, value, image_mask, backend="torch")


def test_the_errors_are_those_that_are_printed(llava, monkeypatch, capsys):
    rows = re.findall(r"^\| `(.+?)` \|", ERRORS, re.M)
    assert len(rows) >= 10
    for row, printed in zip(rows, printed_errors(llava, monkeypatch, capsys), strict=True):
        assert re.fullmatch(".*".join(map(re.escape, row.split("..."))), printed), (row, printed)
