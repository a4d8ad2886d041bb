"""Build the native extension in place, unless its CUDA part is there already; exits 1 if that still cannot be used."""

from __future__ import annotations

import subprocess
import sys

from .machine import ROOT

CUDA_PART = "import eah_kernels; print(eah_kernels.native_parts()['cuda'] or '')"


def missing() -> str:
    """Why the CUDA part cannot be used, asked of a new process; "" if it can."""
    done = subprocess.run([sys.executable, "-c", CUDA_PART], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def main() -> int:
    if not missing():
        print("the CUDA part is there already")
        return 0
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT)
    why = missing()
    print(f"eah_kernels._cuda: {why or 'built'}")
    return int(bool(why))


if __name__ == "__main__":
    sys.exit(main())
