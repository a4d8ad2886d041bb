"""A model of one multiprocessor of an H100 or H200: what a kernel's clocks are made of, counted, not measured.

    python -m bench.multiprocessor    the table of kernels-2.md, and from how many programs on `one_pass` loses

Warps that wait for each other take turns: a group's products, the wait for them, then the exps and the rest of what it
issues. Groups share the matrix unit and, as one server, exps and issues: an exp takes the time of 8 issues, of which
BESIDE are made meanwhile. A multiprocessor with enough groups is bound by the busier of the two; with few, by a group's
turn.
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS = 132
MATRIX, EXPS, ISSUES = 2048, 16, 128  # a clock: 16-bit multiply-adds, exps, instructions of a thread
BESIDE = 4
LATENCY = 85  # clocks of a wait for wgmma; fitted to the two rows of attend, which waited for each of 12 products
LAUNCH = 1750  # clocks, 1 us


class Loop(NamedTuple):
    """A steady loop. scores: of a group's tile. features: multiply-adds a score."""

    scores: int
    features: int
    issues: float  # a score
    waits: int  # a tile
    groups: int  # on a multiprocessor

    @property
    def clocks(self) -> float:
        """Of the multiprocessor, a score."""
        matrix, rest = self.features / MATRIX, 1 / EXPS + (self.issues - BESIDE) / ISSUES
        turn = matrix + rest + self.waits * LATENCY / self.scores
        return max(matrix, rest, turn / self.groups)


# As shipped when kernels-2.md was written, 8 warps in two groups, and that table's clocks a score.
SHIPPED = {
    "lse": (Loop(64 * 128, 128, 7.1, 1, 4), 0.085),
    "sinks": (Loop(64 * 64, 128, 6.8, 1, 4), 0.085),
    "attend, shared": (Loop(64 * 64, 384, 8.7, 12, 2), 0.252),
    "attend, own": (Loop(64 * 64, 256, 13.3, 12, 2), 0.271),
}


class Program(NamedTuple):
    """Instructions that a warp of 8 executes: for a program, a tile, and one left out. Fitted, within 3 %, to the
    emulator's counts for 64 to 768 tokens (tests/compiled; PTX, times the machine code's length over the PTX's)."""

    rows: int  # of a tile
    keys: int
    once: float
    tile: float
    left_out: float = 0

    def clocks(self, tiles: int, left_out: int, head_dim: int, groups: int) -> tuple[float, float]:
        """Of a program alone on a multiprocessor, and of its exps and issues."""
        scores = tiles * self.rows * self.keys
        issues = 8 * 32 * (self.once + self.tile * tiles + self.left_out * left_out) / ISSUES
        rest = issues + scores * (1 / EXPS - BESIDE / ISSUES)
        return max(rest, (rest + scores * head_dim / MATRIX) / groups + tiles * LATENCY), rest


LSE = {64: Program(128, 128, 1048, 413), 128: Program(128, 128, 1134, 433)}
SINKS = {64: Program(64, 128, 1268, 223), 128: Program(64, 128, 1420, 255)}
ONE_PASS = {64: Program(64, 128, 436, 780, 153), 128: Program(64, 128, 532, 842, 202)}


def statistics_clocks(length: int, head_dim: int, heads: int, groups: int) -> tuple[float, float]:
    """Of `one_pass`, one resident program a multiprocessor, and of `lse` and `sinks`, two: with so many heads in all.

    groups: of a program of `lse` or `sinks`, 2 if the halves of its warps drift apart as far as they can, 1 if not at
    all. The warps of `one_pass` wait for each other at every maximum. Every column block has an image token.
    """

    def blocks(of: int) -> range:
        return range(-(-length // of))

    walked = [-(-min(64 * (block + 1), length) // 128) for block in blocks(64)]
    held = -(-length // 256) * 2
    alone = [ONE_PASS[head_dim].clocks(tiles, held - tiles, head_dim, 1)[0] for tiles in walked]
    one = max(max(alone), heads * sum(alone) / MULTIPROCESSORS)
    two = LAUNCH
    columns = [-(-(length - 128 * block) // 64) for block in blocks(128)]
    for program, tiles in ((LSE[head_dim], [b + 1 for b in blocks(128)]), (SINKS[head_dim], columns)):
        alone, rest = zip(*(program.clocks(n, 0, head_dim, groups) for n in tiles), strict=True)
        two += max(max(alone), heads * sum(rest) / MULTIPROCESSORS)
    return one, two


def crossover(length: int, head_dim: int, groups: int) -> int | None:
    """From how many programs on `one_pass` takes longer; None if not up to 4096 heads."""
    for heads in range(1, 4097):
        one, two = statistics_clocks(length, head_dim, heads, groups)
        if one > two:
            return heads * -(-length // 64)
    return None


def main() -> None:
    for name, (loop, table) in SHIPPED.items():
        print(f"{name:15} {loop.clocks:.3f} clocks a score, kernels-2.md {table:.3f}")
    print("one_pass loses from so many programs on: head dim, tokens, overlapping halves, none")
    for head_dim in ONE_PASS:
        for length in (128, 256, 320, 384, 512, 648, 768):
            print(f"{head_dim:4} {length:5}", *(crossover(length, head_dim, groups) for groups in (2, 1)))


if __name__ == "__main__":
    main()
