"""What a result file says of the machine, the libraries and the code it was measured with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def describe(device: str, commit: str | None = None) -> dict:
    """Device, driver, library versions, commit (with "+" for uncommitted changes), command and date."""

    def run(*command):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    driver = None
    if device == "cuda":
        driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["cuda"] = torch.version.cuda
    if commit is None:
        changed = run("git", "status", "--porcelain", "--untracked-files=no", "--", "eah_kernels", "bench/*.py")
        commit = f"{run('git', 'rev-parse', 'HEAD')}{'+' if changed else ''}"
    return {
        "device": device_name(device),
        "driver": driver,
        "versions": versions,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def results_folder(device: str) -> Path:
    """$OUT, or bench/results/<device>; made if missing."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else ROOT / "bench/results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder
