"""The steps of slurm/train.sbatch besides training: python -m proxynorm.launch.job ACTION ARGUMENT…

stage FOLDER OVERRIDE… copies .beton files to a node's own disk. Jobs that come at the same time
wait for one copy; later ones find it. It stays when the job ends: remove FOLDER/proxynorm-UID when
it is no longer needed. Prints the override that points data.root at the copy, or nothing for data
that need not be staged.

requeue LIMIT OVERRIDE… decides whether a stopped run is queued again. Status 0: yes. Status 2, with
the reason in one line: the job was queued again LIMIT times without one weight update. The run
folder holds the restart at which its step was first seen.
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
    """Copy the .beton files of `root` below `node` once, checked; returns the copy's folder.

    Raises DataError if a file is missing or damaged, or there is no room.
    """
    names = [beside(root / part) for part in PARTS for beside in (Path, manifest_path, sums_path)]
    files = {path.absolute(): path.stat() for path in names if path.is_file()}
    # Other files, sizes or dates are other data, with a copy of its own.
    known = "".join(f"{path} {now.st_size} {now.st_mtime_ns}\n" for path, now in files.items())
    home = own_folder(node)
    target = home / hashlib.sha256(known.encode()).hexdigest()[:16]
    temporary = home / f".{target.name}"
    with locked(home / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for part in PARTS:
            read_beton(root / part)  # damage at the source shows before gigabytes are copied
        shutil.rmtree(temporary, ignore_errors=True)  # left by a job that was killed
        needed, free = sum(now.st_size for now in files.values()), shutil.disk_usage(home).free
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
                        f"{root / part}: {len(changed)} images are damaged, or were while they "
                        f"were copied to {home}"
                    )
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def own_folder(node: Path) -> Path:
    """The user's folder below `node`. Raises DataError if it cannot be written."""
    home = node / f"proxynorm-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"STAGE={node}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    # On a shared disk anyone could have made the folder, and put other data into it.
    if home.stat().st_uid != os.getuid():
        raise DataError(f"{home} belongs to another user; choose another folder for STAGE")
    return home


def stage(folder: str, *overrides: str) -> None:
    """Print the override for a copy of the run's data below `folder`."""
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
    """Raise ConfigError if the run of the overrides is not to be queued again."""
    folder = folder_of(settings_from(compose_config(overrides)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "requeues.json", folder / "summary.json"
    former, summary = (json.loads(p.read_text()) if p.is_file() else {} for p in paths)
    step, restart = summary.get("steps", 0), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    first = former.get("restart", 0) if former.get("step") == step else restart
    first = min(first, restart)  # another job starts anew
    write_json(paths[0], {"step": step, "restart": first})
    if restart - first >= int(limit):
        raise ConfigError(
            f"not queued again: {folder} stays at step {step}, {limit} times queued again; "
            "give it more time"
        )


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    guard(lambda: {"stage": stage, "requeue": requeue}[action](*arguments))
