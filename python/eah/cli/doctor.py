"""`eah doctor`: versions, devices, and what works here or why not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from torch.torch_version import TorchVersion

from eah.cli.messages import one_line
from eah.eval.words import why_no_nltk, why_no_spacy
from eah_kernels import BACKENDS, __version__, eah_attention, gluon_kernels, native_parts, untested_triton
from eah_kernels.testing import agrees

PACKAGES = ("torch", "triton", "numpy", "transformers", "pillow", "matplotlib", "nltk", "spacy")
OLDEST_TRANSFORMERS = "5.3"


def doctor() -> dict:
    """Versions of what EAH uses (None = not installed), which of them were not tested, and devices; why `eah.enable`,
    the word rules of `eah eval`, a part of the native extension, or a backend on a device, does not work, or None; the
    Gluon kernels of a device."""
    named = [name for name in BACKENDS if name != "auto"]
    versions: dict[str, str | None] = {"eah-kernels": __version__, "python": platform.python_version()}
    versions |= {name: installed(name) for name in PACKAGES}
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    no_enable = why_no_enable()
    return {
        "versions": versions,
        "untested": untested(no_enable is None),
        "enable": no_enable,
        "eval": {"nltk": why_no_nltk(), "spacy": why_no_spacy()},
        "native": native_parts(),
        "devices": devices,
        "gluon": {device: gluon_kernels(device) for device in devices},
        "backends": {device: {name: why_no_backend(name, device) for name in named} for device in devices},
    }


def print_doctor(findings: dict) -> None:
    for name, version in findings["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    for note in findings["untested"]:
        print(note)
    print(f"\neah.enable     {works(findings['enable'])}")
    print("\nword rules of eah eval")
    for part, problem in findings["eval"].items():
        print(f"  {part:12} {works(problem)}")
    print("\nnative extension")
    for part, problem in findings["native"].items():
        built = "built, not yet measured" if part == "cuda" else "built"
        print(f"  {part:12} {works(problem, built)}")
    for device, backends in findings["backends"].items():
        print(f"\nbackends on {device}: {findings['devices'][device]}")
        for name, problem in backends.items():
            print(f"  {name:12} {works(problem)}")
        if findings["gluon"][device]:
            kernels = ", ".join(findings["gluon"][device])
            print(f'  {"":12} backend="triton", by name: Gluon kernels ({kernels}), built, not measured')


def works(problem: str | None, yes: str = "works") -> str:
    return yes if problem is None else f"no: {problem}"


def untested(with_transformers: bool) -> list[str]:
    """What is to be said of versions beyond those that were tested."""
    notes = []
    try:
        notes.append(untested_triton())
    except Exception as error:  # a broken installation raises what it likes
        notes.append(f"triton cannot be imported: {one_line(error)}")
    if with_transformers:
        from eah.transformers.enable import untested_transformers

        notes.append(untested_transformers())
    return [note for note in notes if note]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_no_enable() -> str | None:
    """Why no model can be enabled here, or None."""
    wanted = f"transformers >= {OLDEST_TRANSFORMERS}"
    advice = f'pip install "transformers>={OLDEST_TRANSFORMERS}"'
    try:
        import transformers
        from transformers import PreTrainedModel  # noqa: F401  (imported lazily: it may fail where the package does not)
    except ModuleNotFoundError as missing:
        if missing.name == "transformers":
            return f"it needs {wanted}: {advice}"
        return f"transformers cannot be imported: {one_line(missing)}"
    except Exception as error:  # a broken installation raises what it likes
        return f"transformers cannot be imported: {one_line(error)}"
    if TorchVersion(transformers.__version__) < OLDEST_TRANSFORMERS:
        return f"it needs {wanted}, and {transformers.__version__} is installed: {advice}"
    return None


def why_no_backend(backend: str, device: str) -> str | None:
    """Why a backend cannot run a small layer on a device, or None."""
    half = backend == "native" and device != "cpu"  # the native CUDA kernels take no float32
    x = torch.randn(1, 2, 20, 64, device=device, dtype=torch.float16 if half else torch.float32)
    image_mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    try:
        result = eah_attention(x, x, x, image_mask, backend=backend)
        plain, exact = (eah_attention(t, t, t, image_mask, backend="reference") for t in (x, x.double()))
    except Exception as error:  # a driver or a compiler raises what it likes
        return why_not(error, backend)
    if not torch.equal(result.head, plain.head) or not agrees(result.output, exact.output, plain.output, x):
        return "it disagrees with the reference: please report this"
    return None


def why_not(error: Exception, backend: str) -> str:
    """What `eah_attention` says of a backend that cannot be used, where the backend is named already."""
    return one_line(error).removeprefix(f'backend="{backend}" cannot be used: ')
