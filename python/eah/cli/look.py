"""`eah inspect`: a user's own model looks at a picture, or at many, and a page shows what EAH sees there."""

from __future__ import annotations

from pathlib import Path

from eah.cli.doctor import why_no_enable
from eah.cli.messages import progress
from eah.cli.samples import load_picture
from eah.inspect.look import check_threshold

FIRST_LAYERS = 4  # that are pictured when none are named


def inspect(arguments) -> dict:
    """Looks, writes, and says where; what can be refused without the weights is refused before they are read.

    Raises:
        ImportError, OSError, ValueError, RuntimeError: as loading the picture and the model and the look do.
    """
    check_threshold(arguments.threshold)
    picture, _ = load_picture(arguments.image)
    processor, model = loaded(arguments)
    out = Path(arguments.out)
    from eah.inspect.compare import compare
    from eah.inspect.look import look
    from eah.inspect.one import write

    progress("looking")
    layers = pictured_layers(model, arguments.layers)
    seen = look(model, processor, picture, arguments.prompt, threshold=arguments.threshold, pictured=layers)
    compared = None
    if arguments.compare:
        progress("answering without and with EAH")
        compared = compare(model, processor, seen, max_new_tokens=arguments.max_new_tokens)
    progress("drawing")
    names = {"model": arguments.model, "image": Path(arguments.image).name}
    page = write(seen, out, names, layers, compared)
    return {"page": str(page), "numbers": str(out / "inspect.json")}


def loaded(arguments):
    """The processor and the model, once it is sure that they can be looked at and drawn."""
    problem = why_no_enable()
    if problem:
        raise ImportError(problem)
    from eah.cli.generate import check_model
    from eah.inspect.figures import new_figure
    from eah.transformers.pretrained import device_of, load_pretrained

    new_figure(1, 1)
    place = device_of(arguments.device)
    asked = {"layers": tuple(dict.fromkeys(arguments.layers))} if arguments.layers else {}
    check_model(arguments.model, {"threshold": arguments.threshold, **asked}, arguments.trust_remote_code)
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
