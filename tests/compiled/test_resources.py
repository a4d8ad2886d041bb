"""`make resources` says when a build is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CODE = """
from dataclasses import replace
from tests.compiled import resources
from eah_kernels.triton.tiles import TILES
row = resources.Row("lse", "sm_90", "plain", 64)
print(resources.build(row)[2])
good = resources.TARGETS["sm_90"]
resources.TARGETS["sm_90"] = good._replace(shared_kib=1, matrix="UTCHMMA")
print(resources.build(row)[2])
resources.TARGETS["sm_90"] = good
row = resources.Row("attend", "sm_90", "float32", 256)
print(resources.build(row)[2])
kinds = TILES["attend"]["sm_90"]
kinds["float32"] = tuple(replace(tile, spills="") for tile in kinds["float32"])
print(resources.build(row)[2])
"""


def test_every_kind_of_wrong_build_is_told():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    right, wrong, excused, spilling = map(eval, done.stdout.splitlines())
    assert right == [] and excused == []
    assert wrong == ["more than 1 KiB of shared memory", "no UTCHMMA instruction"]
    assert len(spilling) == 1 and spilling[0].startswith("spills ")


@pytest.mark.parametrize("short", [False, True])
def test_the_table_is_complete(short):
    from eah_kernels.triton.lse import LSE_PAD
    from eah_kernels.triton.one_pass import KEYS_STEP
    from eah_kernels.triton.pack import PAD
    from eah_kernels.triton.tiles import HEAD_DIMS, SHORT_TILES, TILES

    for kernel, targets in (SHORT_TILES if short else TILES).items():
        assert set(targets) == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
        for kinds in targets.values():
            every = {"plain", "masked"} if short else {"plain", "masked", "float32"}
            assert set(kinds) == every or (short and not kinds)
            for tiles in kinds.values():
                assert len(tiles) == len(HEAD_DIMS)
                for tile, dim in [(t, d) for t, d in zip(tiles, HEAD_DIMS, strict=True) if t]:
                    assert LSE_PAD % tile.block_m == PAD % tile.block_m == PAD % tile.block_n == 0
                    assert kernel != "attend" or tile.value_width >= dim
                    assert kernel != "one_pass" or KEYS_STEP % tile.block_n == 0
