"""The figures of a page, as PNG files' content: drawn on nothing, in colours that are read on light and dark ground.

They are drawn by matplotlib alone, without pyplot: nothing global is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eah.inspect.look import LayerLook, Look

if TYPE_CHECKING:
    from eah.inspect.compare import LayerChange

DPI = 144
INK = "#808890"  # of text and axes
FIRST, SPARSE, OTHERS, MARK = "#e4572e", "#2a9d8f", "#9aa3ab", "#ff2d6f"
CELLS_WITH_TEXT = 16  # heads, at most
COLOURS = "inferno"
LABELLED = 2.4  # inches of height at least, for the label of a colour bar
SHADE = 0.62  # of the colour over the picture


def new_figure(width: float, height: float, **options):
    """An empty figure of so many inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ImportError('the pictures need matplotlib: pip install "eah-kernels[demo]"') from missing
    return Figure(figsize=(width, height), dpi=DPI, facecolor="none", **options)


def png(figure, colours: int = 96) -> bytes:
    """A palette of few colours makes a third of the size."""
    from PIL import Image

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", transparent=True)
    Image.open(whole).quantize(colours, method=Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return small.getvalue()


def inked(axes, grid: bool = False, lines: bool = True):
    """The axes in the colour of INK, without a box; lines: those of x and y are drawn."""
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8, length=3)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set(color=INK, visible=lines and side in ("left", "bottom"))
    if grid:
        axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    return axes


def colour_bar(figure, drawn, axes, label: str, form: str | None = None, shrink: float = 1.0) -> None:
    """The scale of what is drawn in the axes, beside them."""
    bar = figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02, shrink=shrink, format=form)
    bar.set_label(label, color=INK, fontsize=9)
    inked(bar.ax)
    bar.outline.set_visible(False)


