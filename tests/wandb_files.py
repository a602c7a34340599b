"""Read W&B's offline files back: what a run would show once it is synchronized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # LevelDB's log format, in which W&B writes


def chunks(path: Path) -> Iterator[bytes]:
    """The records of a log: chunks of type full (1), or first (2), middle (3) and last (4)."""
    content, place, parts = path.read_bytes(), HEADER, []
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_offline(folder: Path) -> dict[str, Any]:
    """The one offline run below a folder: its name, group, job type, tags, and the keys of its
    configuration, history and summary.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes the file out when it ends
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, Any] = {"config": set(), "history": set(), "summary": set()}
    for chunk in chunks(path):
        record = Record.FromString(chunk)
        if record.WhichOneof("record_type") == "run":
            run = record.run
            found |= {"name": run.display_name, "group": run.run_group, "job": run.job_type}
            found["tags"] = list(run.tags)
            found["config"] |= {item.key for item in run.config.update}
        for kind, items in (("history", record.history.item), ("summary", record.summary.update)):
            found[kind] |= {item.key or item.nested_key[0] for item in items}
    return found
