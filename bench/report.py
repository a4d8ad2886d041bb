"""Tables and a chart from the result files: `python -m bench.report [FOLDER ...]` prints the tables.

bench/publish.py puts them into the repository.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .machine import ROOT

ESSENTIAL = ("eah", "attention", "held")


def published(root: Path = ROOT) -> list[Path]:
    return sorted(path.parent for path in (root / "bench/results").glob("*/attention.json"))


def heading(results: dict, file: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    where = "/".join(("..", *file.parts[-4:])) if file.parts[-4:-2] == ("bench", "results") else file.name
    commit = f"commit {results['commit'][:12]}; " if "commit" in results else ""
    return f"Measured: {results['device']}; {versions}; {commit}`{results['command']}`; [{file.name}]({where})"


def attention_table(file: Path) -> str:
    """One line a layer, dtype and contestant: everything that was measured."""
    results = json.loads(file.read_text())
    columns = ["layer", "dtype", "contestant", "median ms", "p20-p80 ms", "to SDPA", "to eager EAH"]
    columns += ["in a CUDA graph, to SDPA", "TFLOP/s", "extra MiB"]
    lines = [heading(results, file), "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in results["rows"]:
        cells = [row["layer"], row["dtype"], row["contestant"]]
        if "not_timed" in row:
            cells += [f"not timed: {row['not_timed']}"] + [""] * (len(columns) - 4)
        else:
            cells += [figure(row["median_ms"]), f"{figure(row['p20_ms'])}-{figure(row['p80_ms'])}"]
            cells += [
                number(row["ratio_to_sdpa"]),
                number(row["ratio_to_eager"]),
                number(row.get("graph_ratio_to_sdpa")),
            ]
            cells += [f"{row['tflops']:.3g}", number(row.get("peak_extra_mib"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def essential_table(file: Path) -> str:
    """One line a layer and dtype, a column a contestant: medians over plain SDPA's, losing ones included."""
    results = json.loads(file.read_text())
    rows = [row for row in results["rows"] if row["computes"] in ESSENTIAL]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    names.sort(key=lambda name: not name.startswith("SDPA"))
    lines = [heading(results, file), ""]
    lines += [f"| layer | dtype | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for layer, dtype in dict.fromkeys((row["layer"], row["dtype"]) for row in rows):
        of_layer = {r["contestant"]: r for r in rows if (r["layer"], r["dtype"]) == (layer, dtype)}
        cells = [essential_cell(of_layer[name]) if name in of_layer else "" for name in names]
        lines.append(f"| {layer} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def essential_cell(row: dict) -> str:
    if "not_timed" in row:
        return "not timed"
    milliseconds, ratio = f"{figure(row['median_ms'])} ms", row["ratio_to_sdpa"]
    return milliseconds if ratio in (None, 1) else f"{ratio:.2f} ({milliseconds})"


def model_table(file: Path) -> str:
    results = json.loads(file.read_text())
    lines = [heading(results, file), ""]
    lines += [
        "| model | attention | first token ms | to SDPA | decode tokens/s | to SDPA | extra MiB |",
        "|" + "---|" * 7,
    ]
    for row in results["rows"]:
        if "not_timed" in row:
            lines.append(f"| {row['model']} | {row['way']} | not timed: {row['not_timed']} | | | | |")
            continue
        cells = [row["model"], row["way"], f"{row['first_token_ms']:.4g}", number(row["first_token_ratio"], 3)]
        cells += [f"{row['decode_tokens_per_s']:.3g}", number(row["decode_ratio"], 3), number(row["peak_extra_mib"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three figures, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def number(value: float | None, places: int = 2) -> str:
    return "" if value is None else f"{value:.{places}f}"


def tables(folder: Path, essential: bool) -> str:
    found = {"attention.json": essential_table if essential else attention_table, "model.json": model_table}
    return "\n\n".join(table(folder / name) for name, table in found.items() if (folder / name).exists())


def all_results(root: Path = ROOT) -> str:
    """What stands between the marks in docs/results.md."""
    return "\n\n".join(tables(folder, essential=True) for folder in published(root))


def chart(folder: Path) -> Path:
    """Medians over plain SDPA's: a panel a layer, a group of bars a dtype, losing ones included."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads((folder / "attention.json").read_text())
    rows = [row for row in results["rows"] if row.get("ratio_to_sdpa") and row["computes"] in ESSENTIAL]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    baseline = next(name for name in names if name.startswith("SDPA"))
    names = [name for name in names if name != baseline]
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    canvas, panels = plt.subplots(
        down, across, figsize=(3 * across, 2.3 * down + 0.9), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(layers) :]:
        panel.axis("off")
    for panel, layer in zip(panels.flat, layers, strict=False):
        of_layer = {(row["dtype"], row["contestant"]): row for row in rows if row["layer"] == layer}
        dtypes = list(dict.fromkeys(dtype for dtype, _ in of_layer))
        there = [name for name in names if any((dtype, name) in of_layer for dtype in dtypes)]
        width = 0.8 / max(1, len(there))
        for group, dtype in enumerate(dtypes):
            for place, name in enumerate(there):
                row = of_layer.get((dtype, name))
                if row is not None:
                    x, ratio = group + (place - (len(there) - 1) / 2) * width, row["ratio_to_sdpa"]
                    panel.bar(x, ratio, 0.9 * width, color=colours[name])
                    panel.annotate(f"{ratio:.2f}", (x, ratio), ha="center", va="bottom", fontsize=7)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(dtypes)), dtypes, fontsize=8)
        panel.tick_params(axis="y", labelsize=7)
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        what, _, shape = layer.partition(": ")
        panel.set_title(f"{what}\n{shape}", fontsize=8)
    bars = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    canvas.legend(bars, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    canvas.suptitle(f"time over plain SDPA's (the line; lower is better); {results['device']}", fontsize=10)
    file = folder / "attention.png"
    canvas.savefig(file, dpi=110)
    plt.close(canvas)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: those that are published")
    for folder in parser.parse_args().folders or published():
        print(tables(folder, essential=True), "\n")


if __name__ == "__main__":
    main()
