"""Measure the power decomposition: `proxynorm power`, proxynorm/commands/power.py."""

from _checkout import run

if __name__ == "__main__":
    run("power")
