"""The page of one picture: inspect.json, PNG files and inspect.html, from a look."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eah.eval.files import replacing, write_text
from eah.inspect import figures
from eah.inspect.look import LayerLook, Look
from eah.inspect.numbers import numbers
from eah.inspect.page import Picture, details, document, facts, row, section, table, text
from eah.patches import Grid

INTRODUCTION = (
    "A vision sink is an image token to which a head pays much attention, averaged over all tokens that can see it. "
    "EAH (Enhancing Attention Heads) takes the head with the most sinks in a shallow layer and lends its attention map "
    "to every head of that layer."
)
PLACE = (
    "A square is where its token comes from, not all that it has seen: a vision encoder mixes what its patches hold."
)


def write(look: Look, out: Path, names: dict[str, str], layers: Sequence[int], compared=None) -> Path:
    """Writes inspect.json, the PNG files and inspect.html into the folder; the page's path.

    names: what to say of the model and the picture. layers: those that have pictures of their own, kept with maps.
    compared: a `compare.Compared`.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    data = {**names, **numbers(look)}
    if compared is not None:
        data["compare"] = compared.numbers()
    made = Made(out)
    parts = [_head(look, data, made), _overview(look, data, made), _layers(look, data, layers, made)]
    if compared is not None:
        parts.append(compared.section(made))
    parts.append(_reading(look, data))
    write_text(out / "inspect.json", json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
    page = out / "inspect.html"
    write_text(page, document(f"What EAH sees: {names.get('image', 'a picture')}", *parts))
    return page


class Made:
    """The pictures of a page, put into its folder as they are made."""

    def __init__(self, out: Path):
        self.out = out

    def __call__(self, name: str, content: bytes, alt: str, caption: str = "") -> Picture:
        with replacing(self.out / name) as beside:
            beside.write_bytes(content)
        return Picture(name, content, alt, caption)


def told(entry: dict) -> str:
    """What a layer's choice comes to, in a sentence."""
    most, tokens = max(entry["sinks"]), len(entry["uniform"])
    if entry["head"] is None:
        return f"no head of layer {entry['layer']} has a sink, so none lends its map"
    share = f"{most} of {tokens} image tokens ({100 * most / tokens:.0f} %)"
    return f"in layer {entry['layer']} head {entry['head']} has the most sinks, {share}"


def caution(entry: dict) -> str:
    """What makes that choice say little."""
    parts = ["another head has as many sinks"] * entry["tied"]
    parts += ["all image tokens are its sinks"] * entry["saturated"]
    if entry["uniform_share"]:
        parts.append(f"even attention would make sinks of {100 * entry['uniform_share']:.0f} %")
    return "; ".join(parts)


def acting(entries: Sequence[dict]) -> dict:
    """The layer in which EAH acts by default, or the first that there is."""
    return next((entry for entry in entries if entry["layer"] == 1), entries[0])


def _head(look: Look, data: dict, made: Made) -> str:
    first = acting(data["layers"])
    sentence = told(first)
    lends = "" if first["head"] is None else ": its map is the one that EAH lends to the whole layer"
    picture = made("picture.png", _thumbnail(look.image), f"The picture that was looked at: {data.get('image', '')}")
    known = [(name, data[name]) for name in ("model", "image") if name in data]
    known += [("prompt", look.prompt), ("tokens", f"{look.tokens}, of them {len(look.positions)} of the picture")]
    known += [("threshold", f"{look.threshold:g}")]
    words = text(f"{sentence[0].upper()}{sentence[1:]}{lends}.", "lead") + text(INTRODUCTION, "soft")
    title = "<h1>What EAH sees in this picture</h1>"
    return f'<header>{title}<div class="head"><div>{words}{facts(known)}</div>{picture.html()}</div></header>'


def _thumbnail(image) -> bytes:
    small = image.copy()
    small.thumbnail((360, 360))
    content = io.BytesIO()
    small.quantize(128).save(content, "PNG", optimize=True)
    return content.getvalue()


def _overview(look: Look, data: dict, made: Made) -> str:
    alt = "Sinks by layer and head: " + "; ".join(told(entry) for entry in data["layers"][:8]) + "."
    caption = (
        "Colour: the share of the image tokens that are sinks of a head. Framed: the head with most sinks of each "
        "layer, which EAH would choose there; dotted: another head with as many. Hatched: all image tokens are sinks."
    )
    lines = [
        (
            entry["layer"],
            "none" if entry["head"] is None else entry["head"],
            max(entry["sinks"]),
            f"{100 * max(entry['density']):.0f} %",
            f"{entry['uniform_level']:.2g}",
            caution(entry),
        )
        for entry in data["layers"]
    ]
    listed = table(("layer", "head", "its sinks", "density", "even attention", "caution"), lines)
    without = [f"Layer {layer} has no map: {why}." for layer, why in data["without_map"].items()]
    return section(
        "1. Sinks of every head",
        made("sinks.png", figures.sinks(look, look.threshold), alt, caption).html("wide"),
        listed,
        *(text(line, "soft") for line in without),
    )


def _layers(look: Look, data: dict, layers: Sequence[int], made: Made) -> str:
    entries = {entry["layer"]: entry for entry in data["layers"]}
    pictured = [layer for layer in look.layers if layer.layer in layers]
    if not pictured:
        return section("The layers one by one", text("None of the layers asked for has a map in this forward.", "note"))
    colours = figures.scale_of(pictured, look.threshold)
    bar = made("scale.png", figures.scale(colours, look.threshold), "The colour scale, with the threshold on it")
    opened = 1 if any(layer.layer == 1 for layer in pictured) else min(layer.layer for layer in pictured)
    parts = []
    for layer in pictured:
        entry = entries[layer.layer]
        parts.append(
            details(
                f"Layer {layer.layer}",
                told(entry),
                "<h3>2. Where the heads look</h3>",
                text(f"Outlined in white are the sinks. {PLACE}", "soft"),
                bar.html("alone"),
                *_where(look, layer, entry, colours, made),
                "<h3>3. The attention maps</h3>",
                text(
                    "A row is a token that attends, a column a token that is attended to. Framed in green is the "
                    "picture; sinks are ticked at the top, and stand below as bright vertical stripes. Colours are "
                    "logarithmic.",
                    "soft",
                ),
                row(_maps(look, layer, entry, made)),
                "<h3>4. How the attention is spread</h3>",
                _spread(look, layer, entry, made).html("alone"),
                opened=layer.layer == opened,
            )
        )
    return section("The layers one by one", *parts)


def _roles(layer: LayerLook, entry: dict, threshold: float) -> list[tuple[int, str]]:
    first, runner_up, sparsest = layer.shown(threshold)
    chosen = "most sinks, lends its map" if entry["head"] is not None else "no sink, largest mean"
    roles = [(first, chosen), (runner_up, "runner-up"), (sparsest, "sparsest head")]
    return [(head, role) for head, role in roles if head is not None]


def _where(look: Look, layer: LayerLook, entry: dict, colours, made: Made) -> Iterator[str]:
    for number, grid in enumerate(look.grids or (unplaced(look),)):
        index = torch.tensor([look.positions.index(position) for position in grid.positions])
        if grid.reason:
            yield text(f"The squares are in reading order, not over the picture: {grid.reason}.", "note")
        for view, members in views(grid).items():
            pictures = []
            for head, role in _roles(layer, entry, look.threshold):
                values = layer.column_mean[head][index[members]]
                many = int((values > look.threshold).sum())
                name = f"layer{layer.layer:02}.head{head:02}.{view.replace(' ', '-')}{number or ''}.png"
                alt = f"Head {head} of layer {layer.layer} ({role}) over the picture: {many} of {len(values)} are sinks"
                caption = f"Head {head}, {role}: {many} sinks" + (f" ({view})" if view == "whole picture" else "")
                pictures.append(made(name, _squares(look, grid, members, values, colours), alt, caption))
            yield row(pictures)
        lost = [kind for kind, box in zip(grid.kinds, grid.boxes, strict=True) if box is None]
        if lost and not grid.reason:
            kinds = ", ".join(f"{lost.count(kind)} {kind}" for kind in sorted(set(lost)))
            yield text(f"Image tokens without a place in the picture: {kinds}.", "soft")


def views(grid: Grid) -> dict[str, list[int]]:
    """What is drawn separately, with its tokens' places in the grid: details and the view of the whole picture."""
    if grid.reason:
        return {"reading order": list(range(len(grid.positions)))}
    found: dict[str, list[int]] = {}
    for place, (kind, box) in enumerate(zip(grid.kinds, grid.boxes, strict=True)):
        if box is not None:
            found.setdefault("whole picture" if kind == "global" else "picture", []).append(place)
    return found


def unplaced(look: Look) -> Grid:
    """For inputs that were made elsewhere."""
    many = len(look.positions)
    reason = "where they come from was not asked for"
    return Grid(0, None, None, look.positions, (None,) * many, ("unplaced",) * many, (0,) * many, reason)


def _squares(look: Look, grid: Grid, members: list[int], values: Tensor, colours) -> bytes:
    boxes = [box for member in members if (box := grid.boxes[member]) is not None]
    if grid.reason or len(boxes) < len(members):
        return figures.in_reading_order(values, look.threshold, colours)
    return figures.over_picture(look.image, boxes, values, look.threshold, colours)


def _maps(look: Look, layer: LayerLook, entry: dict, made: Made) -> Iterator[Picture]:
    for head, role in _roles(layer, entry, look.threshold):
        if head not in layer.maps:
            continue
        means = layer.column_mean[head].tolist()
        at = [position for position, mean in zip(look.positions, means, strict=True) if mean > look.threshold]
        content = figures.attention_map(layer.maps[head], look.tokens, look.positions, at)
        alt = (
            f"Attention map of head {head} of layer {layer.layer} ({role}), lower triangle; {len(at)} columns are sinks"
        )
        yield made(f"layer{layer.layer:02}.head{head:02}.map.png", content, alt, f"Head {head}, {role}")


def _spread(look: Look, layer: LayerLook, entry: dict, made: Made) -> Picture:
    caption = (
        "Each line is a head: its image tokens, the most attended first. Where a line crosses the threshold is the "
        "head's number of sinks. The grey band is what attention that favours nothing gives to the first and the last "
        f"image token; it alone makes sinks of {100 * entry['uniform_share']:.0f} % at this threshold."
    )
    alt = f"Sorted mean attention of every head of layer {layer.layer} on a logarithmic axis, with the threshold"
    name = f"layer{layer.layer:02}.means.png"
    return made(name, figures.sorted_means(layer, look.threshold), alt, caption)


def _reading(look: Look, data: dict) -> str:
    low, high = (f([entry["uniform_level"] for entry in data["layers"]]) for f in (min, max))
    level = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
    return section(
        "How far this goes",
        text(
            "The threshold does not carry over between prompts of different length. In this one, "
            f"of {look.tokens} tokens, attention that favours nothing gives an image token {level} on average; in a "
            "prompt of 300 tokens nearly all of it lies above 0.002, in one of 2,048 nothing does. A head that is "
            "merely flat has many sinks where the threshold is below that level."
        ),
        text(
            "These pictures show where attention goes, and which head EAH would choose. They do not show whether the "
            "answer is better with it: that takes labels, as in eah eval. inspect.json, beside this page, has every "
            "number of it, so that sinks at another threshold can be counted without another run."
        ),
    )
