#!/usr/bin/env bash
# All that a CUDA machine is asked for, in one command: the GPU tests, the attention table, the whole models.
# Writes to $OUT, or bench/results/<device>; the essential tables are printed last. --dry-run: small, on any machine.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:python PYTHONUNBUFFERED=1
log=${OUT:+$OUT/tests.log}
if [ "${1:-}" = --dry-run ]; then
    python3 -m pytest -m gpu
    python3 bench/attention.py --dry-run
    exit
fi
python3 -m pytest -m gpu 2>&1 | tee "${log:-/dev/null}"
# The native CUDA kernels under compute-sanitizer, where both are there: memory errors, then races in shared memory.
if python3 -c "import sys, eah_kernels; sys.exit(eah_kernels.native_parts()['cuda'] is not None)" &&
    command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python3 -m pytest -m gpu tests/test_gpu_native.py \
            -k "q_len=113 or q_len=3 or kv_len=300" 2>&1 | tee -a "${log:-/dev/null}"
    done
fi
python3 bench/attention.py "$@"
python3 bench/model.py --rounds 3 "$@"
python3 bench/report.py
