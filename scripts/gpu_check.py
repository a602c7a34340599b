"""Check and measure one GPU: benchmarks/gpu_check.py, which needs torch alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
