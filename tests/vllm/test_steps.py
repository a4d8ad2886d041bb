"""A step of the worker on a runner that stands for vLLM's: the plan, the layer, the tally. Nothing may be raised."""

import logging
from types import SimpleNamespace

import pytest
import torch

from eah.method import Knobs
from eah.reasons import Reason
from eah.vllm.hold import HoldingLayer
from eah.vllm.layer import PLAN, EnhancedLayer
from eah.vllm.plan import OPTED_OUT, Plan, Prompt, no_plan, plan_step
from eah.vllm.report import KEPT, Tally
from eah.vllm.requests import STREAMED
from eah.vllm.settings import Settings
from eah_kernels import eah_attention

HEADS, KV_HEADS, DIM = 4, 2, 8
SETTINGS = Settings(knobs=Knobs(threshold=0.05, backend="torch"))


class Position:
    def __init__(self, *spans):
        self.spans = list(spans)

    def extract_embeds_range(self):
        return self.spans


def request(length, *spans, eah=None, embeds=None):
    """A request of so many prompt tokens, its image tokens at (first, last)."""
    features = [SimpleNamespace(modality="image", mm_position=Position(span)) for span in spans]
    params = SimpleNamespace(extra_args=None if eah is None else {"eah": eah}, max_tokens=16)
    return SimpleNamespace(num_prompt_tokens=length, mm_features=features, sampling_params=params, prompt_embeds=embeds)


def step(*rows):
    """rows: (request, tokens computed before, tokens of this step). The runner, its metadata, what is scheduled."""
    ids = [f"r{number}" for number in range(len(rows))]
    starts = torch.tensor([0, *torch.tensor([count for _, _, count in rows]).cumsum(0).tolist()])
    batch = SimpleNamespace(req_ids=ids, num_computed_tokens_cpu=[computed for _, computed, _ in rows])
    requests = {request_id: state for request_id, (state, _, _) in zip(ids, rows, strict=True)}
    prefilling = torch.tensor([computed < state.num_prompt_tokens for state, computed, _ in rows])
    common = SimpleNamespace(query_start_loc_cpu=starts, is_prefilling=prefilling)
    scheduled = {request_id: count for request_id, (_, _, count) in zip(ids, rows, strict=True)}
    runner = SimpleNamespace(input_batch=batch, requests=requests, device=torch.device("cpu"))
    return runner, common, scheduled


def test_the_plan_of_a_mixed_step():
    """Decoding, a prompt, a text, a prompt right after another, a preempted one with its answer, one that opted out."""
    plan = plan_step(
        *step(
            (request(9, (2, 4)), 9, 1),
            (request(10, (2, 5)), 0, 10),
            (request(12, (0, 2), (6, 7)), 0, 12),
            (request(5), 0, 5),
            (request(8, (1, 3)), 0, 11),
            (request(7, (1, 3), eah="off"), 0, 7),
            (request(6, (1, 3), eah="maybe"), 0, 6),
        ),
        SETTINGS,
    )
    assert plan.others == {"r3": Reason.NO_IMAGE_TOKEN, "r5": OPTED_OUT} and plan.misread == {"r6": "maybe"}
    assert [run.prompts for run in plan.runs] == [
        [Prompt("r1", 10, 4), Prompt("r2", 12, 5)],
        [Prompt("r4", 8, 3)],
        [Prompt("r6", 6, 3)],
    ]
    assert [(run.rows.start, run.rows.stop) for run in plan.runs] == [(1, 23), (28, 36), (46, 52)]
    assert [run.cu_seqlens.tolist() for run in plan.runs] == [[0, 10, 22], [0, 8], [0, 6]]
    marked = plan.runs[0].image_mask.nonzero().flatten().tolist()
    assert marked == [2, 3, 4, 5, 10, 11, 12, 16, 17] and plan.runs[0].max_seqlen == 12


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ((request(10, (2, 5)), 0, 7), Reason.CUT),
        ((request(10, (2, 5)), 4, 6), Reason.CUT),
        ((request(10, (2, 5), embeds=True), 0, 10), Reason.PROMPT_EMBEDS),
        ((request(10, (2, 5), eah=STREAMED), 0, 10), Reason.STREAMED),
        ((request(10), 6, 4), Reason.NO_IMAGE_TOKEN),
        ((request(10, (2, 5), eah="off"), 6, 4), OPTED_OUT),
        ((request(10), 0, 4), None),  # it ends in a later step, and is counted there
        ((request(10, (2, 5), eah="off"), 0, 4), None),
    ],
    ids=["cut", "rest", "embeddings", "streamed", "no image", "off", "no image, unfinished", "off, unfinished"],
)
def test_what_is_not_enhanced(row, why):
    plan = plan_step(*step(row), SETTINGS)
    assert plan.runs == [] and plan.others == ({} if why is None else {"r0": why})


