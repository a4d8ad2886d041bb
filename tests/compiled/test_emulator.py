"""What the emulator finds wrong, each with the code that is right beside it: kernels of a few lines of PTX."""

import numpy as np
import pytest
import torch

from . import ptx
from .emulator import Executable, Fault, element_ranges
from .lowering import Program
from .ptx import PTXError

HEADER = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd2, %rd2, %rd1;
{body}
	ret;
}}
"""


def execute(body, tensor=None, threads=64, grid=1, **options):
    """The kernel's only tensor, after it: 64 zeros of 32 bits, if none is given."""
    tensor = torch.zeros(64, dtype=torch.int32) if tensor is None else tensor
    text = HEADER.format(threads=threads, body="\n".join(f"\t{line.strip()}" for line in body.strip().split("\n")))
    (kernel,) = ptx.parse(text).values()
    params = np.array([tensor.data_ptr()], dtype=np.uint64).tobytes()
    Executable(Program(kernel)).launch(grid, params, 1024, element_ranges([tensor]), **options)
    return tensor


def wrong(message, body, *arguments, **options):
    for seed in (0, 1, 2):
        with pytest.raises(Fault, match=message):
            execute(body, *arguments, seed=seed, **options)


SWAP = """
st.shared.b32 [%r3], %r1;
{barrier}
xor.b32 %r4, %r3, 252;
ld.shared.b32 %r5, [%r4];
st.global.b32 [%rd2], %r5;
"""


def test_barrier():
    assert execute(SWAP.format(barrier="bar.sync 0;")).tolist() == list(range(64))[::-1]
    wrong("read (before it was written|without a barrier)", SWAP.format(barrier=""))
    again = SWAP.format(barrier="bar.sync 0;") + "{barrier}\nst.shared.b32 [%r3], %r5;"
    execute(again.format(barrier="bar.sync 0;"))
    wrong("written without a barrier after warp . read it|read without a barrier", again.format(barrier=""))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_between_registers_and_shared_memory(transposed):
    """Lane l holds entries 2 l and 2 l + 1 of an 8 x 8 matrix of 16 bits, by rows."""
    trans = ".trans" if transposed else ""
    body = f"""
    shl.b32 %r4, %r1, 1;
    add.s32 %r5, %r4, 1;
    shl.b32 %r5, %r5, 16;
    or.b32 %r4, %r4, %r5;
    and.b32 %r6, %r1, 7;
    shl.b32 %r6, %r6, 4;
    stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r6], {{%r4}};
    bar.sync 0;
    LOAD
    st.global.b32 [%rd2], %r7;
    """
    stored = execute(body.replace("LOAD", "ld.shared.b32 %r7, [%r3];"), threads=32)[:32].view(torch.int16).view(8, 8)
    entries = torch.arange(64, dtype=torch.int16).view(8, 8)
    assert torch.equal(stored, entries.mT if transposed else entries)
    back = f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r7}}, [%r6];"
    assert torch.equal(execute(body.replace("LOAD", back), threads=32)[:32].view(torch.int16), entries.flatten())


def test_a_barrier_that_not_all_reach():
    wrong("executed by lanes 0000ffff", "setp.ge.s32 %p1, %r1, 16;\n@%p1 bra $skip;\nbar.sync 0;\n$skip:")
    spin = "$again:\nld.global.b32 %r4, [%rd1];\nsetp.eq.b32 %p1, %r4, 0;\n@%p1 bra $again;"
    wrong("no end after", spin, limit=10000)


COPY = """
cp.async.ca.shared.global [%r3], [%rd2], 4, 4;
cp.async.commit_group;
{wait}
bar.sync 0;
ld.shared.b32 %r5, [%r3];
neg.s32 %r5, %r5;
st.global.b32 [%rd2], %r5;
cp.async.wait_all;
"""


def test_asynchronous_copies():
    numbers = torch.arange(64, dtype=torch.int32)
    copied = execute(COPY.format(wait="cp.async.wait_group 0;"), numbers.clone())
    assert torch.equal(copied, -numbers)
    wrong("while a cp.async of warp . to it is under way", COPY.format(wait="cp.async.wait_group 1;"))
    wrong("ends while its cp.async", COPY.format(wait="").split("bar.sync")[0])


