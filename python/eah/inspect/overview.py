"""The page of many pictures: inspect.json, calibration.json, PNG files and inspect.html."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from eah.eval.files import write_json, write_text
from eah.inspect import many_figures as figures
from eah.inspect.many import correlation, in_common
from eah.inspect.one import INTRODUCTION, Made, acting
from eah.inspect.page import document, facts, section, table, text

WELL_DEFINED = (
    "Without labels this says where the choice of a head is well defined, not where hallucination falls. The commands "
    "below decide that, on data with labels."
)


def write(
    records: Sequence[dict],
    names: dict,
    out: Path,
    heads: int,
    answers: tuple[str, dict[str, float]] | None = None,
    calibration: dict | None = None,
) -> Path:
    """Writes what the pictures have in common, and the calibration where there is one; the page's path.

    names: model, images, prompt and threshold. heads: of the widest layer. answers: as `many.hallucinations` gives.
    calibration: cells of `calibrate.calibrate`, candidates with their KL, commands.
    """
    common, made = in_common(records), Made(out)
    data = {**names, "pictures": [_brief(record) for record in records], "layers": common}
    parts = [_head(records, names, common), _heads(common, heads, made)]
    if answers is not None:
        found, html = _against(records, common, answers, made)
        data["hallucination"] = found
        parts.append(html)
    if calibration is not None:
        write_json(out / "calibration.json", {**names, "pictures": len(records), **calibration})
        parts.append(_calibration(calibration, names["threshold"], made))
    write_json(out / "inspect.json", data)
    page = out / "inspect.html"
    write_text(page, document(f"What EAH sees in {len(records)} pictures", *parts))
    return page


def _brief(record: dict) -> dict:
    chosen = {
        layer: {"head": entry["head"][0], "sinks": entry["best"][0], "next": entry["second"][0]}
        for layer, entry in record["layers"].items()
    }
    return {name: record[name] for name in ("image", "tokens", "image_tokens", "without_map")} | {"layers": chosen}


def _head(records: Sequence[dict], names: dict, common: Sequence[dict]) -> str:
    one = acting(common)
    head = (
        "no head wins most often" if one["commonest_head"] is None else f"head {one['commonest_head']} wins most often"
    )
    lead = f"In layer {one['layer']} {head}, in {one['agreement']:.0%} of {one['pictures']} pictures."
    tokens = sorted(record["image_tokens"] for record in records)
    spread = f"{tokens[0]}" if tokens[0] == tokens[-1] else f"{tokens[0]} to {tokens[-1]}"
    known = [(name, names[name]) for name in ("model", "images", "prompt", "threshold")]
    known += [("pictures", len(records)), ("image tokens", f"{spread} a picture")]
    words = text(lead, "lead") + text(INTRODUCTION, "soft")
    return f"<header><h1>What EAH sees in {len(records)} pictures</h1>{words}{facts(known)}</header>"


def _heads(common: Sequence[dict], heads: int, made: Made) -> str:
    one = acting(common)
    parts = [
        made(
            "wins.png",
            figures.wins(common, heads),
            f"How often each head has the most sinks of its layer; in layer {one['layer']} {_winner(one)}",
            "In how many pictures, in percent, a head has the most sinks of its layer and would lend its map.",
        ).html("wide"),
        made(
            "density.png",
            figures.density_and_agreement(common),
            "Density of the winner and agreement of the pictures, by layer",
            "Above: sinks of the winner per image token, the median over the pictures and the quartiles. Below: the "
            "share of the pictures in which the layer's commonest head wins. Where it is low, the picture decides the "
            "head.",
        ).html("alone"),
    ]
    if any(found["places"] is not None for found in common):
        caption = (
            "Every picture stretched to a square: how much of each part's tokens are sinks of the winner. What is "
            "the same in all layers says little of the pictures: early tokens, at the top, are seen by the rows that "
            "see little else, so that attention which favours nothing gives more to each."
        )
        parts.append(
            made("places.png", figures.places(common), "Where the winner's sinks lie, by layer", caption).html("wide")
        )
    else:
        parts.append(
            text("Where sinks lie is not shown: where this model's image tokens come from is not known.", "note")
        )
    lines = [
        (
            found["layer"],
            "none" if found["commonest_head"] is None else found["commonest_head"],
            f"{found['agreement']:.0%}",
            f"{found['entropy_bits']:.2f}",
            f"{found['density']['median']:.0%}",
            f"{found['wins'].get('-1', 0)} of {found['pictures']} pictures have no head with a sink",
        )
        for found in common
    ]
    listed = table(("layer", "commonest head", "agreement", "entropy, bits", "density, median", "without"), lines)
    return section("Which heads win", *parts, listed)


def _winner(one: dict) -> str:
    return "none has" if one["commonest_head"] is None else f"head {one['commonest_head']}, in {one['agreement']:.0%}"


def _against(records: Sequence[dict], common: Sequence[dict], answers, made: Made) -> tuple[dict, str]:
    variant, shares = answers
    layer = acting(common)["layer"]
    pairs = [
        (record["layers"][str(layer)]["best"][0] / record["image_tokens"], shares[record["image"]])
        for record in records
        if record["image"] in shares and str(layer) in record["layers"]
    ]
    if not pairs:
        raise ValueError("--answers: none of the pictures that were looked at is answered there")
    rank = correlation(pairs)
    found = {"variant": variant, "layer": layer, "pictures": len(pairs), "spearman": rank}
    told = "cannot be told" if rank is None else f"is {rank:.2f}"
    picture = made(
        "hallucination.png",
        figures.against_hallucination(pairs, layer, "made up, or answered wrong"),
        f"Density in layer {layer} against hallucination, {len(pairs)} pictures",
        f"A dot is a picture: answers of {variant}. The rank correlation (Spearman) {told}.",
    )
    return found, section("Density against hallucination", picture.html("alone"))


def _calibration(calibration: dict, own: float, made: Made) -> str:
    chosen, cells = calibration["candidates"], calibration["cells"]
    usable = sum(cell["usable"] for cell in cells)
    caption = (
        "Colour: by how much the best head leads, in sinks per image token, mean over the pictures. Hatched: not "
        "usable, as no head is chosen in a tenth of the pictures or more, or the best head is saturated or tied in a "
        "tenth or more. Framed: the candidates. The triangle at the top is the threshold of the other figures."
    )
    alt = f"Margin by layer and threshold; {usable} of {len(cells)} combinations are usable"
    figure = made("calibration.png", figures.margins(cells, chosen, own), alt, caption)
    if not chosen:
        none = "No combination of layer and threshold is usable: the choice is missing, saturated or tied too often."
        return section("Calibration", figure.html("wide"), text(none, "note"))
    lines = [
        (
            cell["layer"],
            f"{cell['threshold']:g}",
            *(f"{cell[name]:.0%}" for name in ("chosen", "saturated", "tied", "margin")),
            "-" if cell["stability"] is None else f"{cell['stability']:.0%}",
            f"{cell['kl']['median']:.2g} (at most {cell['kl']['largest']:.2g}), {cell['kl']['pictures']} pictures",
        )
        for cell in chosen
    ]
    head = ("layer", "threshold", "chosen", "saturated", "tied", "margin", "stability", "KL of the first token, nats")
    commands = "<pre>" + escape("\n".join(calibration["commands"]), quote=False) + "</pre>"
    return section("Calibration", figure.html("wide"), table(head, lines), text(WELL_DEFINED, "note"), commands)
