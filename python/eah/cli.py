"""The command line: `eah demo`, `eah generate`, `eah models`, `eah doctor` (also `python -m eah`)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys

import torch

from eah.decode import MODES
from eah.demo import demo, print_demo
from eah.generate import generate
from eah.models import family_table
from eah_kernels import __version__, eah_attention, native_parts

BACKENDS = ("reference", "torch", "native", "triton")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the user's making end in one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        print(f"eah {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eah", description="EAH (Enhancing Attention Heads) for vision-language models, as attention kernels."
    )
    parser.add_argument("--version", action="version", version=f"eah-kernels {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("demo", help="EAH in a small LLaVA with random weights, on a real photograph, offline")
    one.add_argument("--image", metavar="FILE", help="another picture than the one that matplotlib ships")
    one.add_argument("--json", action="store_true", help="print the results as JSON")
    one.set_defaults(run=_demo)

    two = commands.add_parser("generate", help="answer a prompt about a picture with your own model")
    two.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a model folder, or an id on the hub")
    two.add_argument("--image", required=True, metavar="FILE")
    two.add_argument("--prompt", required=True, metavar="TEXT")
    two.add_argument("--layers", type=int, nargs="+", help="decoder layers, 0-based (default: 1, or the first usable)")
    two.add_argument("--threshold", type=float, default=0.002, help="mean attention of a vision sink (default: 0.002)")
    two.add_argument("--min-density", type=float, default=0.0, help="sinks per image token below which no head lends")
    two.add_argument("--decode", default="off", choices=MODES, help="what steps after the prompt do (default: off)")
    two.add_argument("--backend", default="auto", choices=("auto", *BACKENDS))
    two.add_argument("--max-new-tokens", type=int, default=128)
    two.add_argument("--device", help="default: cuda where there is one, else cpu")
    which = two.add_mutually_exclusive_group()
    which.add_argument("--no-eah", action="store_true", help="the model as it is")
    which.add_argument("--compare", action="store_true", help="both answers, without EAH first")
    two.add_argument("--trust-remote-code", action="store_true", help="let the model's folder bring its own code")
    two.set_defaults(run=_generate)

    three = commands.add_parser("models", help="the model families that are known, as a Markdown table")
    three.set_defaults(run=_models)

    four = commands.add_parser("doctor", help="versions, devices, and which backends work here")
    four.add_argument("--json", action="store_true", help="print the findings as JSON")
    four.set_defaults(run=_doctor)
    return parser


def _demo(arguments) -> int:
    results = demo(arguments.image)
    print(json.dumps(results, indent=2)) if arguments.json else print_demo(results)
    return 0


def _generate(arguments) -> int:
    generate(
        arguments.model,
        arguments.image,
        arguments.prompt,
        answers=("plain", "eah") if arguments.compare else ("plain",) if arguments.no_eah else ("eah",),
        knobs=dict(
            threshold=arguments.threshold,
            min_density=arguments.min_density,
            decode=arguments.decode,
            backend=arguments.backend,
            **({"layers": tuple(arguments.layers)} if arguments.layers else {}),
        ),
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    return 0


def _models(arguments) -> int:
    print(models_table())
    return 0


def models_table() -> str:
    """The families as a Markdown table; README.md holds the same text."""
    lines = ["| family | status | first usable layer from 1 on | notes |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in family_table())])


def _doctor(arguments) -> int:
    findings = doctor()
    if arguments.json:
        print(json.dumps(findings, indent=2))
        return 0
    for name, version in findings["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    print("\nnative extension")
    for part, problem in findings["native"].items():
        built = "built, not yet measured" if part == "cuda" else "built"
        print(f"  {part:10} {built if problem is None else 'no: ' + problem}")
    for device, backends in findings["backends"].items():
        print(f"\n{device}: {findings['devices'][device]}")
        for name, problem in backends.items():
            print(f"  {name:10} {'works' if problem is None else 'no: ' + problem}")
    return 0


def doctor() -> dict:
    """Versions of what EAH uses (None = not installed); devices; why a part of the native extension, or a backend on a
    device, does not work, or None."""
    versions = {"eah-kernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "pillow", "matplotlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    backends = {device: {name: _problem(name, device) for name in BACKENDS} for device in devices}
    return {"versions": versions, "native": native_parts(), "devices": devices, "backends": backends}


def _problem(backend: str, device: str) -> str | None:
    """Why a backend cannot run a small layer on a device, or None."""
    half = backend == "native" and device != "cpu"  # the native CUDA kernels take no float32
    x = torch.randn(1, 2, 20, 64, device=device, dtype=torch.float16 if half else torch.float32)
    image_mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    try:
        result = eah_attention(x, x, x, image_mask, backend=backend)
        expected = eah_attention(x, x, x, image_mask, backend="reference")
    except Exception as error:
        return f"{error}"
    tolerance = 1e-2 if half else 1e-3
    if not torch.equal(result.head, expected.head) or (result.output - expected.output).abs().max() > tolerance:
        return "it disagrees with the reference: please report this"
    return None
