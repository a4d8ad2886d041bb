"""A sample of the planted faults; `make compiled MUTANTS=all` tries every one of them."""

import os

import mutants
import pytest
from triton_launch import compiled

from support import Case, exact, make, run

SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_planted_faults_are_noticed(target, capsys):
    tried, caught, _, survivors = mutants.survey([target], sample=60, seed=SEED, processes=1)
    with capsys.disabled():
        print(f"\n{target}, seed {SEED}: {caught.total()} of {tried.total()} planted faults caught", dict(caught))
    missed = [line for line in survivors if line.split(" | ")[1] in mutants.STRICT]
    assert not missed, missed


@pytest.mark.parametrize(("operator", "kernel"), [("order", "_sinks_kernel"), ("copy wait", "_lse_kernel")])
def test_every_one_of_an_operator(operator, kernel):
    """The ticket's order, and the waits of a pipelined loop."""
    replays = []
    with compiled("sm_80", observe=lambda launched: replays.append(mutants.Replay(launched))) as driver:
        inputs = make(Case(q_len=140, heads=2, kv_heads=1))
        inputs = mutants.spaced(inputs)
        inputs.query, inputs.key, inputs.value = (t.bfloat16() for t in (inputs.query, inputs.key, inputs.value))
        run(inputs, exact(inputs)[-1], "triton")
    replay = next(r for r in replays if r.launched.name == kernel)
    program = replay.launched.program
    executable = next(e for e in driver.executables.values() if e.program is program)
    replay.results, replay.steps = replay.run(executable), replay.executed
    sites = [m for m in mutants.mutants_of(program.kernel) if m.operator == operator]
    assert sites
    for site in sites:
        assert replay.caught(mutants.changed(program.kernel, site)), site
