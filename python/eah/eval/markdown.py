"""result.md: what result.json holds, for people."""

from __future__ import annotations

import math

from eah.eval.files import write_text

AS_NUMBERS = ("length", "rating")  # every other metric is a fraction, told in percent


def write(path, results: dict[str, dict]) -> None:
    """results: what result.json holds, by the name of the run; one run's name may be empty."""
    write_text(path, "\n\n".join(section(name, result) for name, result in results.items()) + "\n")


def section(name: str, result: dict) -> str:
    title = f"# {result['bench']}" + (f": {name}" if name else "")
    parts = list(dict.fromkeys(row["part"] for row in result["rows"]))
    of = {part: {r["variant"]: r["metrics"] for r in result["rows"] if r["part"] == part} for part in parts}
    if len(parts) > 1:
        of["mean"] = {}
        for entry in result["summary"]:
            of["mean"].setdefault(entry["variant"], {})[entry["metric"]] = entry["mean"]
    tables = [f"## {part}\n\n{table(part, metrics, result)}" for part, metrics in of.items()]
    said = "\n".join(f"- {line}" for line in notes(result))
    return "\n\n".join([title, said, *tables])


def table(part: str, metrics: dict[str, dict], result: dict) -> str:
    """A line a variant. A difference from the first one has its interval, and the spread of several parts a +-."""
    columns = [name for name in next(iter(metrics.values())) if any(m[name] is not None for m in metrics.values())]
    differ = {(d["variant"], d["metric"]): d for d in result["differences"] if d["part"] == part}
    std = {(s["variant"], s["metric"]): s["std"] for s in result["summary"]} if part == "mean" else {}
    lines = [f"| variant | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for variant, values in metrics.items():
        cells = [_cell(name, values[name], std.get((variant, name)), differ.get((variant, name))) for name in columns]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: str, value: float | None, std: float | None, differ: dict | None) -> str:
    if value is None:
        return "-"
    scale = 1 if metric.startswith(AS_NUMBERS) else 100
    text = f"{scale * value:.1f}" if scale == 100 else f"{value:.2f}"
    text += "" if std is None else f" ± {scale * std:.1f}"
    if differ is None or differ["low"] is None:
        return text
    low, high, difference = (scale * differ[key] for key in ("low", "high", "difference"))
    return f"{text} ({difference:+.1f} [{low:+.1f}, {high:+.1f}])"


def notes(result: dict) -> list[str]:
    """What to know before a figure is read."""
    rows, settings = result["rows"], result["settings"]
    found = [f"{name}: {_plain(value)}" for name, value in settings.items() if value is not None]
    if result["differences"]:
        one = result["differences"][0]
        found.append(
            f"in brackets: the difference from {one['against']} and its {100 * one['level']:g} % interval, from "
            f"{one['resamples']} paired draws of the images"
        )
    for row in rows:
        where = f"{row['variant']}, {row['part']}"
        if row["acted"] == 0:
            found.append(f"**{where}: EAH chose no head in any answer: these are figures of the model as it is**")
        elif row["acted"] is not None and row["acted"] < 1:
            found.append(f"{where}: EAH chose a head in {100 * row['acted']:.1f} % of the answers")
        if row["unparsed"]:
            found.append(f"{where}: {row['unparsed']} of {row['n']} answers say neither yes nor no")
        if row["truncated"]:
            found.append(
                f"{where}: {row['truncated']} of {row['n']} answers were cut at the largest number of new tokens"
            )
    found.append("answers: " + ", ".join(_counts(rows)))
    return found


def _counts(rows: list[dict]) -> list[str]:
    return [f"{part} {n}" for part, n in dict.fromkeys((row["part"], row["n"]) for row in rows)]


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
