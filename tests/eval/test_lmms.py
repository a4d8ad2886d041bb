"""The model of lmms-eval against stubs of what it uses of 0.7.3."""

import importlib
import sys
import types
from importlib.metadata import entry_points

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from ..support.processors import processor_of
from ..support.tiny_models import build


class Lmms:
    """lmms_eval.api.model.lmms, as far as a model sees it."""

    def __init__(self):
        self.task_dict, self.cached = {}, []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *what: self.cached.append(what))


@pytest.fixture
def eah_hf(monkeypatch):
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = types.SimpleNamespace
    monkeypatch.delitem(sys.modules, "eah.eval.lmms", raising=False)
    yield importlib.import_module("eah.eval.lmms").EahHf
    sys.modules.pop("eah.eval.lmms", None)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    build("llava").save_pretrained(folder)
    processor_of("llava").save_pretrained(folder)
    return folder


DOCS = [{"image": Image.new("RGB", (12, 12), (40 * n, 90, 10)), "text": "abcdefgh"[: n + 1]} for n in range(5)]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


def ask(model, settings=GREEDY, docs=DOCS, context=lambda doc: doc["text"]):
    model.task_dict = {"pope": {"test": docs}}
    return model.generate_until(
        [
            types.SimpleNamespace(args=(context(doc), dict(settings), lambda d: [d["image"]], number, "pope", "test"))
            for number, doc in enumerate(docs)
        ]
    )


def test_answers_are_eah_s_whatever_the_batch(eah_hf, saved_model):
    options = {"pretrained": str(saved_model), "device": "cpu", "dtype": "float32", "threshold": 0.02}
    plain, one, several = (
        eah_hf(**options, **more) for more in ({"eah": False}, {"batch_size": 1}, {"batch_size": 3, "layers": "1"})
    )
    answers = ask(one)
    assert ask(several) == answers and len(answers) == 5 and ask(plain) != answers
    assert ask(one, context=lambda doc: f"<image>\n{doc['text']}") == answers
    assert [what[:1] for what in one.cached] == [("generate_until",)] * 10


def test_settings_of_a_task(eah_hf, saved_model):
    model = eah_hf(pretrained=str(saved_model), device="cpu")
    [whole] = ask(model, docs=DOCS[:1])
    assert ask(model, {**GREEDY, "until": whole[2:4]}, DOCS[:1]) == [whole[: whole.index(whole[2:4])].strip()]
    assert ask(model, {**GREEDY, "temperature": 2.0, "do_sample": None}, DOCS[:1])
    with pytest.raises(ValueError, match="transformers has no such setting"):
        ask(model, {**GREEDY, "image_aspect": "original"}, DOCS[:1])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"layers": "1,2"}, r"layers must be numbers such as 1 or 0\+1, got '1,2'"),
        ({"layers": -1}, "layers must be numbers"),
        ({"batch_size": "auto"}, "batch_size must be a number from 1 on, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be a number from 1 on, got 0"),
    ],
)
def test_model_args_of_wrong_form(eah_hf, given, error):
    with pytest.raises(ValueError, match=error):
        eah_hf(pretrained="nowhere", **given)


def test_what_is_not_for_it(eah_hf, saved_model):
    with pytest.raises(ValueError, match=r"prompt_format must have {}"):
        eah_hf(pretrained=str(saved_model), prompt_format="<image>")
    model = eah_hf(pretrained=str(saved_model), device="cpu")
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    model.task_dict = {"t": {"s": DOCS}}
    for visuals in ([], DOCS[:2], ["video.mp4"]):
        request = types.SimpleNamespace(args=("a", GREEDY, lambda _, v=visuals: v, 0, "t", "s"))
        with pytest.raises(ValueError, match="questions about one picture; task 't', document 0"):
            model.generate_until([request])


def test_without_a_chosen_head_it_says_so(eah_hf, saved_model):
    model = eah_hf(pretrained=str(saved_model), device="cpu", threshold=0.99)
    with pytest.warns(UserWarning, match="EAH chose no head in any answer"):
        ask(model)


def test_the_entry_point(eah_hf):
    from eah.eval.lmms_entry import manifest

    assert vars(manifest()) == {"model_id": "eah_hf", "simple_class_path": "eah.eval.lmms.EahHf"}
    found = [entry.value for entry in entry_points(group="lmms_eval.models") if entry.name == "eah_hf"]
    assert found in ([], ["eah.eval.lmms_entry:manifest"])  # none where an older build is installed
