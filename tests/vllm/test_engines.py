"""Engines of every kind answer as `eah.enable` does in transformers: the same head, sinks and greedy tokens."""

import os

import pytest

from .asks import MIXED, TWICE
from .engine import CROWD, ENGINES, LOGPROBS, N3, STRUCTURED

pytest.importorskip("vllm")

FIRST = ("plain", "crowded", "hold", "compiled", "speculation", "tensor parallel")
CHANGED = 3  # enhanced prompts, at least, whose answer is another than without EAH
CHOSEN = [*FIRST, *(name for name in ENGINES if name not in (*FIRST, "without") and os.environ.get("ALL"))]


def records_of(result):
    """request -> layer -> record; the worker's ids are the request's with a random end."""
    records = {}
    for record in result["report"][0]["last"]:
        request = record["request_id"].rsplit("-", 1)[0]
        assert record["layer"] not in records.setdefault(request, {}), "a prompt was recorded twice"
        records[request][record["layer"]] = record
    return records


def compare(engine, result, reference):
    """How many tokens were compared, and how many enhanced prompts were answered otherwise than without EAH."""
    records, knobs = records_of(result), dict(engine.knobs)
    default = knobs.pop("default", "on")
    compared = changed = 0
    for batch, answers in zip(engine.batches, result["batches"], strict=True):
        for ask, answer in zip(batch, answers, strict=True):
            on = bool(ask.seeds) and (ask.eah or default) != "off"
            model = reference(engine.family, lora=ask.lora, **engine.text)
            want = model.answer(ask, answer["prompt"], on, **(knobs if on else {}))
            if "n" not in ask.options and "structured_outputs" not in ask.options:
                assert answer["tokens"][0][: len(want.tokens)] == want.tokens, ask
                assert len(answer["tokens"][0]) == ask.tokens, ask
                compared += len(want.tokens)
            children = [f"{n}_{answer['request_id']}" for n in range(ask.options["n"])] if "n" in ask.options else None
            for request in children or [answer["request_id"]]:
                assert set(records.get(request, {})) == set(want.rows), ask
                for layer, row in want.rows.items():
                    record = records[request][layer]
                    assert record["head"] == row.head, ask
                    assert tuple(record["sinks"]) == row.sinks, ask
                    assert record["image_tokens"] == row.image_tokens, ask
            if on and changed < CHANGED:
                plain = model.answer(ask, answer["prompt"], False).tokens
                changed += want.tokens != plain[: len(want.tokens)]
    return compared, changed


def outcomes(asks, default):
    said = [(ask.eah if ask.eah in ("on", "off") else default, bool(ask.seeds)) for ask in asks]
    return {
        "enhanced": sum(eah == "on" and image for eah, image in said),
        "opted_out": sum(eah == "off" for eah, _ in said),
        "text": sum(eah == "on" and not image for eah, image in said),
    }


@pytest.mark.parametrize("name", CHOSEN)
def test_an_engine_answers_as_transformers_does(name, answered, reference):
    engine, result = ENGINES[name], answered(name)
    compared, changed = compare(engine, result, reference)
    assert compared > 30 and changed >= CHANGED
    leads, *others = result["report"]
    asks = [ask for batch in engine.batches for ask in batch for _ in range(ask.options.get("n", 1))]
    want = outcomes(asks, engine.knobs.get("default", "on"))
    assert leads["enhanced"] + leads["no_head"] == want["enhanced"]
    assert leads["opted_out"] == want["opted_out"]
    assert leads["stood_aside"].get("no image token", 0) == want["text"]
    assert all(other["last"] == [] and other["enhanced"] == 0 for other in others)


def test_only_other_requests_read_the_prefix_cache(answered):
    first, again = answered("plain")["batches"][1:3]
    assert [answer["cached"] for answer in first] == [0, 0, 128]  # the text of the second is that of the third
    assert [answer["cached"] for answer in again] == [0, 128, 128]
    assert [answer["tokens"] for answer in first] == [answer["tokens"] for answer in again]
    assert TWICE[0].text == TWICE[1].text and first[0]["tokens"] != first[1]["tokens"]


def test_sampling_options_leave_the_head_alone(answered):
    n3, logprobs, structured = answered("plain")["batches"][3]
    assert [ask.text for ask in (N3, LOGPROBS, STRUCTURED)] == [MIXED[0].text] * 3
    plain = answered("plain")["batches"][0][0]
    assert len({tuple(tokens) for tokens in n3["tokens"]}) == 3
    assert logprobs["tokens"] == plain["tokens"] and len(logprobs["prompt_logprobs"]) == len(plain["prompt"])
    assert set(structured["text"][0].replace(" ", "")) <= set("xyz") and structured["text"] != plain["text"]


def test_a_request_that_says_neither_on_nor_off_gets_the_default_and_is_counted(answered):
    result = answered("plain")
    assert result["batches"][4][0]["tokens"] == result["batches"][0][0]["tokens"]
    assert (
        result["report"][0]["stood_aside"]['the request\'s "eah" is neither "on" nor "off": the default was taken'] == 1
    )


def test_opting_out_equals_a_run_without_the_plugin(answered):
    out, without = answered("plain")["batches"][5], answered("without")["batches"][0]
    for mine, theirs in zip(out, without, strict=True):
        assert mine["tokens"] == theirs["tokens"] and mine["logprobs"] == theirs["logprobs"] and mine["logprobs"][0]


def test_beam_search_stands_aside(answered):
    """It cannot say "off": its steps, of 1, 2 and 2 beams, are those of a run without the plugin."""
    assert answered("plain")["beams"] == answered("without")["beams"]
    reasons = answered("plain")["report"][0]["stood_aside"]
    assert sum(count for why, count in reasons.items() if why.startswith("a step of beam search")) == 5


def test_a_prompt_is_enhanced_again_after_it_was_preempted(answered):
    result = answered("crowded")
    preempted = {int(request.rsplit("-", 1)[0]) for request in result["preempted"]}
    assert any(CROWD[request].enhanced for request in preempted)
    assert all(len(answer["tokens"][0]) == 40 for answer in result["batches"][0])  # none starved
