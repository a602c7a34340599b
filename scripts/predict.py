"""Classify images with a run: `proxynorm predict`, proxynorm/commands/predict.py."""

from _checkout import run

if __name__ == "__main__":
    run("predict")
