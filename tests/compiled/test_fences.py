"""The scan of `make resources` for shared memory that wgmma reads without a proxy fence."""

import pytest

from .fences import unfenced_reads

WAIT, FENCE, MMA = (
    "cp.async.wait_group 0;",
    "fence.proxy.async.shared::cta;",
    "wgmma.mma_async.sync.aligned.m64n32k16 x;",
)
COPY, STORE = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;", "@%p1 st.shared.b32 [ %r1 ], %r2;"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([COPY, WAIT, FENCE, MMA], {}),
        ([COPY, FENCE, WAIT, MMA], {4: 1}),
        ([COPY, WAIT, "@%p1 " + FENCE, MMA], {4: 1}),
        ([COPY, "cp.async.wait_group 1;", FENCE, WAIT, MMA], {5: 1}),
        ([STORE, "bar.sync 0;", MMA], {3: 1}),
        ([STORE, FENCE, MMA], {}),
        ([STORE, "tcgen05.mma.cta_group::1.kind::f16 x;"], {2: 1}),
        # a fence on one path only
        ([STORE, "@%p2 bra $L1;", FENCE, "$L1:", MMA], {5: 1}),
        # around a loop: what the last iteration wrote
        (["$L1:", MMA, COPY, WAIT, "@%p2 bra $L1;", "ret;"], {2: 3}),
        (["$L1:", FENCE, MMA, COPY, WAIT, "@%p2 bra $L1;", "ret;"], {}),
        (["bra.uni $L1;", STORE, "$L1:", MMA, "ret;"], {}),
        # labels of inline assembly recur
        (["{", "skip:", "@!done bra.uni skip;", "}", STORE, FENCE, "{", "skip:", "@!done bra.uni skip;", "}", MMA], {}),
    ],
)
def test_unfenced_reads(lines, found):
    assert unfenced_reads("\n".join(lines)) == found


def test_a_build_without_ptx_has_no_such_reads():
    assert unfenced_reads("") == {}
