"""The figures of a page of many pictures, as PNG files' content."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eah.inspect.figures import CELLS_WITH_TEXT, FIRST, INK, LABELLED, MARK, SPARSE, colour_bar, inked, new_figure, png

PLACES = 12  # layers whose sinks' places are drawn, at most


def wins(common: Sequence[dict], heads: int) -> bytes:
    """How often each head (column) wins in each layer (row)."""
    told = heads <= CELLS_WITH_TEXT
    width, height = (0.52, 0.34) if told else (0.21, 0.21)
    figure = new_figure(1.3 + width * heads, max(1.15 + height * len(common), LABELLED), layout="constrained")
    axes = inked(figure.add_subplot(), lines=False)
    shares = [[one["wins"].get(str(head), 0) / one["pictures"] for head in range(heads)] for one in common]
    drawn = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            if told and share:
                ink = "black" if share > 0.6 else "white"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_yticks(range(len(common)), [one["layer"] for one in common])
    axes.set_xticks(range(0, heads, 1 if told else 4))
    colour_bar(figure, drawn, axes, "pictures in which it wins", "{x:.0%}")
    return png(figure)


def density_and_agreement(common: Sequence[dict]) -> bytes:
    """By layer: the winner's density (median, quartiles), and in how many pictures the commonest head wins."""
    figure = new_figure(6.2, 3.6, layout="constrained")
    above, below = (inked(axes, grid=True) for axes in figure.subplots(2, 1, sharex=True))
    at = range(len(common))
    quartiles = [[one["density"][name] for one in common] for name in ("quartile_1", "median", "quartile_3")]
    above.fill_between(at, quartiles[0], quartiles[2], color=FIRST, alpha=0.25, linewidth=0)
    above.plot(at, quartiles[1], "o-", color=FIRST, markersize=4)
    below.plot(at, [one["agreement"] for one in common], "o-", color=SPARSE, markersize=4)
    above.set(ylabel="density", ylim=(0, 1.02))
    below.set(xlabel="layer", ylabel="agreement", ylim=(0, 1.02))
    below.set_xticks(at, [one["layer"] for one in common])
    return png(figure, 64)


def places(common: Sequence[dict]) -> bytes:
    """Where the winner's sinks lie, as shares of the tokens in each part of the picture: the first layers."""
    shown = [one for one in common if one["places"] is not None][:PLACES]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(0.9 + 1.5 * columns, 0.3 + 1.7 * rows, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False)
    drawn = None
    for number, axes in enumerate(every.flat):
        axes.axis("off")
        if number < len(shown):
            cells = [[math.nan if v is None else v for v in line] for line in shown[number]["places"]]
            drawn = axes.imshow(cells, cmap="inferno", vmin=0, vmax=1)
            axes.set_title(f"layer {shown[number]['layer']}", color=INK, fontsize=9)
    colour_bar(figure, drawn, every, "of the tokens are sinks", "{x:.0%}", shrink=0.9)
    return png(figure)


def against_hallucination(pairs: Sequence[tuple[float, float]], layer: int, label: str) -> bytes:
    """A dot a picture: the winner's density in a layer, and how much the answer makes up."""
    figure = new_figure(4.6, 3.2, layout="constrained")
    axes = inked(figure.add_subplot(), grid=True)
    axes.plot([a for a, _ in pairs], [b for _, b in pairs], "o", color=FIRST, alpha=0.5, markersize=5)
    axes.set(xlabel=f"density of the winner in layer {layer}", ylabel=label, ylim=(-0.03, 1.03))
    return png(figure, 64)


def margins(cells: Sequence[dict], candidates: Sequence[dict], own: float) -> bytes:
    """Layers by thresholds: the mean margin as the colour, what is not usable hatched, the candidates framed."""
    from matplotlib.patches import Rectangle

    layers = sorted({cell["layer"] for cell in cells})
    thresholds = sorted({cell["threshold"] for cell in cells})
    values = [[0.0] * len(thresholds) for _ in layers]
    figure = new_figure(1.6 + 0.26 * len(thresholds), max(1.3 + 0.26 * len(layers), LABELLED), layout="constrained")
    axes = inked(figure.add_subplot(), lines=False)
    for cell in cells:
        y, x = layers.index(cell["layer"]), thresholds.index(cell["threshold"])
        values[y][x] = cell["margin"]
        if not cell["usable"]:
            square = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="//////", edgecolor=INK, linewidth=0)
            axes.add_patch(square)
    drawn = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto")
    for cell in candidates:
        x, y = thresholds.index(cell["threshold"]), layers.index(cell["layer"])
        axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=MARK, linewidth=2.2))
    if thresholds[0] < own < thresholds[-1]:
        at = math.log(own / thresholds[0]) / math.log(thresholds[-1] / thresholds[0]) * (len(thresholds) - 1)
        axes.plot([at], [-0.5], "v", color=MARK, markersize=7, clip_on=False)
    axes.set(xlabel="threshold", ylabel="layer", xlim=(-0.5, len(thresholds) - 0.5), ylim=(len(layers) - 0.5, -0.5))
    axes.set_yticks(range(len(layers)), layers)
    ticks = range(0, len(thresholds), 4)
    axes.set_xticks(ticks, [f"{thresholds[tick]:.2g}" for tick in ticks])
    colour_bar(figure, drawn, axes, "margin, of the image tokens")
    return png(figure)
