"""The Gluon kernels as compiled for sm_90, executed on the CPU: right in several orders of their warps and copies.

And faults planted into the compiled code, of the kinds that a ring of tiles invites: each is noticed. ALL=1: at every
place where it fits.
"""

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from eah_kernels import reference, shared_map_attention, sink_statistics
from eah_kernels.triton.tiles import FAST

from ..support.cases import Case, assert_close, assert_statistics_close, check, exact, make, run
from .emulator import Executable
from .lowering import Program
from .replays import Replay, spaced
from .triton_launch import TensorMap, compiled

HALF, BRAIN = torch.float16, torch.bfloat16
KERNELS = [f"_{kernel}_kernel" for kernel in FAST]
SMALL = Case(q_len=299, kv_len=300, batch=1, heads=2, kv_heads=1, dim=128)
LONG = Case(q_len=430, kv_len=640, batch=1, heads=1, kv_heads=1, dim=128, image="all")  # tiles: 4 of rows, 5 of keys
BOTH = Case(q_len=150, kv_len=330, batch=2, heads=2, kv_heads=1, dim=64, image="absent")  # an own map and a shared one
HOLES = (0, 40), (70, 100), (130, 131), (192, 400), (420, 455)  # tiles that they split, whole ones and split ones
FELT = {  # by kernel and mask, what shows a fault
    "_lse_kernel": replace(LONG, q_len=300),
    "_sinks_kernel": LONG,
    "_attend_kernel": BOTH,
    "_attend_kernel, mask": replace(BOTH, q_len=200, kv_len=460, mask="left"),
}
UNFELT = {  # a group's last tiles: nothing comes to their places any more
    ("early_release", "_sinks_kernel"): 3,
    ("wrong_phase", "_sinks_kernel"): 1,  # the first group leaves no tile out
    ("missing_wait", "_sinks_kernel"): 1,
    ("early_release", "_attend_kernel"): 4,
    ("wrong_phase", "_attend_kernel"): 1,
    ("missing_wait", "_attend_kernel"): 5,
    ("early_release", "_attend_kernel, mask"): 4,
    ("wrong_phase", "_attend_kernel, mask"): 5,
    ("missing_wait", "_attend_kernel, mask"): 16,  # 8 for cleared tiles: the next keys come after them
}
PLACES = None if os.environ.get("ALL") else 3


def short_rings(stages: int = 2):
    """Not as many places as there is room for: a few tiles go round. attend has a place less for keys."""
    few = {"lse": stages, "sinks": stages, "attend": max(stages, 2)}
    rows = {k: {"sm_90": {d: replace(t, stages=few[k]) for d, t in v["sm_90"].items()}} for k, v in FAST.items()}
    return mock.patch.dict(FAST, rows)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(SMALL, BRAIN, marks=pytest.mark.tritons),
        (Case(q_len=200, kv_len=261, heads=4, kv_heads=2, dim=64, image="absent", layout="bhsd"), HALF),
        (Case(q_len=65, kv_len=70, heads=3, kv_heads=3, dim=128, image="absent"), HALF),
    ],
    ids=str,
)
def test_right_in_every_order(case, dtype):
    inputs = make(case, dtype)
    output, head, counts, _, _, threshold = exact(inputs)
    results, names = [], set()
    for seed in (0, 1, 2, 3):
        with short_rings(), compiled("sm_90", seed=seed, gluon=True, observe=lambda launched: names.add(launched)):
            results.append(run(inputs, threshold, "triton"))
    assert by_tma(names) == {launched.name for launched in names} == set(KERNELS)
    assert torch.equal(results[0].sink_counts, counts) and torch.equal(results[0].head, head)
    plain = reference.shared_map_attention(inputs.query, inputs.key, inputs.value, head, inputs.scoring, dtype)
    assert_close(results[0].output, output, plain)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.tritons
