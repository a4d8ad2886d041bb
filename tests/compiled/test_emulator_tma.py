"""What the emulator finds wrong about TMA, mbarriers and warps of different jobs, beside the code that is right."""

import numpy as np
import pytest
import torch

from . import ptx, tensor_maps
from .emulator import Executable, Fault, element_ranges
from .lowering import Program

# Warp 0 brings three tiles of 8 x 64 numbers of 16 bits through one place, warp 1 writes out row 1 of each.
RING = """
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128]
)
.reqntid 64
.maxnreg 64
{
	.reg .pred %p<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.b64 %rd3, kernel_param_1;
	cvta.param.u64 %rd3, %rd3;
	mov.u32 %r1, %tid.x;
	and.b32 %r2, %r1, 31;
	mov.b32 %r3, 1024;
	mov.b32 %r4, 1032;
	mov.b32 %r5, 0;
	setp.eq.s32 %p1, %r1, 0;
	@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
	@%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
	bar.sync 0;
	setp.ge.s32 %p2, %r1, 32;
	@%p2 bra $consume;
$produce:
	and.b32 %r6, %r5, 1;
	xor.b32 %r6, %r6, 1;
	{
	.reg .pred complete;
	again:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], %r6;
	@!complete bra.uni again;
	}
	shl.b32 %r7, %r5, 3;
	sub.s32 %r7, %r7, 1;
	mov.b32 %r8, 0;
	elect.sync _|%p3, -1;
	@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;
	@%p3 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%rd3, {%r8, %r7}], [%r3];
	add.s32 %r5, %r5, 1;
	setp.lt.s32 %p4, %r5, 3;
	@%p4 bra $produce;
	ret;
$consume:
	and.b32 %r6, %r5, 1;
	{
	.reg .pred complete;
	again:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r6;
	@!complete bra.uni again;
	}
	shl.b32 %r7, %r2, 2;
	ld.shared.b32 %r9, [%r7+128];
	bar.warp.sync -1;
	setp.eq.s32 %p3, %r2, 0;
	@%p3 mbarrier.arrive.shared::cta.b64 _, [%r4];
	mad.lo.s32 %r10, %r5, 128, %r7;
	cvt.u64.u32 %rd4, %r10;
	add.s64 %rd4, %rd4, %rd1;
	st.global.b32 [%rd4], %r9;
	add.s32 %r5, %r5, 1;
	setp.lt.s32 %p4, %r5, 3;
	@%p4 bra $consume;
	ret;
}
"""
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r6;"
RELEASE = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r4];"


def execute(text, seed):
    numbers = torch.arange(20 * 64, dtype=torch.int16).view(20, 64)
    out = torch.zeros(3, 64, dtype=torch.int16)
    (kernel,) = ptx.parse(text).values()
    tensor_map = tensor_maps.encode(numbers, numbers.shape, numbers.stride(), [8, 64], swizzle=3)
    params = np.array([out.data_ptr()], dtype=np.uint64).tobytes().ljust(64, b"\0") + tensor_map
    Executable(Program(kernel)).launch(1, params, 2048, element_ranges([numbers, out]), seed=seed)
    return out, numbers


@pytest.mark.parametrize("seed", range(6))
def test_tiles_arrive_swizzled_and_zeros_from_outside(seed):
    out, numbers = execute(RING, seed)
    rows = torch.cat([torch.zeros(1, 64, dtype=torch.int16), numbers])[1::8][:3]
    swapped = rows.view(3, 8, 8)[:, [1, 0, 3, 2, 5, 4, 7, 6]]  # in row 1 of a tile, neighbouring 16 bytes trade places
    assert torch.equal(out.view(3, 8, 8), swapped)


