"""Measure this machine: attention layers, then a whole model; prints the tables.

python -m bench.measure               about a minute on two CPU cores; writes into build/bench, or --out
python -m bench.measure --publish     also puts the results into the repository (bench/publish.py), unless the machine
                                      is busy before or was during the run
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from . import publish, report
from .machine import ROOT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder to write to")
    parser.add_argument("--publish", action="store_true", help="put the results into the repository")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.publish:
            publish.refuse_a_busy_machine()
        print(f"Measuring; about a minute on two quiet CPU cores. Results go to {chosen.out}.", flush=True)
        start = time.monotonic()
        for script in ("attention", "model"):
            command = [sys.executable, "-m", f"bench.{script}", "--out", chosen.out.resolve()]
            if subprocess.run(command, cwd=ROOT).returncode:
                print(f"{script} failed; its file in {chosen.out} says what it left out.", file=sys.stderr)
                return 1
        print(report.tables(chosen.out, essential=True))
        print(f"It took {(time.monotonic() - start) / 60:.1f} minutes.")
        if chosen.publish:
            print(f"Published in {publish.publish([chosen.out])}.")
    except publish.Refused as refused:
        print(f"Not published: {refused}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
