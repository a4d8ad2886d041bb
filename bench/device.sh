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
python3 bench/attention.py "$@"
python3 bench/model.py --rounds 3 "$@"
python3 bench/report.py
