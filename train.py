"""Train a network: python train.py norm=ln_pn batch=32. `--help` lists the configuration."""

from proxynorm.commands import run

if __name__ == "__main__":
    run("train")
