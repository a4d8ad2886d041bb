"""The command line: `eah demo`, `generate`, `inspect`, `models`, `doctor`, `eval`, `vllm-args`; or `python -m eah`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from types import ModuleType

from eah.cli.messages import one_line
from eah.cli.models import models_table, models_text
from eah.eval.command import add_eval, count, utf8
from eah.transformers.families import family_table
from eah.transformers.modes import MODES

INTERRUPTED = 130  # 128 + SIGINT, what shells expect


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the user's making end in one line on stderr.

    What a command needs is imported when it runs: torch and transformers take seconds.
    """
    status = 0
    try:
        try:
            status = _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be told
    except BrokenPipeError:  # no error: the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again
    return status


def _run(argv: list[str]) -> int:
    command, debug = "eah", False
    try:
        arguments = _parser(argv).parse_args(argv)
        command, debug = f"eah {arguments.command}", arguments.debug
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if debug:
            raise
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {one_line(ValueError(message))} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from eah import __version__

        print(f"eah-kernels {__version__}")
        parser.exit()


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Knows the arguments of the command in argv only, since what they may be is known once torch is loaded."""

    def print_help(_) -> int:
        parser.print_help()
        return 0

    parser = _Parser(
        prog="eah", description="EAH (Enhancing Attention Heads) for vision-language models, as attention kernels."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(run=print_help)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    every: list[argparse.ArgumentParser] = add_eval(commands)
    for name, (run, add_arguments, help) in COMMANDS.items():
        command: argparse.ArgumentParser = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        if name == chosen:
            add_arguments(command)
        every.append(command)
    for command in every:
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="FILE", help="another picture than the one that matplotlib ships")
    parser.add_argument("--out", metavar="DIR", help="write a page of pictures there, as eah inspect does")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from eah_kernels import BACKENDS

    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a model folder, or an id on the hub")
    add("--image", required=True, metavar="FILE")
    add("--prompt", required=True, type=utf8, metavar="TEXT")
    add(
        "--layers",
        type=_layers,
        nargs="+",
        metavar="N",
        help="decoder layers, 0-based: 0 1 or 0,1 (default: 1, or the first usable)",
    )
    add("--threshold", type=float, default=0.002, help="mean attention of a vision sink (default: 0.002)")
    add("--min-density", type=float, default=0.0, help="sinks per image token below which no head lends")
    add("--decode", default="off", choices=MODES, help="what steps after the prompt do (default: off)")
    add("--backend", default="auto", choices=BACKENDS)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-eah", action="store_true", help="the model as it is")
    which.add_argument("--compare", action="store_true", help="both answers, without EAH first")
    add("--trust-remote-code", action="store_true", help="let the model's folder bring its own code")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a model folder, or an id on the hub")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--image", metavar="FILE", help="the picture to look at")
    which.add_argument("--images", metavar="DIR", help="a folder of pictures: what they have in common")
    add("--prompt", required=True, type=utf8, metavar="TEXT")
    add("--out", required=True, metavar="DIR", help="where inspect.html, inspect.json and the pictures are written")
    add(
        "--layers",
        type=_layers_or_all,
        nargs="+",
        metavar="all|N",
        help="layers that get pictures of their own: all, or 0 1 2 (default: the first four)",
    )
    add("--threshold", type=float, default=0.002, help="mean attention of a vision sink (default: 0.002)")
    add("--compare", action="store_true", help="of --image: also answer without and with EAH, and show what changes")
    add("--max-new-tokens", type=count, metavar="N", help="of --compare (default: 128)")
    add("--limit", type=count, metavar="N", help="of --images: only the first N by name")
    add("--calibrate", action="store_true", help="of --images: at which layer and threshold the choice is well defined")
    add("--answers", metavar="DIR", help="of --images: the --out of eah eval run, density against hallucination")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--trust-remote-code", action="store_true", help="let the model's folder bring its own code")


def _models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown, as in docs/models.md")


def _vllm_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layers", type=_layers, nargs="+", metavar="N", help="decoder layers, 0-based: 0 1 or 0,1")
    add("--threshold", type=float, help="mean attention of a vision sink (default: 0.002)")
    add("--min-density", type=float, help="sinks per image token below which no head lends")
    add("--backend", help="of eah_kernels (default: auto)")
    add("--broadcast-to", type=_heads, metavar="N", help="how many heads take the map (default: all)")
    add("--decode", help="off or hold: what steps after the prompt do (default: off)")
    add("--video", action=argparse.BooleanOptionalAction, help="video tokens count as image tokens (default)")
    add("--default", help="on or off: for requests that do not say (default: on)")


def _layers(text: str) -> list[int]:
    """The numbers of one word: "1" or "0,1"."""
    numbers = text.replace(",", " ").split()
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"layers are numbers from 0 on, such as 1 or 0,1; got {text!r}")
    return [int(number) for number in numbers]


def _numbers(words: list[list[int]]) -> list[int]:
    """All of --layers."""
    return [number for word in words for number in word]


def _layers_or_all(text: str) -> list[int]:
    """[] for all."""
    return [] if text == "all" else _layers(text)


def _heads(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number of heads, or all; got {text!r}")
    return text if text == "all" else int(text)


def _load(command: str) -> ModuleType:
    import_module("eah_kernels")  # first: it holds back what torch says of a missing numpy
    return import_module(f"eah.cli.{command}")


def _demo(arguments) -> int:
    module = _load("demo")
    results = module.demo(arguments.image, arguments.out)
    print(json.dumps(results, indent=2)) if arguments.json else module.print_demo(results)
    return 0


def _generate(arguments) -> int:
    results = _load("generate").generate(
        arguments.model,
        arguments.image,
        arguments.prompt,
        answers=("without", "with") if arguments.compare else ("without",) if arguments.no_eah else ("with",),
        knobs=dict(
            threshold=arguments.threshold,
            min_density=arguments.min_density,
            decode=arguments.decode,
            backend=arguments.backend,
            **({"layers": tuple(_numbers(arguments.layers))} if arguments.layers else {}),
        ),
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        stream=not arguments.json,
    )
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 0


def _inspect(arguments) -> int:
    module = _load("look")
    if arguments.layers is not None:
        if [] in arguments.layers and len(arguments.layers) > 1:
            raise ValueError("--layers must be all, or numbers such as 0 1 2, not both")
        arguments.layers = _numbers(arguments.layers)
    one = arguments.image is not None
    for name in ("limit", "calibrate", "answers") if one else ("layers", "compare", "max_new_tokens"):
        if getattr(arguments, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is of {'--images' if one else '--image'}, which was not given")
    if arguments.max_new_tokens is not None and not arguments.compare:
        raise ValueError("--max-new-tokens is of --compare, which was not given")
    written = (module.inspect if one else module.inspect_many)(arguments)
    print(json.dumps(written, indent=2)) if arguments.json else module.print_inspect(written)
    return 0


def _models(arguments) -> int:
    if arguments.json:
        print(json.dumps([row._asdict() for row in family_table()], indent=2))
    else:
        print(models_table() if arguments.markdown else models_text())
    return 0


def _doctor(arguments) -> int:
    module = _load("doctor")
    findings = module.doctor()
    print(json.dumps(findings, indent=2)) if arguments.json else module.print_doctor(findings)
    return 0


def _vllm_args(arguments) -> int:
    import_module("eah_kernels")  # first: it holds back what torch says of a missing numpy
    settings = import_module("eah.vllm.settings")
    knobs = {name: getattr(arguments, name) for name in settings.KNOBS}
    if knobs["layers"]:
        knobs["layers"] = _numbers(knobs["layers"])
    engine = settings.engine_args(**knobs)
    print(json.dumps(engine, indent=2) if arguments.json else " ".join(settings.flags(engine)))
    return 0


COMMANDS = {
    "demo": (_demo, _demo_arguments, "EAH in a small LLaVA with random weights, on a real photograph, offline"),
    "generate": (_generate, _generate_arguments, "answer a prompt about a picture with your own model"),
    "inspect": (_inspect, _inspect_arguments, "pictures of the heads of your own model: a page on what EAH sees"),
    "models": (_models, _models_arguments, "the model families that are known"),
    "doctor": (_doctor, lambda parser: None, "versions, devices, what works here and why the rest does not"),
    "vllm-args": (_vllm_args, _vllm_arguments, "the flags of vllm serve that put EAH into vLLM"),
}
