"""`eah inspect`: a user's own model looks at a picture, or at many, and a page shows what EAH sees there."""

from __future__ import annotations

from pathlib import Path

import torch

from eah.cli.doctor import why_no_enable
from eah.cli.messages import progress
from eah.eval.journal import alone_in
from eah.inspect.look import check_threshold
from eah.pictures import read_picture
from eah.transformers.pretrained import check_model, device_of, load_pretrained

FIRST_LAYERS = 4  # that are pictured when none are named
NEW_TOKENS = 128  # of --compare


def inspect(arguments) -> dict:
    """Looks, writes, and says where; what can be refused without the weights is refused before they are read.

    Raises:
        ImportError, OSError, ValueError, RuntimeError: as loading the picture and the model and the look do.
    """
    check_threshold(arguments.threshold)
    picture = read_picture(arguments.image, upright=True)
    place, out = checked(arguments), Path(arguments.out)
    from eah.inspect.compare import compare
    from eah.inspect.look import look
    from eah.inspect.one import write

    with alone_in(out):
        processor, model = loaded(arguments, place)
        progress("looking")
        layers = pictured_layers(model, arguments.layers)
        seen = look(model, processor, picture, arguments.prompt, threshold=arguments.threshold, pictured=layers)
        compared = None
        if arguments.compare:
            progress("answering without and with EAH")
            compared = compare(model, processor, seen, max_new_tokens=arguments.max_new_tokens or NEW_TOKENS)
        progress("drawing")
        names = {"model": arguments.model, "image": Path(arguments.image).name}
        page = write(seen, out, names, layers, compared)
    return {"page": str(page), "numbers": str(out / "inspect.json")}


def inspect_many(arguments) -> dict:
    """Looks at a folder of pictures, calibrates if asked to, writes, and says where; the same command goes on where an
    interrupted one was.

    Raises:
        As `inspect`; also where --out was begun with other settings.
    """
    from eah.inspect import many, overview

    check_threshold(arguments.threshold)
    paths = many.pictures_in(arguments.images, arguments.limit)
    answers = None if arguments.answers is None else many.hallucinations(arguments.answers)
    place, out = checked(arguments), Path(arguments.out)
    settings = {"model": arguments.model, "device": place.type}

    def load(path: Path):
        progress(f"looking at {path.name}")
        return read_picture(path, upright=True)

    with alone_in(out):
        processor, model = loaded(arguments, place)
        records, thresholds = many.look_at_all(
            model, processor, paths, arguments.prompt, arguments.threshold, out, settings, load
        )
        calibration = _calibrate(model, processor, paths, records, thresholds, load, arguments)
        progress("drawing")
        names = {name: getattr(arguments, name) for name in ("model", "images", "prompt", "threshold")}
        page = overview.write(records, names, out, _heads(model), answers, calibration)
    written = {"page": str(page), "numbers": str(out / "inspect.json")}
    if calibration is None:
        return written
    found = {name: calibration[name] for name in ("candidates", "commands")}
    return {**written, "calibration": str(out / "calibration.json"), **found}


def print_inspect(written: dict) -> None:
    """Where everything is; of a calibration also the candidates and the commands."""
    print("\n".join(written[name] for name in ("page", "numbers", "calibration") if name in written))
    if "candidates" not in written:
        return
    print("\nlayer  threshold  chosen  saturated  tied  margin  stability  KL of the first token")
    for cell in written["candidates"]:
        stability = "-" if cell["stability"] is None else f"{cell['stability']:.0%}"
        shares = f"{cell['chosen']:6.0%}  {cell['saturated']:9.0%}  {cell['tied']:4.0%}  {cell['margin']:6.1%}"
        print(f"{cell['layer']:5}  {cell['threshold']:9g}  {shares}  {stability:>9}  {cell['kl']['median']:.2g}")
    print("\n".join(["", *written["commands"]] if written["commands"] else ["none is usable"]))


def _calibrate(model, processor, paths, records, thresholds, load, arguments) -> dict | None:
    from eah.inspect.calibrate import calibrate, candidates, command, first_token_kl

    if not arguments.calibrate:
        return None
    cells, out = calibrate(records, thresholds), Path(arguments.out)
    chosen = []
    for cell in candidates(cells):
        kl = first_token_kl(model, processor, paths, records, arguments.prompt, cell, out, load)
        chosen.append({**cell, "kl": kl})
    commands = [command(arguments.model, arguments.images, cell) for cell in chosen]
    return {"thresholds": thresholds, "candidates": chosen, "commands": commands, "cells": cells}


def _heads(model) -> int:
    from eah.transformers.find import modules_with_maps, query_heads

    return max(query_heads(module) for module in modules_with_maps(model)[0].values())


def checked(arguments) -> torch.device:
    """The device, once it is sure by the config that the model can be looked at and drawn."""
    problem = why_no_enable()
    if problem:
        raise ImportError(problem)
    from eah.inspect.figures import new_figure

    new_figure(1, 1)
    place = device_of(arguments.device)
    asked = {"layers": tuple(dict.fromkeys(arguments.layers))} if arguments.layers else {}
    check_model(arguments.model, [{"threshold": arguments.threshold, **asked}], arguments.trust_remote_code)
    return place


def loaded(arguments, place: torch.device):
    """The processor and the model."""
    progress(f"loading {arguments.model}")
    return load_pretrained(arguments.model, "auto", place, arguments.trust_remote_code)


def pictured_layers(model, asked: list[int] | None) -> tuple[int, ...]:
    """The layers that get pictures of their own; asked: None for the first few, [] for all.

    Raises:
        ValueError: a layer that the model does not have, or one without a map.
    """
    from eah.transformers.find import attention_modules, modules_with_maps

    usable = tuple(modules_with_maps(model)[0])
    if asked is None:
        return usable[:FIRST_LAYERS]
    if asked:
        attention_modules(model, tuple(asked))
    return tuple(sorted(set(asked))) or usable
