"""The fuzzer finds what is wrong, makes it simple and tells how to see it again."""

import random

import pytest

from eah_kernels import torch_blocked

from ..support.cases import LAYOUTS
from . import fuzz


def test_a_planted_fault_is_found_and_made_simple(monkeypatch, tmp_path):
    right = torch_blocked.shared_map_attention

    def assuming(query, key, value, head, scoring):
        """As if a head's entries lay side by side."""
        return right(query, key, value, head, scoring) + (0 if head.is_contiguous() else 1)

    problem = fuzz.Problem(
        function="shared_map_attention", q_len=5, more_keys=3, batch=3, kv_heads=2, dim=8, value_dim=8, mask="bias",
        layouts=("reversed", "sliced", "plain", "plain", "negated", "sliced", "plain"),
    )  # fmt: skip
    assert fuzz.failure(problem) is None
    monkeypatch.setattr(torch_blocked, "shared_map_attention", assuming)
    assert "off by" in fuzz.failure(problem)
    least = fuzz.simplest(problem)
    plain = fuzz.Problem(function="shared_map_attention")
    assert {k for k, v in vars(least).items() if v != vars(plain)[k]} == {"batch", "layouts"}
    assert least.batch == 2 and least.layouts == ("plain",) * 5 + ("sliced", "plain")
    fuzz.save(tmp_path / "failure.py", least)
    assert "batch=2" in (tmp_path / "failure.py").read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_decides_the_problems(seed):
    first, second = (
        [fuzz.draw(rng, ["torch", "triton"]) for _ in range(200)] for rng in map(random.Random, [seed] * 2)
    )
    assert first == second and all(map(fuzz.valid, first))
    assert {layout for p in first for layout in p.layouts} == {"plain", *LAYOUTS}
    assert {p.mask for p in first} == set(fuzz.MASKS) and {p.function for p in first} == set(fuzz.FUNCTIONS)
