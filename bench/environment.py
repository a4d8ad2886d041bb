"""What this GPU machine is, and the two ceilings that every time is held against, measured; writes environment.json.

The copy rate counts bytes read and written of a device-to-device copy; the matrix rate is that of an 8192^3 product of
random bfloat16 values.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .machine import Results, said
from .timing import spread, timed


def measure(rounds: int = 10, copy_bytes: int = 2**32, size: int = 8192) -> list[dict]:
    memory = torch.randint(0, 256, (2, copy_bytes // 2), dtype=torch.uint8, device="cuda")
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    calls = {
        "copy": ("TB/s", copy_bytes / 1e9, lambda: memory[0].copy_(memory[1])),
        "matrix product": ("TFLOP/s", 2 * size**3 / 1e9, lambda: a @ b),
    }
    rows = []
    for name, (unit, work, call) in calls.items():
        times = spread([timed(call, "cuda").device for _ in range(rounds + 1)][1:])
        rows.append({"ceiling": name, "rate": work / times["median_ms"], "unit": unit, **times})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    chosen = parser.parse_args(arguments)
    tools = {tool: said(tool, "--version") for tool in ("nvcc", "compute-sanitizer", "ncu")}
    found = {name: text.splitlines()[-1] if text else None for name, text in tools.items()}
    Results(chosen.out / "environment.json", "cuda", chosen.commit, tools=found).add(measure())


if __name__ == "__main__":
    main()
