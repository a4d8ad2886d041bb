"""Many pictures: what is kept of each, on the disk as soon as it is known, and what they have in common."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from eah.eval.files import field, read_json, read_records, sha256, write_json
from eah.eval.run import refuse_other_settings, versions
from eah.eval.score import read_result
from eah.inspect.look import LayerLook, Look, look
from eah.patches import Grid

KINDS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BINS = 12  # a side of the grid in which it is counted where sinks lie
THRESHOLDS = 24  # of a calibration


def pictures_in(folder: str | Path, limit: int | None) -> list[Path]:
    """The first pictures of a folder, by name.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in KINDS and path.is_file())
    if not found:
        raise ValueError(f"{folder} has no picture: looked for {', '.join(KINDS)}")
    return found[:limit]


def thresholds_around(seen: Look) -> list[float]:
    """24 values on a logarithmic grid, from a twentieth to ten times what even attention gives an image token."""
    levels = [layer.uniform[layer.uniform > 0].mean().item() for layer in seen.layers if (layer.uniform > 0).any()]
    low, high = math.log10(statistics.fmean(levels) / 20), math.log10(statistics.fmean(levels) * 10)
    step = (high - low) / (THRESHOLDS - 1)
    return [float(f"{10 ** (low + number * step):.3g}") for number in range(THRESHOLDS)]


def look_at_all(
    model, processor, paths: Sequence[Path], prompt: str, threshold: float, out: Path, named: dict, load: Callable
) -> tuple[list[dict], list[float]]:
    """The records of these pictures and the calibration's thresholds. What `out` holds of them already is taken from
    there; each new record is on the disk before the next picture is looked at.

    named: what else the records depend on, the model's folder among it. load: from a path to an upright PIL image.

    Raises:
        ValueError: `out` was begun with other settings, or nothing says with which.
    """
    settings = {**named, "prompt": prompt, "threshold": threshold, "versions": versions()}
    grid = None
    if (out / "run.json").exists() or (out / "looks").exists():
        refuse_other_settings(out, settings)
        grid = read_json(out / "run.json")["thresholds"]
    records = []
    for path in paths:
        kept, digest = out / "looks" / f"{path.name}.json", sha256(path)
        record = read_json(kept) if kept.exists() else None
        if record is None or record.get("sha256") != digest:
            seen = look(model, processor, load(path), prompt, threshold=threshold, pictured=())
            if grid is None:
                grid = thresholds_around(seen)
                write_json(out / "run.json", {**settings, "thresholds": grid})
            record = {"image": path.name, "sha256": digest, **record_of(seen, [threshold, *grid])}
            write_json(kept, record)
        records.append(record)
    assert grid is not None
    return records, grid


def record_of(seen: Look, thresholds: Sequence[float]) -> dict:
    """At each threshold, of each layer: the head with most sinks (-1 without any), its sinks and the next head's. At
    the first threshold, too, where its sinks lie.
    """
    layers = {str(layer.layer): _layer(seen, layer, thresholds) for layer in seen.layers}
    return {
        "tokens": seen.tokens,
        "image_tokens": len(seen.positions),
        "layers": layers,
        "without_map": {str(number): why for number, why in seen.without_map.items()},
    }


def _layer(seen: Look, layer: LayerLook, thresholds: Sequence[float]) -> dict:
    heads, best, second = [], [], []
    for threshold in thresholds:
        head, counts = layer.head(threshold), sorted(layer.counts(threshold).tolist(), reverse=True)
        heads.append(-1 if head is None else head)
        best.append(counts[0])
        second.append(counts[1] if len(counts) > 1 else 0)
    sinks = layer.column_mean[layer.shown(thresholds[0])[0]] > thresholds[0]
    return {"head": heads, "best": best, "second": second, "places": _places(seen, sinks.tolist())}


def _places(seen: Look, sinks: list[bool]) -> list[list[float | None]] | None:
    """The share of the tokens that are sinks in each part of the picture, BINS x BINS; None where none comes from
    there, or where the tokens' places are not known.
    """
    there, all_there = torch.zeros(BINS, BINS), torch.zeros(BINS, BINS)
    sink = dict(zip(seen.positions, sinks, strict=True))
    for grid in seen.grids:
        for position, box in zip(grid.positions, grid.boxes, strict=True):
            if box is not None and grid.size is not None:
                rows, columns = _bins(box, grid)
                all_there[rows, columns] += 1
                there[rows, columns] += sink[position]
    if not all_there.any():
        return None
    shares = (there / all_there).tolist()
    return [[None if math.isnan(share) else round(share, 4) for share in line] for line in shares]


