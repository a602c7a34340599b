"""Measure speed and memory: `proxynorm benchmark`, proxynorm/commands/benchmark.py."""

from _checkout import run

if __name__ == "__main__":
    run("benchmark")
