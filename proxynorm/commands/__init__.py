"""The commands of `proxynorm NAME`; train.py, eval.py and scripts/*.py run the same code.

Each is a module of this package. It has either a dataclass Options and a function main(options), or
a function entry() that reads sys.argv itself. Both may return an exit status.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

COMMANDS = {
    "train": "train a network, resume a run, sweep",
    "eval": "evaluate a run or a checkpoint",
    "predict": "write the likeliest classes of images to a CSV",
    "export": "write a run's model as safetensors, ONNX and a model card",
    "doctor": "check what is installed and what an experiment needs",
    "reproduce": "plan, launch and report the paper's tables",
    "power": "power decomposition of random nets or of a run",
    "benchmark": "measure speed and memory (in a checkout)",
    "write-ffcv": "write labelled images to a .beton file",
    "demo": "train bn, ln and ln_pn on Fashion-MNIST and compare them",
}


def main() -> None:
    """Run the command that the first argument names: the console script `proxynorm`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"proxynorm {name}"]
        return run(name)
    rows = [f"  {key:<12}{text}" for key, text in COMMANDS.items()]
    usage = ["usage: proxynorm COMMAND [key=value …]", "", *rows, "", "Each takes --help."]
    if name in ("-h", "--help"):
        return print(*usage, sep="\n")
    _fail(f"no command '{name}'; valid: {', '.join(COMMANDS)}")


def run(name: str) -> None:
    """Run a command with the arguments in sys.argv[1:]."""
    if name == "train":
        from proxynorm.train.preemption import exit_on_signals

        exit_on_signals()  # before the imports, which take seconds
    try:
        module = import_module(f"proxynorm.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        # Without the extra [train], only the layer's dependencies are installed.
        if error.name is None or error.name.partition(".")[0] == "proxynorm":
            raise
        # In a checkout, the environment is probably not active.
        remedy = "source .venv/bin/activate, or install proxynorm's extra [train]"
        _fail(f"{name} needs {error.name}, which {sys.executable} lacks: {remedy}")
    from proxynorm.cli import guard, script

    if hasattr(module, "entry"):
        guard(module.entry)
    script(module.Options, module.main, module.__doc__)


def _fail(message: str) -> NoReturn:
    """Exit as proxynorm.cli.fail does, which cannot be imported without OmegaConf."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
