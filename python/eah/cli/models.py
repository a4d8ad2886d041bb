"""`eah models`: the table of families, in Markdown or in columns."""

from __future__ import annotations

import shutil
import sys
import textwrap

from eah.transformers.families import family_table

MODELS_HEADER = ("family", "status", "first usable layer from 1 on", "notes")


def models_table() -> str:
    """The families as a Markdown table; docs/models.md holds the same text."""
    lines = [f"| {' | '.join(MODELS_HEADER)} |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in family_table())])


def models_text() -> str:
    """The families in aligned columns, the notes folded to the width of the terminal."""
    rows = [("family", "status", "layer", "notes"), *family_table()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
        folded = textwrap.wrap(row[3], max(30, room - len(start) - 2), break_on_hyphens=False) or [""]
        lines += [
            f"{start if number == 0 else ' ' * len(start)}  {part}".rstrip() for number, part in enumerate(folded)
        ]
    return "\n".join([*lines, "", "layer: the first usable one from 1 on, counted from 0"])
