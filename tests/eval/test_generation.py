"""Answers made in batches are those that generate() gives to each prompt alone; decoding is neutral."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

import eah
from eah.eval.benchmark import Item
from eah.eval.generation import answer_batch, before_eos, check_changes, generating_by, neutral_config
from eah.eval.variants import Variant
from eah.transformers.inputs import Prompts

from ..support.family_models import build as build_family
from ..support.processors import PROCESSORS, processor_of
from ..support.tiny_models import build

QUESTIONS = ("abcdefgh", "a", "hgfe", "abcdefghijklmnop", "zz")
VARIANTS = (None, Variant((1,), 0.05), Variant((0, 1), 0.02, decode="hold"), Variant((1,), 0.05, decode="track"))


def pictures():
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (len(QUESTIONS), 12, 12, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "paligemma"])
def test_a_batch_answers_as_each_prompt_alone(family):
    """In float32, as it is and with EAH in every mode of decoding; the heads are those of each prompt alone, too."""
    model, processor = build_family(family) if family != "llava" else build(family), processor_of(family)
    place = PROCESSORS[family][4]
    prompts, config = Prompts(processor, form=f"{place}{{}}"), neutral_config(model, 8, {})
    items = [Item(number, f"{number}.png", question) for number, question in enumerate(QUESTIONS)]
    answered = set()
    for variant in VARIANTS:
        with generating_by(model, config):
            records = answer_batch(model, prompts, config, variant, items, pictures())
        for item, picture, record in zip(items, pictures(), records, strict=True):
            inputs = processor(images=[[picture]], text=[place + item.prompt], return_tensors="pt")
            options = dict(max_new_tokens=8, do_sample=False)
            if variant is None:
                output = model.generate(**inputs, **options)
            else:
                knobs = {name: getattr(variant, name) for name in ("layers", "threshold", "decode")}
                with eah.enable(model, **knobs) as handle:
                    output = model.generate(**inputs, **options)
                    rows = {str(layer.layer): layer.rows[0].head for layer in handle.report().layers}
                assert record["heads"] == rows
            alone = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert record["answer"] == alone.strip()
        answered.add(tuple(record["answer"] for record in records))
    assert len(answered) > 1, "EAH changes no answer here"


def test_decoding_is_neutral_whatever_the_folder_says_and_the_model_is_as_before():
    model, processor = build("llava"), processor_of("llava")
    plain = copy.deepcopy(model)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    own = model.generation_config
    prompts, items = Prompts(processor), [Item(0, "0.png", "abc")]
    answers = []
    for one in (model, plain):
        config = neutral_config(one, 12, {})
        with generating_by(one, config):
            answers += answer_batch(one, prompts, config, None, items, pictures()[:1])
    assert answers[0] == answers[1] and model.generation_config is own
    with pytest.raises(RuntimeError), generating_by(model, config):
        raise RuntimeError
    assert model.generation_config is own


def test_with_beams_the_head_is_the_rows_own():
    model, processor = build("llava"), processor_of("llava")
    config = neutral_config(model, 4, {"num_beams": 3})
    items = [Item(number, "", question) for number, question in enumerate(QUESTIONS)]
    with generating_by(model, config):
        beams = answer_batch(model, Prompts(processor), config, VARIANTS[1], items, pictures())
        greedy = answer_batch(model, Prompts(processor), neutral_config(model, 4, {}), VARIANTS[1], items, pictures())
    assert [record["heads"] for record in beams] == [record["heads"] for record in greedy]


def test_prompts():
    processor = processor_of("llava")
    assert Prompts(processor).text("q") == "<image>\nq"
    assert Prompts(processor, " s").text("q") == "<image>\nq s"
    assert Prompts(processor, "", "USER: <image>\n{} ASSISTANT:").text("{q}") == "USER: <image>\n{q} ASSISTANT:"
    processor.chat_template = (
        "{{ bos_token }}U: {% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} A:"
    )
    text = Prompts(processor).text("q")
    assert text == "<2>U: <image>q A:"
    ids = Prompts(processor).inputs([text], pictures()[:1])["input_ids"][0].tolist()
    assert ids.count(2) == 1  # begun once
    with pytest.raises(ValueError, match=r"form must have {} where the question is, got '<image>'"):
        Prompts(processor, "", "<image>")
    processor.image_token = None
    with pytest.raises(ValueError, match="LlavaProcessor has no image token"):
        Prompts(processor, "", "{}").text("q")


def test_tokens_before_the_end():
    assert before_eos([5, 6, 2, 0, 0], 2) == [5, 6] and before_eos([5, 6], [2, 3]) == [5, 6]
    assert before_eos([3, 2], [2, 3]) == [] and before_eos([1, 2], None) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"do_sample": "True"},
            "do_sample must be true, a number, a list or the like, got the text 'True'",
        ),
        ({"do_sample": 1}, "--generation do_sample must be true or false, got 1"),
        ({"num_beams": "two"}, "--generation num_beams must be true, a number"),
        ({"num_beams": 0}, "--generation num_beams must be an int >= 1, got 0"),
        ({"num_beams": 2.5}, r"--generation num_beams must be an int >= 1, got 2\.5"),
        ({"num_beams": True}, "--generation num_beams must be an int >= 1, got True"),
        ({"do_sample": True, "temperature": float("nan")}, "--generation temperature must be finite, got nan"),
        ({"assistant_early_exit": 1}, "--generation assistant_early_exit: transformers cannot do it with a model of"),
        ({"temperature": 0.7}, r"(?s)--generation: .*`temperature` is set to `0.7`"),
        ({"length_penalty": 2.0}, r"(?s)--generation: .*only used in beam-based"),
        ({"watermarking_config": 1}, "--generation: "),
        ({"max_length": 9}, "--generation max_length: --max-new-tokens is its option"),
        ({"num_beam_groups": 2}, "--generation num_beam_groups: group beam search is code on the hub"),
        ({"validate": 1}, "--generation validate: transformers has no such setting"),
        ({"_from_model_config": True}, "transformers has no such setting"),
        ({"transformers_version": "5"}, "transformers has no such setting"),
    ],
)
def test_settings_that_would_be_ignored_or_fail_later(changes, error, caplog):
    with pytest.raises(ValueError, match=error):
        check_changes(changes)
    assert not caplog.records


def test_settings_that_are_fine():
    check_changes({})
    check_changes({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0})
    check_changes({"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"})
    check_changes({"cache_implementation": "static", "repetition_penalty": 1.1})


def test_settings_that_are_not_the_users():
    with pytest.raises(ValueError, match="--generation stop_strings: an answer ends"):
        check_changes({"stop_strings": "x"})
    with pytest.raises(ValueError, match="DoLa is code on the hub, and nothing is downloaded"):
        check_changes({"dola_layers": "high"})
