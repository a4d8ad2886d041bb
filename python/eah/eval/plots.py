"""Pictures of result.json: metrics by threshold and layers, and CHAIR against length."""

from __future__ import annotations

from pathlib import Path

from eah.eval.files import replacing
from eah.eval.variants import family_and_threshold

BY_THRESHOLD = {
    "pope": ("accuracy", "f1", "yes_ratio"),
    "chair": ("chair_s", "chair_i", "recall", "length"),
    "amber": ("chair", "cover", "hal", "f1"),
    "mmhal": ("rating", "hallucination"),
}


def plot(result: dict, out: Path, prefix: str = "") -> list[Path]:
    """Writes the pictures that the result is enough for; their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ImportError('the plots need matplotlib: pip install "eah-kernels[eval]"') from missing
    part = "mean" if any(d["part"] == "mean" for d in result["differences"]) else result["rows"][0]["part"]
    values: dict[str, dict[str, float | None]] = {}
    for entry in result["summary"]:
        values.setdefault(entry["variant"], {})[entry["metric"]] = entry["mean"]
    bounds = {(d["variant"], d["metric"]): d for d in result["differences"] if d["part"] == part}
    made = []
    if any(family_and_threshold(variant) for variant in values):
        path = out / f"{prefix}by_threshold.png"
        _save(_by_threshold(Figure, result["bench"], values, bounds), path)
        made.append(path)
    if result["bench"] == "chair":
        path = out / f"{prefix}chair_by_length.png"
        _save(_by_length(Figure, values), path)
        made.append(path)
    return made


def _by_threshold(figure_class, bench: str, values: dict, bounds: dict):
    """A line for each set of layers; the bars are the intervals of the difference from the first variant."""
    metrics = BY_THRESHOLD[bench]
    figure = figure_class(figsize=(3.6 * len(metrics), 3.4), layout="constrained")
    first = next(iter(values))
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for variant, found in values.items():
            place, value, bound = family_and_threshold(variant), found[metric], bounds.get((variant, metric))
            if place is None or value is None:
                continue
            below, above = 0.0, 0.0
            if bound is not None and bound["low"] is not None:
                below, above = bound["difference"] - bound["low"], bound["high"] - bound["difference"]
            lines.setdefault(place[0], []).append((place[1], value, max(below, 0), max(above, 0)))
        for label, points in lines.items():
            x, y, *error = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=label)
        if family_and_threshold(first) is None and values[first][metric] is not None:
            axes.axhline(values[first][metric], color="black", linestyle="--", label=first)
        axes.set(xlabel="threshold", ylabel=metric)
        axes.set_xscale("symlog", linthresh=1e-4)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def _by_length(figure_class, values: dict):
    figure = figure_class(figsize=(7.2, 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("chair_s", "chair_i"), strict=True):
        for variant, found in values.items():
            if found[metric] is not None and found["length"] is not None:
                axes.plot(found["length"], found[metric], "o", label=variant)
        axes.set(xlabel="length, tokens", ylabel=metric)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def _save(figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)
