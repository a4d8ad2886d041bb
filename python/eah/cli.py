"""The command line: `eah demo`, `eah generate`, `eah models`, `eah doctor`, `eah eval` (also `python -m eah`)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap

from eah.decode import MODES
from eah.demo import demo, print_demo
from eah.doctor import doctor, one_line, print_doctor
from eah.eval.command import add_eval
from eah.generate import generate
from eah.models import family_table
from eah_kernels import BACKENDS, __version__

INTERRUPTED = 130  # 128 + SIGINT, what shells expect


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the user's making end in one line on stderr."""
    status = 0
    try:
        try:
            status = _run(_parser().parse_args(argv))
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be told
    except BrokenPipeError:  # no error: the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again
    return status


def _run(arguments) -> int:
    command = f"eah {arguments.command}"
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {one_line(ValueError(message))} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eah", description="EAH (Enhancing Attention Heads) for vision-language models, as attention kernels."
    )
    parser.add_argument("--version", action="version", version=f"eah-kernels {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = commands.add_parser("demo", help="EAH in a small LLaVA with random weights, on a real photograph, offline")
    one.add_argument("--image", metavar="FILE", help="another picture than the one that matplotlib ships")
    one.set_defaults(run=_demo)

    two = commands.add_parser("generate", help="answer a prompt about a picture with your own model")
    two.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a model folder, or an id on the hub")
    two.add_argument("--image", required=True, metavar="FILE")
    two.add_argument("--prompt", required=True, metavar="TEXT")
    two.add_argument(
        "--layers",
        type=_layers,
        nargs="+",
        metavar="N",
        help="decoder layers, 0-based: 0 1 or 0,1 (default: 1, or the first usable)",
    )
    two.add_argument("--threshold", type=float, default=0.002, help="mean attention of a vision sink (default: 0.002)")
    two.add_argument("--min-density", type=float, default=0.0, help="sinks per image token below which no head lends")
    two.add_argument("--decode", default="off", choices=MODES, help="what steps after the prompt do (default: off)")
    two.add_argument("--backend", default="auto", choices=BACKENDS)
    two.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    two.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    which = two.add_mutually_exclusive_group()
    which.add_argument("--no-eah", action="store_true", help="the model as it is")
    which.add_argument("--compare", action="store_true", help="both answers, without EAH first")
    two.add_argument("--trust-remote-code", action="store_true", help="let the model's folder bring its own code")
    two.set_defaults(run=_generate)

    three = commands.add_parser("models", help="the model families that are known")
    three.add_argument("--markdown", action="store_true", help="print the table in Markdown, as in docs/models.md")
    three.set_defaults(run=_models)

    four = commands.add_parser("doctor", help="versions, devices, what works here and why the rest does not")
    four.set_defaults(run=_doctor)
    for command in (one, two, three, four, *add_eval(commands)):
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _layers(text: str) -> list[int]:
    """The numbers of one word: "1" or "0,1"."""
    numbers = text.replace(",", " ").split()
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"layers are numbers from 0 on, such as 1 or 0,1; got {text!r}")
    return [int(number) for number in numbers]


def _demo(arguments) -> int:
    results = demo(arguments.image)
    print(json.dumps(results, indent=2)) if arguments.json else print_demo(results)
    return 0


def _generate(arguments) -> int:
    results = generate(
        arguments.model,
        arguments.image,
        arguments.prompt,
        answers=("without", "with") if arguments.compare else ("without",) if arguments.no_eah else ("with",),
        knobs=dict(
            threshold=arguments.threshold,
            min_density=arguments.min_density,
            decode=arguments.decode,
            backend=arguments.backend,
            **({"layers": tuple(n for word in arguments.layers for n in word)} if arguments.layers else {}),
        ),
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        stream=not arguments.json,
    )
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 0


def _models(arguments) -> int:
    if arguments.json:
        print(json.dumps([row._asdict() for row in family_table()], indent=2))
    else:
        print(models_table() if arguments.markdown else models_text())
    return 0


MODELS_HEADER = ("family", "status", "first usable layer from 1 on", "notes")


def models_table() -> str:
    """The families as a Markdown table; docs/models.md holds the same text."""
    lines = [f"| {' | '.join(MODELS_HEADER)} |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in family_table())])


def models_text() -> str:
    """The families in aligned columns, the notes folded to the width of the terminal."""
    rows = [("family", "status", "layer", "notes"), *family_table()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
        folded = textwrap.wrap(row[3], max(30, room - len(start) - 2), break_on_hyphens=False) or [""]
        lines += [
            f"{start if number == 0 else ' ' * len(start)}  {part}".rstrip() for number, part in enumerate(folded)
        ]
    return "\n".join([*lines, "", "layer: the first usable one from 1 on, counted from 0"])


def _doctor(arguments) -> int:
    findings = doctor()
    print(json.dumps(findings, indent=2)) if arguments.json else print_doctor(findings)
    return 0