def test_a_dummy_run_has_no_plan():
    runner, common, _ = step((request(4, (0, 1)), 0, 4))
    assert plan_step(runner, SimpleNamespace(is_prefilling=None), {}, SETTINGS) == no_plan()
    common.is_prefilling = torch.zeros(8, dtype=torch.bool)  # rows without requests
    assert plan_step(runner, common, {}, SETTINGS) == no_plan()


class Impl:
    scale, logits_soft_cap = DIM**-0.5, 0

    def __init__(self):
        self.runs = 0

    def forward(self, layer, query, key, value, kv_cache, metadata, output, **kwargs):
        self.runs += 1
        output.fill_(-7)
        return output


def enhanced_layer(tally, knobs=SETTINGS.knobs, writes=False, window=None):
    backend = SimpleNamespace(forward_includes_kv_cache_update=writes)
    layer = SimpleNamespace(impl=Impl(), sliding_window=window, attn_backend=backend)
    return EnhancedLayer(1, layer, knobs, None, tally), layer


def tensors(tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator) * 2 for shape in shapes)
    return query, key, value, torch.full((tokens, HEADS, DIM), 9.0)


def metadata(plan):
    return SimpleNamespace(**{PLAN: plan})


@pytest.mark.parametrize("window", [None, 4])
def test_the_rows_of_prompts_are_enhanced_and_no_others(window):
    tally = Tally(lambda outcome: None)
    _, layer = enhanced_layer(tally, window=window)
    rows = step((request(9), 9, 1), (request(10, (2, 5)), 0, 10), (request(12, (0, 2)), 0, 15), (request(3), 0, 3))
    plan = plan_step(*rows, SETTINGS)
    query, key, value, output = tensors(29)
    assert layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output) is output
    assert layer.impl.runs == 1
    want, heads = torch.full_like(output, -7), []
    for first, length, image in ((1, 10, slice(2, 6)), (11, 12, slice(0, 3))):
        tokens = slice(first, first + length)
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[:, image] = True
        batched = (flat[tokens].transpose(0, 1)[None] for flat in (query, key, value))
        result = eah_attention(*batched, mask, threshold=0.05, sliding_window=window, backend="torch")
        want[tokens] = result.output[0].transpose(0, 1)
        heads.append(int(result.head))
    assert torch.equal(output, want)
    tally.end_step(plan)
    assert [record["head"] for record in tally.report()["last"]] == heads and max(heads) >= 0


def test_a_step_of_prompts_alone_leaves_the_original_out():
    for writes, rows in ((False, 6), (True, 6), (False, 8)):  # fused cache writes and padded rows need it
        _, layer = enhanced_layer(Tally(None), writes=writes)
        plan = plan_step(*step((request(6, (1, 3)), 0, 6)), SETTINGS)
        query, key, value, output = tensors(rows)
        layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
        assert layer.impl.runs == (writes or rows > 6)
        assert (output[:6] != -7).all() and (output[6:] == -7).all()


def test_without_a_plan_the_original_runs():
    _, layer = enhanced_layer(Tally(None))
    query, key, value, output = tensors(4)
    for plan in (None, SimpleNamespace(), metadata(Plan([], {"r0": OPTED_OUT}, {}, []))):
        assert layer.impl.forward(layer, query, key, value, None, plan, output=output) is output
    assert layer.impl.runs == 3


@pytest.mark.parametrize("others", [True, False])
def test_an_error_in_a_step_is_told_and_not_raised(others, caplog):
    tally, told = Tally(lambda outcome: None), []
    _, layer = enhanced_layer(tally, knobs=SETTINGS.knobs._replace(broadcast_to=99))
    rows = [(request(6, (1, 3)), 0, 6), *([(request(3), 0, 3)] if others else [])]
    plan = plan_step(*step(*rows), SETTINGS)
    query, key, value, output = tensors(9 if others else 6)
    with caplog.at_level(logging.ERROR, "vllm.eah"):
        layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
    assert layer.impl.runs == 1 and (output == -7).all()
    assert "layer 1: ValueError was raised" in caplog.text and "Traceback" in caplog.text
    tally.end_step(plan)
    report = tally.report()
    assert report["stood_aside"].pop("layer 1: ValueError was raised, see the log") == 1
    assert report["stood_aside"] == ({"no image token": 1} if others else {}) and report["enhanced"] == 0
    assert report["last"] == told == []


