"""The OpenAI server with two engines (data parallel): concurrent requests with opt-outs, the report, the metrics."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .asks import MIXED, Ask, letters

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
LOAD = bool(os.environ.get("LOAD"))


@pytest.fixture(scope="module")
def server(saved, tmp_path_factory):
    from .server import serving

    with serving(saved("llava"), tmp_path_factory.mktemp("server"), "--data-parallel-size", "2") as running:
        yield running


def correct(ask, answer, reference):
    """Whether an answer is the reference's, up to the first near tie."""
    want = reference("llava").answer(ask, answer["prompt"], ask.enhanced)
    return answer["tokens"][: len(want.tokens)] == want.tokens and len(answer["tokens"]) == ask.tokens


def test_fifty_at_once(server, reference):
    asks = [Ask(letters(10 + i, i) + "I" + letters(5), (i,), "off" if i % 2 else None) for i in range(50)]
    before = server.counted()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(server.chat, asks))
    assert all(correct(ask, answer, reference) for ask, answer in zip(asks, answers, strict=True))
    after = server.counted()
    moved = {outcome: after[outcome] - before.get(outcome, 0) for outcome in after}
    assert moved.get("enhanced", 0) + moved.get("no_head", 0) == 25 and moved["opted_out"] == 25
    (report,) = server.reports()  # vLLM asks one engine of the two
    told = [
        (ask, answer, record["head"])
        for ask, answer in zip(asks, answers, strict=True)
        for record in report["last"]
        if record["request_id"].startswith(answer["id"])
    ]
    assert 0 < len(told) < 25
    for ask, answer, head in told:
        assert ask.enhanced and reference("llava").answer(ask, answer["prompt"], True).rows[1].head == head


def test_mixed_requests_and_bad_ones(server, reference):
    """A value that is neither on nor off is the default; an error of the request is no error of the server's."""
    for ask in MIXED:
        assert correct(ask, server.chat(ask), reference)
    assert server.chat(MIXED[0], vllm_xargs={"eah": ["off"]})["tokens"] == server.chat(MIXED[0])["tokens"]
    assert server.chat(MIXED[0], vllm_xargs={"eah": 0})["tokens"] == server.chat(MIXED[0])["tokens"]
    assert correct(MIXED[0], server.chat(MIXED[0]), reference)


def test_the_example_client(server, tmp_path):
    from .models import picture

    picture(0).save(tmp_path / "picture.png")
    command = [sys.executable, "examples/vllm_client.py", server.url, str(tmp_path / "picture.png"), "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "with EAH:    " in done.stdout and "without EAH: " in done.stdout
    (tmp_path / "no picture").write_text("text")
    done = subprocess.run([*command[:3], str(tmp_path / "no picture")], cwd=ROOT, capture_output=True, text=True)
    assert f"{server.url} answers HTTP Error 4" in done.stdout and "image" in done.stdout


@pytest.mark.skipif(not LOAD, reason="takes minutes: make test-vllm LOAD=1")
def test_under_load(server, reference):
    """200 requests, half with images, a quarter opted out, a fifth cancelled: none lost, every answer right."""
    draw = random.Random(0)
    asks = []
    for i in range(200):
        image = "I" if i % 2 else ""
        text = letters(draw.randrange(2, 60), i) + image + letters(draw.randrange(1, 30), i)
        asks.append(Ask(text, (i,) if image else (), draw.choice([None, None, "on", "off"]), draw.randrange(4, 24)))

    def one(ask_and_fate):
        ask, fate = ask_and_fate
        return server.cancelled(ask, 0.3 * fate) if fate < 0.2 else server.chat(ask)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, [(ask, draw.random()) for ask in asks]))
    finished = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer is not None]
    assert 120 < len(finished) < 195
    wrong = [ask for ask, answer in finished if not correct(ask, answer, reference)]
    assert not wrong
    assert all(len(report["last"]) <= 1000 for report in server.reports())
