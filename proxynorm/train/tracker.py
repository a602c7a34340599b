"""Weights & Biases mirrors metrics.jsonl. Its failures never stop a run."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

from proxynorm.errors import ConfigError
from proxynorm.files import write_text
from proxynorm.train.settings import CHOICES, Settings

MODES = CHOICES["logger.mode"]


def has_key() -> bool:
    """Return whether there is a W&B key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(mode: str) -> str:
    """Resolve auto: WANDB_MODE if set, else online with a key, offline without."""
    if mode not in MODES:
        raise ConfigError(f"logger.mode={mode}: valid: {', '.join(MODES)}")
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


class Tracker:
    """One W&B run for one run folder, however often it is resumed."""

    def __init__(
        self, settings: Settings, folder: Path, name: str, config: dict[str, Any], resumed: bool
    ) -> None:
        self.run = None
        mode = choose_mode(settings.logger.mode)
        if mode == "disabled":
            return
        import wandb  # takes a second, and is optional

        logger, identifier = settings.logger, folder / "wandb_id.txt"
        if not (resumed and identifier.exists()):
            write_text(identifier, secrets.token_hex(4))
        norm, model = settings.norm.name, str(settings.model["name"])
        numbers = [f"batch={settings.batch}", f"regularization={settings.regularization.name}"]
        tags = [norm, model, *numbers, *logger.tags]
        try:
            self.run = wandb.init(
                mode=mode,
                project=logger.project,
                entity=logger.entity,
                group=logger.group,
                name=name,
                id=identifier.read_text(),
                resume="allow",
                dir=folder,
                config=config,
                tags=[tag[:64] for tag in tags],  # W&B refuses longer ones
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.run.define_metric("*", step_metric="step")
        except Exception as error:
            self.run = None
            print(f"warning: W&B is off for this run: {shorten(str(error), 240)}", file=sys.stderr)

    def log(self, row: dict[str, Any]) -> None:
        """Mirror one row, with figures named event/key."""
        if self.run is not None:
            others = {k: v for k, v in row.items() if k not in ("event", "step")}
            figures = {f"{row['event']}/{key}": value for key, value in others.items()}
            self.run.log({"step": row["step"], **figures})

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish(exit_code=exit_code)
