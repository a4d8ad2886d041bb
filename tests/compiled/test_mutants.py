"""A sample of the planted faults; `make compiled MUTANTS=all` tries every one of them."""

import os

import pytest

from ..support.cases import Case, exact, make, run
from . import mutants
from .emulator import Executable
from .problems import Replay, spaced
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
