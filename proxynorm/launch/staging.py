"""Copy .beton files to a node's own disk: python -m proxynorm.launch.staging FOLDER OVERRIDE…

Jobs that come at the same time wait for one copy; later ones find it. It stays when the job ends:
remove FOLDER/proxynorm-UID when it is no longer needed. Prints the override that points data.root
at the copy, or nothing for data that need not be staged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from proxynorm.cli import guard
from proxynorm.data.ffcv.beton import changed_images, manifest_path, read_beton, sums_path
from proxynorm.errors import DataError
from proxynorm.files import locked
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.words import quoted

PARTS = ("train.beton", "val.beton")


def stage(root: Path, node: Path) -> Path:
    """Copy the .beton files of `root` below `node` once, checked; returns the copy's folder.

    Raises DataError if a file is missing or damaged, or there is no room.
    """
    files, home = beton_files(root), own_folder(node)
    target = home / digest(files)
    with locked(home / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for part in PARTS:
            read_beton(root / part)  # damage at the source shows before gigabytes are copied
        temporary = home / f".{target.name}"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a job that was killed
        needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(home).free
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
                check_copy(root / part, temporary / part)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def beton_files(root: Path) -> list[Path]:
    """The .beton files in `root` and their companions. Raises DataError if a .beton is missing."""
    betons = [root / part for part in PARTS]
    for path in betons:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; STAGE copies .beton files, made by scripts/write_ffcv.py"
            )
    companions = [beside(path) for path in betons for beside in (manifest_path, sums_path)]
    return [*betons, *(path for path in companions if path.is_file())]


def digest(files: Sequence[Path]) -> str:
    """A name for the data: of the files' names, sizes and dates."""
    state = hashlib.sha256()
    for path in files:
        known = path.stat()
        state.update(f"{path.absolute()} {known.st_size} {known.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


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


def check_copy(source: Path, copy: Path) -> None:
    """Raises DataError unless the copy matches its checksums, which FFCV's own files lack."""
    samples = read_beton(copy)
    if samples.manifest and (damaged := changed_images(samples)):
        raise DataError(
            f"{source}: {len(damaged)} of {len(samples)} images are damaged, "
            f"or were while they were copied to {copy.parent}"
        )


def main(arguments: Sequence[str]) -> int:
    folder, *overrides = arguments
    data = settings_from(compose_config(overrides)).data
    if data.name == "fashion_mnist":
        print("staging: Fashion-MNIST is small; nothing is copied", file=sys.stderr)
        return 0
    if data.name != "beton":
        raise DataError(
            f"STAGE copies .beton files, not data={data.name}: make them with scripts/write_ffcv.py"
        )
    copy = stage(Path(data.root).expanduser(), Path(os.path.expandvars(folder)))
    print(f"data.root={quoted(str(copy))}")
    return 0


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
