"""Weights & Biases, which mirrors metrics.jsonl. Its failures never stop a run."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

from proxynorm.analysis.power_monitor import from_metrics
from proxynorm.cli import check_fields
from proxynorm.files import write_text
from proxynorm.train.settings import LoggerSettings, Settings


def choose_mode(mode: str) -> str:
    """Resolve auto: WANDB_MODE if set, else online with a key, offline without.

    Raises ConfigError for an unknown mode.
    """
    check_fields(LoggerSettings(mode), "logger.")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "")
    if mode:
        return mode
    key: Any = os.environ.get("WANDB_API_KEY")
    with suppress(OSError, netrc.NetrcParseError):
        server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        key = key or netrc.netrc().authenticators(server or "")
    return "online" if key else "offline"


def start_run(mode: str, name: str, folder: Path, tags: Sequence[str], **options: Any) -> Any:
    """Start a W&B run that prints nothing and writes to `folder`; options: of wandb.init.

    Returns None if W&B is disabled, or, with a warning, if it fails.
    """
    if mode == "disabled":
        return None
    try:
        import wandb  # takes a second, and is optional

        return wandb.init(
            mode=mode,
            name=name,
            dir=folder,
            tags=[tag[:64] for tag in dict.fromkeys(tags)],  # W&B refuses longer tags
            settings=wandb.Settings(silent=True, console="off"),
            **options,
        )
    except Exception as error:  # W&B must not stop a run, whatever it raises
        reason = shorten(f"{type(error).__name__}: {error}", 240)
        print(f"warning: {name} is not on W&B: {reason}", file=sys.stderr)
        return None


class Tracker:
    """The W&B run of a run folder: one, however often training is resumed."""

    def __init__(
        self, settings: Settings, folder: Path, name: str, config: dict[str, Any], resumed: bool
    ) -> None:
        logger, identifier = settings.logger, folder / "wandb_id.txt"
        self.norm, mode = settings.norm.name, choose_mode(logger.mode)
        if mode != "disabled" and not (resumed and identifier.exists()):
            write_text(identifier, secrets.token_hex(4))
        given = {"norm": self.norm, "model": settings.model["name"], "batch": settings.batch}
        given["regularization"] = settings.regularization.name
        self.run = start_run(
            mode,
            name,
            folder,
            [*(f"{key}={value}" for key, value in given.items()), *(logger.tags or [])],
            project=logger.project,
            entity=logger.entity,
            group=logger.group,
            job_type="train",
            id=identifier.read_text() if mode != "disabled" else None,
            resume="allow",
            config=config,
        )
        if self.run is not None:
            self.run.define_metric("*", step_metric="step")

    def log(self, row: dict[str, Any]) -> None:
        """Log a row under names event/key; a power row becomes an image and two numbers."""
        if self.run is None:
            return
        metrics = {k: v for k, v in row.items() if k not in ("event", "step")}
        if row["event"] == "power":
            metrics = {"epoch": row["epoch"], **power_summary(row, self.norm)}
        named = {f"{row['event']}/{key}": value for key, value in metrics.items()}
        self.run.log({"step": row["step"], **named})

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish(exit_code=exit_code)


def power_summary(row: dict[str, Any], norm: str) -> dict[str, Any]:
    """Return P1 … P4 against depth as an image, and the mean and largest P1.

    A W&B panel for each term of each norm would bury the others.
    """
    import wandb

    from proxynorm.analysis.power_plots import power_figure
    from proxynorm.analysis.style import as_image, norm_label

    rows = from_metrics(row)
    figure = power_figure({f"{norm_label(norm)}, epoch {row['epoch']:g}": rows})
    p1 = [norm_row.p1 for norm_row in rows]
    image = wandb.Image(as_image(figure))
    return {"decomposition": image, "p1_mean": sum(p1) / len(p1), "p1_max": max(p1)}