def test_keys_that_do_not_reach_the_layer():
    tally = Tally(lambda outcome: None)
    _, layer = enhanced_layer(tally)
    plan = plan_step(*step((request(6, (1, 3)), 0, 6)), SETTINGS)
    query, _, _, output = tensors(6)
    layer.impl.forward(layer, query, None, None, None, metadata(plan), output=output)
    tally.end_step(plan)
    assert layer.impl.runs == 1 and tally.report()["stood_aside"] == {Reason.FUSED_WRITE.value: 1}


def act(tally, ids, layers=(1,), head=2):
    """A step in which prompts of these ids are enhanced, or none has a head."""
    prompts = [Prompt(request_id, 6, 3) for request_id in ids]
    for layer in layers:
        tally.acted(prompts, layer, torch.full((len(ids),), head), torch.zeros(len(ids), HEADS, dtype=torch.int32))
    tally.end_step(no_plan())


def test_a_prompt_is_counted_once_until_it_is_finished():
    outcomes = []
    tally = Tally(outcomes.append)
    act(tally, ["a", "b"], layers=(0, 1))
    act(tally, ["a"])  # preempted, and computed again
    act(tally, ["c"], head=-1)
    assert outcomes == ["enhanced", "enhanced", "no_head"]
    tally.finished(["a"])
    act(tally, ["a"])  # a new request of that name
    report = tally.report()
    assert (report["enhanced"], report["no_head"]) == (3, 1)
    assert [(record["request_id"], record["layer"]) for record in report["last"]] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
        ("c", 1),
        ("a", 1),
    ]
    assert report["last"][4]["head"] is None and report["last"][0]["sinks"] == [0] * HEADS