@pytest.mark.parametrize(
    ("right", "faulty", "message"),
    [
        pytest.param(WAIT, "setp.eq.s32 complete, 0, 0;", "read", id="missing wait"),
        pytest.param(WAIT, WAIT.replace("%r6", "1"), "read|wait for one another", id="wrong phase"),
        pytest.param(
            "ld.shared.b32 %r9, [%r7+128];\n\tbar.warp.sync -1;\n\tsetp.eq.s32 %p3, %r2, 0;\n\t" + RELEASE,
            "setp.eq.s32 %p3, %r2, 0;\n\t" + RELEASE + "\n\tld.shared.b32 %r9, [%r7+128];",
            "TMA copy to it is under way|without a wait for the phase|after warp 1 read it",
            id="early release",
        ),
        pytest.param("b64 [%r4], 1;", "b64 [%r4], 2;", "wait for one another", id="wrong count"),
        pytest.param("_, [%r3], 1024;", "_, [%r3], 512;", "wait for one another", id="too few bytes"),
        pytest.param("_, [%r3], 1024;", "_, [%r3], 2048;", "wait for one another", id="too many bytes"),
        pytest.param("bar.sync 0;", "", "no mbarrier at|without a barrier after its mbarrier.init", id="no barrier"),
        pytest.param(
            RELEASE, RELEASE.replace("@%p3 ", ""), "wait for one another|arrive where", id="every lane arrives"
        ),
        pytest.param("ld.shared.b32 %r9, [%r7+128]", "ld.shared.b32 %r9, [%r7+1024]", "mbarrier|before", id="barrier"),
    ],
)
def test_faults(right, faulty, message):
    assert right in RING
    caught = []
    for seed in range(6):
        try:
            execute(RING.replace(right, faulty), seed)
        except Fault as fault:
            caught.append(str(fault))
    assert caught, "no seed notices"
    assert all(any(word in text for word in message.split("|")) for text in caught), caught


def warps(jobs):
    """A kernel of two warps, each with a job, on no tensor."""
    head, tail = RING.split("\tsetp.eq.s32 %p1, %r1, 0;")[0], "\tret;\n}\n"
    return f"{head}setp.ge.s32 %p2, %r1, 32;\n@%p2 bra $second;\n{jobs[0]}\nret;\n$second:\n{jobs[1]}\n{tail}"


def test_registers_are_given_out():
    more, fewer = "setmaxnreg.inc.sync.aligned.u32 104;", "setmaxnreg.dec.sync.aligned.u32 24;"
    for seed in range(4):
        execute(warps([more, fewer]), seed)
        with pytest.raises(Fault, match="the threads wait for one another"):
            execute(warps([more, "bar.warp.sync -1;"]), seed)
        with pytest.raises(Fault, match="setmaxnreg from 64 to 104"):
            execute(warps([more.replace("inc", "dec"), fewer]), seed)


def test_barriers_of_some_warps():
    for seed in range(4):
        execute(warps(["bar.sync 1, 32;", "bar.sync 2, 32;"]), seed)
        execute(warps(["bar.sync 1, 64;", "bar.sync 1, 64;"]), seed)
        for job, message in [
            ("bar.sync 1, 64;", "the threads wait for one another"),
            ("bar.sync 2, 64;", "for another number of threads"),
        ]:
            with pytest.raises(Fault, match=message):
                execute(warps([job, "bar.sync 2, 96;"]), seed)


@pytest.mark.parametrize("table", ["$L_brx_0: .branchtargets", "$L_brx_0:\n\t.branchtargets"])
def test_an_indirect_branch(table):
    jobs = """
	TABLE
		$first,
		$third,
		$third;
	and.b32 %r6, %r1, 3;
	brx.idx %r6, $L_brx_0;
	$first:
	mov.b32 %r9, 1;
	bra $end;
	$third:
	mov.b32 %r9, 3;
	$end:
	""".replace("TABLE", table)
    with pytest.raises(Fault, match=r"brx\.idx to label 3 of 3"):
        execute(warps([jobs, ""]), 0)
    execute(warps([jobs.replace("%r1, 3", "%r1, 1"), ""]), 0)