def colours_of(low: float, high: float):
    """The logarithmic colour scale from low to high, both > 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    return ScalarMappable(LogNorm(low, max(high, 2 * low), clip=True), COLOURS)


def scale_of(looks: Iterable[LayerLook], threshold: float):
    """One for all pictures of a page: where most of the column means are, and the threshold."""
    means = torch.cat([layer.column_mean.flatten() for layer in looks])
    means = means[means > 0].sort().values
    if not len(means):
        return colours_of(1e-6, 1e-3)
    low, high = (means[int(share * (len(means) - 1))].item() for share in (0.05, 0.99))
    if threshold > 0:
        low, high = min(low, threshold / 2), max(high, threshold * 2)
    return colours_of(max(low, high * 1e-4), high)


def sinks(look: Look, threshold: float) -> bytes:
    """Sinks by layer (rows) and head (columns): density as the colour, the winner ringed, full density hatched."""
    from matplotlib.patches import Rectangle

    heads = max(len(layer.column_mean) for layer in look.layers)
    numbers = sorted({*(layer.layer for layer in look.layers), *look.without_map})
    told = heads <= CELLS_WITH_TEXT
    width, height = (0.52, 0.34) if told else (0.21, 0.21)
    figure = new_figure(1.3 + width * heads, max(1.15 + height * len(numbers), LABELLED), layout="constrained")
    axes = inked(figure.add_subplot(), lines=False)
    drawn = None
    highest = max(layer.counts(threshold).max().item() / layer.column_mean.shape[1] for layer in look.layers)
    top = max(math.ceil(10 * highest) / 10, 0.1)
    for layer in look.layers:
        y, counts = numbers.index(layer.layer), layer.counts(threshold)
        density = counts / layer.column_mean.shape[1]
        drawn = axes.imshow(
            density[None].numpy(), cmap="viridis", vmin=0, vmax=top, extent=(-0.5, len(counts) - 0.5, y + 0.5, y - 0.5)
        )
        winner = layer.head(threshold)
        for head, count in enumerate(counts.tolist()):
            if told:
                ink = "black" if density[head] > 0.6 * top else "white"
                axes.text(head, y, str(count), ha="center", va="center", fontsize=8, color=ink)
            if density[head] == 1:
                box = Rectangle((head - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="black", linewidth=0)
                axes.add_patch(box)
            if winner is not None and count == counts[winner]:
                style = "-" if head == winner else ":"
                axes.add_patch(
                    Rectangle(
                        (head - 0.44, y - 0.42), 0.88, 0.84, fill=False, edgecolor=MARK, linewidth=2, linestyle=style
                    )
                )
    for layer_number in look.without_map:
        axes.text(0, numbers.index(layer_number), "no map", va="center", fontsize=8, color=INK)
    axes.set(xlabel="head", ylabel="layer", aspect="auto", xlim=(-0.5, heads - 0.5), ylim=(len(numbers) - 0.5, -0.5))
    axes.set_yticks(range(len(numbers)), numbers)
    axes.set_xticks(range(0, heads, 1 if told else 4))
    colour_bar(figure, drawn, axes, "image tokens that are sinks", "{x:.0%}")
    return png(figure)


def scale(colours, threshold: float) -> bytes:
    """The colour bar of all pictures, the threshold on it."""
    figure = new_figure(5.4, 0.82, layout="constrained")
    axes = figure.add_subplot()
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal")
    inked(axes, lines=False)
    axes.set_xlabel("mean attention that an image token gets")
    low, high = colours.norm.vmin, colours.norm.vmax
    if low < threshold < high:
        axes.axvline(threshold, color=MARK, linewidth=2.5)
        axes.text(threshold, 1.15, f"threshold {threshold:g}", color=MARK, fontsize=9, ha="center", va="bottom")
    bar.outline.set_visible(False)
    return png(figure, 256)


def over_picture(image, boxes: Sequence[tuple], values: Tensor, threshold: float, colours) -> bytes:
    """Each token as a square over the picture in grey; what no token comes from is dark; the sinks' area is outlined.

    boxes: (x0, y0, x1, y1) in the picture's pixels, one a value.
    """
    from matplotlib.collections import LineCollection, PolyCollection

    width, height = image.size
    inches = 3.1 / max(width, height)
    figure = new_figure(max(width * inches, 0.2), max(height * inches, 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    side = round(3.1 * DPI)
    grey = image.convert("L")
    grey.thumbnail((side, side))
    axes.imshow(
        _dimmed(grey, boxes, width, height).numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0)
    )
    corners = [((x0, y0), (x1, y0), (x1, y1), (x0, y1)) for x0, y0, x1, y1 in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours.to_rgba(values.numpy()), alpha=SHADE, linewidths=0))
    lines = outline([box for box, value in zip(boxes, values.tolist(), strict=True) if value > threshold])
    axes.add_collection(LineCollection(lines, colors="white", linewidths=1.1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    return png(figure, 128)


def _dimmed(grey, boxes, width: int, height: int) -> Tensor:
    """The picture, darker where no token comes from."""
    wide, high = grey.size
    pixels = torch.tensor(list(grey.tobytes()), dtype=torch.float32).view(high, wide)
    covered = torch.zeros(high, wide, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        rows = slice(int(y0 * high / height), -int(-y1 * high // height))
        columns = slice(int(x0 * wide / width), -int(-x1 * wide // width))
        covered[rows, columns] = True
    return torch.where(covered, 60 + 0.76 * pixels, 0.35 * pixels)


def outline(boxes: Sequence[tuple]) -> list[tuple]:
    """The border of the area that boxes cover together: the sides that two of them do not share."""
    seen: dict[tuple, int] = {}
    for x0, y0, x1, y1 in boxes:
        a, b, c, d = (round(v, 3) for v in (x0, y0, x1, y1))
        for line in (((a, b), (c, b)), ((a, d), (c, d)), ((a, b), (a, d)), ((c, b), (c, d))):
            seen[line] = seen.get(line, 0) + 1
    return [line for line, times in seen.items() if times == 1]


def in_reading_order(values: Tensor, threshold: float, colours) -> bytes:
    """The tokens as squares, row by row from the top left, where nobody knows their place in the picture."""
    from matplotlib.collections import LineCollection, PolyCollection

    columns = max(1, round(len(values) ** 0.5))
    boxes = [(i % columns, i // columns, i % columns + 1, i // columns + 1) for i in range(len(values))]
    rows = -(-len(values) // columns)
    figure = new_figure(2.6, max(2.6 * rows / columns, 0.2))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.axis("off")
    corners = [((x0, y0), (x1, y0), (x1, y1), (x0, y1)) for x0, y0, x1, y1 in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours.to_rgba(values.numpy()), linewidths=0))
    lines = outline([box for box, value in zip(boxes, values.tolist(), strict=True) if value > threshold])
    axes.add_collection(LineCollection(lines, colors="white", linewidths=1.1))
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    return png(figure)


def attention_map(kept: Tensor, tokens: int, positions: Sequence[int], sink_positions: Sequence[int]) -> bytes:
    """A head's map as the paper draws it: rows attend to columns; the image framed, sinks ticked at the top."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Polygon

    figure = new_figure(3.3, 3.35, layout="constrained")
    axes = inked(figure.add_subplot(), lines=False)
    low = 0.05 / tokens
    hidden = torch.ones(len(kept), len(kept)).triu(1).bool() if kept.shape[0] == kept.shape[1] else None
    shown = kept.masked_fill(hidden, torch.nan) if hidden is not None and not kept[hidden].any() else kept
    axes.imshow(
        shown.clamp(min=low).numpy(),
        norm=LogNorm(low, 0.3),
        cmap=COLOURS,
        extent=(0, tokens, tokens, 0),
        interpolation="nearest",
    )
    for begin, end in spans(positions):
        corners = [(begin, begin), (begin, tokens), (end, tokens), (end, end)]
        axes.add_patch(Polygon(corners, fill=False, edgecolor=SPARSE, linewidth=1.5, joinstyle="miter"))
    if sink_positions:
        at = [position + 0.5 for position in sink_positions]
        axes.plot(at, [-0.012 * tokens] * len(at), "|", color=MARK, markersize=5, markeredgewidth=0.6, clip_on=False)
    axes.set(xlabel="token attended to", ylabel="token that attends", xlim=(0, tokens), ylim=(tokens, 0))
    return png(figure, 64)


