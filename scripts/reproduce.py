"""Reproduce the paper's tables: `proxynorm reproduce`, proxynorm/commands/reproduce.py."""

from _checkout import run

if __name__ == "__main__":
    run("reproduce")