def test_statistics_and_a_given_head():
    """Without a tally, with column means; the log-sum-exps of one head alone."""
    with compiled("sm_90", seed=2, gluon=True):
        check(Case(q_len=150, kv_len=210, heads=2, kv_heads=2, image="scattered"), "triton", HALF)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "shown",
    [((0, 640),), ((0, 100), (130, 131), (190, 400), (470, 640)), ((256, 384),), ((0, 64),)],
    ids=str,
)
def test_a_mask_by_key(shown, dim):
    """Whole tiles, split ones and hidden ones, also where a batch row has no others; what the mask hides is NaN."""
    inputs = make(Case(q_len=430, kv_len=640, heads=2, kv_heads=1, dim=dim, mask="left", image="scattered"), HALF)
    hide_all_but(shown, inputs)
    _, _, counts, lse, mean, threshold = exact(inputs)
    results, names = [], set()
    for seed in (0, 1, 2, 3):
        with short_rings(), compiled("sm_90", seed=seed, gluon=True, observe=lambda launched: names.add(launched)):
            tensors = (t := spaced(inputs)).query, t.key, t.image_mask
            options = dict(attention_mask=t.attention_mask, threshold=threshold, return_column_mean=True)
            results.append(sink_statistics(*tensors, backend="triton", **options))
    assert by_tma(names) == {"_lse_kernel", "_sinks_kernel"}
    assert torch.equal(results[0].sink_counts, counts)
    counting = inputs.attention_mask[:, None, 210:].expand_as(lse)
    assert_statistics_close(results[0].lse[counting], results[0].column_mean, lse[counting], mean)
    for other in results[1:]:
        assert torch.equal(other.lse[counting], results[0].lse[counting])
        assert torch.equal(other.column_mean, results[0].column_mean)


@pytest.mark.parametrize(
    ("case", "shown", "heads"),
    [
        (Case(q_len=200, kv_len=261, heads=4, kv_heads=2, dim=64, mask="left"), ((0, 261),), (-1, 0)),
        (Case(q_len=200, kv_len=460, heads=2, kv_heads=1, dim=128, mask="left"), HOLES, (0, -1)),
        (Case(q_len=199, kv_len=200, heads=2, kv_heads=1, dim=128, mask="left"), ((0, 40),), (-1, 0)),
        (Case(q_len=199, kv_len=200, heads=2, kv_heads=1, dim=128, mask="left"), ((0, 40),), (0, -1)),
        (Case(q_len=197, kv_len=260, heads=3, kv_heads=3, dim=64, mask="right"), ((180, 260),), (0, -1)),
    ],
    ids=["left", "holes", "nothing, shared", "nothing, own", "right, first rows"],
)
def test_the_output_under_a_mask_by_key(case, shown, heads):
    """An own map and a shared one. What the mask hides is NaN, values included; rows that see no key are zeros."""
    inputs = make(case, BRAIN)
    hide_all_but(shown, inputs)
    head = torch.tensor(heads, dtype=torch.int32)
    wide = inputs.widened()
    exact_output = reference.shared_map_attention(wide.query, wide.key, wide.value, head, wide.scoring)
    plain = reference.shared_map_attention(inputs.query, inputs.key, inputs.value, head, inputs.scoring, BRAIN)
    query = spaced(replace(inputs, attention_mask=None)).query  # also of rows whose own key is hidden
    results, names = [], set()
    for seed in (0, 1, 2, 3):
        with short_rings(), compiled("sm_90", seed=seed, gluon=True, observe=lambda launched: names.add(launched)):
            t = spaced(inputs)
            options = dict(attention_mask=t.attention_mask, backend="triton")
            results.append(shared_map_attention(query, t.key, t.value, head, **options))
    assert by_tma(names) == {"_lse_kernel", "_attend_kernel"}
    assert_close(results[0], exact_output, plain)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def hide_all_but(shown, inputs):
    key = torch.arange(inputs.key.shape[2])
    inputs.attention_mask &= sum((first <= key) & (key < end) for first, end in shown).bool()