def test_global_memory_outside_the_tensors():
    spread = torch.zeros(128, dtype=torch.int32)
    wrong("no element of a tensor", "st.global.b32 [%rd2], %r1;", spread[::2])
    wrong("byte 256 of a storage of 256", "st.global.b32 [%rd2+4], %r1;")
    wrong("not aligned", "ld.global.v2.b32 {%r4, %r5}, [%rd2];")


TICKET = """
{guard} bra $end;
mul.wide.u32 %rd3, %r2, 4;
add.s64 %rd3, %rd1, %rd3;
st.global.b32 [%rd3+8], 7;
atom.global.gpu.{order}.add.u32 %r4, [%rd1], 1;
setp.ne.b32 %p2, %r4, 3;
@%p2 bra $end;
ld.global.b32 %r5, [%rd1+8];
ld.global.b32 %r6, [%rd1+16];
add.s32 %r5, %r5, %r6;
st.global.b32 [%rd1+4], %r5;
$end:
"""


def test_order_between_blocks():
    ticket = TICKET.replace("{guard}", "setp.ne.b32 %p1, %r1, 0;\n@%p1")
    for seed in range(4):
        assert execute(ticket.format(order="acq_rel"), grid=4, seed=seed)[1] == 14
    for order in ("relaxed", "acquire", "release"):
        wrong("global memory is read unordered with a write by block", ticket.format(order=order), grid=4)
    wrong("global memory is written unordered", "mov.b32 %r4, 1;\nst.global.b32 [%rd2], %r2;", grid=2)


def test_forms_of_triton_3_8_and_3_9():
    body = """
    cvt.u64.u32 %rd3, %r1;
    shl.b64 %rd3, %rd3, 40;
    mul.hi.u64 %rd4, %rd3, %rd3;
    add.s64 %rd4, %rd4, 3;
    cvt.u32.u64 %r4, %rd4;
    cvt.u16.u64 %r5, %rd4;
    shl.b32 %r6, %r1, 3;
    st.shared::cta.v2.b32 [%r6], { %r4, %r5 };
    ld.shared::cta.v2.b32 { %r7, %r8 }, [%r6];
    sub.s32 %r7, %r7, %r8;
    red.global.gpu.relaxed.add.u32 [%rd2], %r7;
    red.global.gpu.relaxed.add.u32 [%rd1 + 4], %r8;
    """
    squares = [65536 * lane**2 for lane in range(64)]
    squares[1] += 64 * 3
    assert execute(body).tolist() == squares


def test_lanes_part_and_meet():
    """Collatz steps of each lane's number: a loop of another length in each."""
    body = """
    add.s32 %r4, %r1, 1;
    mov.b32 %r5, 0;
    $again:
    setp.eq.b32 %p1, %r4, 1;
    @%p1 bra $done;
    and.b32 %r6, %r4, 1;
    setp.ne.b32 %p2, %r6, 0;
    @!%p2 bra $even;
    mad.lo.s32 %r4, %r4, 3, 1;
    bra $next;
    $even:
    shr.u32 %r4, %r4, 1;
    $next:
    add.s32 %r5, %r5, 1;
    bra $again;
    $done:
    shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1;
    st.global.b32 [%rd2], %r7;
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert execute(body).tolist() == [steps((thread ^ 1) + 1) for thread in range(64)]
    wrong("shfl.sync", "setp.lt.s32 %p1, %r1, 9;\n@%p1 shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;")


def test_what_is_not_known_is_named():
    with pytest.raises(PTXError, match=r"line 17: sin.approx.f32 %r4, %r1: not a form"):
        execute("sin.approx.f32 %r4, %r1;")
    with pytest.raises(PTXError, match=r"line 17.*unknown is no operand"):
        execute("add.s32 %r4, unknown, 1;")
    with pytest.raises(PTXError, match=r"line 17.*%rd1 has 8 bytes where 4 are expected"):
        execute("add.s32 %r4, %rd1, 1;")
