"""Measure the power decomposition: `proxynorm power`, proxynorm/commands/power.py."""

from proxynorm.commands import run

if __name__ == "__main__":
    run("power")
