"""Measure: python scripts/benchmark.py loader [source=DIR] [json=FILE]

The first word names the benchmark, key=value arguments follow; `python scripts/benchmark.py NAME --help` lists them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from proxynorm.cli import fail, nearest, script
from proxynorm.errors import ConfigError

# Each is a module of benchmarks with a dataclass Options and a function main(options).
BENCHMARKS = {
    "step": "training and inference steps of every norm, in turns: time, bytes kept for backward, share of the moments",
    "passes": "where LN+PN's time goes: its layers and its extra passes over the map, alone, against torch's LN",
    "memory": "bytes kept for the backward pass by every norm, beside BN + activation",
    "loader": "images a second of the loaders on the same JPEGs, against FFCV's, torchvision's and timm's",
    "engine": "our training loop against a bare one, against its loader, and against timm's loader, model and optimizer",
    "startup": "seconds from the command to the first weight update, with a warm cache",
    "storage": "size against speed of .beton files, by longest side and JPEG quality",
    "damage": "preparation of images with planted damage: every bad one named, no good one",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, BENCHMARKS))
        rows = "\n".join(f"  {key:<{width}}  {text}" for key, text in BENCHMARKS.items())
        print(f"{__doc__.strip()}\n\nBenchmarks:\n{rows}")
        return
    if name not in BENCHMARKS:
        fail(ConfigError(f"no benchmark '{name}'; {nearest(name, BENCHMARKS)}"))
    del sys.argv[1]
    module = import_module(f"benchmarks.{name}")
    script(module.Options, lambda options: measure(module, options), module.__doc__)


def measure(module: ModuleType, options: Any) -> int | None:
    """Run the benchmark, the folder of its file made before it begins. Raises ConfigError if that cannot be."""
    if options.json is not None:
        folder = Path(options.json).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"json={options.json}: cannot make {folder}: {error.strerror}"
            ) from None
    return module.main(options)


if __name__ == "__main__":
    main()
