"""The steps of slurm/train.sbatch besides training: python -m proxynorm.launch.job ACTION ARGUMENT…

stage FOLDER OVERRIDE… copies .beton files to a node's own disk and prints the override that points
data.root at the copy. For data that need no staging it prints nothing. All jobs on a node share one
copy, which stays when they end: remove FOLDER/proxynorm-UID when it is no longer needed.

requeue LIMIT OVERRIDE… decides whether a stopped run is queued again. Exit status 0 means yes.
Exit status 2, with a line that says why, means no: the job was requeued LIMIT times without a
weight update. requeues.json in the run folder records the restart at which the run reached its
step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from proxynorm.cli import guard
from proxynorm.data.ffcv.beton import changed_images, manifest_path, read_beton, sums_path
from proxynorm.errors import ConfigError, DataError
from proxynorm.files import locked, write_json
from proxynorm.train.arguments import quoted
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import folder_of

PARTS = ("train.beton", "val.beton")


def copy_data(root: Path, node: Path) -> Path:
    """Copy the .beton files of `root` below `node` unless they are there; return the copy's folder.

    The copy is verified. Raises DataError if a file is missing or damaged, or the disk is too full.
    """
    paths = [path_of(root / part) for part in PARTS for path_of in (Path, manifest_path, sums_path)]
    files = {path.absolute(): path.stat() for path in paths if path.is_file()}
    # Another path, size or date means other data, which gets its own copy.
    stamp = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in files.items())
    home = own_folder(node)
    target = home / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    temporary = home / f".{target.name}"
    with locked(home / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for part in PARTS:
            read_beton(root / part)  # finds damage before gigabytes are copied
        shutil.rmtree(temporary, ignore_errors=True)  # left by a job that was killed
        needed, free = sum(stat.st_size for stat in files.values()), shutil.disk_usage(home).free
        if free < 1.05 * needed:
            raise DataError(
                f"{home}: {free / 1e9:.2f} GB free, the .beton files take {needed / 1e9:.2f} GB; "
                "choose another STAGE, or none"
            )
        temporary.mkdir()
        try:
            for path in files:
                shutil.copyfile(path, temporary / path.name)
            for part in PARTS:
                if changed := changed_images(read_beton(temporary / part)):
                    raise DataError(
                        f"{root / part}: {len(changed)} images are damaged, or were damaged when "
                        f"copied to {home}"
                    )
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def own_folder(node: Path) -> Path:
    """Make and return the user's folder below `node`. Raises DataError if that fails."""
    home = node / f"proxynorm-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"STAGE={node}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    # On a shared disk, another user may have made the folder and put other data into it.
    if home.stat().st_uid != os.getuid():
        raise DataError(f"{home} belongs to another user; choose another folder for STAGE")
    return home


def stage(folder: str, *overrides: str) -> None:
    """Copy the data of a run below `folder` and print the override that points to the copy."""
    data = settings_from(compose_config(overrides)).data
    if data.name == "fashion_mnist":
        print("staging: Fashion-MNIST is small; nothing is copied", file=sys.stderr)
        return
    if data.name != "beton":
        raise DataError(
            f"STAGE copies .beton files, not data={data.name}: make them with scripts/write_ffcv.py"
        )
    copy = copy_data(Path(data.root).expanduser(), Path(os.path.expandvars(folder)))
    print(f"data.root={quoted(str(copy))}")


def requeue(limit: str, *overrides: str) -> None:
    """Raise ConfigError unless the run with these overrides should be queued again."""
    folder = folder_of(settings_from(compose_config(overrides)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "requeues.json", folder / "summary.json"
    last, summary = (json.loads(p.read_text()) if p.is_file() else {} for p in paths)
    step, restart = summary.get("steps", 0), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    first = last.get("restart", 0) if last.get("step") == step else restart
    first = min(first, restart)  # the count of a new job starts at 0
    write_json(paths[0], {"step": step, "restart": first})
    if restart - first >= int(limit):
        raise ConfigError(
            f"not queued again: {folder} is still at step {step} after {limit} requeues; "
            "give it more time"
        )


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    guard(lambda: {"stage": stage, "requeue": requeue}[action](*arguments))
