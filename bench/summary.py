"""The result files of a device run in few short lines, for where only the end of an output is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

LINES, LINE = 100, 118  # at most, of a summary and of one of its lines
SHORT = {"EAH, ": "", "eager EAH, as published": "published", "FlexAttention": "flex", "SDPA, ": "sdpa "}


def lines(folder: Path) -> list[str]:
    """Of every result file in the folder."""
    tables = {
        "environment": environment,
        "kernels": kernels,
        "bounds": bounds,
        "attention": attention,
        "model": models,
    }
    found = []
    for name, table in tables.items():
        file = folder / f"{name}.json"
        if file.exists():
            results = json.loads(file.read_text())
            found += [f"-- {name}", *table(results, folder)]
            found += [f"   left out: {what}: {why}" for what, why in results["left_out"].items()]
    return found


def cut(found: list[str], most: int = LINES) -> list[str]:
    """The first `most`, none longer than a line; the last says how many more there are."""
    found = [line if len(line) <= LINE else line[: LINE - 3] + "..." for line in found]
    if len(found) <= most:
        return found
    return [*found[: most - 1], f"... {len(found) - most + 1} more lines in summary.txt"]


def environment(results: dict, folder: Path) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"{results['device']}, driver {results['driver']}; {versions}; commit {results.get('commit', 'not known')}"
    yield "; ".join(f"{row['ceiling']} {row['rate']:.3g} {row['unit']}" for row in results["rows"])


def attention(results: dict, folder: Path) -> Iterator[str]:
    """A line a layer and dtype: plain SDPA, everybody else over it; `g`, the same in a CUDA graph; `h`, host ms."""
    for (layer, dtype), rows in grouped(results["rows"], "layer", "dtype"):
        timed = [row for row in rows if "median_ms" in row]
        plain = timed[0].get("sdpa") if timed else None
        cells = []
        for row in timed:
            cell = f"{short(row['contestant'])} "
            if row["contestant"] == plain or row["ratio_to_sdpa"] is None:
                cell += f"{row['median_ms']:.3g} ms"
                cell += f" g {row['graph_ms']:.3g} ms" if "graph_ms" in row else ""
            else:
                cell += f"{row['ratio_to_sdpa']:.2f}"
                cell += f" g {row['graph_ratio_to_sdpa']:.2f}" if "graph_ratio_to_sdpa" in row else ""
                cell += f" h {row['host_ms']:.2g}" if "graph_ms" in row else ""
            if not row["contestant"].endswith("alone"):
                cells.append(cell)
        absent = [row for row in rows if "not_timed" in row]
        ours = [row for row in absent if row["contestant"].startswith("EAH")]
        theirs = [short(row["contestant"]) for row in absent if row not in ours]
        cells += [f"not timed: {', '.join(theirs)}"] if theirs else []
        cells += [f"NOT TIMED: {short(row['contestant'])}: {row['not_timed'][:60]}" for row in ours]
        yield from packed(f"{layer} {dtype}:", cells)


def kernels(results: dict, folder: Path) -> Iterator[str]:
    """A line a layer and dtype: FlashAttention-2 in ms, each kernel over it."""
    for (layer, dtype), rows in grouped(results["rows"], "layer", "dtype"):
        flash = next((row.get("median_ms") for row in rows if row["kernel"] == "SDPA, flash"), None)
        cells = [f"FA2 {flash:.3g} ms" if flash else "no FA2"]
        cells += [cell(row, flash) for row in rows if row["kernel"] != "SDPA, flash"]
        yield from packed(f"{layer} {dtype}:", cells)


def cell(row: dict, flash: float | None) -> str:
    if "not_timed" in row:
        return f"{row['kernel']}: {row['not_timed'][:60]}"
    ratio = f" ({row['median_ms'] / flash:.2f})" if flash else ""
    return f"{row['kernel']} {row['median_ms']:.3g} ms{ratio}"


def bounds(results: dict, folder: Path) -> Iterator[str]:
    """A line a layer and kernel: as shipped in ms, and over that what one cost gone leaves; ^ without exps too."""
    without_exp = folder / "bounds-add.json"
    rows = results["rows"] + (json.loads(without_exp.read_text())["rows"] if without_exp.exists() else [])
    for (layer, kernel), of_kernel in grouped(rows, "layer", "kernel"):
        shipped = next((row.get("median_ms") for row in of_kernel if row["variant"] == "as shipped"), None)
        if not shipped or len(of_kernel) == 1:
            continue
        cells = [f"{kernel} {shipped:.3g} ms"]
        for row in of_kernel:
            name = "no exp" if (row["variant"], row["exp"]) == ("as shipped", "add") else row["variant"]
            if "median_ms" in row and (row["variant"], row["exp"]) != ("as shipped", "exp"):
                cells.append(f"{name}{'^' if row['exp'] == 'add' else ''} {row['median_ms'] / shipped:.2f}")
        yield f"{layer.split(':')[0]}: {', '.join(cells)}"


def models(results: dict, folder: Path) -> Iterator[str]:
    for row in results["rows"]:
        if "not_timed" in row:
            yield f"{row['model']}, {row['way']}: {row['not_timed']}"
            continue
        ratios = row["first_token_ratio"], row["decode_ratio"]
        first, rest = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        yield (
            f"{row['model']}, {row['way']}: first token {row['first_token_ms']:.4g} ms ({first}), "
            f"{row['decode_tokens_per_s']:.3g} tokens/s ({rest})"
        )


def grouped(rows: list[dict], *names: str) -> Iterator[tuple[tuple, list[dict]]]:
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        yield key, [row for row in rows if tuple(row[name] for name in names) == key]


def packed(line: str, cells: list[str]) -> Iterator[str]:
    """The line and the cells side by side, in as few lines as hold them, indented from the second on."""
    for text in cells:
        if len(line) + len(text) + 2 > LINE:
            yield line
            line = "  "
        line += f" {text};"
    yield line


def short(name: str) -> str:
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name