def _bins(box: tuple, grid: Grid) -> tuple[slice, slice]:
    """The parts of the picture whose middle is in the box, or the one in which the box's middle is."""
    assert grid.size is not None
    width, height = grid.size

    def within(low: float, high: float, length: int) -> slice:
        begin, end = (math.ceil(value / length * BINS - 0.5) for value in (low, high))
        middle = min(max(int((low + high) / 2 / length * BINS), 0), BINS - 1)
        return slice(max(begin, 0), min(end, BINS)) if end > begin else slice(middle, middle + 1)

    return within(box[1], box[3], height), within(box[0], box[2], width)


def in_common(records: Sequence[dict]) -> list[dict]:
    """Layer by layer, at the first threshold: who wins how often, how dense, how far the pictures agree, and where."""
    layers = sorted({int(layer) for record in records for layer in record["layers"]})
    return [_common(layer, [record for record in records if str(layer) in record["layers"]]) for layer in layers]


def _common(layer: int, records: Sequence[dict]) -> dict:
    entries = [record["layers"][str(layer)] for record in records]
    wins = Counter(entry["head"][0] for entry in entries)
    densities = [entry["best"][0] / record["image_tokens"] for record, entry in zip(records, entries, strict=True)]
    shares = [count / len(entries) for count in wins.values()]
    low, middle, high = statistics.quantiles(densities, n=4, method="inclusive") if len(entries) > 1 else 3 * densities
    head, most = commonest(wins)
    return {
        "layer": layer,
        "pictures": len(entries),
        "wins": {str(one): wins[one] for one in sorted(wins)},  # "-1": no head has a sink
        "density": {"quartile_1": low, "median": middle, "quartile_3": high},
        "commonest_head": None if head < 0 else head,
        "agreement": most / len(entries),
        "entropy_bits": max(0.0, -sum(share * math.log2(share) for share in shares)),
        "places": _mean([entry["places"] for entry in entries if entry["places"] is not None]),
    }


def commonest(wins: Counter[int]) -> tuple[int, int]:
    """The head that wins most often, the lower of two, and how often."""
    return min(wins.items(), key=lambda item: (-item[1], item[0]))


def _mean(places: Sequence[list]) -> list[list[float | None]] | None:
    if not places:
        return None
    each = torch.tensor([[[math.nan if v is None else v for v in line] for line in one] for one in places])
    return [[None if math.isnan(v) else v for v in line] for line in each.nanmean(0).tolist()]


def hallucinations(folder: str | Path) -> tuple[str, dict[str, float]]:
    """Of a result folder of `eah eval run`: the variant that was asked first, and by picture the share of its mentions
    that are hallucinated (CHAIR), or of its questions that are answered wrong (POPE, AMBER).

    Raises:
        ValueError: the folder has no such results.
    """
    folder = Path(folder)
    rows = read_result(folder)["rows"]
    variant = rows[0]["variant"]
    sums: dict[str, list[float]] = {}
    for part in dict.fromkeys(row["part"] for row in rows if row["variant"] == variant):
        paths = [folder / kind / f"{variant}.{part}.jsonl" for kind in ("answers", "details")]
        if not all(path.is_file() for path in paths):
            raise ValueError(f"--answers {folder} has no answers/{variant}.{part}.jsonl with details: eah eval run has")
        pictures = {
            field(record, "id", paths[0], number, (int, str)): field(record, "image", paths[0], number)
            for number, record in enumerate(read_records(paths[0]), 1)
        }
        for number, detail in enumerate(read_records(paths[1]), 1):
            id = field(detail, "image_id" if "image_id" in detail else "id", paths[1], number, (int, str))
            picture, (wrong, of) = pictures.get(id), _judged(detail, paths[1], number)
            if of and picture is not None:
                total = sums.setdefault(picture, [0, 0])
                total[0] += wrong
                total[1] += of
    if not sums:
        raise ValueError(f"--answers {folder}: no answer there names an object (chair) or is a yes or no (pope, amber)")
    return variant, {picture: wrong / of for picture, (wrong, of) in sums.items()}


def _judged(detail: dict, path: Path, number: int) -> tuple[int, int]:
    if "hallucinated" in detail:
        wrong, of = (len(field(detail, name, path, number, list)) for name in ("hallucinated", "objects"))
        return wrong, of
    if detail.get("label") in ("yes", "no"):
        return int(detail.get("parsed") != detail["label"]), 1
    return 0, 0


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, of ranks with ties at their mean; None where one side is constant or there are under 3 pairs."""
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    return None if any(len(set(each)) == 1 for each in ranks) else statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    count = Counter(values)
    return [first[value] + (count[value] - 1) / 2 for value in values]
