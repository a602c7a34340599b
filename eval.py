"""Evaluate a trained run: python eval.py run=runs/NAME."""

from proxynorm.commands import run

if __name__ == "__main__":
    run("eval")
