#!/usr/bin/env bash
# Makes the environment if needed and runs the tests, in parallel on up to four cores. Arguments go to
# pytest: `-m quick` runs the unit tests alone, `-n 0` one test after another (as --pdb needs).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
cores=$(nproc 2>/dev/null || echo 1)
workers=$((cores > 4 ? 4 : cores > 1 ? cores : 0))
# One thread per process: small tensors gain nothing from more, and workers would compete for cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n "$workers" "$@"
