"""What a result file says of the machine, the libraries and the code it was measured with, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CPU_FIELDS = ("cpu family", "model", "stepping", "cache size")  # of /proc/cpuinfo


class Results:
    """A result file: its head and the rows so far; `add` leaves a whole file behind, the one before or the new."""

    def __init__(self, file: Path, device: str, commit: str | None = None, **more):
        self.file, self.head, self.rows = Path(file), {**describe(device, commit), **more, "left_out": {}}, []
        self.failed = False  # something was left out, and not for lack of time
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.add([])

    def leave_out(self, what: str, why: str, failed: bool = True) -> None:
        self.head["left_out"][what] = why
        self.failed |= failed
        self.add([])

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        unfinished = self.file.with_name(f".{self.file.name}.unfinished")
        unfinished.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
        os.replace(unfinished, self.file)


def said(*command: str) -> str | None:
    """What a command printed; None where it is not there or failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_here() -> str | None:
    """git's, with "+" for uncommitted changes to what is measured or measures; None without git."""
    commit = said("git", "rev-parse", "HEAD")
    changed = said("git", "status", "--porcelain", "--untracked-files=no", "--", "eah_kernels", "python", "bench/*.py")
    return commit and commit + ("+" if changed else "")


def cpu_info() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_info().get('model name', platform.machine())}, {torch.get_num_threads()} threads"


def identity(device: str) -> dict:
    """What tells this machine from another one whose device has the same name."""
    info = cpu_info()
    found: dict = {name: info[name] for name in CPU_FIELDS if name in info}
    found["cpus"] = os.cpu_count()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = [properties.name, properties.multi_processor_count, properties.total_memory]
    else:
        found["flags"] = len(info.get("flags", "").split())
    return found


def command_line() -> str:
    """What was run, as one would type it in the repository's root."""
    script, *given = sys.argv
    program = ["-m", f"bench.{Path(script).stem}"] if Path(script).parent == ROOT / "bench" else [script]
    here = f"{ROOT}{os.sep}"
    return shlex.join(["python", *program, *(argument.removeprefix(here) for argument in given)])


def describe(device: str, commit: str | None = None) -> dict:
    """Device, machine, driver, library versions, commit (left out where nobody knows it), command and date."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    driver = None
    if device == "cuda":
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["cuda"] = torch.version.cuda
    commit = commit or commit_here()
    return {
        "device": device_name(device),
        "machine": identity(device),
        "driver": driver,
        "versions": versions,
        **({"commit": commit} if commit else {}),
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
