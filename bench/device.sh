#!/usr/bin/env bash
# What a CUDA machine is asked for, in parts of at most eight minutes: bench/device.py says what each part is.
#     bash bench/device.sh PART FOLDER [--commit C]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:python PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS=2 # of each test worker; there is one a core
exec python3 -m bench.device "$@"