def spans(positions: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of consecutive positions, [begin, end)."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = found[-1][0], position + 1
        else:
            found.append((position, position + 1))
    return found


def sorted_means(layer: LayerLook, threshold: float) -> bytes:
    """Each head's column means, largest first, with the threshold and the level of attention that favours nothing."""
    figure = new_figure(4.6, 3.1, layout="constrained")
    axes = inked(figure.add_subplot(), grid=True)
    first, _, sparsest = layer.shown(threshold)
    means = layer.column_mean.sort(-1, descending=True).values
    ranks = range(1, means.shape[1] + 1)
    level = layer.uniform.sort(descending=True).values
    positive = level > 0
    if positive.any():
        low, high = level[positive].min().item(), level.max().item()
        axes.axhspan(low, max(high, low * 1.02), color=INK, alpha=0.22, linewidth=0, label="uniform attention")
    for head, row in enumerate(means):
        if head not in (first, sparsest):
            axes.plot(ranks, row.tolist(), color=OTHERS, linewidth=0.8, alpha=0.7, label="_")
    axes.plot([], [], color=OTHERS, linewidth=0.8, label="other heads")
    if sparsest is not None:
        axes.plot(ranks, means[sparsest].tolist(), color=SPARSE, linewidth=2, label=f"head {sparsest}, sparsest")
    axes.plot(ranks, means[first].tolist(), color=FIRST, linewidth=2, label=f"head {first}, most sinks")
    axes.axhline(threshold, color=MARK, linewidth=1.6, linestyle="--", label=f"threshold {threshold:g}")
    high = means.max().item()
    if high > 0:
        axes.set_yscale("log")
        axes.set_ylim(
            max(min(means.clamp(min=1e-12).quantile(0.02).item(), threshold / 3 or 1), high * 1e-5), high * 1.6
        )
    axes.set(xlabel="image tokens of a head, most attended first", ylabel="mean attention", xlim=(1, means.shape[1]))
    axes.legend(fontsize=7.5, labelcolor=INK, frameon=False, loc="upper right")
    return png(figure, 64)


def shares(layers: Sequence[LayerChange]) -> bytes:
    """Where the attention after the picture goes, layer by layer, without and with EAH, and each layer's change."""
    figure = new_figure(1.6 + 0.42 * max(len(layers), 8), 3.6, layout="constrained")
    axes, change = map(inked, figure.subplots(2, 1, sharex=True, height_ratios=(5, 3)))
    parts = (("image", "the picture", FIRST), ("text", "text", SPARSE), ("first", "first token", OTHERS))
    for offset, when, shade in ((-0.2, "without", 0.55), (0.2, "with_eah", 1.0)):
        below = [0.0] * len(layers)
        for part, label, colour in parts:
            values = [getattr(getattr(layer, when), part) for layer in layers]
            at = [number + offset for number in range(len(layers))]
            axes.bar(at, values, 0.36, below, color=colour, alpha=shade, label=label if shade == 1 else None)
            below = [low + value for low, value in zip(below, values, strict=True)]
    change.plot(range(len(layers)), [layer.change for layer in layers], "o-", color=MARK, markersize=4)
    change.set(xlabel="layer", ylabel="change", ylim=(0, 1.25 * max([0.01, *(layer.change for layer in layers)])))
    change.set_xticks(range(len(layers)), [layer.layer for layer in layers])
    axes.set(ylabel="share of the attention", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=4, fontsize=7.5, labelcolor=INK, frameon=False)
    return png(figure, 64)
