#!/usr/bin/env bash
# Makes the environment if needed, trains bn, ln and ln_pn on Fashion-MNIST, and prints and draws the comparison; the verdict is the last line.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
