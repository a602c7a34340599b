"""A tiny table, runs written by hand, and a stand-in for train.py that ends as it is told."""

import json
import sys
from functools import lru_cache

from omegaconf import OmegaConf

from proxynorm.train.config import compose_config

TINY = """
title: Tiny
about: A table for tests.
train: [data=fashion_mnist, model=resnet20v2, model.depth=8, model.width=8, batch=64, epochs=1,
        data.limit=256, data.holdout=200, log_every=1,
        loader=torchvision, loader.workers=0, logger=none]
cells:
  - norm: [bn, ln_pn]
rows: [norm]
seeds: 2
minutes: 0.1
hardware: one CPU core
comparisons:
  - {first: ln_pn, second: bn, expect: equal, claim: LN+PN matches BN}
"""

SEARCH = """
title: Search
about: A search of the learning rate, with one more point for LN.
train: [data=fashion_mnist, model=resnet20v2, data.holdout=10000]
cells:
  - norm: [bn, ln]
    optim.base_lr: [0.025, 0.05, 0.1, 0.2, 0.4, 0.8]
  - norm: [ln]
    optim.base_lr: [1.6]
rows: [norm]
columns: [optim.base_lr]
seeds: 1
minutes: 3
hardware: one CPU core
search: {axes: [optim.base_lr], by: norm}
"""

STAND_IN = """
import json, os, socket, sys, time
from pathlib import Path
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(values["runs_dir"].strip("'")) / values["name"].strip("'")
folder.mkdir(parents=True, exist_ok=True)
(folder / ".lock").write_text(f"{socket.gethostname()} pid {os.getpid()}")
with open(folder / "started", "a") as stream:
    stream.write("x")
plan = json.loads((folder.parents[1] / "plan.json").read_text()).get(folder.name, {})
time.sleep(plan.get("seconds", 0))
print(plan.get("says", "trained"), flush=True)
if "signal" in plan:
    os.kill(os.getpid(), plan["signal"])
if plan.get("status", 0) == 0:
    for file in (folder.parents[1] / "finished" / folder.name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
sys.exit(plan.get("status", 0))
"""


def write_run(run, top1, epochs=1, power=None):
    """A finished run's folder, as train.py would leave it."""
    run.folder.mkdir(parents=True)
    rows = [
        {
            "event": "train",
            "step": step,
            "epoch": step / 4,
            "images": 64 * step,
            "loss": 2.3 - 0.1 * step,
            "images_per_second": 100.0,
            "eta_seconds": (4 * epochs - step) * 64 / 100,
        }
        for step in range(1, 5)
    ]
    rows += [{"event": "power", "step": 4, "epoch": 1, "images": 256, **power}] if power else []
    rows.append(
        {"event": "eval", "step": 4, "epoch": 1.0, "images": 256, "top1": top1, "loss": 1.9}
    )
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(run.cell.overrides, epochs).replace(
        "\nseed: 0\n", f"\nseed: {run.seed}\n"
    )
    (run.folder / "config.yaml").write_text(config)
    environment = {
        "python": "3.11.0",
        "packages": {"torch": "2.14"},
        "processor": "CPU",
        "cores": 2,
        "threads": 1,
        "gpus": [],
        "git": {"commit": "0123456789abcdef", "dirty": False},
    }
    (run.folder / "environment.json").write_text(json.dumps(environment))
    summary = {
        "completed": True,
        "steps": 4,
        "total_steps": 4,
        "loss": 1.9,
        "top1": top1,
        "train_seconds": 36.0,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))


@lru_cache
def configuration(overrides, epochs):
    """config.yaml of a run with these overrides."""
    return OmegaConf.to_yaml(compose_config([*overrides, f"epochs={epochs}"]), resolve=True)


def reproduce(*arguments):
    """The command line of scripts/reproduce.py."""
    return [sys.executable, "scripts/reproduce.py", *map(str, arguments)]
