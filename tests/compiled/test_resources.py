"""`make resources` says when a build is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .sass import overlap

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CODE = """
from dataclasses import replace
from tests.compiled import resources
from eah_kernels.triton.tiles import ONCE, TILES, find_tile
row = resources.Row("lse", "sm_90", "plain", 64)
print(resources.build(row)[2])
good = resources.TARGETS["sm_90"]
resources.TARGETS["sm_90"] = good._replace(shared_kib=1, matrix="UTCHMMA")
print(resources.build(row)[2])
resources.TARGETS["sm_90"] = good
row = resources.Row("sinks", "sm_90", "masked", 128)
print(resources.build(row)[2])
kinds = TILES["sinks"]["sm_90"]
kinds["masked"] = tuple(replace(tile, spills="") for tile in kinds["masked"])
find_tile.cache_clear()
print(resources.build(row)[2])
kinds["masked"] = tuple(replace(tile, spills=ONCE) for tile in kinds["masked"])
find_tile.cache_clear()
print(resources.build(row)[2])
row = resources.Row("lse", "sm_90", "fast", 128)
resources.FAST_ISSUES, resources.FAST_EXPS_BETWEEN["lse"] = 4, 20
print(resources.build(row)[2])
row = resources.Row("attend", "sm_90", "plain", 64)
launch = resources.make_launch(row)
launch.arguments["R"] = launch.arguments["R"]._replace(WGMMA=False)
make, resources.make_launch = resources.make_launch, lambda row: launch
print(resources.build(row)[2])
row = resources.Row("attend", "sm_80", "plain", 64)
launch = make(row)
launch.arguments["R"] = launch.arguments["R"]._replace(MMA_SYNC=False)
print(resources.build(row)[2])
"""


def unfenced(problem: str) -> bool:
    """Whether it is what every such build of these Tritons has."""
    from .triton_launch import UNFENCED  # which imports triton

    return UNFENCED and problem.endswith("without a proxy fence")


def test_every_kind_of_wrong_build_is_told():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    told = [[problem for problem in eval(line) if not unfenced(problem)] for line in done.stdout.splitlines()]
    right, wrong, excused, spilling, inside, slow, serialised, twice = told
    assert right == [] and excused == []
    assert wrong == ["more than 1 KiB of shared memory", "no UTCHMMA instruction"]
    assert len(spilling) == 1 and spilling[0].startswith("spills ")
    assert inside == ["spills in a loop, and the table says that it does not"]
    assert ["more than 4" in slow[0], "fewer than 20" in slow[1], len(slow)] == [True, True, 2]
    assert serialised == ["ptxas serialises wgmma: (C7515)"]
    assert twice == ["takes every exp of the shared map 4.0 times"]


EXP, PRODUCT, WAIT = "MUFU.EX2 R1, R2", "HGMMA.64x128x16.F32 R8, R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("loop", "waits", "exps"),
    [
        ([PRODUCT, PRODUCT, WAIT, EXP, EXP], 0.5, 0),
        ([PRODUCT, EXP, PRODUCT, EXP, WAIT, EXP], 0.5, 1),
        ([PRODUCT, WAIT, EXP, PRODUCT, EXP, WAIT], 1, 0.5),
        ([EXP, EXP, WAIT, PRODUCT], 1, 2),  # of the turn before
        ([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EXP, WAIT], 2, 1),  # the first wait leaves it under way
        (["HMMA.16816.F32 R8, R4", EXP], 0, 0),
    ],
)
def test_exps_beside_a_product(loop, waits, exps):
    assert overlap(loop) == (waits, exps)


@pytest.mark.parametrize("short", [False, True])
def test_the_table_is_complete(short):
    from eah_kernels.triton.lse import LSE_PAD
    from eah_kernels.triton.one_pass import KEYS_STEP
    from eah_kernels.triton.pack import PAD
    from eah_kernels.triton.tiles import HEAD_DIMS, SHORT_TILES, TILES

    for kernel, targets in (SHORT_TILES if short else TILES).items():
        assert set(targets) == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
        for target, kinds in targets.items():
            every = {"plain", "masked"} if short else {"plain", "masked", "float32"}
            assert set(kinds) == every or (short and not kinds)
            for tiles in kinds.values():
                assert len(tiles) == len(HEAD_DIMS)
                for tile, dim in [(t, d) for t, d in zip(tiles, HEAD_DIMS, strict=True) if t]:
                    assert LSE_PAD % tile.block_m == PAD % tile.block_m == PAD % tile.block_n == 0
                    assert kernel != "attend" or tile.value_width >= dim
                    if kernel == "attend" and target in ("sm_80", "sm_89"):  # a warp's share of the rows is 16
                        assert tile.block_m == 16 * tile.num_warps
                    assert kernel != "one_pass" or KEYS_STEP % tile.block_n == 0