def test_a_prompt_that_did_not_reach_every_layer_is_told(caplog):
    """Where vLLM computes a layer past EAH (a replayed graph, a seam that moved), nothing may look enhanced."""
    outcomes = []
    tally = Tally(outcomes.append, layers=2)
    plan = plan_step(*step((request(6, (1, 3)), 0, 6), (request(6, (1, 3)), 0, 6)), SETTINGS)
    prompts = plan.runs[0].prompts
    for layer, reached in (0, prompts), (1, prompts[:1]):
        heads = torch.zeros(len(reached), dtype=torch.int32)
        tally.acted(reached, layer, heads, torch.zeros(len(reached), HEADS, dtype=torch.int32))
    tally.end_step(plan, due=["r0", "r1"])
    tally.end_step(no_plan(), due=["r2"])  # never planned
    tally.end_step(Plan([], {"r3": Reason.CUT, "r4": OPTED_OUT}, {}, []), due=["r3"])
    assert sorted(outcomes) == ["enhanced", "opted_out", *["stood_aside"] * 3]
    report = tally.report()
    assert report["stood_aside"] == {Reason.NOT_REACHED.value: 2, Reason.CUT.value: 1}
    assert {record["request_id"] for record in report["last"]} == {"r0"}
    (line,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert line.getMessage() == f"eah: request r1: {Reason.NOT_REACHED.value}"


def test_a_request_that_was_misread_is_counted_beside_its_outcome(caplog):
    tally = Tally(lambda outcome: None)
    for _ in range(2):
        tally.end_step(Plan([], {"a": Reason.NO_IMAGE_TOKEN}, {"a": ["off"] * 99}, []))
    (line,) = caplog.records
    assert line.getMessage().startswith('eah: request a: "eah" must be "on" or "off", got [\'off\', ')
    assert len(line.getMessage()) < 150
    assert tally.report()["stood_aside"] == {Reason.NO_IMAGE_TOKEN.value: 1, Reason.MISREAD.value: 1}


def test_memory_of_the_tally_is_bounded():
    tally = Tally(lambda outcome: None)
    for number in range(3 * KEPT):
        act(tally, [str(number)])
        tally.finished([str(number)])
    assert len(tally.report()["last"]) == KEPT and tally.report()["enhanced"] == 3 * KEPT
    assert not (tally._counted or tally._waiting or tally._acted or tally._aside)


def test_heads_stay_on_a_device_until_they_are_asked_for():
    """`meta` stands for a GPU: reading it fails."""
    tally = Tally(lambda outcome: None)
    tally._told = float("inf")  # no line is due
    prompts = [Prompt("a", 6, 3)]
    for _ in range(3):
        tally.acted(prompts, 1, torch.empty(1, device="meta"), torch.empty(1, HEADS, device="meta"))
        tally.end_step(no_plan())
    with pytest.raises(Exception, match="meta"):
        tally.report()


def test_a_line_is_logged_at_most_every_ten_seconds(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr("eah.vllm.report.time.monotonic", lambda: now[0])
    tally = Tally(lambda outcome: None)
    with caplog.at_level(logging.INFO, "vllm.eah"):
        for number in range(25):
            act(tally, [str(number)])
            now[0] += 1
        tally.end_step(Plan([], {"x": OPTED_OUT, "y": Reason.CUT}, {}, []))
        for _ in range(30):
            now[0] += 1
            tally.end_step(no_plan())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "eah: prompts: 1 enhanced, 0 without a head, 0 opted out",
        "eah: prompts: 11 enhanced, 0 without a head, 0 opted out",
        "eah: prompts: 21 enhanced, 0 without a head, 0 opted out",
        f"eah: prompts: 25 enhanced, 0 without a head, 1 opted out; stood aside: {Reason.CUT.value}: 1",
    ]


def test_another_process_of_the_group_keeps_no_tally():
    tally = Tally(None)
    act(tally, ["a"])
    assert tally.report() == {"enhanced": 0, "no_head": 0, "opted_out": 0, "stood_aside": {}, "last": []}


HOLD = SETTINGS._replace(decode="hold")


class CachingImpl(Impl):
    """Keeps what it was given, and the keys that are written to its cache."""

    fails = False

    def forward(self, layer, query, key, value, kv_cache, metadata, output, **kwargs):
        self.query, self.key = query, key
        return super().forward(layer, query, key, value, kv_cache, metadata, output)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        if self.fails:
            raise RuntimeError("no cache")
        self.written = key, value, slots


def holding_layer(tally):
    backend = SimpleNamespace(forward_includes_kv_cache_update=False)
    layer = SimpleNamespace(impl=CachingImpl(), sliding_window=None, attn_backend=backend, layer_name="layers.1")
    slots = {"layers.1": torch.arange(100, 200)}
    return HoldingLayer(1, layer, HOLD.knobs, None, tally, slots=slots.__getitem__), layer


def test_later_rows_get_the_held_heads_query_and_key():
    """A prompt, a text and a decoding row; then a later row of each. The rows of others stay as they are."""
    hook, layer = holding_layer(Tally(lambda outcome: None))
    plan = plan_step(*step((request(10, (2, 5)), 0, 10), (request(4), 0, 4), (request(9), 9, 1)), HOLD)
    assert plan.spans == [("r0", slice(0, 10))]
    query, key, value, output = tensors(15)
    layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
    head = int(hook.heads["r0"])
    assert head >= 0 and list(hook.heads) == ["r0"]
    written, values, slots = layer.impl.written
    assert torch.equal(written, key[:10, head // 2, None].expand(10, KV_HEADS, DIM)) and torch.equal(values, value[:10])
    assert slots.tolist() == list(range(100, 110))
    assert torch.equal(layer.impl.query[10:], query[10:]) and torch.equal(layer.impl.key[10:], key[10:])
    assert (output[:10] != -7).all() and (output[10:] == -7).all()

    rows = step((request(10, (2, 5)), 10, 1), (request(4), 4, 1))
    plan = plan_step(*rows, HOLD, hook.heads)
    assert plan.spans == [("r0", slice(0, 1))] and plan.runs == []
    query, key, value, output = tensors(2)
    layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
    assert torch.equal(layer.impl.query[0], query[0, head].expand(HEADS, DIM))
    assert torch.equal(layer.impl.query[1], query[1]) and torch.equal(layer.impl.key[1], key[1])
    hook.forget(["r0", "r1"])
    assert hook.heads == {} and plan_step(*rows, HOLD, hook.heads).spans == []


def test_a_prompt_without_a_head_holds_none():
    hook, layer = holding_layer(Tally(lambda outcome: None))
    hook.knobs = hook.knobs._replace(threshold=2.0)
    plan = plan_step(*step((request(10, (2, 5)), 0, 10)), HOLD)
    query, key, value, output = tensors(10)
    layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
    assert int(hook.heads["r0"]) == -1
    assert torch.equal(layer.impl.query, query) and torch.equal(layer.impl.written[0], key)


@pytest.mark.parametrize("fault", ["cache", "enhance", "no keys"])
def test_an_error_while_holding_is_told_and_not_raised(fault, caplog):
    tally = Tally(lambda outcome: None)
    hook, layer = holding_layer(tally)
    layer.impl.fails = fault == "cache"
    if fault == "enhance":
        hook.knobs = hook.knobs._replace(broadcast_to=99)
    plan = plan_step(*step((request(10, (2, 5)), 0, 10)), HOLD)
    query, key, value, output = tensors(10)
    key, value = (None, None) if fault == "no keys" else (key, value)
    layer.impl.forward(layer, query, key, value, None, metadata(plan), output=output)
    assert layer.impl.runs == 1 and torch.equal(layer.impl.query, query) and hook.heads == {}
    assert ("was raised" in caplog.text) == (fault != "no keys")
