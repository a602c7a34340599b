"""Run a benchmark: python scripts/benchmark.py NAME [key=value …]

Example: python scripts/benchmark.py loader source=DIR json=FILE
`benchmark.py NAME --help` lists the options of a benchmark.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from proxynorm.cli import help_entry, nearest, script
from proxynorm.errors import ConfigError

# The repository, if this is a checkout: a wheel does not contain benchmarks/.
ROOT = Path(__file__).resolve().parents[2]
# Each is a module of benchmarks/ with a dataclass Options and a function main(options).
BENCHMARKS = {
    "step": "time of training and inference steps of every norm, share of the proxy moments",
    "passes": "where LN+PN's time goes: the operators of a step, beside those with torch's LN",
    "memory": "bytes kept for the backward pass by every norm, beside torch's batch norm",
    "traffic": "bytes of feature map that a compiled step moves on a GPU, on any machine",
    "loader": "images a second of our loaders, FFCV's, torchvision's and timm's on the same JPEGs",
    "engine": "our training loop against a bare one, its loader alone, and timm's parts",
    "startup": "seconds from the command to the first weight update, with a warm cache",
    "storage": "size against speed of .beton files, by longest side and JPEG quality",
}


def entry() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        rows = "".join(help_entry(key, text, 11) for key, text in BENCHMARKS.items())
        print(f"{__doc__.strip()}\n\nBenchmarks:\n{rows}", end="")
        return
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark '{name}'; {nearest(name, BENCHMARKS)}")
    del sys.argv[1]
    if not (ROOT / "benchmarks").is_dir():
        raise ConfigError("benchmarks are in the repository: git clone it and run there")
    sys.path.insert(0, str(ROOT))
    module = import_module(f"benchmarks.{name}")

    def run(options: Any) -> int | None:
        if options.json:  # if the folder cannot be made, fail before measuring
            Path(options.json).absolute().parent.mkdir(parents=True, exist_ok=True)
        return module.main(options)

    script(module.Options, run, module.__doc__)
