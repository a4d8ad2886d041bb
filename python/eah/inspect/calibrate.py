"""At which layer and threshold the choice of a head is well defined: from many pictures, without labels."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import eah
from eah.eval.files import read_json, write_json
from eah.inspect.look import inputs_of
from eah.inspect.many import commonest
from eah.inspect.numbers import divergence

DENSE = 0.95  # a head that has more sinks per image token is saturated
CHOSEN, SATURATED, TIED = 0.9, 0.1, 0.1  # usable: chosen in more, saturated and tied in less of the pictures
CANDIDATES = 3
KL_PICTURES = 16  # at most, for which the answer's first token is compared


def calibrate(records: Sequence[dict], thresholds: Sequence[float]) -> list[dict]:
    """For every layer and threshold, shares of the pictures and means over them.

    chosen: some head has a sink. saturated: the best head's density exceeds 0.95. tied: the two best heads have as many
    sinks. margin: (best - second) / image tokens. stability: how often the commonest head of one half of the pictures
    wins in the other, None with fewer than two. usable: chosen in > 90 %, saturated and tied in < 10 %.

    thresholds: those of the records but the first, which is the user's own.
    """
    layers = sorted({int(layer) for record in records for layer in record["layers"]})
    return [_cell(layer, at, value, records) for layer in layers for at, value in enumerate(thresholds, 1)]


def _cell(layer: int, at: int, threshold: float, records: Sequence[dict]) -> dict:
    met = [
        (record["layers"][str(layer)], record["image_tokens"]) for record in records if str(layer) in record["layers"]
    ]
    heads = [entry["head"][at] for entry, _ in met]
    best, second = ([entry[name][at] for entry, _ in met] for name in ("best", "second"))
    tokens = [count for _, count in met]

    def share(holds) -> float:
        return statistics.fmean(map(float, holds))

    chosen = share(head >= 0 for head in heads)
    saturated = share(b / n > DENSE for b, n in zip(best, tokens, strict=True))
    tied = share(b == s > 0 for b, s in zip(best, second, strict=True))
    return {
        "layer": layer,
        "threshold": threshold,
        "chosen": chosen,
        "saturated": saturated,
        "tied": tied,
        "margin": statistics.fmean((b - s) / n for b, s, n in zip(best, second, tokens, strict=True)),
        "stability": _stability(heads),
        "usable": chosen > CHOSEN and saturated < SATURATED and tied < TIED,
    }


def _stability(heads: Sequence[int]) -> float | None:
    halves = heads[::2], heads[1::2]
    if not all(halves):
        return None
    winners = [commonest(Counter(half))[0] for half in halves]
    shares = [
        half.count(head) / len(half) if head >= 0 else 0.0 for half, head in zip(halves, winners[::-1], strict=True)
    ]
    return statistics.fmean(shares)


def candidates(cells: Sequence[dict]) -> list[dict]:
    """The three layers whose best usable threshold has the widest margin, that threshold with each; widest first."""
    best: dict[int, dict] = {}
    for cell in cells:
        if cell["usable"] and cell["margin"] > best.get(cell["layer"], {"margin": -1.0})["margin"]:
            best[cell["layer"]] = cell
    return sorted(best.values(), key=lambda cell: -cell["margin"])[:CANDIDATES]


@torch.no_grad()
def first_token_kl(
    model, processor, paths: Sequence[Path], records: Sequence[dict], prompt: str, cell: dict, out: Path, load: Callable
) -> dict[str, Any]:
    """KL(without || with EAH) of the first answer token, in nats, over at most 16 of the pictures, evenly spread.

    cell: of `calibrate`, the layer and the threshold. What was found is kept in `out` and
    taken from there the next time.
    """
    layer, threshold = cell["layer"], cell["threshold"]
    step = -(-len(paths) // KL_PICTURES)
    kept = out / "kl" / f"layer{layer}-threshold{threshold:g}.json"
    known = read_json(kept) if kept.exists() else {}
    found = {}
    for path, record in list(zip(paths, records, strict=True))[::step]:
        digest = record["sha256"]
        if digest not in known:
            inputs = inputs_of(processor, load(path), prompt).to(model.device, model.dtype)
            plain = model(**inputs).logits[0, -1]
            with eah.enable(model, layers=(layer,), threshold=threshold):
                known[digest] = divergence(plain, model(**inputs).logits[0, -1])
            write_json(kept, known)
        found[digest] = known[digest]
    return {"median": statistics.median(found.values()), "largest": max(found.values()), "pictures": len(found)}


def command(model: str, images: str, candidate: dict) -> str:
    """What decides, with labels; DATA and the output folder are the user's."""
    layer, threshold = candidate["layer"], f"{candidate['threshold']:g}"
    out = f"out/chair-l{layer}-t{threshold}"
    given = f"--model {shlex.quote(model)} --data DATA --images {shlex.quote(images)}"
    return f"eah eval run chair {given} --layers {layer} --threshold {threshold} --out {out}"
