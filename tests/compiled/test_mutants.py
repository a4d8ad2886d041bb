"""A sample of the planted faults; `make compiled MUTANTS=all` tries every one of them."""

import os

import pytest
import torch

from ..support.cases import Case, exact, make, run
from . import mutants, ptx
from .emulator import Executable
from .nothing import Flow, redundant
from .replays import Replay, kept, spaced
from .triton_launch import compiled

SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_planted_faults_are_noticed(target, capsys):
    result = mutants.survey([target], sample=60, seed=SEED, processes=1, more=False)
    with capsys.disabled():
        print("", *result.table(), sep="\n")
    missed = [line for line in result.missed if line.split(" | ")[2] in mutants.STRICT]
    assert not missed, missed


@pytest.mark.parametrize(("operator", "kernel"), [("order", "_sinks_kernel"), ("copy wait", "_lse_kernel")])
def test_every_one_of_an_operator(operator, kernel):
    """The ticket's order, and the waits of a pipelined loop."""
    replays = []
    with compiled("sm_80", observe=lambda launched: replays.append(Replay(launched))):
        inputs = make(Case(q_len=140, kv_len=141, heads=2, kv_heads=1))
        inputs = spaced(inputs)
        inputs.query, inputs.key, inputs.value = (t.bfloat16() for t in (inputs.query, inputs.key, inputs.value))
        run(inputs, exact(inputs)[-1], "triton")
    replay = next(r for r in replays if r.launched.name == kernel)
    program = replay.launched.program
    replay.record()
    sites = [m for m in mutants.mutants_of(program.kernel) if m.operator == operator]
    assert sites
    for site in sites:
        assert replay.caught(Executable(mutants.changed(program, site))), site


HEAD = """
.visible .entry kernel()
.reqntid 128
{{
	.reg .pred %p<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	mov.u32 %r1, %tid.x;
"""
FENCES = (
    HEAD
    + """	setp.lt.s32 %p1, %r1, {first};
	setp.lt.s32 %p2, %r1, 65;
	@%p1 bra $L1;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r2,%r3,%r4,%r5}}, %rd1, %rd2, 0, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
$L1:
	{between}
	@%p2 bra $L2;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.{types} {{%r{result},%r3,%r4,%r5}}, {rows}, %rd2, 0, 1, 1, 0, 0;
	{after}
$L2:
	{again}
	ret;
}}
"""
)


@pytest.mark.parametrize(
    ("change", "nothing"),
    [
        ({}, True),
        (dict(result=6), True),
        (dict(first=66), False),  # the second product may be the first
        (dict(between="add.s32 %r1, %r1, 64;"), False),  # or it may, as the number between changes
        (dict(again="@%p2 bra $L1;"), True),
        (dict(between="mov.u32 %r4, %r1;"), False),
        (dict(between="add.f32 %r7, %r4, %r4;"), False),
        (dict(between="mov.u32 %r7, %r1;"), True),
        (dict(rows="{%r6,%r7,%r7,%r7}"), True),
        (dict(rows="{%r6,%r7,%r7,%r7}", between="mov.u32 %r6, %r1;"), False),
        (dict(rows="{%r3,%r7,%r7,%r7}", result=6), False),  # of the product before: its sums
        (dict(types="bf16.bf16"), False),  # another shape
        (dict(after="mov.u32 %r3, %r1;", again="bra $L1;"), False),
    ],
)
def test_wgmma_fence_that_does_nothing(change, nothing):
    """The second of two products, which comes with the first, whose registers nobody touched since its fence."""
    body = dict(first=1, between="", types="f16.f16", result=2, rows="%rd1", after="", again="") | change
    (kernel,) = ptx.parse(FENCES.format(**body)).values()
    fences = [i for i, s in enumerate(kernel.statements) if s.opcode.startswith("wgmma.fence")]
    assert [redundant(Flow(kernel), fence) for fence in fences] == [False, nothing]


def test_list_tells_fences_apart():
    """Their text is the same: the product that a fence is of says which it is."""
    body = dict(first=66, between="", types="f16.f16", result=6, rows="%rd3", after="", again="")
    (kernel,) = ptx.parse(FENCES.format(**body)).values()
    sites = [m for m in mutants.mutants_of(kernel) if m.operator == "wgmma fence"]
    texts = [mutants.told(kernel, site).split(" | ")[-1] for site in sites]
    assert texts == [f"wgmma.fence.sync.aligned of {product} -> None" for product in ("%r2 %rd1 %rd2", "%r6 %rd3 %rd2")]


def test_list_tells_branches_by_where_they_go():
    body = dict(first=66, between="", types="f16.f16", result=6, rows="%rd3", after="", again="@%p2 bra $L1;")
    (kernel,) = ptx.parse(FENCES.format(**body)).values()
    sites = [m for m in mutants.mutants_of(kernel) if m.operator == "predicate"]
    assert [" to earlier " in mutants.told(kernel, site) for site in sites] == [False, False, True]


def test_copy_is_kept_while_it_is_the_same():
    tensor = torch.zeros(3)
    first = kept(tensor.untyped_storage())
    assert kept(tensor.untyped_storage()) is first
    tensor[1] = -0.0
    second = kept(tensor.untyped_storage())
    assert second is not first and list(first) == [0] * 12 and list(second)[7] == 0x80


LOADS = (
    HEAD
    + """	setp.lt.s32 %p1, %r1, 7;
	mov.u32 %r3, %r1;
	@%p1 {load};
	{use};
	ret;
}}
"""
)


@pytest.mark.parametrize(
    ("load", "use", "nothing"),
    [
        ("ld.global.b32 {%r3}, [%rd1+0]", "mov.u32 %r3, %r1", True),
        ("ld.shared.b32 %r3, [%r1+0]", "mov.u32 %r4, %r1", True),
        ("ld.global.b32 {%r3}, [%rd1+0]", "mov.u32 %r4, %r3", False),
        ("ld.global.b32 {%r3}, [%rd1+0]", "st.shared.b32 [%r3+0], %r1", False),
        ("ld.global.b32 {%r3}, [%rd1+0]", "st.shared.b32 [%r1+0], %r3", False),
        ("ld.shared.b32 %r3, [%r1+0]", "ld.shared.b32 %r4, [%r3+0]", False),
        ("ld.global.v2.b32 {%r3,%r5}, [%rd1+0]", "add.s32 %r4, %r5, %r1", False),
        ("ld.global.acquire.gpu.b32 {%r3}, [%rd1+0]", "mov.u32 %r4, %r1", False),
        ("st.shared.b32 [%r1+0], %r1", "mov.u32 %r4, %r1", False),
    ],
)
def test_load_that_nobody_reads(load, use, nothing):
    (kernel,) = ptx.parse(LOADS.format(load=load, use=use)).values()
    sites = [m for m in mutants.mutants_of(kernel) if m.operator == "predicate" and m.statement is None]
    assert (not sites) == nothing
