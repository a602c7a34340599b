"""Export a run's model: `proxynorm export`, proxynorm/commands/export.py."""

from _checkout import run

if __name__ == "__main__":
    run("export")
