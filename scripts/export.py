"""Export a run's model: `proxynorm export`, proxynorm/commands/export.py."""

from proxynorm.commands import run

if __name__ == "__main__":
    run("export")
