"""The measurements of scripts/benchmark.py and scripts/gpu_check.py."""

import os

# Otherwise torch.profiler logs its own steps, and a missing GPU as an error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