def by_tma(names):
    return {launched.name for launched in names if any(isinstance(a, TensorMap) for a in launched.arguments)}


def launch_of(name, case):
    replays = []
    inputs = make(case, BRAIN)
    if case.mask:
        hide_all_but(HOLES, inputs)
    with short_rings(1), compiled("sm_90", gluon=True, observe=lambda launched: replays.append(Replay(launched))):
        run(spaced(inputs), exact(inputs)[-1], "triton")
    return next(replay for replay in replays if replay.launched.name == name.split(",")[0])


@pytest.fixture(scope="module")
def recorded():
    """By kernel, a launch that can be had again; memory that belongs to nobody lies around its tensors.

    With one place in a ring, every phase of it is felt.
    """
    found = {}
    for name, case in FELT.items():
        found[name] = launch_of(name, case)
        found[name].record()
    return found


def early_release(statements, at):
    """The place is given back before the product that reads it is done."""
    if statements[at].opcode.startswith("wgmma.wait_group"):
        arrive = next((i for i in range(at, at + 20) if statements[i].opcode.startswith("mbarrier.arrive.shared")), 0)
        if arrive:
            return [*statements[:at], *statements[at + 1 : arrive + 1], statements[at], *statements[arrive + 1 :]]


def wrong_phase(statements, at):
    if statements[at].opcode.startswith("mbarrier.try_wait"):
        target, place, parity = statements[at].operands
        flip = statements[at]._replace(opcode="xor.b32", operands=("%r99999", parity, "1"))
        return [*statements[:at], flip, *changed(statements, at, operands=(target, place, "%r99999"))[at:]]


def missing_wait(statements, at):
    if statements[at].opcode.startswith("mbarrier.try_wait"):
        return changed(statements, at, opcode="setp.eq.s32", operands=(statements[at].operands[0], "0", "0"))


def wrong_count(statements, at):
    if statements[at].opcode.startswith("mbarrier.init") and statements[at].operands[1] != "1":
        return changed(statements, at, operands=(statements[at].operands[0], str(int(statements[at].operands[1]) - 1)))


def wrong_bytes(statements, at):
    if statements[at].opcode.startswith("mbarrier.arrive.expect_tx"):
        return changed(statements, at, operands=(*statements[at].operands[:2], "1024"))


def accumulator_in_flight(statements, at):
    if statements[at].opcode.startswith("wgmma.wait_group"):
        return changed(statements, at, operands=(str(int(statements[at].operands[0]) + 1),))


def missing_fence(statements, at):
    """Of the rows that a mask hides, once they are zeros."""
    if statements[at].opcode.startswith("fence.proxy.async") and statements[at].location.startswith("ring.py"):
        return [*statements[:at], *statements[at + 1 :]]


def missing_zeros(statements, at):
    if statements[at].opcode.startswith("st.shared") and statements[at].location.startswith("ring.py"):
        return [*statements[:at], *statements[at + 1 :]]


def changed(statements, at, **fields):
    return [*statements[:at], statements[at]._replace(**fields), *statements[at + 1 :]]


FAULTS = [early_release, wrong_phase, missing_wait, wrong_count, wrong_bytes, accumulator_in_flight]
EVERYWHERE = [(fault, kernel) for fault in FAULTS for kernel in FELT]
OF_CLEARING = [(fault, "_attend_kernel, mask") for fault in (missing_fence, missing_zeros)]


@pytest.mark.parametrize(("fault", "kernel"), EVERYWHERE + OF_CLEARING)
def test_a_planted_fault_is_noticed(fault, kernel, recorded):
    replay = recorded[kernel]
    source = replay.launched.program.kernel
    planted = [found for at in range(len(source.statements)) if (found := fault(source.statements, at))]
    missed = 0
    for statements in planted[:: max(len(planted) // PLACES, 1) if PLACES else 1]:
        missed += not replay.caught(Executable(Program(source._replace(statements=tuple(statements)))))
    assert planted and missed <= UNFELT.get((fault.__name__, kernel), 0)
