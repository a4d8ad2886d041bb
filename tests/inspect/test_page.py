"""`eah inspect --image`: the files it writes, and what stands in the page."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from transformers import PreTrainedModel

from eah import cli
from eah.cli.look import pictured_layers
from eah.eval.journal import alone_in
from eah.inspect import look
from eah.inspect.figures import outline, spans
from eah.inspect.one import views, write

from ..support.family_models import build as build_family
from ..support.processors import PROCESSORS, processor_of
from ..support.saved_model import save_small_llava
from ..support.tiny_models import build


class Page(HTMLParser):
    """The images of a page, its text, and whatever would be loaded from elsewhere."""

    def __init__(self, content):
        super().__init__()
        self.images, self.links, self.open, self.words = [], [], [], []
        self.feed(content)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("model"), "a <b> & 'c'.png")


def run(capsys, saved_model, out, *more, **changes):
    arguments = {"--model": saved_model[0], "--image": saved_model[1], "--prompt": "What?", "--out": out} | changes
    words = [str(word) for pair in arguments.items() for word in pair]
    try:
        status = cli.main(["inspect", *words, "--device", "cpu", *map(str, more)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_a_page_of_one_picture(capsys, saved_model, tmp_path):
    more = ("--compare", "--max-new-tokens", 3, "--layers", 1)
    prompt = {"--prompt": "What <script>is</script> & 'it'?"}
    status, out, err = run(capsys, saved_model, tmp_path, *more, **prompt)
    assert status == 0, err
    assert out.splitlines() == [str(tmp_path / "inspect.html"), str(tmp_path / "inspect.json")]
    content = (tmp_path / "inspect.html").read_text()
    page, data = Page(content), json.loads((tmp_path / "inspect.json").read_text())
    assert len(content) < 10e6 and all(link.startswith("data:") for link in page.links)
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len({image["src"] for image in page.images}) == len(files)
    assert all(len(image["alt"]) > 10 and int(image["width"]) > 0 for image in page.images)
    of_the_layer = sum(len(image["src"]) for image in page.images if "layer 1" in image["alt"])
    assert len(content) + 31 * of_the_layer < 10e6, "all 32 layers of LLaVA-1.5 would be more than 10 MB"
    assert prompt["--prompt"] in page.text and saved_model[1].name in page.text
    first = data["layers"][1]
    head, count = first["head"], max(first["sinks"])
    assert f"In layer 1 head {head} has the most sinks, {count} of 576 image tokens" in page.text
    assert f"layer01.head{head:02}.picture.png" in files and "compare.png" in files
    assert {name[:7] for name in files if name.startswith("layer")} == {"layer01"}
    assert [len(data["grids"]), data["grids"][0]["reason"], len(data["grids"][0]["boxes"])] == [1, None, 576]
    assert "without EAH" in page.text and data["compare"]["kl"] >= 0 and list(data["compare"]["answers"])
    again = tmp_path / "again"
    run(capsys, saved_model, again, *more, **prompt)
    for name in ("inspect.json", "inspect.html", *files):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_layers_by_default_and_all():
    model, hybrid = build("llava"), build_family("qwen3_5")  # whose layers 0 to 2 have no map
    assert pictured_layers(model, None) == pictured_layers(model, []) == (0, 1, 2)
    assert pictured_layers(model, [2, 0, 2]) == (0, 2) and 0 not in pictured_layers(hybrid, None)
    with pytest.raises(ValueError, match=r"layer 0 of .* has no attention map"):
        pictured_layers(hybrid, [0])


@pytest.mark.parametrize(
    ("more", "changes", "status", "named"),
    [
        ((), {"--image": "none.png"}, 1, "there is no picture none.png"),
        ((), {"--model": "no/such/folder"}, 1, "there is no folder no/such/folder"),
        (("--threshold", -1), {}, 1, "threshold must be a finite number >= 0, got -1.0"),
        (("--threshold", "nan"), {}, 1, "threshold must be a finite number >= 0, got nan"),
        (("--layers", 99), {}, 1, "layers must be within 0..3"),
        (("--layers", "x"), {}, 2, "layers are numbers from 0 on"),
        (("--layers", "all", 1), {}, 1, "--layers must be all, or numbers"),
        (("--device", "gpu"), {}, 1, "device 'gpu' cannot be used"),
        (("--max-new-tokens", 0), {}, 2, "must be an int >= 1"),
        (("--max-new-tokens", 3), {}, 1, "--max-new-tokens is of --compare, which was not given"),
        (("--answers", ""), {}, 1, "--answers is of --images, which was not given"),
        ((), {"--prompt": "a\udcff"}, 2, "argument --prompt: must be UTF-8, got 'a\\udcff'"),
        ((), {"--image": ""}, 1, "there is no picture"),
        ((), {"--out": __file__}, 1, f"--out must be a folder, and {__file__} is a file"),
    ],
)
def test_errors_are_one_line_and_come_before_the_weights_are_read(
    capsys, saved_model, tmp_path, monkeypatch, more, changes, status, named
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read"))
    found, out, err = run(capsys, saved_model, tmp_path, *more, **changes)
    assert found == status and named in err and err.count("\n") == 1 and out == "" and not list(tmp_path.iterdir())


def test_two_do_not_write_to_one_folder(capsys, saved_model, tmp_path):
    with alone_in(tmp_path):
        status, out, err = run(capsys, saved_model, tmp_path)
    assert status == 1 and "another process is writing to" in err and err.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_device_that_is_full_is_named(capsys, saved_model, tmp_path):
    (tmp_path / ".inspect.part.json").symlink_to("/dev/full")
    status, out, err = run(capsys, saved_model, tmp_path, "--layers", 0)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "No space left on device" in err and str(tmp_path / "inspect.json") in err


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "paligemma"])
def test_pages_of_families_of_every_kind(family, picture, tmp_path):
    """With one view, with several, with newline tokens, and with none at all."""
    from ..support.family_models import build as build_family

    model, processor = build("llava") if family == "llava" else build_family(family), processor_of(family)
    place = PROCESSORS[family][4]
    seen = look(model, processor, picture, f"{place}abc", threshold=0.02)
    page = Page(write(seen, tmp_path, {}, [layer.layer for layer in seen.layers]).read_text())
    drawn = {name for grid in seen.grids for name in views(grid)}
    assert ("reading order" in drawn) == any(grid.reason for grid in seen.grids)
    for grid in seen.grids:
        assert grid.reason is None or grid.reason in page.text
    assert all(any(view.replace(" ", "-") in path.name for path in tmp_path.glob("*.png")) for view in drawn)


def test_what_cannot_happen_by_itself_is_drawn_too(tiny, picture, tmp_path):
    """No sink, all sinks, one head, a layer without a map, means of 0, inputs made elsewhere."""
    seen = look(*tiny, picture, "abc")
    for threshold in (0.0, 5.0):
        page = write(dataclasses.replace(seen, threshold=threshold), tmp_path, {}, [1]).read_text()
        assert ("all image tokens are its sinks" in page) == (threshold == 0)
        assert ("no head of layer 1 has a sink" in page) == (threshold == 5)
    one = [dataclasses.replace(layer, column_mean=torch.zeros(1, 9), uniform=torch.zeros(9)) for layer in seen.layers]
    odd = dataclasses.replace(seen, layers=tuple(one), grids=(), without_map={7: "it is <odd>"})
    page = Page(write(odd, tmp_path, {}, [0]).read_text())
    none = Page(write(odd, tmp_path, {}, [7]).read_text())
    assert "None of the layers asked for has a map" in none.text
    assert "Layer 7 has no map: it is <odd>." in page.text and "where they come from was not asked for" in page.text


def test_the_outline_is_what_two_boxes_do_not_share():
    assert len(outline([(0, 0, 1, 1)])) == 4 and outline([]) == []
    assert len(outline([(0, 0, 1, 1), (1, 0, 2, 1)])) == 6
    assert len(outline([(0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1)])) == 8


def test_spans():
    assert spans([3, 4, 5, 9, 11, 12]) == [(3, 6), (9, 10), (11, 13)] and spans([]) == []
