"""pytest-benchmark cases: `pytest bench --benchmark-only --benchmark-group-by=param:layer`.

For ratios measured side by side use bench/attention.py, whose contestants take turns.
"""

import pytest
import torch

from .contestants import check, contestants
from .layers import CPU_LAYERS, LATENCY, PREFILL, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


CASES = [
    pytest.param(layer, contestant, id=f"{layer}-{contestant.name}")
    for layer in ((*PREFILL[:6], *LATENCY[1:]) if DEVICE == "cuda" else CPU_LAYERS)
    for contestant in contestants(DEVICE, layer)
]


@pytest.mark.parametrize("layer, contestant", CASES)
def test_speed(benchmark, layer, contestant):
    problem = check(contestant, layer, DTYPE, DEVICE)
    if problem:
        pytest.skip(f"not timed: {problem}")
    inputs = make_inputs(layer, DTYPE, DEVICE)

    def run():
        contestant.run(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
