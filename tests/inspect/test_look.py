"""`look`, from a picture and a prompt to numbers."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from eah.inspect import look
from eah.inspect.numbers import numbers

from ..support.processors import processor_of
from ..support.tiny_models import build


def picture(width=12, height=12):
    generator = torch.Generator().manual_seed(3)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def test_the_same_input_gives_the_same_numbers_and_they_hold_each_column_mean_exactly():
    model, processor = build("llava"), processor_of("llava")
    first, second = (json.dumps(numbers(look(model, processor, picture(), "abc"))) for _ in range(2))
    assert first == second
    seen = look(model, processor, picture(), "abc")
    for layer, kept in zip(json.loads(first)["layers"], seen.layers, strict=True):
        assert torch.equal(torch.tensor(layer["column_mean"]), kept.column_mean)


def test_an_orientation_in_the_file_is_applied(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 10).save(path, exif=exif)
    with Image.open(path) as turned:
        seen = look(build("llava"), processor_of("llava"), turned, "abc")
    assert seen.image.size == (10, 20)


def test_a_whole_prompt_begins_once():
    from tokenizers.processors import TemplateProcessing

    processor = processor_of("llava")
    begins = TemplateProcessing(single="<2> $A", special_tokens=[("<2>", 2)])
    processor.tokenizer.backend_tokenizer.post_processor = begins
    for prompt in ("<image>abc", "<2><image>abc"):
        ids = look(build("llava"), processor, picture(), prompt).inputs["input_ids"][0].tolist()
        assert ids == [2, *[95] * 9, 34, 35, 36]


def test_the_processor_is_as_before():
    processor = processor_of("llava")
    processor.tokenizer.padding_side, processor.tokenizer.pad_token = "right", None
    look(build("llava"), processor, picture(), "abc")
    assert processor.tokenizer.padding_side == "right" and processor.tokenizer.pad_token is None


def test_nan_is_not_told_as_no_sink():
    model = build("llava")
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the attention of layer 1 is NaN"):
        look(model, processor_of("llava"), picture(), "abc")


def test_what_does_not_fit_is_told_in_one_line():
    model, processor = build("llava"), processor_of("llava")
    for wrong, error, named in [
        (dict(image="a.png"), TypeError, "image must be a PIL image"),
        (dict(prompt=3), TypeError, "prompt must be a str"),
        (dict(threshold=-1), ValueError, "threshold must be"),
        (dict(threshold=True), ValueError, "threshold must be"),
        (dict(model=torch.nn.Linear(1, 1)), TypeError, "PreTrainedModel"),
    ]:
        arguments = dict(model=model, processor=processor, image=picture(), prompt="abc") | wrong
        with pytest.raises(error, match=named) as caught:
            look(**arguments)
        assert "\n" not in str(caught.value)


def test_the_code_of_the_documentation_runs(capsys):
    page = (Path(__file__).parents[2] / "docs/inspect.md").read_text()
    places, looks = re.findall(r"```python\n(.+?)```", page, re.S)
    names = {"model": build("llava"), "processor": processor_of("llava"), "picture": picture()}
    exec(places, names | {"prompt": "<image>abc"})
    assert len(capsys.readouterr().out.splitlines()) == 9
    exec(looks, names)
    assert len(capsys.readouterr().out.splitlines()) == 3
